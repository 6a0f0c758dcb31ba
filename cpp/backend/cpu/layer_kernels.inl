// The layer kernels over simd.h's lanes; compiled once per instruction set by layer_kernels_*.cc, which define
// DRAFTWERK_ISA and kRegisters, the number of vector registers.
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {
namespace {

constexpr int kPagesPerChunk = kAttentionChunk / kPageSize;
static_assert(kPageSize == kLanes, "one vector holds one component of a page's keys");

float reciprocal_rms(const float* x, float epsilon, int columns) {
  f32x16 squares = {};
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (i < columns) {
    const f32x16 v = load_partial(x + i, columns - i);
    squares = fma(v, v, squares);
  }
  return 1.0F / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(columns) + epsilon);
}

void rms_norm(const float* x, const float* scale, float epsilon, int columns, float* y) {
  const float factor = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) store(y + i, load(x + i) * factor * load(scale + i));
  if (i < columns) {
    const int rest = columns - i;
    store_partial(y + i, load_partial(x + i, rest) * factor * load_partial(scale + i, rest), rest);
  }
}

void add_rms_norm(const float* x, const float* scale, float epsilon, int columns, float factor, float* residual) {
  const float reciprocal = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(residual + i, fma(load(x + i) * reciprocal, load(scale + i), load(residual + i)) * factor);
  }
  if (i < columns) {
    const int rest = columns - i;
    const f32x16 sum =
        fma(load_partial(x + i, rest) * reciprocal, load_partial(scale + i, rest), load_partial(residual + i, rest));
    store_partial(residual + i, sum * factor, rest);
  }
}

void mix_rms_norm(float* x, const float* scale, float epsilon, int columns, const float* added, float added_factor,
                  float factor) {
  const float reciprocal = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(x + i, fma(load(x + i) * reciprocal, load(scale + i), load(added + i) * added_factor) * factor);
  }
  if (i < columns) {
    const int rest = columns - i;
    const f32x16 sum = fma(load_partial(x + i, rest) * reciprocal, load_partial(scale + i, rest),
                           load_partial(added + i, rest) * added_factor);
    store_partial(x + i, sum * factor, rest);
  }
}

void widen(WeightType type, const std::byte* source, int count, float* out) {
  const std::size_t element = type == WeightType::f32 ? 4 : 2;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes, source += kLanes * element) store(out + i, load_float(type, source));
  if (i < count) {
    std::byte rest[kLanes * 4] = {};
    std::memcpy(rest, source, static_cast<std::size_t>(count - i) * element);
    store_partial(out + i, load_float(type, rest), count - i);
  }
}

void weighted_sum(const float* x, std::int64_t stride, const std::int32_t* rows, const float* weights, int count,
                  int columns, float* y) {
  const float* first = x + rows[0] * stride;
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    f32x16 sum = load(first + i) * weights[0];
    for (int n = 1; n < count; ++n) sum = fma(load(x + rows[n] * stride + i), splat(weights[n]), sum);
    store(y + i, sum);
  }
  if (i < columns) {
    const int rest = columns - i;
    f32x16 sum = load_partial(first + i, rest) * weights[0];
    for (int n = 1; n < count; ++n) sum = fma(load_partial(x + rows[n] * stride + i, rest), splat(weights[n]), sum);
    store_partial(y + i, sum, rest);
  }
}

void gelu_multiply(const float* gate, const float* up, int columns, float* y) {
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) store(y + i, gelu_tanh(load(gate + i)) * load(up + i));
  if (i < columns) {
    const int rest = columns - i;
    store_partial(y + i, gelu_tanh(load_partial(gate + i, rest)) * load_partial(up + i, rest), rest);
  }
}

float softcap_max(float* x, int columns, float softcap) {
  const f32x16 lowest = splat(-__builtin_inff());
  f32x16 largest = lowest;
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    f32x16 v = load(x + i);
    if (softcap != 0.0F) {
      v = softcap * tanh(v / softcap);
      store(x + i, v);
    }
    largest = max(v, largest);
  }
  if (i < columns) {
    const int rest = columns - i;
    f32x16 v = load_partial(x + i, rest);
    if (softcap != 0.0F) {
      v = softcap * tanh(v / softcap);
      store_partial(x + i, v, rest);
    }
    float lanes[kLanes];
    store(lanes, lowest);
    store_partial(lanes, v, rest);
    largest = max(load(lanes), largest);
  }
  return reduce_max(largest);
}

void rotate(float* x, const float* cosine, const float* sine, int head_dim) {
  const int half = head_dim / 2;
  float* y = x + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const f32x16 a = load(x + i);
    const f32x16 b = load(y + i);
    const f32x16 c = load(cosine + i);
    const f32x16 s = load(sine + i);
    store(x + i, a * c - b * s);
    store(y + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i];
    const float b = y[i];
    x[i] = a * cosine[i] - b * sine[i];
    y[i] = b * cosine[i] + a * sine[i];
  }
}

