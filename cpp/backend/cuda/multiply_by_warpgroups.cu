#include "backend/cuda/multiply_by_warpgroups.h"

#include <cstddef>
#include <cstdint>

#include "backend/cuda/error.h"
#include "backend/cuda/product_tile.cuh"
#include "backend/cuda/warpgroup.cuh"

namespace draftwerk::cuda {
namespace {

using C = Chunk<WeightFormat::bf16>;

// A block has two warpgroups, one of 64 outputs beside the other, of which each warp has a panel.
constexpr int kThreads = kTilePanels * kWarp;
constexpr int kOperandOffset = kTilePanels * C::kBytes;  // in a stage, which has a chunk
constexpr int kStageBytes = kOperandOffset + kGroupTiles * kFragmentBytes;
constexpr int kStages = 6;
constexpr int kAhead = kStages - 2;     // one is multiplied, one may still be
constexpr int kSums = kGroupTiles * 4;  // of a thread
constexpr std::size_t kTotalBytes = std::size_t{kThreads} * kSums * sizeof(float);
constexpr std::size_t kShared = kTotalBytes + std::size_t{kStages} * kStageBytes;
static_assert(kShared <= std::size_t{227} << 10);  // of a block of Hopper

// A block multiplies a tile over all columns, slice after slice, from chunks that it copies to shared memory as they
// are. The warpgroups take the tensor cores in turn: while one waits for its products and begins the next ones, the
// other's are computed. Bound by the second-level cache: 128 and 192 rows of 2 bytes for 128 * 192 * 2 operations a
// column are 430 TFLOP/s at 5.6 TB/s (the 128 by 128 of multiply_many are 360), where tensor cores have up to 989.
__global__ void __launch_bounds__(kThreads, 1) multiply_by_warpgroups(const Products a) {
#if DRAFTWERK_HAS_WARPGROUPS
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x);
  const ProductPart& part = part_of(a, static_cast<int>(blockIdx.y));
  const RowTile here(a, part, static_cast<int>(blockIdx.x), kGroupRows);
  // Of a pair of matrices, each warpgroup has one.
  const bool pair = part.paired != nullptr;
  const int unit = static_cast<int>(blockIdx.y) - part.first_unit;
  const int first_panel = unit * (pair ? kGroupWarps : kTilePanels);
  const int panel = first_panel + warp() % (pair ? kGroupWarps : kTilePanels);
  const int panels = (part.outputs + kPanelRows - 1) / kPanelRows;
  const int last_tile = (here.rows - 1) / kOperandRows;
  float* const totals = reinterpret_cast<float*>(dynamic_shared());  // [kSums][thread]
  std::byte* const ring = dynamic_shared() + kTotalBytes;

  // A warp copies what its lanes read as weights; panels and tiles that are not there are copies of the last ones,
  // which are multiplied for nobody.
  const std::byte* const weights = (pair && warp() >= kGroupWarps ? part.paired : part.weight) +
                                   min(panel, panels - 1) * part.panel_bytes + lane() * 16;
  const int own = warp() * C::kBytes + lane() * 16;  // in a stage
  const std::byte* const operands =
      a.operands.data + here.first / kOperandRows * a.operands.tile_bytes + lane() * kOperandPieceBytes;
  const auto fetch = [&](int chunk) {
    std::byte* const stage = ring + chunk % kStages * kStageBytes;
#pragma unroll
    for (int f = 0; f < C::kFragments; ++f) {
      cp_async_16(stage + own + f * kFragmentBytes, weights + std::int64_t{chunk} * C::kBytes + f * kFragmentBytes);
    }
#pragma unroll
    for (int i = 0; i < kGroupTiles / kTilePanels; ++i) {
      const int tile = i * kTilePanels + warp();
      cp_async_16(stage + kOperandOffset + tile * kFragmentBytes + lane() * kOperandPieceBytes,
                  operands + min(tile, last_tile) * a.operands.tile_bytes + std::int64_t{chunk} * kFragmentBytes);
    }
  };

