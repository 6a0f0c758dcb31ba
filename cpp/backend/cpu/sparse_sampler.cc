#include "backend/cpu/sparse_sampler.h"

#include <algorithm>
#include <cstddef>

#include "backend/cpu/choosing.h"

namespace draftwerk::cpu {
namespace {

/// Token 0 if no logit is finite, as of a whole row.
TokenId choose_greedy(const SamplerKernels& kernels, const Candidates& list) {
  const float top = kernels.maximum(list.z, list.count);
  if (!(top > kMinusInfinity)) return 0;
  TokenId lowest = INT_MAX;
  for (int first = 0; first < list.count; first += kLogitChunk) {
    const int last = std::min(first + kLogitChunk, list.count);
    if (kernels.maximum(list.z + first, last - first) != top) continue;
    for (int i = first; i < last; ++i) {
      if (list.z[i] == top) lowest = std::min(lowest, list.tokens[i]);
    }
  }
  return lowest;
}

TokenId choose(const SamplerKernels& kernels, const SparseLogitRows& logits, std::int64_t output,
               const ProposeRow& row) {
  const SamplingParams& sampling = *row.sampling;
  const VerifyGroup group{0, row.drafts, row.position, row.sampling, row.history, row.banned, row.banned_tokens};
  const auto index = static_cast<int>(row.drafts.size());
  adjust_logits(group, index, [&](TokenId token) { return logits.find(output, token); }, [](TokenId, float) {});

  float* z = logits.values_of(output);
  const Candidates list{z, logits.tokens_of(output), logits.count};
  if (sampling.temperature <= 0.0F) return choose_greedy(kernels, list);
  const float scale = 1.0F / sampling.temperature;
  for (int i = 0; i < list.count; ++i) z[i] = scaled(z[i], scale);
  const float top = kernels.maximum(z, list.count);
  if (!(top > kMinusInfinity)) return 0;
  Cut cut = kKeepAll;
  if (sampling.top_k > 0 && sampling.top_k < list.count) cut = list_cut(kernels, list, sampling.top_k, -FLT_MAX, top);
  const TokenId token =
      choose_among(ShortList{kernels, list}, cut, sampling, top, {sampling.seed, row.position + index});
  return token == INT_MAX ? 0 : token;
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
                    std::span<TokenId> tokens, WorkerPool& pool) {
  pool.parallel_for(static_cast<std::int64_t>(rows.size()), 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      tokens[at] = choose(kernels, logits, i, rows[at]);
    }
  });
}

}  // namespace draftwerk::cpu
