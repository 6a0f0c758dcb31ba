#include "backend/cuda/kv.h"

#include <algorithm>

#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kMaxHeadDim = 512;
/// Pairs of components (i, i + head_dim / 2) that a lane has at most.
constexpr int kPairs = kMaxHeadDim / 2 / kWarp;
/// Warps of a block, each with one head of a row.
constexpr int kHeadsPerBlock = 8;

struct HeadsOfRows {
  StepView step;
  float* query;
  const float* key;  ///< null: queries only
  const float* value;
  const float* query_scale;
  const float* key_scale;
  const float* value_scale;  ///< null: values are not normalised
  const float* inverse_frequency;
  std::uint64_t key_offset;
  std::uint64_t value_offset;
  std::int32_t query_stride;
  std::int32_t key_stride;
  std::int32_t value_stride;
  std::int32_t query_heads;
  std::int32_t kv_heads;
  std::int32_t head_dim;
  std::int32_t table;
  std::int32_t wide;  ///< pages of float32
  float query_epsilon;
  float key_epsilon;
  float value_epsilon;
  float unused;
};

/// A head's components, [2][kPairs] for each lane: pairs lane, lane + 32 and so on.
struct Head {
  float low[kPairs];
  float high[kPairs];
};

__device__ void load_head(Head& head, const float* x, int half) {
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    const int i = lane() + t * kWarp;
    head.low[t] = i < half ? x[i] : 0.0F;
    head.high[t] = i < half ? x[half + i] : 0.0F;
  }
}

__device__ void normalise(Head& head, const float* scale, float epsilon, int half) {
  float squares = 0.0F;
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    squares = fmaf(head.low[t], head.low[t], squares);
    squares = fmaf(head.high[t], head.high[t], squares);
  }
  const float factor = 1.0F / sqrtf(warp_sum(squares) / static_cast<float>(2 * half) + epsilon);
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    const int i = lane() + t * kWarp;
    if (i >= half) continue;
    head.low[t] = head.low[t] * factor * scale[i];
    head.high[t] = head.high[t] * factor * scale[half + i];
  }
}

__device__ void rotate(Head& head, const float* cosine, const float* sine, int half) {
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    const int i = lane() + t * kWarp;
    if (i >= half) continue;
    const float low = head.low[t];
    const float high = head.high[t];
    head.low[t] = low * cosine[i] - high * sine[i];
    head.high[t] = high * cosine[i] + low * sine[i];
  }
}

/// Finite in any case: what one row keeps is multiplied by the zeros of those that do not see it.
__device__ void store(std::byte* head, int index, float x, bool wide) {
  x = finite_f16(x);
  if (wide) {
    reinterpret_cast<float*>(head)[index] = x;
  } else {
    reinterpret_cast<std::uint16_t*>(head)[index] = float_to_f16(x);
  }
}