  await_previous();
  for (int chunk = 0; chunk < kAhead; ++chunk) {
    if (chunk < part.chunks) fetch(chunk);
    cp_async_commit();
  }
  float of_split[kGroupTiles][4] = {};
  const auto for_each_sum = [&](auto&& body) {
#pragma unroll
    for (int t = 0; t < kGroupTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(t, i, t * 4 + i);
    }
  };
  const int slices = part.splits * kSliceWarps;
  std::uint32_t weight[C::kFragments][4];  // read until it is awaited, in the next round
  int chunk = 0;
  for (int slice = 0; slice < slices; ++slice) {
    float of_slice[kGroupTiles][4] = {};
    const int end = static_cast<int>(static_cast<std::int64_t>(part.chunks) * (slice + 1) / slices);
    for (; chunk < end; ++chunk) {
      cp_async_wait<kAhead - 1>();
      share_with_warpgroups();
      __syncthreads();  // and everybody has waited for the products of the chunk before the last one
      await_warpgroup();
      const std::byte* const stage = ring + chunk % kStages * kStageBytes;
#pragma unroll
      for (int step = 0; step < C::kFragments; ++step) {
        const auto words = *reinterpret_cast<const uint4*>(stage + own + step * kFragmentBytes);
        weight[step][0] = words.x;
        weight[step][1] = words.y;
        weight[step][2] = words.z;
        weight[step][3] = words.w;
      }
      begin_warpgroup_products();
#pragma unroll
      for (int step = 0; step < C::kFragments; ++step) {
        multiply_by_warpgroup(of_slice, weight[step], stage + kOperandOffset + step * 2 * kOperandPieceBytes,
                              kFragmentBytes);
      }
      end_warpgroup_products();
      if (chunk + kAhead < part.chunks) fetch(chunk + kAhead);
      cp_async_commit();
    }
    await_warpgroup(of_slice);
    for_each_sum([&](int t, int i, int) { of_split[t][i] = __fadd_rn(of_split[t][i], of_slice[t][i]); });
    if (part.splits == 1 || slice % kSliceWarps != kSliceWarps - 1) continue;
    for_each_sum([&](int t, int i, int at) {
      float& total = totals[at * kThreads + thread];
      total = __fadd_rn(slice == kSliceWarps - 1 ? 0.0F : total, of_split[t][i]);
      of_split[t][i] = slice == slices - 1 ? total : 0.0F;
    });
  }
  cp_async_wait<0>();

  // By way of shared memory, for a loop that is short code; and of a pair, the first warpgroup finishes what both have.
  for_each_sum([&](int t, int i, int at) { totals[at * kThreads + thread] = of_split[t][i]; });
  __syncthreads();
  if ((pair && warp() >= kGroupWarps) || panel >= panels) return;
#pragma unroll 1
  for (int at = 0; at < kSums; ++at) {
    const int row = here.first + at / 4 * kOperandRows + lane() % 4 * 2 + at % 2;
    const int output = panel * kPanelRows + lane() / 4 + at % 4 / 2 * 8;
    if (row >= a.rows || output >= part.outputs) continue;
    const float* const sum = totals + at * kThreads + thread;
    finish(part, a.softcap, row, output, *sum, pair ? sum[kGroupWarps * kWarp] : 0.0F);
  }
#else
  __trap();  // the host takes this kernel where there is code for sm_90a, and the device runs that
#endif
}

}  // namespace

void record_products_by_warpgroups(LaunchList& launches, int blocks_of_tile, const Products& products) {
  const dim3 grid(static_cast<unsigned>(products.tile_count), static_cast<unsigned>(blocks_of_tile));
  launches.add(multiply_by_warpgroups, {grid, dim3(kThreads), kShared}, products);
}

void allow_products_by_warpgroups() { allow_shared(multiply_by_warpgroups, kShared); }

}  // namespace draftwerk::cuda
