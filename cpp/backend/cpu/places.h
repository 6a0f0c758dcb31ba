// Where several panels of a matrix that are multiplied together are read.
#pragma once

#include <cstddef>

namespace draftwerk::cpu {

/// The same place in each of some panels, which lie `apart` bytes from one another.
struct Place {
  const std::byte* at;  ///< in the first of them
  std::size_t apart;

  [[nodiscard, gnu::always_inline]] const std::byte* in(int panel) const {
    return at + static_cast<std::size_t>(panel) * apart;
  }
  [[nodiscard, gnu::always_inline]] Place operator+(std::size_t bytes) const { return {at + bytes, apart}; }
  [[gnu::always_inline]] void operator+=(std::size_t bytes) { at += bytes; }
};

}  // namespace draftwerk::cpu
