// Attention of a step's rows over the pages of their sequences.
//
// Positions are cut into chunks of kAttentionChunk, and chunks are taken together in spans, both by absolute position
// alone. What a row takes from a chunk (the largest score, the sum of weights, the weighted values) is a function of
// the row and the chunk; a span adds up its chunks in ascending order, and a row its spans. Whether a block goes
// through all spans of its rows, or each has a block of its own whose result goes to memory, changes no bit of that.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/operands.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

inline constexpr int kAttentionChunk = 128;

// A layer that sees everything cuts its positions into spans that grow with the context: each is a block's work where
// one sequence has to occupy the device, and each costs a partial result of every row. 48 spans of a context of 8k, 88
// of 32k, 136 of 128k. Spans of a layer with a window are single chunks: it has few.
inline constexpr int kShortSpans = 32;   ///< of one chunk: up to position 4,096
inline constexpr int kMiddleSpans = 56;  ///< of four: up to position 32,768
inline constexpr int kMiddleSpanChunks = 4;
inline constexpr int kLongSpanChunks = 16;

/// The span of a chunk.
__host__ __device__ constexpr int span_of_chunk(int chunk, bool windowed) {
  if (windowed || chunk < kShortSpans) return chunk;
  const int middle = (chunk - kShortSpans) / kMiddleSpanChunks;
  if (middle < kMiddleSpans) return kShortSpans + middle;
  return kShortSpans + kMiddleSpans + (chunk - kShortSpans - kMiddleSpans * kMiddleSpanChunks) / kLongSpanChunks;
}
/// The first chunk of a span.
__host__ __device__ constexpr int first_chunk_of_span(int span, bool windowed) {
  if (windowed || span < kShortSpans) return span;
  if (span < kShortSpans + kMiddleSpans) return kShortSpans + (span - kShortSpans) * kMiddleSpanChunks;
  return kShortSpans + kMiddleSpans * kMiddleSpanChunks + (span - kShortSpans - kMiddleSpans) * kLongSpanChunks;
}

class Attention {
 public:
  /// Allocates `scratch_bytes` for partial results. What does not fit is computed without, which takes longer where few
  /// sequences are long. `multiprocessors`: of the device.
  Attention(int multiprocessors, std::size_t scratch_bytes);

  /// Backend::attend for head sizes of 32, 64, 128, 256 and 512, and up to 16 query heads for a key/value head. Data of
  /// tensors is aligned to 8 bytes and strides are even. Does not write the outputs of padding rows. Leaves the output
  /// as operands, if `left` says where.
  void attend(LaunchList& list, const StepView& step, Tensor query, int query_heads, const KvLayer& kv,
              const Visibility& sees, float scale, Tensor output, const OperandSink& left = {}) const;

 private:
  int multiprocessors_;
  std::size_t scratch_bytes_;
  DeviceMemory scratch_;
};

}  // namespace draftwerk::cuda
