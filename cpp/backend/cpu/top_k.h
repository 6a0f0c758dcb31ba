// Choosing the few best of a few hundred or thousand scores: experts of a row, clusters of a head.
#pragma once

#include <cstdint>

namespace draftwerk::cpu {

/// chosen[0 .. k) = the indices of the k largest of scores[0 .. count), ascending; of equal scores the lower index is
/// taken first, and NaN counts as minus infinity. 0 < k <= count.
void choose_largest(const float* scores, int count, int k, std::int32_t* chosen);

}  // namespace draftwerk::cpu
