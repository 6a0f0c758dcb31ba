#include "backend/cpu/sparse_sampler.h"

#include <algorithm>
#include <cstddef>

#include "backend/cpu/choosing.h"

namespace draftwerk::cpu {
namespace {

void choose(const SamplerKernels& kernels, const SparseLogitRows& logits, std::int64_t output, const ProposeRow& row,
            std::span<Candidate> candidates) {
  const SamplingParams& sampling = *row.sampling;
  adjust_logits(row, [&](TokenId token) { return logits.find(output, token); }, [](TokenId, float) {});

  float* z = logits.values_of(output);
  const std::int32_t* tokens = logits.tokens_of(output);
  if (sampling.temperature > 0.0F) {
    const float scale = 1.0F / sampling.temperature;
    for (int i = 0; i < logits.count; ++i) z[i] = scaled(z[i], scale);
  }
  const float top = kernels.maximum(z, logits.count);
  const double normalizer = log_normalizer(top, kernels.list_mass({z, tokens, logits.count}, kKeepAll, top));
  if (sampling.temperature > 0.0F) {
    choose_sampled(kernels, z, tokens, logits.count, sampling, noise_of(row), candidates);
  } else {
    choose_greedy(kernels, z, tokens, logits.count, candidates);
  }
  set_probabilities(kernels, row, normalizer, candidates);
  // As of a whole row.
  if (candidates[0].token < 0) candidates[0].token = 0;
}

}  // namespace

float* SparseLogitRows::find(std::int64_t output, TokenId token) const {
  if (token < 0 || token >= vocabulary) return nullptr;
  const std::int32_t row = row_of[token];
  if (row < 0) return nullptr;
  if (chosen == nullptr) return values_of(output) + row;
  const std::int32_t* first = chosen + output * clusters;
  const std::int32_t* at = std::lower_bound(first, first + clusters, row / cluster_size);
  if (at == first + clusters || *at != row / cluster_size) return nullptr;
  return values_of(output) + (at - first) * cluster_size + row % cluster_size;
}

void propose_sparse(const SamplerKernels& kernels, const SparseLogitRows& logits, std::span<const ProposeRow> rows,
                    int count, std::span<Candidate> candidates, WorkerPool& pool) {
  const auto each = static_cast<std::size_t>(count);
  pool.parallel_for(static_cast<std::int64_t>(rows.size()), 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      choose(kernels, logits, i, rows[at], candidates.subspan(at * each, each));
    }
  });
}

}  // namespace draftwerk::cpu
