// The attention kernels of layer_kernels.h, which layer_kernels.inl includes: a chunk of positions for a tile of
// queries, and the merging of chunks. Where a position's key and value lie, and which queries are computed together,
// changes no bit of a query's result: a score is one chain of multiply-adds over the components, the softmax goes by
// position lane, and values are added in the order of their positions.
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {
namespace {

constexpr int kPagesPerChunk = kAttentionChunk / kPageSize;
static_assert(kPageSize == kLanes, "one vector holds one component of a page's keys");

// Registers that accumulate: half of them, which covers the latency of fma and leaves room for its operands.
constexpr int kAccumulators = kRegisters / 2;
constexpr int kRegistersPerPage = kPageSize / kRegisterLanes;
// Most queries that one pass over keys or values serves: more would not fit the accumulators.
constexpr int kQueriesAtOnce =
    kAccumulators / kRegistersPerPage < kQueryTile ? kAccumulators / kRegistersPerPage : kQueryTile;
// Queries are copied to rows of this many floats: a constant, so that addresses need one register, and not a power
// of two, so that the rows do not share cache sets.
constexpr int kQueryStride = kMaxHeadDim + kLanes;

/// What one tile does within one chunk. Query i sees [begin[i], end[i]) of the chunk's positions: those before `tail`
/// in the chunk's own pages, position p of the others in slot slots[i][p - tail].
struct ChunkWork {
  int begin[kQueryTile] = {};
  int end[kQueryTile] = {};
  int first_active = kQueryTile;    ///< from the first to the last query that sees something; between them, as only in
  int past_active = 0;              ///< trees, there may be some that see nothing
  int first_page = kPagesPerChunk;  ///< pages of the chunk of which some query sees a position before the tail
  int past_page = 0;
  const std::byte* page[kPagesPerChunk];
  int tail = kAttentionChunk;
  const std::int64_t* slots[kQueryTile];
  alignas(64) float scores[kQueryTile * kAttentionChunk];
};

/// What dot_keys asks memory for while it computes. Values are added by components, a position of a page after the
/// other: what reads a line here and a line there waits for each.
struct Ahead {
  bool values = false;  ///< those of its own positions
  int pages = 0;        ///< beside them, the keys of so many pages that come next; of P at most
};

/// scores[n][position] = q[n] . k[position] for N queries and P pages: for every d in ascending order one fma per lane.
template <int N, int P, class Element>
void dot_keys(const float* queries, const std::byte* const* pages, const KvHeadView& kv, Ahead ahead, float* scores) {
  constexpr int kParts = P * kRegistersPerPage;
  constexpr std::size_t kComponentBytes = kPageSize * sizeof(Element);
  constexpr int kComponentsPerLine = 64 / kComponentBytes;
  const Element* keys[P];
  for (int p = 0; p < P; ++p) keys[p] = reinterpret_cast<const Element*>(pages[p] + kv.key_offset);
  Register sum[N][kParts] = {};
  for (int d = 0; d < kv.head_dim; ++d) {
    if (ahead.values && d % kComponentsPerLine == 0) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        __builtin_prefetch(pages[p] + kv.value_offset + d * kComponentBytes, 0, 2);
        if (p < ahead.pages) __builtin_prefetch(pages[P + p] + kv.key_offset + d * kComponentBytes, 0, 2);
      }
    }
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

/// Covers queries [first, past) with runs of N <= kQueriesAtOnce consecutive ones, for each of which it calls
/// body.operator()<N>(query).
template <class Body>
void by_runs(int first, int past, const Body& body) {
  for (int i = first; i < past;) {
    const int left = past - i;
    if (kQueriesAtOnce >= 8 && left >= 8) {
      body.template operator()<kQueriesAtOnce >= 8 ? 8 : 1>(i);
      i += 8;
    } else if (kQueriesAtOnce >= 4 && left >= 4) {
      body.template operator()<kQueriesAtOnce >= 4 ? 4 : 1>(i);
      i += 4;
    } else if (left >= 2) {
      body.template operator()<2>(i);
      i += 2;
    } else {
      body.template operator()<1>(i);
      i += 1;
    }
  }
}

/// All pages of the chunk before the tail for N consecutive queries.
template <int N, class Element>
void score_queries(const float* queries, const KvHeadView& kv, int query, ChunkWork& work) {
  constexpr int kPages = kQueriesAtOnce / N;
  const float* q = queries + query * kQueryStride;
  float* scores = work.scores + query * kAttentionChunk;
  const bool asks = query == work.first_active;  // for the queries behind it as well
  int page = work.first_page;
  for (; page + kPages <= work.past_page; page += kPages) {
    const Ahead ahead = {asks, work.past_page - page - kPages};
    dot_keys<N, kPages, Element>(q, work.page + page, kv, ahead, scores + page * kPageSize);
  }
  for (; page < work.past_page; ++page) {
    dot_keys<N, 1, Element>(q, work.page + page, kv, {asks}, scores + page * kPageSize);
  }
}

/// The positions of query i in the tail, as offsets to the tail's first.
int tail_begin(const ChunkWork& work, int i) { return work.begin[i] > work.tail ? work.begin[i] - work.tail : 0; }
int tail_end(const ChunkWork& work, int i) { return work.end[i] - work.tail; }

/// The scores of the tail. Paths of a tree share few pages, so all queries take a page together, and each picks those
/// of its own path: a score is the same wherever its key lies and whatever is computed beside it.
template <class Element>
void score_tail(const float* queries, const KvHeadView& kv, ChunkWork& work) {
  std::int64_t page = INT64_MAX;
  std::int64_t last_page = -1;
  for (int i = work.first_active; i < work.past_active; ++i) {
    if (tail_begin(work, i) >= tail_end(work, i)) continue;
    const std::int64_t first = work.slots[i][tail_begin(work, i)] / kPageSize;
    const std::int64_t last = work.slots[i][tail_end(work, i) - 1] / kPageSize;
    page = first < page ? first : page;
    last_page = last > last_page ? last : last_page;
  }
  alignas(64) float scores[kQueryTile * kAttentionChunk];
  for (; page <= last_page; ++page) {
    const std::byte* const keys = kv.arena + std::size_t{kv.pages[page]} * kPageUnit;
    by_runs(work.first_active, work.past_active, [&]<int N>(int query) {
      dot_keys<N, 1, Element>(queries + query * kQueryStride, &keys, kv, {}, scores + query * kAttentionChunk);
    });
    for (int i = work.first_active; i < work.past_active; ++i) {
      for (int t = tail_begin(work, i); t < tail_end(work, i); ++t) {
        const std::int64_t lane = work.slots[i][t] - page * kPageSize;
        if (lane < 0 || lane >= kPageSize) continue;
        work.scores[i * kAttentionChunk + work.tail + t] = scores[i * kAttentionChunk + lane];
      }
    }
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

/// values[query] += weight[position] * v[position] over the query's part of the tail, D registers from component d.
template <int D, class Element>
void add_tail_values(const ChunkWork& work, const KvHeadView& kv, int d, int query, float* values) {
  float* out = values + query * kv.head_dim + d;
  Register sum[D];
#pragma GCC unroll 16
  for (int j = 0; j < D; ++j) sum[j] = register_load(out + j * kRegisterLanes);
  for (int t = tail_begin(work, query); t < tail_end(work, query); ++t) {
    const std::int64_t slot = work.slots[query][t];
    const std::byte* page = kv.arena + std::size_t{kv.pages[slot / kPageSize]} * kPageUnit;
    const auto* v = reinterpret_cast<const Element*>(page + kv.value_offset) + slot % kPageSize * kv.head_dim + d;
    const Register weight = register_splat(work.scores[query * kAttentionChunk + work.tail + t]);
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) sum[j] = register_fma(weight, register_load(v + j * kRegisterLanes), sum[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < D; ++j) register_store(out + j * kRegisterLanes, sum[j]);
}

template <class Element>
void add_tail(const ChunkWork& work, const KvHeadView& kv, int query, float* values) {
  if (tail_begin(work, query) >= tail_end(work, query)) return;
  constexpr int kVectors = kAccumulators > 8 ? 8 : kAccumulators;
  int d = 0;
  for (; d + kVectors * kRegisterLanes <= kv.head_dim; d += kVectors * kRegisterLanes) {
    add_tail_values<kVectors, Element>(work, kv, d, query, values);
  }
  for (; d < kv.head_dim; d += kRegisterLanes) add_tail_values<1, Element>(work, kv, d, query, values);
}

/// Where the positions of query i end that it sees before the tail.
int own_end(const ChunkWork& work, int i) { return work.end[i] < work.tail ? work.end[i] : work.tail; }

/// N consecutive queries before the tail: together over the positions that all of them see, each alone over the few at
/// either end that some do not. Multiplying those by a weight of 0 instead would let another row's infinity become this
/// row's NaN.
template <int N, class Element>
void weigh_queries(const ChunkWork& work, std::size_t value_offset, int head_dim, int query, float* values) {
  int begin = 0;
  int end = work.tail;
  for (int n = query; n < query + N; ++n) {
    begin = work.begin[n] > begin ? work.begin[n] : begin;
    end = work.end[n] < end ? work.end[n] : end;
  }
  const bool shared = begin < end;
  for (int n = query; n < query + N; ++n) {
    add_range<1, Element>(work, value_offset, head_dim, n, work.begin[n], shared ? begin : own_end(work, n), values);
  }
  if (!shared) return;
  add_range<N, Element>(work, value_offset, head_dim, query, begin, end, values);
  for (int n = query; n < query + N; ++n) {
    add_range<1, Element>(work, value_offset, head_dim, n, end, own_end(work, n), values);
  }
}

template <class Element>
void attend_visible(const QueryTile& tile, const KvHeadView& kv, float scale, ChunkWork& work, AttentionState& state) {
  alignas(64) float queries[kQueryTile * kQueryStride];
  for (int i = work.first_active; i < work.past_active; ++i) {
    for (int d = 0; d < kv.head_dim; d += kLanes) store(queries + i * kQueryStride + d, load(tile.query[i] + d));
  }
  by_runs(work.first_active, work.past_active,
          [&]<int N>(int query) { score_queries<N, Element>(queries, kv, query, work); });
  const bool has_tail = work.tail < kAttentionChunk;
  if (has_tail) score_tail<Element>(queries, kv, work);
  for (int i = work.first_active; i < work.past_active; ++i) {
    exponentiate(i, scale, work, state.maximum[i], state.sum[i]);
    for (int d = 0; d < kv.head_dim; d += kLanes) store(state.values + i * kv.head_dim + d, f32x16{});
  }
  by_runs(work.first_active, work.past_active, [&]<int N>(int query) {
    weigh_queries<N, Element>(work, kv.value_offset, kv.head_dim, query, state.values);
  });
  if (!has_tail) return;
  for (int i = work.first_active; i < work.past_active; ++i) add_tail<Element>(work, kv, i, state.values);
}

void attend_chunk(const QueryTile& tile, const KvHeadView& kv, std::int64_t chunk, float scale, AttentionState& state) {
  ChunkWork work;
  const std::int64_t start = chunk * kAttentionChunk;
  if (tile.tail < start + kAttentionChunk) work.tail = tile.tail > start ? static_cast<int>(tile.tail - start) : 0;
  int low = kAttentionChunk;
  int high = 0;
  for (int i = 0; i < tile.count; ++i) {
    const std::int64_t begin = tile.first[i] > start ? tile.first[i] - start : 0;
    const std::int64_t end = tile.last[i] - start + 1 < kAttentionChunk ? tile.last[i] - start + 1 : kAttentionChunk;
    if (begin >= end) continue;
    work.begin[i] = static_cast<int>(begin);
    work.end[i] = static_cast<int>(end);
    work.first_active = i < work.first_active ? i : work.first_active;
    work.past_active = i + 1;
    if (work.end[i] > work.tail) work.slots[i] = tile.slots[i] + (start + work.tail - tile.tail);
    const int own = own_end(work, i);
    if (work.begin[i] >= own) continue;
    low = work.begin[i] < low ? work.begin[i] : low;
    high = own > high ? own : high;
  }
  if (work.first_active >= work.past_active) return;
  if (low < high) {
    work.first_page = low / kPageSize;
    work.past_page = (high + kPageSize - 1) / kPageSize;
  }
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
}  // namespace draftwerk::cpu::DRAFTWERK_ISA
