// What all products are made of: a warp multiplies a chunk of weights with rows of operands.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device.cuh"
#include "backend/cuda/operands.cuh"
#include "backend/cuda/weight_fragments.cuh"

namespace draftwerk::cuda {

enum class Memory : std::uint8_t { shared, global };

/// A warp's B operands of the two steps of a block of 8 rows and 32 columns.
template <Memory kMemory>
__device__ __forceinline__ void load_operands(const std::byte* block, std::uint32_t (&x)[4]) {
  if constexpr (kMemory == Memory::shared) {
    // Row lane % 8 and operand_piece(row, lane / 8), of one number: kernels of many rows have no register to spare.
    const int rows = lane() * kOperandRowBytes;
    ldmatrix_x4(x, block + (rows & 7 * kOperandRowBytes) + ((rows >> 5 ^ rows >> 3) & 3 * kOperandPieceBytes));
  } else {
    const int row = lane() / 4;
    const std::byte* own = block + row * kOperandRowBytes + lane() % 4 * 4;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      x[piece] = *reinterpret_cast<const std::uint32_t*>(own + operand_piece(row, piece));
    }
  }
}

/// Adds a warp's products of a chunk, without the scales of whole rows: of kPanels panels, each chunk behind the other,
/// with kTiles * 8 rows of operands in kMemory.
template <Memory kMemory, WeightFormat kFormat, int kPanels, int kTiles>
__device__ __forceinline__ void multiply_chunk(const std::byte* panels, const std::byte* operands,
                                               float (&sums)[kPanels][kTiles][4]) {
  using C = Chunk<kFormat>;
  constexpr int kBlocks = C::kColumns / kBlockColumns;
#pragma unroll(kPanels* kTiles >= 16 ? 1 : kBlocks)  // for the sake of registers
  for (int block = 0; block < kBlocks; ++block) {
    std::uint32_t x[kTiles][2][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      std::uint32_t pieces[4];
      load_operands<kMemory>(operands + (t * kBlocks + block) * kFragmentBytes, pieces);
      x[t][0][0] = pieces[0];
      x[t][0][1] = pieces[1];
      x[t][1][0] = pieces[2];
      x[t][1][1] = pieces[3];
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const std::byte* chunk = panels + panel * C::kBytes;
      const std::byte* own = chunk + lane() * 16;
      if constexpr (kFormat == WeightFormat::bf16) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const auto words = *reinterpret_cast<const uint4*>(own + step * kFragmentBytes);
          const std::uint32_t a[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma_bf16(sums[panel][t], a, x[t][step]);
        }
      } else if constexpr (kFormat == WeightFormat::fp8) {
        const auto words = *reinterpret_cast<const uint4*>(own + block * kFragmentBytes);
        std::uint32_t a[2][4];
        unpack_fp8(words.x, words.y, a[0]);
        unpack_fp8(words.z, words.w, a[1]);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma_bf16(sums[panel][t], a[step], x[t][step]);
        }
      } else {
        std::uint32_t a[2][4];
        if constexpr (kFormat == WeightFormat::int8) {
          const auto words = *reinterpret_cast<const uint4*>(own + block * kFragmentBytes);
          unpack_int8(words.x, words.y, a[0]);
          unpack_int8(words.z, words.w, a[1]);
        } else {
          const auto words = *reinterpret_cast<const uint2*>(own + block * 8);
          unpack_int4(words.x, a[0]);
          unpack_int4(words.y, a[1]);
        }
        const std::byte* scales = chunk + C::kFragments * kFragmentBytes + lane() / 4 * 8 + block * 4;
        const auto both = *reinterpret_cast<const std::uint32_t*>(scales);
        const float upper = f16_to_float(static_cast<std::uint16_t>(both & 0xFFFFU));
        const float lower = f16_to_float(static_cast<std::uint16_t>(both >> 16));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float of_block[4] = {};
          mma_bf16(of_block, a[0], x[t][0]);
          mma_bf16(of_block, a[1], x[t][1]);
          float (&sum)[4] = sums[panel][t];
          sum[0] = __fmaf_rn(upper, of_block[0], sum[0]);
          sum[1] = __fmaf_rn(upper, of_block[1], sum[1]);
          sum[2] = __fmaf_rn(lower, of_block[2], sum[2]);
          sum[3] = __fmaf_rn(lower, of_block[3], sum[3]);
        }
      }
    }
  }
}

}  // namespace draftwerk::cuda
