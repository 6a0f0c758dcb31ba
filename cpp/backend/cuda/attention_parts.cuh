// What attention is given, what its blocks share, and how two partial results become one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/attention.h"
#include "backend/cuda/device.cuh"
#include "backend/cuda/kv.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

// A block has a warp for each page of a chunk while it takes scores, and for each eighth of the components while it
// adds up values.
inline constexpr int kAttentionWarps = kAttentionChunk / kPageSize;
inline constexpr int kAttentionThreads = kAttentionWarps * kWarp;
/// Queries of an m16n8k16.
inline constexpr int kTileQueries = 16;

inline constexpr float kNoScore = -__builtin_huge_valf();

/// Attention of one layer in a step.
struct Attend {
  StepView step;
  const float* query;
  float* output;
  OperandSink left;
  float* partial_values;   ///< [slots, rows, query heads, head_dim]
  float2* partial_states;  ///< [slots, rows, query heads]: largest score and sum of weights
  std::uint64_t key_offset;
  std::uint64_t value_offset;
  std::int32_t query_stride;
  std::int32_t output_stride;
  std::int32_t output_columns;
  std::int32_t table;
  std::int32_t query_heads;
  std::int32_t group;  ///< query heads of a key/value head
  std::int32_t window;
  std::int32_t own;
  std::int32_t block_rows;  ///< rows of a block, at most
  std::int32_t slots;       ///< of partial results, span s in slot s % slots; 0: a block goes through all spans
  float scale;              ///< of scores, to powers of two
  std::int32_t unused;

  __device__ int end(int row) const { return step.positions[row] + own; }
  __device__ int begin(int row) const { return window > 0 ? max(end(row) - window, 0) : 0; }
};

/// What the values (or sums of weights) of two partial results are multiplied by to be added.
struct MergeFactors {
  float old;
  float fresh;
};

// The instructions are given one by one, so that no two kernels round differently.
__device__ __forceinline__ MergeFactors merge_factors(float old_maximum, float fresh_maximum) {
  if (fresh_maximum == kNoScore) return {1.0F, 0.0F};
  const float maximum = fmaxf(old_maximum, fresh_maximum);
  return {exp2f(__fsub_rn(old_maximum, maximum)), exp2f(__fsub_rn(fresh_maximum, maximum))};
}
__device__ __forceinline__ float merged(float old, float fresh, const MergeFactors& f) {
  return f.fresh == 0.0F ? old : fmaf(old, f.old, __fmul_rn(fresh, f.fresh));
}

__device__ __forceinline__ std::uint32_t f16_pair(float low, float high) {
  return float_to_f16(low) | std::uint32_t{float_to_f16(high)} << 16;
}

/// Eight elements of a page, as float16.
template <typename Element>
__device__ __forceinline__ uint4 load_eight(const std::byte* head, int index) {
  if constexpr (sizeof(Element) == 2) {
    return load_16(head + index * sizeof(Element));
  } else {
    const float4 low = __ldcg(reinterpret_cast<const float4*>(head) + index / 4);
    const float4 high = __ldcg(reinterpret_cast<const float4*>(head) + index / 4 + 1);
    return {f16_pair(finite_f16(low.x), finite_f16(low.y)), f16_pair(finite_f16(low.z), finite_f16(low.w)),
            f16_pair(finite_f16(high.x), finite_f16(high.y)), f16_pair(finite_f16(high.z), finite_f16(high.w))};
  }
}
template <typename Element>
__device__ __forceinline__ std::uint32_t load_one(const std::byte* head, int index) {
  if constexpr (sizeof(Element) == 2) {
    return reinterpret_cast<const std::uint16_t*>(head)[index];
  } else {
    return float_to_f16(finite_f16(reinterpret_cast<const float*>(head)[index]));
  }
}

template <int kHeadDim, int kTiles>
struct AttentionShared {
  static constexpr int kQueries = kTiles * kTileQueries;
  uint4 queries[kTiles][kHeadDim / 16][kWarp];    ///< operands A of scores, by k-step and lane
  uint4 weights[kTiles][kAttentionWarps][kWarp];  ///< operands A of values, by page and lane
  float warp_maximum[kQueries][kAttentionWarps];  ///< largest score of a page
  float warp_sum[kQueries][kAttentionWarps];      ///< sum of weights of a page
  float2 factors[kQueries];                       ///< MergeFactors
  int begin[kQueries];                            ///< positions that a query sees
  int end[kQueries];
  PageId pages[2][kAttentionWarps];  ///< of this chunk and the next
  // The block's rows. What is kept here and not in registers is what there is time to read again.
  const PageId* table;        ///< of the segment
  const std::uint8_t* paths;  ///< of these rows
  int first_row;
  int rows;
  int query_count;
  int first_position;  ///< of the segment
  int from;            ///< positions that some query sees
  int to;
  int part;  ///< the first position that is not everywhere the slot of the same number
};

}  // namespace draftwerk::cuda
