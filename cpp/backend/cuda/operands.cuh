// Operands of products (operands.h), as kernels write them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device.cuh"
#include "backend/cuda/operands.h"

namespace draftwerk::cuda {

/// Where operands have a row.
__device__ __forceinline__ std::byte* operand_row(const OperandSink& sink, int row) {
  return sink.data + row / kOperandRows * sink.tile_bytes + row % kOperandRows * kOperandRowBytes;
}

__device__ __forceinline__ std::uint32_t rounded_pair(float first, float second) {
  return float_to_bf16(first) | static_cast<std::uint32_t>(float_to_bf16(second)) << 16;
}

/// Where a piece of a row is among the four of its block, in bytes; and what has to be added without carry (^) to find
/// it elsewhere than in row 0.
__device__ __forceinline__ int operand_turn(int row) { return row / 2 % 4 * kOperandPieceBytes; }
__device__ __forceinline__ int operand_piece(int row, int piece) {
  return (piece * kOperandPieceBytes) ^ operand_turn(row);
}

/// The place of a column in what operand_row() gives.
__device__ __forceinline__ std::int64_t operand_place(int row, int column) {
  const int within = column % kBlockColumns;
  return static_cast<std::int64_t>(column / kBlockColumns) * kFragmentBytes + operand_piece(row, within / 8) +
         within % 8 * 2;
}

/// Leaves the value of a column,
__device__ __forceinline__ void leave(const OperandSink& sink, int row, int column, float value) {
  *reinterpret_cast<std::uint16_t*>(operand_row(sink, row) + operand_place(row, column)) = float_to_bf16(value);
}
/// and those of an even column and the next.
__device__ __forceinline__ void leave_pair(const OperandSink& sink, int row, int column, float first, float second) {
  *reinterpret_cast<std::uint32_t*>(operand_row(sink, row) + operand_place(row, column)) = rounded_pair(first, second);
}

/// Leaves a whole row, whose value in a column is value(column), zeros where there is none; all threads of a block
/// together.
template <int kThreads, typename Value>
__device__ __forceinline__ void leave_row(const OperandSink& sink, int row, int columns, Value&& value) {
  const auto known = [&](int column) { return column < columns ? value(column) : 0.0F; };
  std::byte* const own = operand_row(sink, row);
  const int pieces = static_cast<int>(sink.tile_bytes / kFragmentBytes) * 4;
  for (int i = static_cast<int>(threadIdx.x); i < pieces; i += kThreads) {
    const int first = i / 4 * kBlockColumns + i % 4 * 8;
    std::uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = rounded_pair(known(first + w * 2), known(first + w * 2 + 1));
    *reinterpret_cast<uint4*>(own + i / 4 * kFragmentBytes + operand_piece(row, i % 4)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace draftwerk::cuda
