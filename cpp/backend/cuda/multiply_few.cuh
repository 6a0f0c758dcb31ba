// Products of few rows (matmul.h), as in decoding: bound by the bytes of the weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/multiply_chunk.cuh"
#include "backend/cuda/product_tile.cuh"

namespace draftwerk::cuda {

/// How a block of the kernel cuts its work.
template <WeightFormat kFormat, int kTiles>
struct FewRows {
  static constexpr int kThreads = kSliceWarps * kWarp;
  static constexpr int kColumns = Chunk<kFormat>::kColumns;
  static constexpr int kFragments = Chunk<kFormat>::kFragments;
  // Panels that share what is read of the operands, which come from the second-level cache: at 8 rows an eighth of the
  // bytes of bf16 weights, a quarter of those of the others.
  static constexpr int kPanels = kFormat == WeightFormat::int4 && kTiles <= 2 ? 8 : 4;
  static constexpr int kOutputs = kPanels * kPanelRows;
  static constexpr int kOperandBlocks = kColumns / kBlockColumns;
  static constexpr int kOperandOffset = kPanels * Chunk<kFormat>::kBytes;
  static constexpr int kStageBytes = kOperandOffset + kTiles * kOperandBlocks * kFragmentBytes;  // of a warp
  // Two blocks an SM where sums and fragments need more registers than three leave. A block gets what an SM of Hopper
  // has for each, or all that the smallest devices have.
  static constexpr int kBlocks = kFormat != WeightFormat::bf16 && kPanels * kTiles >= 16 ? 2 : 3;
  static constexpr int kSharedKiB = kBlocks == 2 ? 99 : 75;
  static constexpr int kFit = kSharedKiB * 1024 / (kSliceWarps * kStageBytes);
  static constexpr int kStages = kFit < 2 ? 2 : kFit > 4 ? 4 : kFit;
  static constexpr int kSumStride = kOutputs + 4;  // so that the fragments of a warp fall into different banks
  static constexpr std::size_t kRingBytes = std::size_t{kSliceWarps} * kStages * kStageBytes;
  static constexpr std::size_t kSumBytes =
      std::size_t{kSliceWarps} * kTiles * kOperandRows * kSumStride * sizeof(float);
  static constexpr std::size_t kShared = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

// Few rows: a block multiplies kTiles * 8 rows with 64 or 128 outputs over one split of the columns, a slice each of
// its four warps. A warp copies what it multiplies into a ring of its own, chunks ahead of their use, so that none
// waits for another and 20 KB of weights per stage are under way in each of three blocks an SM. Bound by the bytes of
// the weights: [21504, 5376] in bf16 (231 MB) takes 54 us at 4.3 TB/s, in int4 15 us.
template <WeightFormat kFormat, int kTiles>
__global__ void __launch_bounds__(FewRows<kFormat, kTiles>::kThreads, FewRows<kFormat, kTiles>::kBlocks)
    multiply_few(const Products a) {
  using B = FewRows<kFormat, kTiles>;
  constexpr int kChunkBytes = Chunk<kFormat>::kBytes;
  let_next_start();
  if (a.expert_tiles != nullptr) await_previous();  // which weights are wanted is a result
  // Tiles of rows that want the same weights are neighbours in time.
  const int tile = static_cast<int>(blockIdx.x) % a.tile_count;
  const ProductPart& part = part_of(a, static_cast<int>(blockIdx.x) / a.tile_count);
  const RowTile here(a, part, tile, kTiles * kOperandRows);
  if (here.rows <= 0) return;
  const int unit = static_cast<int>(blockIdx.x) / a.tile_count - part.first_unit;
  const int split = unit % part.splits;

  // The panels of a unit are those of one matrix, or half of them of each of two.
  constexpr int kHalf = B::kPanels / 2;
  const bool pair = part.paired != nullptr;
  const int first_panel = unit / part.splits * (pair ? kHalf : B::kPanels);
  const int panels = (part.outputs + kPanelRows - 1) / kPanelRows - first_panel;  // there are at least
  const std::byte* halves[2];
  halves[0] = part.weight + here.weight_offset + first_panel * part.panel_bytes;
  halves[1] =
      pair ? part.paired + here.weight_offset + first_panel * part.panel_bytes : halves[0] + kHalf * part.panel_bytes;
  const int present[2] = {panels, pair ? panels : panels - kHalf};

  const int slices = part.splits * kSliceWarps;
  const int slice = split * kSliceWarps + warp();
  const int begin = static_cast<int>(static_cast<std::int64_t>(part.chunks) * slice / slices);
  const int end = static_cast<int>(static_cast<std::int64_t>(part.chunks) * (slice + 1) / slices);
  std::byte* const ring = dynamic_shared() + warp() * B::kStages * B::kStageBytes;
  const std::byte* operands[kTiles];  // this lane's
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const std::int64_t first = here.operand(a, t * kOperandRows + lane() / 4);
    operands[t] = a.operands.data + (first ^ lane() % 4 * kOperandPieceBytes);
  }

