// The steps of cpp/backend/sampling.h, for logits wherever they lie: in whole rows (sampler.cc) or in lists of some
// tokens (sparse_sampler.cc).
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

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

/// Steps 1 to 3. The tokens before row `row` of a group are its history and the drafts before the row, which have
/// proved right if the row counts at all; they are counted on top of the history, which several rows read at once.
/// find(token) is where the token's logit lies, null if it has none; changing(token, logit) is told before one changes.
template <typename Find, typename Changing>
void adjust_logits(const VerifyGroup& group, int row, Find&& find, Changing&& changing) {
  const SamplingParams& sampling = *group.sampling;
  const auto overwrite = [&](TokenId token, auto&& change) {
    float* logit = find(token);
    if (logit == nullptr) return;
    changing(token, *logit);
    *logit = change(*logit);
  };
  if (sampling.needs_history()) {
    const auto drafts = group.drafts.first(static_cast<std::size_t>(row));
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
    if (group.history != nullptr) {
      for (const auto& [token, count] : *group.history) {
        penalize(token, count.in_prompt,
                 count.in_output + static_cast<int>(std::count(drafts.begin(), drafts.end(), token)));
      }
    }
    for (std::size_t i = 0; i < drafts.size(); ++i) {
      const auto seen = drafts.first(i);
      if (std::find(seen.begin(), seen.end(), drafts[i]) != seen.end()) continue;
      if (group.history != nullptr && group.history->contains(drafts[i])) continue;
      penalize(drafts[i], false, static_cast<int>(std::count(drafts.begin(), drafts.end(), drafts[i])));
    }
  }
  for (const auto& entry : sampling.logit_bias) {
    overwrite(entry.first, [bias = entry.second](float logit) { return logit + bias; });
  }
  if (row < group.banned_tokens) {
    for (const TokenId token : group.banned) overwrite(token, [](float) { return kMinusInfinity; });
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

/// Keeps the k tokens of the largest z, `low` and `high` as above.
inline Cut list_cut(const SamplerKernels& kernels, const Candidates& list, int k, float low, float high) {
  const Threshold found = find_threshold(
      k, low, high, [&](float threshold) { return kernels.count_at_least(list.z, list.count, 1.0F, threshold); });
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
  Candidates list;

  [[nodiscard]] std::uint64_t mass(Cut cut, float top) const { return kernels.list_mass(list, cut, top); }
  [[nodiscard]] Winner best(Cut cut, NoiseKey noise) const { return kernels.list_best(list, cut, noise); }
};

/// top_p, min_p and the noise, over what `cut` left. The nucleus is never built: it is a prefix of the sorted tokens,
/// so if the winner of all tokens lies inside, it is the winner of the nucleus, and it lies inside if the mass before
/// it is small enough. Otherwise it and everything behind it are out, and the rest competes again: rarely more than
/// once, as the first winner is outside with probability 1 - top_p at most.
template <typename Contenders>
TokenId choose_among(const Contenders& contenders, Cut cut, const SamplingParams& sampling, float top, NoiseKey noise) {
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
    if (winner.token == INT_MAX || !nucleus) return winner.token;
    const Cut before{winner.z, winner.token - 1};
    if (contenders.mass(before, top) < allowed) return winner.token;
    cut = before;
  }
}

}  // namespace draftwerk::cpu
