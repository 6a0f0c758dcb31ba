#include "backend/cuda/attention.h"

#include <algorithm>
#include <numbers>
#include <stdexcept>
#include <string>

#include "backend/cuda/attention_span.cuh"
#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {
namespace {

/// Attention of up to kTiles * 16 queries: consecutive rows of a segment, each with all heads that share key/value head
/// blockIdx.y. Block z takes the z-th span that they see something of, or each block takes all of them.
///
/// For a chunk, each warp takes the scores of one page: keys come from memory to registers as operand B, queries from
/// shared memory as operand A. Then the block finds the largest score of each query and puts weights to shared memory,
/// as float16, again as operand A; then each warp adds up its own components of the values of all pages, which come
/// from memory to registers too. With two blocks on a multiprocessor 64 KiB of keys or values are under way.
///
/// Bound by the bytes of keys and values: a row over 32,768 positions of one head of 512 (67 MB) takes 88 blocks about
/// 20 us on an H200, of which bandwidth alone explains 16.
///
/// A row of a tree sees keys and values in other slots than those of its positions, from the first position on at which
/// the paths of the block's rows part. There each row's own are brought to the places that its positions have, and
/// multiplied by all 16 queries of a tile, of which those of the row keep the result: the arithmetic is that of a
/// chain, bit by bit.
template <int kHeadDim, int kTiles, typename Element>
__global__ void __launch_bounds__(kAttentionThreads, kTiles == 1 ? 2 : 1) attend_spans(const Attend a) {
  follow_previous();
  AttentionBlock<kHeadDim, kTiles, Element> block(a);
  if (!block.find_rows()) return;
  block.find_positions();
  if (block.from() >= block.to()) return;
  const bool windowed = a.window > 0;
  int span = span_of_chunk(block.from() / kAttentionChunk, windowed);
  int last_span = span_of_chunk((block.to() - 1) / kAttentionChunk, windowed);
  if (a.slots > 0) {
    span += static_cast<int>(blockIdx.z);
    if (span > last_span) return;
    last_span = span;
  }
  int chunk = max(block.from() / kAttentionChunk, first_chunk_of_span(span, windowed));
  const int past_chunk = min((block.to() - 1) / kAttentionChunk + 1, first_chunk_of_span(last_span + 1, windowed));
  block.begin(chunk);
  for (bool first = true; span <= last_span; ++span, first = false) {
    const int past = min(past_chunk, first_chunk_of_span(span + 1, windowed));
    // A span of one chunk is added as that, without a result of its own.
    const bool apart = !first && past - chunk > 1;
    if (apart) block.park();
    for (; chunk < past; ++chunk) block.add_chunk(chunk, past_chunk);
    if (apart) block.merge_parked();
  }
  if (a.slots > 0) {
    block.store_partial(last_span % a.slots);
  } else {
    block.store();
  }
}

/// Adds up the spans of row blockIdx.x and head blockIdx.y, four components a thread. Bound by latency: partial results
/// are read back from the second-level cache, 5 us for 88 of them.
__global__ void merge_spans(const Attend a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  if (a.step.row_segment[row] < 0) return;
  const bool windowed = a.window > 0;
  const int end = a.end(row);
  const int begin = a.begin(row);
  if (begin >= end) return;
  const int first_span = span_of_chunk(begin / kAttentionChunk, windowed);
  const int past_span = span_of_chunk((end - 1) / kAttentionChunk, windowed) + 1;
  const int head_dim = a.output_columns / a.query_heads;
  const int component = static_cast<int>(threadIdx.x) * 4;
  const bool active = component < head_dim;
  const auto place = [&](int span) {
    return (std::int64_t{span % a.slots} * a.step.rows + row) * a.query_heads + static_cast<int>(blockIdx.y);
  };
  float maximum = kNoScore;
  float sum = 0.0F;
  float4 total{0.0F, 0.0F, 0.0F, 0.0F};
  for (int first = first_span; first < past_span; first += kWarp) {
    // A lane finds the factors of one span: they depend on the largest score up to the one before.
    const int count = min(past_span - first, kWarp);
    float2 state{kNoScore, 0.0F};
    if (lane() < count) state = a.partial_states[place(first + lane())];
    float up_to = fmaxf(maximum, state.x);
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const float other = __shfl_up_sync(kAllLanes, up_to, static_cast<unsigned>(delta));
      if (lane() >= delta) up_to = fmaxf(up_to, other);
    }
    const float previous = __shfl_up_sync(kAllLanes, up_to, 1);
    const MergeFactors own = merge_factors(lane() == 0 ? maximum : previous, state.x);
    maximum = __shfl_sync(kAllLanes, up_to, kWarp - 1);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const MergeFactors factors{__shfl_sync(kAllLanes, own.old, i), __shfl_sync(kAllLanes, own.fresh, i)};
      sum = merged(sum, __shfl_sync(kAllLanes, state.y, i), factors);
      if (!active) continue;
      const float4 fresh =
          __ldcg(reinterpret_cast<const float4*>(a.partial_values + place(first + i) * head_dim + component));
      total.x = merged(total.x, fresh.x, factors);
      total.y = merged(total.y, fresh.y, factors);
      total.z = merged(total.z, fresh.z, factors);
      total.w = merged(total.w, fresh.w, factors);
    }
  }
  if (!active) return;
  const float factor = 1.0F / sum;
  const int column = static_cast<int>(blockIdx.y) * head_dim + component;
  float* to = a.output + static_cast<std::int64_t>(row) * a.output_stride + column;
  const float2 low{total.x * factor, total.y * factor};
  const float2 high{total.z * factor, total.w * factor};
  *reinterpret_cast<float2*>(to) = low;
  *reinterpret_cast<float2*>(to + 2) = high;
  if (a.left.data == nullptr) return;
  leave_pair(a.left, row, column, low.x, low.y);
  leave_pair(a.left, row, column + 2, high.x, high.y);
}

