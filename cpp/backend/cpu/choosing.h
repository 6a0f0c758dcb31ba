// The steps of cpp/backend/sampling.h, for logits wherever they lie: in whole rows (sampler.cc) or in lists of some
// tokens (choosing.cc).
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/sampler_kernels.h"

namespace draftwerk::cpu {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
inline constexpr Cut kKeepAll{kMinusInfinity, INT_MAX};

/// z of a logit; NaN stays NaN.
inline float scaled(float value, float scale) {
  const float z = value * scale;
  return FLT_MAX < z ? FLT_MAX : z;
}

/// What the noise of a row is drawn from.
inline NoiseKey noise_of(const ProposeRow& row) {
  return {row.sampling->seed, row.position + static_cast<std::int64_t>(row.drafts.size())};
}

/// Log of the sum of exp(z) of `mass` units of weight beside the largest z (sampling.h).
inline double log_normalizer(float top, std::uint64_t mass) {
  return static_cast<double>(top) + std::log(std::ldexp(static_cast<double>(mass), -kWeightFractionBits));
}

/// Sets what the candidates' values say of their probabilities, given the log of the sum of exp(z) over all tokens.
void set_probabilities(const SamplerKernels& kernels, const ProposeRow& row, double normalizer,
                       std::span<Candidate> candidates);

/// Steps 1 to 3. The tokens before a row are its history and the drafts before it, which have proved right if the row
/// counts at all; they are counted on top of the history, which several rows read at once.
/// find(token) is where the token's logit lies, null if it has none; changing(token, logit) is told before one changes.
template <typename Find, typename Changing>
void adjust_logits(const ProposeRow& row, Find&& find, Changing&& changing) {
  const SamplingParams& sampling = *row.sampling;
  const auto overwrite = [&](TokenId token, auto&& change) {
    float* logit = find(token);
    if (logit == nullptr) return;
    changing(token, *logit);
    *logit = change(*logit);
  };
  if (sampling.needs_history()) {
    const std::span<const TokenId> drafts = row.drafts;
    const auto penalize = [&](TokenId token, bool in_prompt, int in_output) {
      if (!in_prompt && in_output == 0) return;
      overwrite(token, [&](float logit) {
        logit = logit > 0.0F ? logit / sampling.repetition_penalty : logit * sampling.repetition_penalty;
        if (in_output > 0) {
          logit -= sampling.presence_penalty + sampling.frequency_penalty * static_cast<float>(in_output);
        }
        return logit;
      });
    };
    if (row.history != nullptr) {
      for (const auto& [token, count] : *row.history) {
        penalize(token, count.in_prompt,
                 count.in_output + static_cast<int>(std::count(drafts.begin(), drafts.end(), token)));
      }
    }
    for (std::size_t i = 0; i < drafts.size(); ++i) {
      const auto seen = drafts.first(i);
      if (std::find(seen.begin(), seen.end(), drafts[i]) != seen.end()) continue;
      if (row.history != nullptr && row.history->contains(drafts[i])) continue;
      penalize(drafts[i], false, static_cast<int>(std::count(drafts.begin(), drafts.end(), drafts[i])));
    }
  }
  for (const auto& entry : sampling.logit_bias) {
    overwrite(entry.first, [bias = entry.second](float logit) { return logit + bias; });
  }
  if (static_cast<std::int64_t>(row.drafts.size()) < row.banned_tokens) {
    for (const TokenId token : row.banned) overwrite(token, [](float) { return kMinusInfinity; });
  }
}

/// Integers in the order of the floats they stand for; neighbours are neighbours.
inline std::int64_t sort_key(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}

inline float from_sort_key(std::int64_t key) {
  const auto bits = static_cast<std::int32_t>(key);
  return std::bit_cast<float>(bits >= 0 ? bits : bits ^ 0x7FFFFFFF);
}

struct Threshold {
  float value = 0.0F;
  int above = 0;       ///< how many lie above it
  bool exact = false;  ///< at most k values are at least `value`: none needs to be told from its equals
};

/// The threshold that at least k values reach, k > 0, by bisection over all floats from `low` (which k or more
/// reach, or which is the lowest number there is) to `high` (the largest value). Counting needs neither memory nor
/// order, and stops as soon as some float separates k values from the rest.
template <typename CountAtLeast>
Threshold find_threshold(int k, float low, float high, CountAtLeast&& count_at_least) {
  if (count_at_least(low) <= k) return {low, 0, true};
  std::int64_t reached = sort_key(low);
  std::int64_t missed = sort_key(high) + 1;
  int above = 0;
  while (missed - reached > 1) {
    const std::int64_t middle = reached + (missed - reached) / 2;
    const int count = count_at_least(from_sort_key(middle));
    if (count == k) return {from_sort_key(middle), 0, true};
    if (count > k) {
      reached = middle;
    } else {
      missed = middle;
      above = count;
    }
  }
  return {from_sort_key(reached), above, false};
}

/// A row whose contenders are found in place.
struct WholeRow {
  const SamplerKernels& kernels;
  const LogitRow& row;

