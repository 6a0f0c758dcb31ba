// Sizes in whole units.
#pragma once

#include <type_traits>

namespace draftwerk {

/// The least multiple of `multiple` that is not below `value`; both are not negative.
template <typename Integer>
constexpr Integer round_up(Integer value, std::type_identity_t<Integer> multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace draftwerk
