#include "backend/cpu/choosing.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace draftwerk::cpu {
namespace {

/// Takes a token out of the running.
void exclude(TokenId token, float* z, const std::int32_t* tokens, int count) {
  z[std::find(tokens, tokens + count, token) - tokens] = kMinusInfinity;
}

/// Of the tokens with z == value, the one that is the n-th in id order, n >= 1.
TokenId nth_equal(const LogitRow& row, float value, int n) {
  for (int token = 0; token < row.vocabulary; ++token) {
    if (token % kLogitChunk == 0 && !(scaled(row.chunk_max[token / kLogitChunk], row.scale) >= value)) {
      token += kLogitChunk - 1;
      continue;
    }
    if (scaled(row.values[token], row.scale) == value && --n == 0) return token;
  }
  return INT_MAX;
}

}  // namespace

float row_maximum(const LogitRow& row) {
  float top = kMinusInfinity;
  for (int c = 0; c < chunks_of(row); ++c) top = row.chunk_max[c] > top ? row.chunk_max[c] : top;
  return top;
}

Candidate largest(const LogitRow& row) {
  const float top = row_maximum(row);
  if (!(top > kMinusInfinity)) return kNoCandidate;
  for (int c = 0; c < chunks_of(row); ++c) {
    if (row.chunk_max[c] != top) continue;
    const int end = std::min((c + 1) * kLogitChunk, row.vocabulary);
    for (int token = c * kLogitChunk; token < end; ++token) {
      if (row.values[token] == top) return {token, top};
    }
  }
  return kNoCandidate;
}

Cut row_cut(const SamplerKernels& kernels, const LogitRow& row, int k, float bound) {
  const float top = scaled(row_maximum(row), row.scale);
  const Threshold found =
      find_threshold(k, bound, top, [&](float threshold) { return kernels.row_count_at_least(row, threshold); });
  return {found.value, found.exact ? INT_MAX : nth_equal(row, found.value, k - found.above)};
}

int collect_top(const SamplerKernels& kernels, const LogitRow& row, int k, float* z, std::int32_t* tokens) {
  // The k-th largest chunk maximum bounds the k-th largest token from below, if there are so many chunks.
  float bound = -FLT_MAX;
  const float top = scaled(row_maximum(row), row.scale);
  if (k <= chunks_of(row) && top > -FLT_MAX) {
    bound = find_threshold(k, -FLT_MAX, top, [&](float threshold) {
              return kernels.count_at_least(row.chunk_max, chunks_of(row), row.scale, threshold);
            }).value;
  }
  const int count = kernels.row_collect(row, {bound, INT_MAX}, kListCapacity, z, tokens);
  if (count <= kListCapacity) return count;
  return kernels.row_collect(row, row_cut(kernels, row, k, bound), kListCapacity, z, tokens);
}

Cut list_cut(const SamplerKernels& kernels, const LogitList& list, int k, float top) {
  const Threshold found = find_threshold(
      k, -FLT_MAX, top, [&](float threshold) { return kernels.count_at_least(list.z, list.count, 1.0F, threshold); });
  if (found.exact) return {found.value, INT_MAX};
  // Of those that equal it, the lowest ids; there are rarely two.
  const int wanted = k - found.above;
  std::int64_t last = -1;
  std::int64_t beyond = INT_MAX;  // at least `wanted` ids of equals are not above this one
  while (beyond - last > 1) {
    const std::int64_t middle = last + (beyond - last) / 2;
    int count = 0;
    for (int i = 0; i < list.count; ++i)
      count += static_cast<int>(list.z[i] == found.value && list.tokens[i] <= middle);
    (count < wanted ? last : beyond) = middle;
  }
  return {found.value, static_cast<std::int32_t>(beyond)};
}

void set_probabilities(const SamplerKernels& kernels, const ProposeRow& row, double normalizer,
                       std::span<Candidate> candidates) {
  const NoiseKey noise = noise_of(row);
  for (Candidate& candidate : candidates) {
    if (candidate.token < 0 || !(candidate.value > kMinusInfinity)) continue;
    float z = candidate.value;
    if (row.sampling->temperature > 0.0F) {
      z -= kernels.gumbel(noise_word(noise.seed, noise.position, candidate.token));
    }
    candidate.probability = static_cast<float>(std::exp(std::min(static_cast<double>(z) - normalizer, 0.0)));
  }
}

void choose_greedy(const SamplerKernels& kernels, float* l, const std::int32_t* tokens, int count,
                   std::span<Candidate> candidates) {
  std::fill(candidates.begin(), candidates.end(), kNoCandidate);
  for (Candidate& candidate : candidates) {
    const float top = kernels.maximum(l, count);
    if (!(top > kMinusInfinity)) return;
    TokenId lowest = INT_MAX;
    for (int first = 0; first < count; first += kLogitChunk) {
      const int last = std::min(first + kLogitChunk, count);
      if (kernels.maximum(l + first, last - first) != top) continue;
      for (int i = first; i < last; ++i) {
        if (l[i] == top) lowest = std::min(lowest, tokens[i]);
      }
    }
    candidate = {lowest, top};
    exclude(lowest, l, tokens, count);
  }
}

void choose_sampled(const SamplerKernels& kernels, float* z, const std::int32_t* tokens, int count,
                    const SamplingParams& sampling, NoiseKey noise, std::span<Candidate> candidates) {
  std::fill(candidates.begin(), candidates.end(), kNoCandidate);
  // Each candidate is one of the top_k when those before it are gone: no more than these are ever looked at.
  const std::int64_t enough = sampling.top_k + static_cast<std::int64_t>(candidates.size()) - 1;
  float few_z[kListCapacity];
  std::int32_t few_tokens[kListCapacity];
  if (sampling.top_k > 0 && enough < count && enough <= kListCapacity) {
    const LogitList all{z, tokens, count};
    const float top = kernels.maximum(z, count);
    if (!(top > kMinusInfinity)) return;
    const Cut cut = list_cut(kernels, all, static_cast<int>(enough), top);
    count = kernels.list_collect(all, cut, few_z, few_tokens);
    z = few_z;
    tokens = few_tokens;
  }
  const LogitList list{z, tokens, count};
  for (Candidate& candidate : candidates) {
    const float top = kernels.maximum(z, count);
    if (!(top > kMinusInfinity)) return;
    Cut cut = kKeepAll;
    if (sampling.top_k > 0 && sampling.top_k < count) cut = list_cut(kernels, list, sampling.top_k, top);
    const Winner winner = choose_among(ShortList{kernels, list}, cut, sampling, top, noise);
    if (winner.token == INT_MAX) return;
    candidate = {winner.token, winner.score};
    exclude(winner.token, z, tokens, count);
  }
}

}  // namespace draftwerk::cpu
