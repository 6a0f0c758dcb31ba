// The product of a head with the states of a step's output rows, and the largest logit of every chunk.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

inline constexpr std::int64_t kPanelsPerChunk = kLogitChunk / kPanel;

/// Computes logits.values for `outputs` rows of `x` by `multiply`, MatmulKernels::matmul or matmul_coarse, and
/// logits.chunk_max by finish(values, row, first, count), which is called when the `count` values of output row `row`
/// from token `first` on are there, may change them, and gives the largest.
template <typename Finish>
void multiply_head(WorkerPool& pool, decltype(MatmulKernels::matmul) multiply, const PackedMatrix& head,
                   const Activations& x, int outputs, const LogitRows& logits, Finish&& finish) {
  constexpr std::int64_t kChunkBytes = kLogitChunk * sizeof(float);
  constexpr std::int64_t kBytesTogether = 128 * 1024;  // a quarter of an L2 of 512 KiB
  const std::int64_t panels = panel_count(head.rows);
  const std::int64_t chunks = (panels + kPanelsPerChunk - 1) / kPanelsPerChunk;
  // Chunks that one product covers: so many that its start (nothing is prefetched before the first panel) does not
  // count, so few that their logits are still in cache when the maxima are taken.
  const std::int64_t together = std::clamp<std::int64_t>(kBytesTogether / (outputs * kChunkBytes), 1, 16);
  pool.parallel_for(chunks, 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t chunk = begin; chunk < end;) {
      const std::int64_t past = std::min(chunk + together, end);
      multiply(head, chunk * kPanelsPerChunk, std::min(past * kPanelsPerChunk, panels), x, outputs, logits.values,
               logits.stride);
      for (; chunk < past; ++chunk) {
        const std::int64_t first = chunk * kLogitChunk;
        const auto count = static_cast<int>(std::min<std::int64_t>(kLogitChunk, head.rows - first));
        for (int row = 0; row < outputs; ++row) {
          logits.chunk_max[row * logits.chunk_stride + chunk] =
              finish(logits.values + row * logits.stride + first, row, first, count);
        }
      }
    }
  });
}

/// The logits themselves.
inline void compute_logits(WorkerPool& pool, const MatmulKernels& matmul, const LayerKernels& layer,
                           const PackedMatrix& head, const Activations& x, int outputs, float softcap,
                           const LogitRows& logits) {
  multiply_head(pool, matmul.matmul, head, x, outputs, logits,
                [&](float* values, int /*row*/, std::int64_t /*first*/, int count) {
                  return layer.softcap_max(values, count, softcap);
                });
}

}  // namespace draftwerk::cpu
