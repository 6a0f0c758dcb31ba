// Products of many rows (matmul.h), as prompts have them, by instructions of a warp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/multiply_chunk.cuh"
#include "backend/cuda/product_tile.cuh"

namespace draftwerk::cuda {

/// How a block cuts a tile of 128 outputs and kRowWarps * 32 rows (kWideTile or kNarrowTile): two warps one below the
/// other, kRowWarps side by side, each with 64 outputs and 32 rows.
template <WeightFormat kFormat, int kRowWarps>
struct ManyRows {
  static constexpr int kOutputWarps = 2;
  static constexpr int kPanels = kTilePanels / kOutputWarps;  // of a warp
  static constexpr int kTiles = 4;
  static constexpr int kThreads = kOutputWarps * kRowWarps * kWarp;
  static constexpr int kBlockTiles = kRowWarps * kTiles;
  static constexpr int kSums = kPanels * kTiles * 4;  // of a thread
  static constexpr int kOperandBlocks = Chunk<kFormat>::kColumns / kBlockColumns;
  static constexpr int kOperandOffset = kTilePanels * Chunk<kFormat>::kBytes;
  static constexpr int kStageBytes = kOperandOffset + kBlockTiles * kOperandBlocks * kFragmentBytes;
  static constexpr int kStages = kRowWarps == 4 ? 4 : 3;
  static constexpr std::size_t kTotalBytes = std::size_t{kThreads} * kSums * sizeof(float);
  static constexpr std::size_t kAddressBytes = std::size_t{kBlockTiles} * kOperandRows * sizeof(std::int64_t);
  static constexpr std::size_t kShared = kTotalBytes + kAddressBytes + std::size_t{kStages} * kStageBytes;
};

// Many rows: a block multiplies a tile over all columns, slice after slice, from chunks that it copies to shared memory
// as they are. Bound by the tensor cores where the weights are quantised, and about as much by the second-level cache
// where they are bf16: 2048 rows with [21504, 5376] are 474 GFLOP, 1.2 ms at the 400 TFLOP/s that mma.sync gives.
template <WeightFormat kFormat, int kRowWarps>
__global__ void __launch_bounds__(ManyRows<kFormat, kRowWarps>::kThreads, 1) multiply_many(const Products a) {
  follow_previous();
  using T = ManyRows<kFormat, kRowWarps>;
  constexpr int kChunkBytes = Chunk<kFormat>::kBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const ProductPart& part = part_of(a, static_cast<int>(blockIdx.y));
  const RowTile here(a, part, static_cast<int>(blockIdx.x), T::kBlockTiles * kOperandRows);
  if (here.rows <= 0) return;
  const bool pair = part.paired != nullptr;
  const int first_panel = (static_cast<int>(blockIdx.y) - part.first_unit) * (pair ? kTilePanels / 2 : kTilePanels);
  const int panels = (part.outputs + kPanelRows - 1) / kPanelRows;
  float* const totals = reinterpret_cast<float*>(dynamic_shared());                           // [kSums][thread]
  auto* const operands = reinterpret_cast<std::int64_t*>(dynamic_shared() + T::kTotalBytes);  // [row]
  std::byte* const ring = dynamic_shared() + T::kTotalBytes + T::kAddressBytes;
  if (thread < T::kBlockTiles * kOperandRows) operands[thread] = here.operand(a, thread);
  __syncthreads();
  const auto fetch = [&](int chunk) {
    std::byte* stage = ring + chunk % T::kStages * T::kStageBytes;
    constexpr int kPieces = kChunkBytes / 16;
    for (int i = thread; i < kTilePanels * kPieces; i += T::kThreads) {
      // Of a pair, a warp has two panels of each matrix: the same outputs.
      const int place = i / kPieces;
      const bool second = pair && place % 4 >= 2;
      const int panel = first_panel + (pair ? place / 4 * 2 + place % 2 : place);
      const std::byte* from = (second ? part.paired : part.weight) + here.weight_offset + panel * part.panel_bytes +
                              static_cast<std::int64_t>(chunk) * kChunkBytes + i % kPieces * 16;
      cp_async_16(stage + i * 16, from, panel < panels);
    }
    constexpr int kTilePieces = T::kOperandBlocks * kWarp;
    for (int i = thread; i < T::kBlockTiles * kTilePieces; i += T::kThreads) {
      const int row = i / kTilePieces * kOperandRows + i % kWarp / 4;
      const std::byte* from =
          a.operands.data + (operands[row] ^ i % 4 * kOperandPieceBytes) +
          (static_cast<std::int64_t>(chunk) * T::kOperandBlocks + i % kTilePieces / kWarp) * kFragmentBytes;
      cp_async_16(stage + T::kOperandOffset + i * 16, from, row < here.rows);
    }
  };

  const int output_warp = warp() / kRowWarps;
  const int row_warp = warp() % kRowWarps;
  float of_slice[T::kPanels][T::kTiles][4] = {};
  float of_split[T::kPanels][T::kTiles][4] = {};
  const auto for_each_sum = [&](auto&& body) {
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel) {
#pragma unroll
      for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) body(panel, t, i, (panel * T::kTiles + t) * 4 + i);
      }
    }
  };
  for (int chunk = 0; chunk < T::kStages - 1; ++chunk) {
    if (chunk < part.chunks) fetch(chunk);
    cp_async_commit();
  }
  const int slices = part.splits * kSliceWarps;
  int chunk = 0;
  for (int slice = 0; slice < slices; ++slice) {
    const int end = static_cast<int>(static_cast<std::int64_t>(part.chunks) * (slice + 1) / slices);
    for (; chunk < end; ++chunk) {
      cp_async_wait<T::kStages - 2>();
      __syncthreads();
      if (chunk + T::kStages - 1 < part.chunks) fetch(chunk + T::kStages - 1);
      cp_async_commit();
      const std::byte* stage = ring + chunk % T::kStages * T::kStageBytes;
      multiply_chunk<Memory::shared, kFormat>(
          stage + output_warp * T::kPanels * kChunkBytes,
          stage + T::kOperandOffset + row_warp * T::kTiles * T::kOperandBlocks * kFragmentBytes, of_slice);
    }
    for_each_sum([&](int panel, int t, int i, int) {
      of_split[panel][t][i] = __fadd_rn(of_split[panel][t][i], of_slice[panel][t][i]);
      of_slice[panel][t][i] = 0.0F;
    });
    if (part.splits == 1 || slice % kSliceWarps != kSliceWarps - 1) continue;
    for_each_sum([&](int panel, int t, int i, int at) {
      float& total = totals[at * T::kThreads + thread];
      total = __fadd_rn(slice == kSliceWarps - 1 ? 0.0F : total, of_split[panel][t][i]);
      of_split[panel][t][i] = slice == slices - 1 ? total : 0.0F;
    });
  }
  cp_async_wait<0>();

#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    if (pair && panel >= 2) break;
    const int in_unit = output_warp * (pair ? 2 : T::kPanels) + panel;
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (row_warp * T::kTiles + t) * kOperandRows + lane() % 4 * 2 + i % 2;
        const int output = (first_panel + in_unit) * kPanelRows + lane() / 4 + i / 2 * 8;
        if (row >= here.rows || output >= part.outputs) continue;
        const auto scaled = [&](const std::byte* weight, float sum) {
          const std::byte* of_output = weight + here.weight_offset + output / kPanelRows * part.panel_bytes;
          return times_row_scale<kFormat>(sum, of_output, part.panel_bytes, output % kPanelRows);
        };
        const float paired = pair ? scaled(part.paired, of_split[panel < 2 ? panel + 2 : panel][t][i]) : 0.0F;
        finish(part, a.softcap, here.slot(a, row), output, scaled(part.weight, of_split[panel][t][i]), paired);
      }
    }
  }
}

}  // namespace draftwerk::cuda
