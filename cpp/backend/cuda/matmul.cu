#include "backend/cuda/matmul.h"

#include <algorithm>
#include <cstddef>

#include "backend/cuda/activation.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/error.h"
#include "backend/cuda/multiply_chunk.cuh"
#include "backend/cuda/operands.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kRows = kOperandRows;
constexpr int kThreads = kSliceWarps * kWarp;
// Steps of more rows are left to the other kernel: this one reads the weights once for every 32.
constexpr int kFewRows = 64;
constexpr int kMostTiles = 4;
// Rows and panels of a block of that one. The wide tile is for devices with the shared memory of an A100 or more.
constexpr int kWideTile = 128;
constexpr int kNarrowTile = 64;
constexpr int kTilePanels = 8;
constexpr std::size_t kWideTileBytes = std::size_t{163} << 10;
constexpr std::size_t kNarrowTileBytes = std::size_t{99} << 10;

/// How a block of the kernel cuts its work.
template <WeightFormat kFormat, int kTiles>
struct Block {
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
  static constexpr std::size_t kSumBytes = std::size_t{kSliceWarps} * kTiles * kRows * kSumStride * sizeof(float);
  static constexpr std::size_t kShared = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

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
  /// Its operands: 64 bytes of every 512.
  [[nodiscard]] __device__ __forceinline__ const std::byte* operand(const Products& a, int row) const {
    const int source = row < rows ? slot(a, row) / a.slots_per_row : 0;
    return a.operands.data + source / kRows * a.operands.tile_bytes + source % kRows * kOperandRowBytes;
  }

  int first;
  int rows;
  std::int64_t weight_offset = 0;
};

// Few rows: a block multiplies kTiles * 8 rows with 64 or 128 outputs over one split of the columns, a slice each of
// its four warps. A lane copies the 16 bytes that it will want of each fragment into a ring of its own, chunks ahead of
// their use, so that nobody waits for anybody and 20 KB of weights per stage are under way in each of three blocks an
// SM. Bound by the bytes of the weights: [21504, 5376] in bf16 (231 MB) takes 54 us at 4.3 TB/s, in int4 15 us.
template <WeightFormat kFormat, int kTiles>
__global__ void __launch_bounds__(kThreads, Block<kFormat, kTiles>::kBlocks) multiply_few(const Products a) {
  using B = Block<kFormat, kTiles>;
  constexpr int kChunkBytes = Chunk<kFormat>::kBytes;
  let_next_start();
  if (a.expert_tiles != nullptr) await_previous();  // which weights are wanted is a result
  // Tiles of rows that want the same weights are neighbours in time.
  const int tile = static_cast<int>(blockIdx.x) % a.tile_count;
  const ProductPart& part = part_of(a, static_cast<int>(blockIdx.x) / a.tile_count);
  const RowTile here(a, part, tile, kTiles * kRows);
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
  for (int t = 0; t < kTiles; ++t) operands[t] = here.operand(a, t * kRows + lane() / 4) + lane() % 4 * 16;

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
      const bool there = t * kRows + lane() / 4 < here.rows;
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
    __syncwarp();  // scales are shared; and everybody is done with the stage that is filled next
    if (chunk + B::kStages - 1 < end) {
      fetch_weights(chunk + B::kStages - 1, free_slot);
      fetch_operands(chunk + B::kStages - 1, free_slot);
    }
    cp_async_commit();
    const std::byte* stage = ring + slot * B::kStageBytes;
    multiply_chunk<kFormat>(stage, stage + B::kOperandOffset, sums);
    free_slot = slot;
    slot = slot + 1 == B::kStages ? 0 : slot + 1;
  }
  cp_async_wait<0>();
  __syncthreads();  // sums take the place of the rings

  float* const of_warps = reinterpret_cast<float*>(dynamic_shared());
  constexpr int kWarpSums = kTiles * kRows * B::kSumStride;
