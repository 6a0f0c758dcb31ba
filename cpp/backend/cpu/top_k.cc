#include "backend/cpu/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace draftwerk::cpu {

// Insertion into a sorted list: of n scores in random order about k ln(n / k) get that far, 133 for 32 of 2,048.
void choose_largest(const float* scores, int count, int k, std::int32_t* chosen) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const auto score = [scores](std::int32_t i) { return std::isnan(scores[i]) ? kMinusInfinity : scores[i]; };
  int kept = 0;
  float least = kMinusInfinity;  // of a full list
  for (std::int32_t i = 0; i < count; ++i) {
    const bool full = kept == k;
    if (full && !(scores[i] > least)) continue;
    const float mine = score(i);
    int at = full ? k - 1 : kept++;
    for (; at > 0 && mine > score(chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
    chosen[at] = i;
    least = score(chosen[kept - 1]);
  }
  std::sort(chosen, chosen + k);
}

}  // namespace draftwerk::cpu
