// Keys and values in pages: how they lie there, and what writes them. Queries are prepared by the same kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

// A head's keys (and its values) in a page are [16 positions, head_dim] in an order of their own: that in which lanes
// of a warp hold them as operand B of mma.m16n8k16, lane l of group l / 4 and place l % 4. A lane reads 16 bytes (of
// float16) for two instructions, and a warp's reads are contiguous, so that attention needs no shared memory for them.

/// Index of a component of the key of a position, 0 to 15. Eight components of a position lie together: which of a
/// step's sixteen they are matters to nobody as long as the query's have the same places.
__host__ __device__ constexpr int key_index(int component, int position) {
  return component / 8 * (8 * kPageSize) + position * 8 + component % 8;
}
/// The same of values: sixteen components lie together, of which lane l has component l / 4 and that plus eight, each
/// at the positions 2 * (l % 4) + {0, 1, 8, 9}.
__host__ __device__ constexpr int value_index(int component, int position) {
  const int lane = component % 8 * 4 + position % 8 / 2;
  return component / 16 * (16 * kPageSize) + lane * 8 + component / 8 % 2 * 4 + position / 8 * 2 + position % 2;
}

/// Bytes that a layer's keys (and as many again for its values) take in a page.
constexpr std::size_t kv_bytes(int heads, int head_dim, KvType type) {
  return static_cast<std::size_t>(heads) * static_cast<std::size_t>(head_dim) * kPageSize *
         (type == KvType::f16 ? 2 : 4);
}

/// Backend::append_kv. What is kept is finite: beyond the range of float16 its largest value, and for NaN its smallest.
void append_kv(LaunchList& list, const StepView& step, Tensor query, Tensor key, Tensor value, int query_heads,
               const Norm& query_norm, const Norm& key_norm, const Norm* value_norm, const Rope& rope,
               const KvLayer& kv);

/// Backend::prepare_queries.
void prepare_queries(LaunchList& list, const StepView& step, Tensor query, int query_heads, const Norm& query_norm,
                     const Rope& rope);

/// A move of keys and values within a sequence.
struct PositionMove {
  std::int32_t from;
  std::int32_t to;
};
/// The moves of one sequence, one after the other. Sequences do not write to each other's pages.
struct SequenceMoves {
  std::int32_t first;               ///< in MoveView::moves
  std::int32_t count;               ///< 0: padding
  std::int32_t pages[kPageTables];  ///< where its page tables begin in MoveView::pages
};
/// A layer whose keys and values move.
struct MovedLayer {
  std::uint64_t key_offset;
  std::uint64_t value_offset;
  std::int32_t table;
  std::int32_t head_dim;
  std::int32_t components;  ///< of all heads
  std::int32_t wide;        ///< 1: float32
};
/// Moves, in arrays on the device.
struct MoveView {
  const MovedLayer* layers;
  const PositionMove* moves;
  const SequenceMoves* sequences;
  const PageId* pages;
  std::byte* arena;
  std::int32_t layer_count;
  std::int32_t sequence_count;   ///< with padding
  std::int32_t most_components;  ///< of a layer
  std::int32_t unused;
};

/// A layer of Backend::move_kv, as the device has it.
MovedLayer moved_layer(const KvLayer& kv);

/// Backend::move_kv.
void move_kv(LaunchList& list, const MoveView& moves);

}  // namespace draftwerk::cuda