/// Block (x, y): heads 8 y to 8 y + 7 of row x, a warp each: first the queries, then the keys, then the values. The
/// angles of a row are taken once for the block. Bound by launch and latency in decoding (about 3 us); a prompt of
/// 2,048 rows of 32 + 16 + 16 heads of 256 reads and writes 0.2 GB: 60 us on an H200, with as much again for the
/// sectors of values, of which a row writes two bytes each.
__global__ void __launch_bounds__(kHeadsPerBlock* kWarp) prepare_heads(const HeadsOfRows a) {
  follow_previous();
  __shared__ float cosine[kMaxHeadDim / 2];
  __shared__ float sine[kMaxHeadDim / 2];
  const int row = static_cast<int>(blockIdx.x);
  const int half = a.head_dim / 2;
  const auto position = static_cast<float>(a.step.positions[row]);
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kHeadsPerBlock * kWarp) {
    float s = 0.0F;
    float c = 0.0F;
    sincosf(position * a.inverse_frequency[i], &s, &c);
    cosine[i] = c;
    sine[i] = s;
  }
  __syncthreads();
  int h = static_cast<int>(blockIdx.y) * kHeadsPerBlock + warp();
  Head head;
  if (h < a.query_heads) {
    float* query = a.query + static_cast<std::int64_t>(row) * a.query_stride + h * a.head_dim;
    load_head(head, query, half);
    normalise(head, a.query_scale, a.query_epsilon, half);
    rotate(head, cosine, sine, half);
#pragma unroll
    for (int t = 0; t < kPairs; ++t) {
      const int i = lane() + t * kWarp;
      if (i >= half) continue;
      query[i] = head.low[t];
      query[half + i] = head.high[t];
    }
    return;
  }
  h -= a.query_heads;
  const int segment_index = a.step.row_segment[row];
  if (h >= 2 * a.kv_heads || segment_index < 0) return;
  const bool is_key = h < a.kv_heads;
  if (!is_key) h -= a.kv_heads;
  if (is_key) {
    load_head(head, a.key + static_cast<std::int64_t>(row) * a.key_stride + h * a.head_dim, half);
    normalise(head, a.key_scale, a.key_epsilon, half);
    rotate(head, cosine, sine, half);
  } else {
    load_head(head, a.value + static_cast<std::int64_t>(row) * a.value_stride + h * a.head_dim, half);
    if (a.value_scale != nullptr) normalise(head, a.value_scale, a.value_epsilon, half);
  }
  const StepSegment& segment = a.step.segments[segment_index];
  const int slot = segment.first_position + row - segment.first_row;
  const PageId page = a.step.pages[segment.pages[a.table] + slot / kPageSize];
  const std::size_t head_bytes = static_cast<std::size_t>(a.head_dim) * kPageSize * (a.wide != 0 ? 4 : 2);
  std::byte* to = a.step.arena + std::size_t{page} * kPageUnit + (is_key ? a.key_offset : a.value_offset) +
                  static_cast<std::size_t>(h) * head_bytes;
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    const int i = lane() + t * kWarp;
    if (i >= half) continue;
    const int at = slot % kPageSize;
    store(to, is_key ? key_index(i, at) : value_index(i, at), head.low[t], a.wide != 0);
    store(to, is_key ? key_index(half + i, at) : value_index(half + i, at), head.high[t], a.wide != 0);
  }
}

constexpr int kMoveThreads = 128;
/// Moves whose elements a thread reads before it writes any.
constexpr int kMovesAtOnce = 8;

/// One component of a key and a value goes through all moves of a sequence. Of several moves it reads first, so that
/// they take one latency of memory: what a move would find that another one of them has brought, it takes from where
/// that one did.
template <typename Element>
__device__ void move_component(const MoveView& a, const MovedLayer& layer, const SequenceMoves& sequence,
                               int component) {
  const PageId* const pages = a.pages + sequence.pages[layer.table];
  const PositionMove* const moves = a.moves + sequence.first;
  const int head = component / layer.head_dim * (layer.head_dim * kPageSize);
  const int d = component % layer.head_dim;
  const auto key = [&](int position) {
    std::byte* page = a.arena + std::size_t{pages[position / kPageSize]} * kPageUnit + layer.key_offset;
    return reinterpret_cast<Element*>(page) + head + key_index(d, position % kPageSize);
  };
  const auto value = [&](int position) {
    std::byte* page = a.arena + std::size_t{pages[position / kPageSize]} * kPageUnit + layer.value_offset;
    return reinterpret_cast<Element*>(page) + head + value_index(d, position % kPageSize);
  };
  for (int first = 0; first < sequence.count; first += kMovesAtOnce) {
    const int count = min(sequence.count - first, kMovesAtOnce);
    Element keys[kMovesAtOnce];
    Element values[kMovesAtOnce];
#pragma unroll
    for (int i = 0; i < kMovesAtOnce; ++i) {
      if (i >= count) continue;
      int from = moves[first + i].from;
      for (int before = i - 1; before >= 0; --before) {
        if (moves[first + before].to == from) from = moves[first + before].from;
      }
      keys[i] = *key(from);
      values[i] = *value(from);
    }
#pragma unroll
    for (int i = 0; i < kMovesAtOnce; ++i) {
      if (i >= count) continue;
      *key(moves[first + i].to) = keys[i];
      *value(moves[first + i].to) = values[i];
    }
  }
}

