// Rows as tensor cores multiply them with weights: normalised, rounded to bfloat16 and put in order, once for all
// weights that meet them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/weight_layout.h"

namespace draftwerk::cuda {

inline constexpr int kOperandRows = 8;       ///< of a B operand
inline constexpr int kOperandRowBytes = 64;  ///< of a row in a block of 32 columns: the registers of its four lanes

/// Rows rounded to bfloat16 in the order of the B operand of mma.m16n8k16: [tile of 8 rows][block of 32 columns][lane]
/// of 16 bytes, which are the registers of two steps of 16 columns. Absent columns are zero, absent rows anything.
struct OperandView {
  const std::byte* data;
  std::int64_t tile_bytes;  ///< of 8 rows
};
/// Where a kernel leaves what it computes, rows of a whole number of blocks of 64 columns, as operands of the product
/// that follows.
struct OperandSink {
  std::byte* data;          ///< null: nowhere
  std::int64_t tile_bytes;  ///< of 8 rows
};
/// Bytes of operands of so many rows and columns.
[[nodiscard]] std::size_t operand_bytes(int rows, int columns);

/// Rounds rows to operands: norm(input), or input where there is no norm.
void record_operands(LaunchList& launches, int rows, Tensor input, const Norm* norm, std::byte* operands);

}  // namespace draftwerk::cuda
