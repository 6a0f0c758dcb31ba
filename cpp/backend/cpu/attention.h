// Attention of a step on the CPU: divides queries and contexts into pieces of work for the chunk kernels of
// layer_kernels.h, in one of two ways that do the same arithmetic in the same order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

/// Queries and results of one layer: [rows, query_heads, head_dim] float32.
struct AttentionCall {
  const float* query = nullptr;
  float* output = nullptr;
  std::int64_t query_stride = 0;   ///< elements from row to row
  std::int64_t output_stride = 0;  ///< likewise
  const KvLayer* kv = nullptr;
  int query_heads = 0;  ///< a multiple of kv->heads
  Visibility sees;      ///< a row at position 0 must see itself
  float scale = 1.0F;
};

class Attention {
 public:
  /// Allocates all scratch for steps of up to `max_rows` rows. `kernels` and `pool` must outlive the object.
  Attention(const LayerKernels& kernels, WorkerPool& pool, int max_rows);

  /// Takes up a step: finds the slots of what its trees' rows see.
  void begin(const StepRows& step);

  /// output[r] = softmax(scale * query[r] . K) V over the positions that row r sees; see Backend::attend.
  /// `step` is that of begin().
  void attend(const AttentionCall& call, const StepRows& step, KvArena arena);

 private:
  /// A tile of queries and where its results go.
  struct TilePlace {
    QueryTile tile;
    KvHeadView kv;
    float* outputs[kQueryTile];
    std::int64_t first_chunk;
    std::int64_t chunks;
  };

  std::int64_t place_tree(const StepRows& step, const Segment& segment);
  [[nodiscard]] TilePlace place_tile(const AttentionCall& call, const StepRows& step, KvArena arena,
                                     std::int64_t index) const;
  void attend_by_tile(const AttentionCall& call, const StepRows& step, KvArena arena, std::int64_t tiles);
  void attend_by_chunk(const AttentionCall& call, const StepRows& step, KvArena arena, std::int64_t tiles);

  const LayerKernels& kernels_;
  WorkerPool& pool_;
  ScratchArray<AttentionState> worker_states_;  ///< two per worker: the running total and one chunk
  ScratchArray<AttentionState> tile_states_;    ///< running totals of tiles with split contexts
  ScratchArray<AttentionState> partials_;       ///< their chunks
  std::vector<TilePlace> split_tiles_;
  std::vector<std::int64_t> split_begin_;   ///< first work item of every split tile
  std::vector<std::int64_t> segment_tile_;  ///< [segments + 1] first tile of a segment, per key/value head
  // Of the step's trees, see QueryTile.
  std::vector<std::int64_t> segment_tail_;  ///< [segments]
  std::vector<std::size_t> row_slots_;      ///< [rows] where in `slots_` a row's begin
  std::vector<std::int64_t> slots_;
};

}  // namespace draftwerk::cpu
