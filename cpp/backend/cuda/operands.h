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
inline constexpr int kOperandRowBytes = 64;  ///< of a row in a block of 32 columns: four pieces of 8 columns
inline constexpr int kOperandPieceBytes = 16;

/// Rows rounded to bfloat16: [tile of 8 rows][block of 32 columns][row][piece of 8 columns], 512 bytes a block. Piece p
/// of row r lies where p ^ (r / 2 % 4) would: the eight rows of a piece are in different banks of shared memory, and
/// wgmma knows the order as its swizzle of 64 bytes. Absent columns are zero, absent rows anything.
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