#pragma unroll
  for (int panel = 0; panel < B::kPanels; ++panel) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = t * kRows + lane() % 4 * 2 + i % 2;
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
    for (int i = static_cast<int>(threadIdx.x); i < here.rows * width; i += kThreads) {
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
  constexpr int kUnitSums = kTiles * kRows * B::kOutputs;
  const int first_unit = tile * a.partial_units + part.first_partial + unit - split;
  float* const partials = a.partials + static_cast<std::int64_t>(first_unit) * kUnitSums;
  for (int i = static_cast<int>(threadIdx.x); i < here.rows * B::kOutputs; i += kThreads) {
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

// --- many rows ----------------------------------------------------------------------------------------------------

/// How a block cuts a tile of 128 outputs and kRowWarps * 32 rows (kWideTile or kNarrowTile): two warps one below the
/// other, kRowWarps side by side, each with 64 outputs and 32 rows.
template <WeightFormat kFormat, int kRowWarps>
struct Tile {
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
  static constexpr std::size_t kAddressBytes = std::size_t{kBlockTiles} * kRows * sizeof(const std::byte*);
  static constexpr std::size_t kShared = kTotalBytes + kAddressBytes + std::size_t{kStages} * kStageBytes;
};

// Many rows: a block multiplies a tile over all columns, slice after slice, from chunks that it copies to shared memory
// as they are. Bound by the tensor cores where the weights are quantised, and about as much by the second-level cache
// where they are bf16: 2048 rows with [21504, 5376] are 474 GFLOP, 1.2 ms at the 400 TFLOP/s that mma.sync gives.
template <WeightFormat kFormat, int kRowWarps>
__global__ void __launch_bounds__(Tile<kFormat, kRowWarps>::kThreads, 1) multiply_many(const Products a) {
  follow_previous();
  using T = Tile<kFormat, kRowWarps>;
  constexpr int kChunkBytes = Chunk<kFormat>::kBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const ProductPart& part = part_of(a, static_cast<int>(blockIdx.y));
  const RowTile here(a, part, static_cast<int>(blockIdx.x), T::kBlockTiles * kRows);
  if (here.rows <= 0) return;
  const bool pair = part.paired != nullptr;
  const int first_panel = (static_cast<int>(blockIdx.y) - part.first_unit) * (pair ? kTilePanels / 2 : kTilePanels);
  const int panels = (part.outputs + kPanelRows - 1) / kPanelRows;
  float* const totals = reinterpret_cast<float*>(dynamic_shared());                               // [kSums][thread]
  auto* const operands = reinterpret_cast<const std::byte**>(dynamic_shared() + T::kTotalBytes);  // [row]
  std::byte* const ring = dynamic_shared() + T::kTotalBytes + T::kAddressBytes;
  if (thread < T::kBlockTiles * kRows) operands[thread] = here.operand(a, thread);
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
      const int row = i / kTilePieces * kRows + i % kWarp / 4;
      const std::byte* from =
          operands[row] +
          (static_cast<std::int64_t>(chunk) * T::kOperandBlocks + i % kTilePieces / kWarp) * kFragmentBytes +
          i % 4 * 16;
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
      multiply_chunk<kFormat>(stage + output_warp * T::kPanels * kChunkBytes,
                              stage + T::kOperandOffset + row_warp * T::kTiles * T::kOperandBlocks * kFragmentBytes,
                              of_slice);
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
        const int row = (row_warp * T::kTiles + t) * kRows + lane() % 4 * 2 + i % 2;
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

// --- host ---------------------------------------------------------------------------------------------------------

// Units of work that a device has at once: three blocks on each of 132 SMs.
constexpr int kUnitsAtOnce = 396;
constexpr int kPanelsPerUnit = 4;        // nominally: what a matrix is cut by must not depend on the number of rows
constexpr int kLeastSliceColumns = 128;  // shorter slices are all start and end

/// Calls body.operator()<format, kTiles>() for the kernel of few rows,
template <typename Body>
void with_block(WeightFormat format, int rows, Body&& body) {
  with_format(format, [&]<WeightFormat kFormat>() {
    if (rows <= kRows) {
      body.template operator()<kFormat, 1>();
    } else if (rows <= 2 * kRows) {
      body.template operator()<kFormat, 2>();
    } else {
      body.template operator()<kFormat, 4>();
    }
  });
}

/// or body.operator()<format, kRowWarps>() for that of many.
template <typename Body>
void with_tile(WeightFormat format, int rows, Body&& body) {
  with_format(format, [&]<WeightFormat kFormat>() {
    static_assert(Tile<kFormat, 4>::kShared <= kWideTileBytes && Tile<kFormat, 2>::kShared <= kNarrowTileBytes);
    if (rows == kWideTile) {
      body.template operator()<kFormat, 4>();
    } else {
      body.template operator()<kFormat, 2>();
    }
  });
}

}  // namespace

int split_count(const MatrixView& weight) {
  const int groups = (weight.panels() + kPanelsPerUnit - 1) / kPanelsPerUnit;
  const int most = weight.chunks * chunk_columns(weight.format) / (kSliceWarps * kLeastSliceColumns);
  return std::clamp(kUnitsAtOnce / groups, 1, std::max(most, 1));
}

int tile_rows(int rows, const ProductDevice& device) {
  if (rows <= 2 * kRows) return rows <= kRows ? kRows : 2 * kRows;
  return rows <= kFewRows ? kMostTiles * kRows : device.shared_bytes >= kWideTileBytes ? kWideTile : kNarrowTile;
}

int tile_rows(int rows, int blocks_of_tile, const ProductDevice& device) {
  const int size = tile_rows(rows, device);
  // 192 rows with [5376, 21504] are 84 blocks of the wide tile, or 126 of half the work each, on 132 multiprocessors:
  // at the 400 TFLOP/s that mma.sync is expected to give all of them, 0.23 ms or 0.12.
  const int narrow_blocks = (rows + kNarrowTile - 1) / kNarrowTile * blocks_of_tile;
  return size == kWideTile && narrow_blocks <= device.multiprocessors ? kNarrowTile : size;
}

// Splits are at most kUnitsAtOnce / groups. Twice that many, for pairs and for units larger than a group.
std::size_t counter_count() {
  return std::size_t{kFewRows / (kMostTiles * kRows)} * Products::kMostParts * 2 * kUnitsAtOnce;
}

std::size_t partial_floats() { return counter_count() * kPanelsPerUnit * kPanelRows * kMostTiles * kRows; }

void record_products(LaunchList& launches, WeightFormat format, const ProductDevice& device, Products products) {
  // Numbers the units of a kernel whose units have so many panels, and gives their number.
  const auto number_units = [&products](int unit_panels, bool by_split) {
    int units = 0;
    products.partial_units = 0;
    for (ProductPart& part : std::span(products.parts, static_cast<std::size_t>(products.part_count))) {
      const int panels = (part.outputs + kPanelRows - 1) / kPanelRows;
      const int of_unit = part.paired == nullptr ? unit_panels : unit_panels / 2;
      const int of_part = (panels + of_unit - 1) / of_unit * (by_split ? part.splits : 1);
      part.first_unit = units;
      part.first_partial = products.partial_units;
      units += of_part;
      if (part.splits > 1) products.partial_units += of_part;
    }
    return units;
  };
  const bool of_experts = products.expert_tiles != nullptr;
  const bool many = of_experts ? products.tile_rows > kMostTiles * kRows : products.rows > kFewRows;
  const int blocks_of_tile = many ? number_units(kTilePanels, false) : 0;
  int size = products.tile_rows;
  if (!of_experts) {
    size = tile_rows(products.rows, blocks_of_tile, device);
    products.tile_count = (products.rows + size - 1) / size;
  }
  if (many) {
    with_tile(format, size, [&]<WeightFormat kFormat, int kRowWarps>() {
      using T = Tile<kFormat, kRowWarps>;
      const dim3 grid(static_cast<unsigned>(products.tile_count), static_cast<unsigned>(blocks_of_tile));
      launches.add(multiply_many<kFormat, kRowWarps>, {grid, dim3(T::kThreads), T::kShared}, products);
    });
    return;
  }
  with_block(format, size, [&]<WeightFormat kFormat, int kTiles>() {
    using B = Block<kFormat, kTiles>;
    const int units = number_units(B::kPanels, true);
    launches.add(multiply_few<kFormat, kTiles>,
                 {dim3(static_cast<unsigned>(units * products.tile_count)), dim3(kThreads), B::kShared}, products);
  });
}

void allow_products(const ProductDevice& device) {
  for (const WeightFormat format : kWeightFormats) {
    for (const int rows : {kRows, 2 * kRows, 4 * kRows}) {
      with_block(format, rows, [&]<WeightFormat kFormat, int kTiles>() {
        allow_shared(multiply_few<kFormat, kTiles>, Block<kFormat, kTiles>::kShared);
      });
    }
    for (const int rows : {kNarrowTile, kWideTile}) {
      if (rows == kWideTile && device.shared_bytes < kWideTileBytes) continue;
      with_tile(format, rows, [&]<WeightFormat kFormat, int kRowWarps>() {
        allow_shared(multiply_many<kFormat, kRowWarps>, Tile<kFormat, kRowWarps>::kShared);
      });
    }
  }
}

}  // namespace draftwerk::cuda