void store_key(const float* key, int head_dim, KvType type, int slot, std::byte* keys) {
  if (type == KvType::f32) {
    for (int d = 0; d < head_dim; ++d) std::memcpy(keys + (d * kPageSize + slot) * 4, key + d, 4);
    return;
  }
  for (int d = 0; d < head_dim; d += kLanes) {
    std::uint16_t halves[kLanes];
    store_half(halves, load(key + d));
    for (int i = 0; i < kLanes; ++i) std::memcpy(keys + ((d + i) * kPageSize + slot) * 2, halves + i, 2);
  }
}

void store_value(const float* value, int head_dim, KvType type, int slot, std::byte* values) {
  if (type == KvType::f32) {
    std::memcpy(values + slot * head_dim * 4, value, static_cast<std::size_t>(head_dim) * 4);
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(values) + slot * head_dim;
  for (int d = 0; d < head_dim; d += kLanes) store_half(halves + d, load(value + d));
}

// --- attention ---------------------------------------------------------------------------------------------------

// Registers that accumulate: half of them, which covers the latency of fma and leaves room for its operands.
constexpr int kAccumulators = kRegisters / 2;
constexpr int kRegistersPerPage = kPageSize / kRegisterLanes;
// Most queries that one pass over keys or values serves: more would not fit the accumulators.
constexpr int kQueriesAtOnce =
    kAccumulators / kRegistersPerPage < kQueryTile ? kAccumulators / kRegistersPerPage : kQueryTile;
// Queries are copied to rows of this many floats: a constant, so that addresses need one register, and not a power
// of two, so that the rows do not share cache sets.
constexpr int kQueryStride = kMaxHeadDim + kLanes;

/// What one tile does within one chunk. Query i sees [begin[i], end[i]) of the chunk's positions.
struct ChunkWork {
  int begin[kQueryTile];
  int end[kQueryTile];
  int first_active = kQueryTile;  ///< the queries that see something are consecutive: both ends of their ranges ascend
  int past_active = 0;
  int first_page = kPagesPerChunk;  ///< pages of the chunk of which some query sees a position
  int past_page = 0;
  const std::byte* page[kPagesPerChunk];
  alignas(64) float scores[kQueryTile * kAttentionChunk];
};

/// scores[n][position] = q[n] . k[position] for N queries and P pages: for every d in ascending order one fma per lane.
template <int N, int P, class Element>
void dot_keys(const float* queries, const std::byte* const* pages, std::size_t key_offset, int head_dim,
              float* scores) {
  constexpr int kParts = P * kRegistersPerPage;
  const Element* keys[P];
  for (int p = 0; p < P; ++p) keys[p] = reinterpret_cast<const Element*>(pages[p] + key_offset);
  Register sum[N][kParts] = {};
  for (int d = 0; d < head_dim; ++d) {
    Register key[kParts];
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
      key[p] = register_load(keys[p / kRegistersPerPage] + d * kPageSize + p % kRegistersPerPage * kRegisterLanes);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Register q = register_splat(queries[n * kQueryStride + d]);
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) sum[n][p] = register_fma(q, key[p], sum[n][p]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) register_store(scores + n * kAttentionChunk + p * kRegisterLanes, sum[n][p]);
  }
}

/// All pages of the chunk for N consecutive queries.
template <int N, class Element>
void score_queries(const float* queries, std::size_t key_offset, int head_dim, int query, ChunkWork& work) {
  constexpr int kPages = kQueriesAtOnce / N;
  const float* q = queries + query * kQueryStride;
  float* scores = work.scores + query * kAttentionChunk;
  int page = work.first_page;
  for (; page + kPages <= work.past_page; page += kPages) {
    dot_keys<N, kPages, Element>(q, work.page + page, key_offset, head_dim, scores + page * kPageSize);
  }
  for (; page < work.past_page; ++page) {
    dot_keys<N, 1, Element>(q, work.page + page, key_offset, head_dim, scores + page * kPageSize);
  }
}

