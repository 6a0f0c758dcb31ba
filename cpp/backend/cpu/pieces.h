// How much work a piece is (WorkerPool::parallel_for). Handing one out costs some tens of nanoseconds, forking and
// joining about a microsecond.
#pragma once

#include <algorithm>
#include <cstdint>

namespace draftwerk::cpu {

/// How many of what reads `bytes_each` bytes of weights: a thread streams about 12 bytes per nanosecond from memory.
inline std::int64_t grain_of_bytes(std::int64_t bytes_each) {
  constexpr std::int64_t kBytesPerPiece = 16 * 1024;
  return std::max<std::int64_t>(kBytesPerPiece / bytes_each, 1);
}

/// How many rows of a cheap operation on `columns` elements each: it takes about a microsecond for 2048.
inline std::int64_t grain_of_rows(std::int64_t columns) {
  constexpr std::int64_t kElementsPerPiece = 2048;
  return std::max<std::int64_t>(kElementsPerPiece / columns, 1);
}

}  // namespace draftwerk::cpu