  const auto fetch_weights = [&](int chunk, int slot) {
    std::byte* stage = ring + slot * B::kStageBytes;
    const std::int64_t offset = static_cast<std::int64_t>(chunk) * kChunkBytes;
#pragma unroll
    for (int panel = 0; panel < B::kPanels; ++panel) {
      const std::byte* from = halves[panel / kHalf] + panel % kHalf * part.panel_bytes + offset;
      const bool there = panel % kHalf < present[panel / kHalf];
#pragma unroll
      for (int f = 0; f < B::kFragments; ++f) {
        const int at = f * kFragmentBytes + lane() * 16;
        cp_async_16(stage + panel * kChunkBytes + at, from + at, there);
      }
    }
    if constexpr (Chunk<kFormat>::kBlockScales) {
      const int panel = lane() / 4;  // four lanes copy the scales of each
      if (panel < B::kPanels) {
        const int half = panel / kHalf;
        const int at = B::kFragments * kFragmentBytes + lane() % 4 * 16;
        const std::byte* from = (half == 0 ? halves[0] : halves[1]) + panel % kHalf * part.panel_bytes + offset;
        const bool there = panel % kHalf < (half == 0 ? present[0] : present[1]);
        cp_async_16(stage + panel * kChunkBytes + at, from + at, there);
      }
    }
  };
  const auto fetch_operands = [&](int chunk, int slot) {
    std::byte* stage = ring + slot * B::kStageBytes;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const bool there = t * kOperandRows + lane() / 4 < here.rows;
#pragma unroll
      for (int block = 0; block < B::kOperandBlocks; ++block) {
        const std::byte* from =
            operands[t] + (static_cast<std::int64_t>(chunk) * B::kOperandBlocks + block) * kFragmentBytes;
        cp_async_16(stage + B::kOperandOffset + (t * B::kOperandBlocks + block) * kFragmentBytes + lane() * 16, from,
                    there);
      }
    }
  };

  float sums[B::kPanels][kTiles][4] = {};
  // Weights do not wait for the kernel before: the memory is busy with them while that one ends.
#pragma unroll
  for (int i = 0; i < B::kStages - 1; ++i) {
    if (begin + i < end) fetch_weights(begin + i, i);
  }
  await_previous();
#pragma unroll
  for (int i = 0; i < B::kStages - 1; ++i) {
    if (begin + i < end) fetch_operands(begin + i, i);
    cp_async_commit();  // the first group has all of these weights
  }
  int slot = 0;
  int free_slot = B::kStages - 1;
  for (int chunk = begin; chunk < end; ++chunk) {
    cp_async_wait<B::kStages - 2>();
    __syncwarp();  // operands and scales are shared; and everybody is done with the stage that is filled next
    if (chunk + B::kStages - 1 < end) {
      fetch_weights(chunk + B::kStages - 1, free_slot);
      fetch_operands(chunk + B::kStages - 1, free_slot);
    }
    cp_async_commit();
    const std::byte* stage = ring + slot * B::kStageBytes;
    multiply_chunk<Memory::shared, kFormat>(stage, stage + B::kOperandOffset, sums);
    free_slot = slot;
    slot = slot + 1 == B::kStages ? 0 : slot + 1;
  }
  cp_async_wait<0>();
  __syncthreads();  // sums take the place of the rings

  float* const of_warps = reinterpret_cast<float*>(dynamic_shared());
  constexpr int kWarpSums = kTiles * kOperandRows * B::kSumStride;
#pragma unroll
  for (int panel = 0; panel < B::kPanels; ++panel) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = t * kOperandRows + lane() % 4 * 2 + i % 2;
        const int output = panel * kPanelRows + lane() / 4 + i / 2 * 8;
        of_warps[warp() * kWarpSums + row * B::kSumStride + output] = sums[panel][t][i];
      }
    }
  }
  __syncthreads();

  const auto sum_of_warps = [&](int row, int output) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kSliceWarps; ++w) {
      sum = __fadd_rn(sum, of_warps[w * kWarpSums + row * B::kSumStride + output]);
    }
    return sum;
  };
  // Threads that are next to each other take outputs that are.
  const int width = pair ? B::kOutputs / 2 : B::kOutputs;
  const int outputs = min(part.outputs - first_panel * kPanelRows, width);
  const auto finish_all = [&](auto product) {
    for (int i = static_cast<int>(threadIdx.x); i < here.rows * width; i += B::kThreads) {
      const int row = i / width;
      const int output = i % width;
      if (output >= outputs) continue;
      const auto scaled = [&](const std::byte* panels, float sum) {
        return times_row_scale<kFormat>(sum, panels + output / kPanelRows * part.panel_bytes, part.panel_bytes,
                                        output % kPanelRows);
      };
      const float paired = pair ? scaled(halves[1], product(row, output + width)) : 0.0F;
      finish(part, a.softcap, here.slot(a, row), first_panel * kPanelRows + output,
             scaled(halves[0], product(row, output)), paired);
    }
  };
  if (part.splits == 1) {
    finish_all(sum_of_warps);
    return;
  }

  // The block that comes last to its outputs adds up what all splits left.
  constexpr int kUnitSums = kTiles * kOperandRows * B::kOutputs;
  const int first_unit = tile * a.partial_units + part.first_partial + unit - split;
  float* const partials = a.partials + static_cast<std::int64_t>(first_unit) * kUnitSums;
  for (int i = static_cast<int>(threadIdx.x); i < here.rows * B::kOutputs; i += B::kThreads) {
    __stcg(partials + split * kUnitSums + i, sum_of_warps(i / B::kOutputs, i % B::kOutputs));
  }
  __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) {
    const auto splits = static_cast<unsigned>(part.splits);
    last = atomicInc(a.counters + first_unit, splits - 1) == splits - 1 ? 1 : 0;
  }
  if (__syncthreads_or(last) == 0) return;
  __threadfence();
  finish_all([&](int row, int output) {
    float sum = 0;
    for (int s = 0; s < part.splits; ++s) {
      sum = __fadd_rn(sum, __ldcg(partials + s * kUnitSums + row * B::kOutputs + output));
    }
    return sum;
  });
}

}  // namespace draftwerk::cuda
