// The kernels of a layer that are not matrix products: norms, activation, rotary embedding, key/value storage and
// attention. One table per instruction set; all of them are row-invariant. NaN stays NaN, but for that of keys and
// values in f16 which the portable kernels read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/isa.h"

namespace draftwerk::cpu {

/// Attention proceeds in chunks of this many absolute positions, whatever the batch: the unit of parallelism over a
/// long context, and what makes a row's arithmetic independent of how the work was divided.
inline constexpr int kAttentionChunk = 128;
/// Queries (rows x heads that share a key/value head) that one load of keys and values serves.
inline constexpr int kQueryTile = 8;
/// Head dimensions are multiples of 16 up to this.
inline constexpr int kMaxHeadDim = 512;

/// One layer's keys and values of one sequence and one key/value head, inside the pages:
/// keys [head_dim][16 positions], so that a vector holds one component of sixteen keys;
/// values [16 positions][head_dim].
struct KvHeadView {
  const std::byte* arena = nullptr;
  const PageId* pages = nullptr;  ///< by position / kPageSize
  std::size_t key_offset = 0;     ///< bytes from the start of a page to this head's keys
  std::size_t value_offset = 0;   ///< likewise its values
  int head_dim = 0;
  KvType type = KvType::f16;
};

/// Bytes that one head's keys, and as many its values, take in a page.
constexpr std::size_t kv_head_bytes(int head_dim, KvType type) {
  return std::size_t{kPageSize} * static_cast<std::size_t>(head_dim) * (type == KvType::f16 ? 2 : 4);
}

/// QueryTile::tail where every position has its own slot.
inline constexpr std::int64_t kNoTail = INT64_MAX;

/// Up to kQueryTile queries of one sequence and key/value head. Query i sees the positions first[i] .. last[i], both
/// included, and nothing outside of them is read on its behalf but other lanes of a page of which some query of the
/// tile sees a position.
/// Slot s of a sequence is lane s % kPageSize of its page s / kPageSize. A position's keys and values lie in the slot
/// of the same number, but from `tail` on, where the paths of a tree part, in one that depends on the query.
struct QueryTile {
  int count = 0;
  const float* query[kQueryTile] = {};  ///< [head_dim] each
  std::int64_t first[kQueryTile] = {};
  std::int64_t last[kQueryTile] = {};
  std::int64_t tail = kNoTail;
  const std::int64_t* slots[kQueryTile] = {};  ///< [last - tail + 1] slots of the positions from `tail` on, ascending
};

/// Softmax-weighted values not yet divided by their weights, for the queries of a tile over some positions: what the
/// online softmax (Milakov & Gimelshein 2018; Dao et al. 2022) carries from chunk to chunk.
struct AttentionState {
  float maximum[kQueryTile];
  float sum[kQueryTile];
  alignas(64) float values[kQueryTile * kMaxHeadDim];  ///< [count][head_dim]
};

struct LayerKernels {
  /// y = x * rsqrt(mean(x^2) + epsilon) * scale over `columns` elements; y may be x.
  void (*rms_norm)(const float* x, const float* scale, float epsilon, int columns, float* y);
  /// residual = (residual + x * rsqrt(mean(x^2) + epsilon) * scale) * factor
  void (*add_rms_norm)(const float* x, const float* scale, float epsilon, int columns, float factor, float* residual);
  /// x = (x * rsqrt(mean(x^2) + epsilon) * scale + added_factor * added) * factor
  void (*mix_rms_norm)(float* x, const float* scale, float epsilon, int columns, const float* added, float added_factor,
                       float factor);
  /// Reads `count` values of a float type; `source` may be unaligned.
  void (*widen)(WeightType type, const std::byte* source, int count, float* out);
  /// y = sum over i of weights[i] * x[rows[i] * stride ...], in ascending order; count >= 1.
  void (*weighted_sum)(const float* x, std::int64_t stride, const std::int32_t* rows, const float* weights, int count,
                       int columns, float* y);
  /// y = gelu_tanh(gate) * up; y may be either.
  void (*gelu_multiply)(const float* gate, const float* up, int columns, float* y);
  /// x = softcap * tanh(x / softcap) unless softcap is 0; returns the largest element (NaN counts as minus infinity).
  /// What is larger never becomes smaller than what is not.
  float (*softcap_max)(float* x, int columns, float softcap);
  /// x += errors * reach + slack; returns the largest element (NaN counts as minus infinity).
  float (*raise_max)(float* x, const float* errors, float reach, float slack, int columns);
  /// Rotates the pairs (i, i + head_dim / 2) of one head by the angles of which cosine and sine are given,
  /// [head_dim / 2] each.
  void (*rotate)(float* x, const float* cosine, const float* sine, int head_dim);
  /// Writes one key as position `slot` (0 .. 15) of a head's keys in a page; f16 saturates at +-65504.
  void (*store_key)(const float* key, int head_dim, KvType type, int slot, std::byte* keys);
  /// Writes one value likewise.
  void (*store_value)(const float* value, int head_dim, KvType type, int slot, std::byte* values);
  /// Attention of a tile over chunk number `chunk` (positions chunk * kAttentionChunk onwards). The part of `state` of
  /// queries that see nothing of the chunk means nothing.
  void (*attend_chunk)(const QueryTile& tile, const KvHeadView& kv, std::int64_t chunk, float scale,
                       AttentionState& state);
  /// Takes the result of chunk number `chunk` into the running `total` of earlier chunks. Chunks are merged in
  /// ascending order; the first that a query sees is copied.
  void (*merge_chunk)(const QueryTile& tile, std::int64_t chunk, int head_dim, const AttentionState& part,
                      AttentionState& total);
  /// output[i] = values / sum of query i, [head_dim] each.
  void (*finish_attention)(const QueryTile& tile, int head_dim, const AttentionState& total, float* const* outputs);
};

const LayerKernels& layer_kernels(Isa isa);

}  // namespace draftwerk::cpu