  [[nodiscard]] std::uint64_t mass(Cut cut, float top) const { return kernels.row_mass(row, cut, top); }
  [[nodiscard]] Winner best(Cut cut, NoiseKey noise) const { return kernels.row_best(row, cut, noise); }
};

/// A row whose contenders are in a list.
struct ShortList {
  const SamplerKernels& kernels;
  LogitList list;

  [[nodiscard]] std::uint64_t mass(Cut cut, float top) const { return kernels.list_mass(list, cut, top); }
  [[nodiscard]] Winner best(Cut cut, NoiseKey noise) const { return kernels.list_best(list, cut, noise); }
};

/// top_p, min_p and the noise, over what `cut` left. The nucleus is never built: it is a prefix of the sorted tokens,
/// so if the winner of all tokens lies inside, it is the winner of the nucleus, and it lies inside if the mass before
/// it is small enough. Otherwise it and everything behind it are out, and the rest competes again: rarely more than
/// once, as the first winner is outside with probability 1 - top_p at most.
/// No token wins (INT_MAX) if `cut` keeps none. kKeepAll keeps minus infinity too: where there is nothing above it, the
/// lowest such token wins.
template <typename Contenders>
Winner choose_among(const Contenders& contenders, Cut cut, const SamplingParams& sampling, float top, NoiseKey noise) {
  const bool nucleus = sampling.top_p < 1.0F;
  std::uint64_t allowed = 0;
  if (nucleus) {
    const double total = static_cast<double>(contenders.mass(cut, top));
    allowed = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(static_cast<double>(sampling.top_p) * total));
  }
  // What ranks before a token is the same with and without min_p.
  if (sampling.min_p > 0.0F) {
    const float floor = top + std::log(sampling.min_p);
    if (floor > cut.value) cut = {floor, INT_MAX};
  }
  while (true) {
    const Winner winner = contenders.best(cut, noise);
    if (winner.token == INT_MAX || !nucleus) return winner;
    const Cut before{winner.z, winner.token - 1};
    if (contenders.mass(before, top) < allowed) return winner;
    cut = before;
  }
}

/// Up to this many tokens are copied, where that is less work than passing over all of them again.
inline constexpr int kListCapacity = 2048;
inline constexpr Candidate kNoCandidate{-1, kMinusInfinity};

inline int chunks_of(const LogitRow& row) { return (row.vocabulary + kLogitChunk - 1) / kLogitChunk; }

/// The largest logit of a row; minus infinity if there is none.
float row_maximum(const LogitRow& row);

/// Step 4 for a whole row.
Candidate largest(const LogitRow& row);

/// Keeps the k tokens of the largest z of a row, given a bound that at least k tokens reach, or the lowest number.
Cut row_cut(const SamplerKernels& kernels, const LogitRow& row, int k, float bound);

/// Puts the k tokens of the largest z of a row, k <= kListCapacity, into lists of that capacity, perhaps among others.
/// Returns how many there are.
int collect_top(const SamplerKernels& kernels, const LogitRow& row, int k, float* z, std::int32_t* tokens);

/// Keeps the k tokens of the largest z, of which `top` is the largest.
Cut list_cut(const SamplerKernels& kernels, const LogitList& list, int k, float top);

/// Step 4 for the list of `count` tokens with their logits `l`: the candidates, as Backend::propose defines them. Those
/// in `l` become minus infinity.
void choose_greedy(const SamplerKernels& kernels, float* l, const std::int32_t* tokens, int count,
                   std::span<Candidate> candidates);

/// Steps 6 to 9 likewise, for the z of step 5.
void choose_sampled(const SamplerKernels& kernels, float* z, const std::int32_t* tokens, int count,
                    const SamplingParams& sampling, NoiseKey noise, std::span<Candidate> candidates);

}  // namespace draftwerk::cpu