/// A thread has a component of layer z of sequence y.
__global__ void __launch_bounds__(kMoveThreads) move_elements(const MoveView a) {
  follow_previous();
  const MovedLayer& layer = a.layers[blockIdx.z];
  const int component = static_cast<int>(blockIdx.x) * kMoveThreads + static_cast<int>(threadIdx.x);
  if (component >= layer.components) return;
  if (layer.wide != 0) {
    move_component<float>(a, layer, a.sequences[blockIdx.y], component);
  } else {
    move_component<std::uint16_t>(a, layer, a.sequences[blockIdx.y], component);
  }
}

void launch_heads(LaunchList& list, const HeadsOfRows& arguments) {
  const int heads = arguments.query_heads + 2 * arguments.kv_heads;
  list.add(prepare_heads,
           {dim3(static_cast<unsigned>(arguments.step.rows),
                 static_cast<unsigned>((heads + kHeadsPerBlock - 1) / kHeadsPerBlock)),
            dim3(kHeadsPerBlock * kWarp)},
           arguments);
}

}  // namespace

void append_kv(LaunchList& list, const StepView& step, Tensor query, Tensor key, Tensor value, int query_heads,
               const Norm& query_norm, const Norm& key_norm, const Norm* value_norm, const Rope& rope,
               const KvLayer& kv) {
  HeadsOfRows arguments{};
  arguments.step = step;
  arguments.query = static_cast<float*>(query.data);
  arguments.key = static_cast<const float*>(key.data);
  arguments.value = static_cast<const float*>(value.data);
  arguments.query_scale = query_norm.scale;
  arguments.key_scale = key_norm.scale;
  arguments.value_scale = value_norm == nullptr ? nullptr : value_norm->scale;
  arguments.inverse_frequency = rope.inverse_frequency;
  arguments.key_offset = kv.key_offset;
  arguments.value_offset = kv.value_offset;
  arguments.query_stride = query.row_stride();
  arguments.key_stride = key.row_stride();
  arguments.value_stride = value.row_stride();
  arguments.query_heads = query_heads;
  arguments.kv_heads = kv.heads;
  arguments.head_dim = kv.head_dim;
  arguments.table = kv.table;
  arguments.wide = kv.type == KvType::f32 ? 1 : 0;
  arguments.query_epsilon = query_norm.epsilon;
  arguments.key_epsilon = key_norm.epsilon;
  arguments.value_epsilon = value_norm == nullptr ? 0.0F : value_norm->epsilon;
  launch_heads(list, arguments);
}

void prepare_queries(LaunchList& list, const StepView& step, Tensor query, int query_heads, const Norm& query_norm,
                     const Rope& rope) {
  HeadsOfRows arguments{};
  arguments.step = step;
  arguments.query = static_cast<float*>(query.data);
  arguments.query_scale = query_norm.scale;
  arguments.inverse_frequency = rope.inverse_frequency;
  arguments.query_stride = query.row_stride();
  arguments.query_heads = query_heads;
  arguments.head_dim = query.columns / query_heads;
  arguments.query_epsilon = query_norm.epsilon;
  launch_heads(list, arguments);
}

MovedLayer moved_layer(const KvLayer& kv) {
  return {kv.key_offset, kv.value_offset,        kv.table,
          kv.head_dim,   kv.heads * kv.head_dim, kv.type == KvType::f16 ? 0 : 1};
}

void move_kv(LaunchList& list, const MoveView& moves) {
  list.add(move_elements,
           {dim3(static_cast<unsigned>((moves.most_components + kMoveThreads - 1) / kMoveThreads),
                 static_cast<unsigned>(moves.sequence_count), static_cast<unsigned>(moves.layer_count)),
            dim3(kMoveThreads)},
           moves);
}

}  // namespace draftwerk::cuda