struct Kernel {
  void (*function)(Attend);
  std::size_t shared_bytes;
};

// Tiles of a block that is not for decoding alone; those that it has no queries for cost nothing. With four, heads of
// 512 would have more running values than registers.
constexpr int most_tiles(int head_dim) { return head_dim == 512 ? 3 : 4; }

/// One tile, or the most. Pages of float32 are for tests, and have one kernel.
template <int kHeadDim, typename Element>
Kernel kernel_of(int tiles) {
  if constexpr (sizeof(Element) == 2) {
    if (tiles == 1) return {attend_spans<kHeadDim, 1, Element>, sizeof(AttentionShared<kHeadDim, 1>)};
  }
  constexpr int kTiles = most_tiles(kHeadDim);
  return {attend_spans<kHeadDim, kTiles, Element>, sizeof(AttentionShared<kHeadDim, kTiles>)};
}
template <typename Element>
Kernel kernel_of(int head_dim, int tiles) {
  switch (head_dim) {
    case 32:
      return kernel_of<32, Element>(tiles);
    case 64:
      return kernel_of<64, Element>(tiles);
    case 128:
      return kernel_of<128, Element>(tiles);
    case 256:
      return kernel_of<256, Element>(tiles);
    case 512:
      return kernel_of<512, Element>(tiles);
    default:
      throw std::logic_error("attention with heads of " + std::to_string(head_dim) +
                             " components; 32, 64, 128, 256 and 512 are possible");
  }
}
Kernel kernel_of(int head_dim, KvType type, int tiles) {
  return type == KvType::f16 ? kernel_of<std::uint16_t>(head_dim, tiles) : kernel_of<float>(head_dim, tiles);
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Spans that the rows of a block can see something of, at most.
int most_spans(int context, int window, int block_rows) {
  const int all = span_of_chunk((context - 1) / kAttentionChunk, window > 0) + 1;
  if (window == 0) return all;
  return std::min(all, (window + block_rows - 1 + kAttentionChunk - 2) / kAttentionChunk + 1);
}

}  // namespace

Attention::Attention(int multiprocessors, std::size_t scratch_bytes)
    : multiprocessors_(multiprocessors), scratch_bytes_(scratch_bytes), scratch_(DeviceMemory::of(scratch_bytes)) {
  for (const int head_dim : {32, 64, 128, 256, 512}) {
    for (const KvType type : {KvType::f16, KvType::f32}) {
      for (const int tiles : {1, most_tiles(head_dim)}) {
        const Kernel kernel = kernel_of(head_dim, type, tiles);
        allow_shared(kernel.function, kernel.shared_bytes);
      }
    }
  }
}

void Attention::attend(LaunchList& list, const StepView& step, Tensor query, int query_heads, const KvLayer& kv,
                       const Visibility& sees, float scale, Tensor output, const OperandSink& left) const {
  const int group = query_heads / kv.heads;
  if (query_heads % kv.heads != 0 || group > kTileQueries || query.columns != query_heads * kv.head_dim ||
      output.columns != query.columns) {
    throw std::logic_error("attention of heads that do not match");
  }
  // How many rows share a block changes no bit of them.
  const int segment_rows = ceil_div(step.rows, step.segment_count);
  const int tiles = kv.type == KvType::f16 && segment_rows * group <= kTileQueries ? 1 : most_tiles(kv.head_dim);
  Attend arguments{};
  arguments.step = step;
  arguments.query = static_cast<const float*>(query.data);
  arguments.output = static_cast<float*>(output.data);
  arguments.left = left;
  arguments.key_offset = kv.key_offset;
  arguments.value_offset = kv.value_offset;
  arguments.query_stride = query.row_stride();
  arguments.output_stride = output.row_stride();
  arguments.output_columns = output.columns;
  arguments.table = kv.table;
  arguments.query_heads = query_heads;
  arguments.group = group;
  arguments.window = sees.window;
  arguments.own = sees.own ? 1 : 0;
  arguments.block_rows = tiles * kTileQueries / group;
  arguments.scale = scale * std::numbers::log2e_v<float>;

  // Nor does whether its spans have blocks of their own: they get them where there are too few blocks otherwise.
  const int row_blocks = step.rows / arguments.block_rows + step.segment_count;
  const int spans = most_spans(step.context, sees.window, arguments.block_rows);
  const auto results =
      static_cast<std::size_t>(spans) * static_cast<std::size_t>(step.rows) * static_cast<std::size_t>(query_heads);
  const std::size_t value_bytes = results * static_cast<std::size_t>(kv.head_dim) * sizeof(float);
  const bool split =
      spans > 1 && row_blocks * kv.heads < multiprocessors_ && value_bytes + results * sizeof(float2) <= scratch_bytes_;
  if (split) {
    arguments.slots = spans;
    arguments.partial_values = static_cast<float*>(scratch_.get());
    arguments.partial_states = reinterpret_cast<float2*>(static_cast<std::byte*>(scratch_.get()) + value_bytes);
  }
  const Kernel kernel = kernel_of(kv.head_dim, kv.type, tiles);
  list.add(kernel.function,
           {dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(kv.heads),
                 static_cast<unsigned>(split ? spans : 1)),
            dim3(kAttentionThreads), kernel.shared_bytes},
           arguments);
  if (!split) return;
  list.add(merge_spans,
           {dim3(static_cast<unsigned>(step.rows), static_cast<unsigned>(query_heads)),
            dim3(static_cast<unsigned>(std::max(kv.head_dim / 4, kWarp)))},
           arguments);
}

}  // namespace draftwerk::cuda