/// Turns the scores of one query into exp(scale * score - maximum), 0 at positions that it does not see.
void exponentiate(int query, float scale, ChunkWork& work, float& maximum, float& sum) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* scores = work.scores + query * kAttentionChunk;
  const int begin = work.begin[query];
  const int end = work.end[query];
  const int first_page = begin / kPageSize;
  const int past_page = (end + kPageSize - 1) / kPageSize;
  const f32x16 hidden = splat(-__builtin_inff());
  f32x16 largest = hidden;
  for (int page = first_page; page < past_page; ++page) {
    const i32x16 position = lane + page * kPageSize;
    const i32x16 seen = (position >= begin) & (position < end);
    const f32x16 v = seen ? load(scores + page * kPageSize) * scale : hidden;
    store(scores + page * kPageSize, v);
    largest = max(v, largest);
  }
  maximum = reduce_max(largest);
  f32x16 weights = {};
  for (int page = first_page; page < past_page; ++page) {
    const f32x16 p = exp(load(scores + page * kPageSize) - maximum);
    store(scores + page * kPageSize, p);
    weights += p;
  }
  sum = reduce_add(weights);
}

/// values[n] += weight[n][position] * v[position] over [begin, end) in ascending order, D registers from component d.
template <int N, int D, class Element>
void add_values(const ChunkWork& work, std::size_t value_offset, int head_dim, int d, int query, int begin, int end,
                float* values) {
  Register sum[N][D];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) sum[n][j] = register_load(values + (query + n) * head_dim + d + j * kRegisterLanes);
  }
  for (int position = begin; position < end;) {
    const int page = position / kPageSize;
    const int stop = (page + 1) * kPageSize < end ? (page + 1) * kPageSize : end;
    const auto* v =
        reinterpret_cast<const Element*>(work.page[page] + value_offset) + (position % kPageSize) * head_dim + d;
    const float* weights = work.scores + query * kAttentionChunk + position;
    for (; position < stop; ++position, v += head_dim, ++weights) {
      Register value[D];
#pragma GCC unroll 16
      for (int j = 0; j < D; ++j) value[j] = register_load(v + j * kRegisterLanes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Register weight = register_splat(weights[n * kAttentionChunk]);
#pragma GCC unroll 16
        for (int j = 0; j < D; ++j) sum[n][j] = register_fma(weight, value[j], sum[n][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) register_store(values + (query + n) * head_dim + d + j * kRegisterLanes, sum[n][j]);
  }
}

template <int N, class Element>
void add_range(const ChunkWork& work, std::size_t value_offset, int head_dim, int query, int begin, int end,
               float* values) {
  if (begin >= end) return;
  constexpr int kVectors = kAccumulators / N > 8 ? 8 : kAccumulators / N;
  int d = 0;
  for (; d + kVectors * kRegisterLanes <= head_dim; d += kVectors * kRegisterLanes) {
    add_values<N, kVectors, Element>(work, value_offset, head_dim, d, query, begin, end, values);
  }
  for (; d < head_dim; d += kRegisterLanes) {
    add_values<N, 1, Element>(work, value_offset, head_dim, d, query, begin, end, values);
  }
}

/// N consecutive queries: together over the positions that all of them see, each alone over the few at either end
/// that some do not. Multiplying those by a weight of 0 instead would let another row's infinity become this row's NaN.
template <int N, class Element>
void weigh_queries(const ChunkWork& work, std::size_t value_offset, int head_dim, int query, float* values) {
  int begin = 0;
  int end = kAttentionChunk;
  for (int n = query; n < query + N; ++n) {
    begin = work.begin[n] > begin ? work.begin[n] : begin;
    end = work.end[n] < end ? work.end[n] : end;
  }
  const bool shared = begin < end;
  for (int n = query; n < query + N; ++n) {
    add_range<1, Element>(work, value_offset, head_dim, n, work.begin[n], shared ? begin : work.end[n], values);
  }
  if (!shared) return;
  add_range<N, Element>(work, value_offset, head_dim, query, begin, end, values);
  for (int n = query; n < query + N; ++n) {
    add_range<1, Element>(work, value_offset, head_dim, n, end, work.end[n], values);
  }
}

template <class Element>
void attend_visible(const QueryTile& tile, const KvHeadView& kv, float scale, ChunkWork& work, AttentionState& state) {
  alignas(64) float queries[kQueryTile * kQueryStride];
  for (int i = work.first_active; i < work.past_active; ++i) {
    for (int d = 0; d < kv.head_dim; d += kLanes) store(queries + i * kQueryStride + d, load(tile.query[i] + d));
  }
  for (int i = work.first_active; i < work.past_active;) {
    const int left = work.past_active - i;
    if (kQueriesAtOnce >= 8 && left >= 8) {
      score_queries<kQueriesAtOnce >= 8 ? 8 : 1, Element>(queries, kv.key_offset, kv.head_dim, i, work);
      i += 8;
    } else if (kQueriesAtOnce >= 4 && left >= 4) {
      score_queries<kQueriesAtOnce >= 4 ? 4 : 1, Element>(queries, kv.key_offset, kv.head_dim, i, work);
      i += 4;
    } else if (left >= 2) {
      score_queries<2, Element>(queries, kv.key_offset, kv.head_dim, i, work);
      i += 2;
    } else {
      score_queries<1, Element>(queries, kv.key_offset, kv.head_dim, i, work);
      i += 1;
    }
  }
  for (int i = work.first_active; i < work.past_active; ++i) {
    exponentiate(i, scale, work, state.maximum[i], state.sum[i]);
    for (int d = 0; d < kv.head_dim; d += kLanes) store(state.values + i * kv.head_dim + d, f32x16{});
  }
  for (int i = work.first_active; i < work.past_active;) {
    const int left = work.past_active - i;
    if (kQueriesAtOnce >= 8 && left >= 8) {
      weigh_queries<kQueriesAtOnce >= 8 ? 8 : 1, Element>(work, kv.value_offset, kv.head_dim, i, state.values);
      i += 8;
    } else if (kQueriesAtOnce >= 4 && left >= 4) {
      weigh_queries<kQueriesAtOnce >= 4 ? 4 : 1, Element>(work, kv.value_offset, kv.head_dim, i, state.values);
      i += 4;
    } else if (left >= 2) {
      weigh_queries<2, Element>(work, kv.value_offset, kv.head_dim, i, state.values);
      i += 2;
    } else {
      weigh_queries<1, Element>(work, kv.value_offset, kv.head_dim, i, state.values);
      i += 1;
    }
  }
}

void attend_chunk(const QueryTile& tile, const KvHeadView& kv, std::int64_t chunk, float scale, AttentionState& state) {
  ChunkWork work;
  const std::int64_t start = chunk * kAttentionChunk;
  int low = kAttentionChunk;
  int high = 0;
  for (int i = 0; i < tile.count; ++i) {
    const std::int64_t begin = tile.first[i] > start ? tile.first[i] - start : 0;
    const std::int64_t end = tile.last[i] - start + 1 < kAttentionChunk ? tile.last[i] - start + 1 : kAttentionChunk;
    if (begin >= end) continue;
    work.begin[i] = static_cast<int>(begin);
    work.end[i] = static_cast<int>(end);
    low = work.begin[i] < low ? work.begin[i] : low;
    high = work.end[i] > high ? work.end[i] : high;
    work.first_active = i < work.first_active ? i : work.first_active;
    work.past_active = i + 1;
  }
  if (low >= high) return;
  work.first_page = low / kPageSize;
  work.past_page = (high + kPageSize - 1) / kPageSize;
  for (int page = work.first_page; page < work.past_page; ++page) {
    work.page[page] = kv.arena + std::size_t{kv.pages[start / kPageSize + page]} * kPageUnit;
  }
  if (kv.type == KvType::f16) {
    attend_visible<std::uint16_t>(tile, kv, scale, work, state);
  } else {
    attend_visible<float>(tile, kv, scale, work, state);
  }
}

void merge_chunk(const QueryTile& tile, std::int64_t chunk, int head_dim, const AttentionState& part,
                 AttentionState& total) {
  for (int i = 0; i < tile.count; ++i) {
    const std::int64_t first_chunk = tile.first[i] / kAttentionChunk;
    if (chunk < first_chunk || chunk > tile.last[i] / kAttentionChunk) continue;
    const float* from = part.values + i * head_dim;
    float* to = total.values + i * head_dim;
    if (chunk == first_chunk) {
      total.maximum[i] = part.maximum[i];
      total.sum[i] = part.sum[i];
      for (int d = 0; d < head_dim; d += kLanes) store(to + d, load(from + d));
      continue;
    }
    const float maximum = part.maximum[i] > total.maximum[i] ? part.maximum[i] : total.maximum[i];
    const f32x16 keep = exp(splat(total.maximum[i] - maximum));
    const f32x16 take = exp(splat(part.maximum[i] - maximum));
    total.maximum[i] = maximum;
    total.sum[i] = total.sum[i] * keep[0] + part.sum[i] * take[0];
    for (int d = 0; d < head_dim; d += kLanes) store(to + d, fma(load(to + d), keep, load(from + d) * take));
  }
}

void finish_attention(const QueryTile& tile, int head_dim, const AttentionState& total, float* const* outputs) {
  for (int i = 0; i < tile.count; ++i) {
    const float factor = 1.0F / total.sum[i];
    for (int d = 0; d < head_dim; d += kLanes) store(outputs[i] + d, load(total.values + i * head_dim + d) * factor);
  }
}

}  // namespace

extern const LayerKernels kLayerKernels;
const LayerKernels kLayerKernels = {rms_norm,      add_rms_norm, mix_rms_norm,    widen,     weighted_sum,
                                    gelu_multiply, softcap_max,  rotate,          store_key, store_value,
                                    attend_chunk,  merge_chunk,  finish_attention};

}  // namespace draftwerk::cpu::DRAFTWERK_ISA
