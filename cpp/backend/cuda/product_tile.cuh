// What the kernels of products (matmul.h) share: which part, rows and operands a block has, and what becomes of a
// product.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/activation.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/matmul.h"
#include "backend/cuda/operands.cuh"
#include "backend/cuda/weight_fragments.cuh"

namespace draftwerk::cuda {

inline constexpr int kTilePanels = 8;  ///< of a block of many rows, of a pair of matrices together

/// Writes a finished product; `row` and `output` are inside.
__device__ __forceinline__ void finish(const ProductPart& part, float softcap, int row, int output, float product,
                                       float paired) {
  float result = product;
  if (part.epilogue == Epilogue::geglu) {
    result = __fmul_rn(gelu_tanh(product), paired);
  } else if (part.epilogue == Epilogue::gelu) {
    result = __fmul_rn(gelu_tanh(product), part.factor[static_cast<std::int64_t>(row) * part.factor_stride + output]);
  } else if (part.epilogue == Epilogue::softcap) {
    result = softcapped(product, softcap);
  }
  part.output[static_cast<std::int64_t>(row) * part.output_stride + output] = result;
  if (part.left.data != nullptr) leave(part.left, row, output, result);
}

/// The part of a launch that a unit belongs to.
__device__ __forceinline__ const ProductPart& part_of(const Products& a, int unit) {
  int index = a.part_count - 1;
  while (index > 0 && a.parts[index].first_unit > unit) --index;
  return a.parts[index];
}

/// The rows of a tile: that many of the step's from some row on, or what an expert has.
struct RowTile {
  __device__ __forceinline__ RowTile(const Products& a, const ProductPart& part, int tile, int size)
      : first(tile * size), rows(min(a.rows - first, size)) {
    if (a.expert_tiles == nullptr) return;
    const ExpertTile& of_expert = a.expert_tiles[tile];
    rows = of_expert.rows;
    weight_offset = of_expert.expert * part.expert_bytes;
  }
  /// Where the result of a row of the tile goes.
  [[nodiscard]] __device__ __forceinline__ int slot(const Products& a, int row) const {
    return a.slots == nullptr ? first + row : a.slots[first + row];
  }
  /// Where its operands begin, 64 bytes of every 512: the piece that lies n-th in the tile's row of shared memory comes
  /// from this ^ 16 n. (A row of an expert may have another place in its eight than where it comes from.)
  [[nodiscard]] __device__ __forceinline__ std::int64_t operand(const Products& a, int row) const {
    const int source = row < rows ? slot(a, row) / a.slots_per_row : 0;
    return (source / kOperandRows * a.operands.tile_bytes + source % kOperandRows * kOperandRowBytes) ^
           operand_turn(source) ^ operand_turn(row);
  }

  int first;
  int rows;
  std::int64_t weight_offset = 0;
};

}  // namespace draftwerk::cuda
