#include "backend/reference_sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <limits>

#include "backend/cpu/sampler_kernels.h"

namespace draftwerk {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr Candidate kNone{-1, kMinusInfinity};

struct Entry {
  float z = 0.0F;
  TokenId token = 0;
};

bool ranks_before(const Entry& a, const Entry& b) { return a.z > b.z || (a.z == b.z && a.token < b.token); }

/// Softmax weight of z in units of 2^-40.
std::uint64_t weight(float z, float top) { return cpu::portable::kSamplerKernels.weight(z - top); }

std::uint64_t mass(const std::vector<Entry>& entries, float top) {
  std::uint64_t sum = 0;
  for (const Entry& entry : entries) sum += weight(entry.z, top);
  return sum;
}

std::vector<Entry> sorted_entries(std::span<const float> z) {
  std::vector<Entry> entries(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) entries[i] = {z[i], static_cast<TokenId>(i)};
  std::sort(entries.begin(), entries.end(), ranks_before);
  return entries;
}

/// min(l * scale, FLT_MAX), minus infinity for NaN.
std::vector<float> scaled(std::span<const float> logits, float scale) {
  std::vector<float> z(logits.begin(), logits.end());
  for (float& x : z) x = std::isnan(x * scale) ? kMinusInfinity : std::min(x * scale, FLT_MAX);
  return z;
}

void record_logprobs(std::span<const float> logits, int count, ReferenceChoice& choice) {
  const std::vector<Entry> entries = sorted_entries(scaled(logits, 1.0F));
  const float top = entries.front().z;
  const double log_sum = static_cast<double>(top) + std::log(static_cast<double>(mass(entries, top)) * 0x1p-40);
  const auto logprob = [&](const Entry& entry) {
    return top == kMinusInfinity ? kMinusInfinity : static_cast<float>(static_cast<double>(entry.z) - log_sum);
  };
  for (const Entry& entry : entries) {
    if (entry.token == choice.token) choice.logprob = logprob(entry);
  }
  for (std::size_t i = 0; i < entries.size() && i < static_cast<std::size_t>(count); ++i) {
    if (entries[i].z > kMinusInfinity) choice.top.push_back({entries[i].token, logprob(entries[i])});
  }
}

/// No candidate where no logit is finite.
Candidate choose(std::vector<float> l, const SamplingParams& sampling, std::int64_t position,
                 const TokenHistory& history, std::span<const TokenId> banned) {
  const auto inside = [&](TokenId token) { return token >= 0 && static_cast<std::size_t>(token) < l.size(); };
  for (const auto& [token, count] : history) {
    if (!inside(token)) continue;
    float& x = l[static_cast<std::size_t>(token)];
    if (count.in_prompt || count.in_output > 0) {
      x = x > 0.0F ? x / sampling.repetition_penalty : x * sampling.repetition_penalty;
    }
    if (count.in_output > 0) {
      x -= sampling.presence_penalty + sampling.frequency_penalty * static_cast<float>(count.in_output);
    }
  }
  for (const auto& [token, bias] : sampling.logit_bias) {
    if (inside(token)) l[static_cast<std::size_t>(token)] += bias;
  }
  for (const TokenId token : banned) {
    if (inside(token)) l[static_cast<std::size_t>(token)] = kMinusInfinity;
  }

  if (sampling.temperature == 0.0F) {
    std::size_t best = l.size();
    for (std::size_t i = 0; i < l.size(); ++i) {
      if (l[i] > (best == l.size() ? kMinusInfinity : l[best])) best = i;
    }
    return best == l.size() ? kNone : Candidate{static_cast<TokenId>(best), l[best]};
  }

  std::vector<Entry> kept = sorted_entries(scaled(l, 1.0F / sampling.temperature));
  const float top = kept.front().z;
  if (top == kMinusInfinity) return kNone;
  if (sampling.top_k > 0 && static_cast<std::size_t>(sampling.top_k) < kept.size()) {
    kept.resize(static_cast<std::size_t>(sampling.top_k));
  }
  if (sampling.top_p < 1.0F) {
    const double share = static_cast<double>(sampling.top_p) * static_cast<double>(mass(kept, top));
    const auto allowed = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(share));
    std::uint64_t before = 0;
    std::size_t count = 0;
    while (count < kept.size() && before < allowed) before += weight(kept[count++].z, top);
    kept.resize(count);
  }
  if (sampling.min_p > 0.0F) {
    const float floor = top + std::log(sampling.min_p);
    std::erase_if(kept, [floor](const Entry& entry) { return entry.z < floor; });
  }
  Entry best{kMinusInfinity, -1};
  for (const Entry& entry : kept) {
    const Entry noisy{entry.z + gumbel_noise(sampling.seed, position, entry.token), entry.token};
    if (noisy.z > kMinusInfinity && ranks_before(noisy, best)) best = noisy;
  }
  return {best.token, best.z};
}

}  // namespace

float gumbel_noise(std::uint64_t seed, std::int64_t position, TokenId token) {
  return cpu::portable::kSamplerKernels.gumbel(noise_word(seed, position, token));
}

ReferenceChoice reference_choose(std::span<const float> logits, const SamplingParams& sampling, std::int64_t position,
                                 const TokenHistory& history, std::span<const TokenId> banned) {
  ReferenceChoice choice;
  choice.token = std::max(choose({logits.begin(), logits.end()}, sampling, position, history, banned).token, 0);
  if (sampling.logprobs >= 0) record_logprobs(logits, sampling.logprobs, choice);
  return choice;
}

std::vector<Candidate> reference_propose(std::span<const float> logits, const ProposeRow& row, int count) {
  const std::size_t depth = row.drafts.size();
  TokenHistory history;
  if (row.sampling->needs_history()) {
    if (row.history != nullptr) history = *row.history;
    for (const TokenId draft : row.drafts) ++history[draft].in_output;
  }
  const bool bans = static_cast<int>(depth) < row.banned_tokens;
  std::vector<float> left(logits.begin(), logits.end());
  std::vector<Candidate> candidates;
  for (int i = 0; i < count; ++i) {
    candidates.push_back(choose(left, *row.sampling, row.position + static_cast<std::int64_t>(depth), history,
                                bans ? row.banned : std::span<const TokenId>{}));
    if (candidates.back().token >= 0) left[static_cast<std::size_t>(candidates.back().token)] = kMinusInfinity;
  }
  candidates[0].token = std::max(candidates[0].token, 0);
  return candidates;
}

VerifyResult reference_verify(std::span<const float> logits, int vocabulary, const VerifyGroup& group) {
  VerifyResult result;
  TokenHistory history;
  if (group.history != nullptr) history = *group.history;
  if (!group.sampling->needs_history()) history.clear();
  const auto width = static_cast<std::size_t>(vocabulary);
  const int drafts = static_cast<int>(group.drafts.size());
  for (int last = -1; true;) {
    const auto depth = static_cast<int>(result.drafts.size());
    ReferenceChoice choice = reference_choose(logits.subspan(static_cast<std::size_t>(last + 1) * width, width),
                                              *group.sampling, group.position + depth, history,
                                              depth < group.banned_tokens ? group.banned : std::span<const TokenId>{});
    result.tokens.push_back(choice.token);
    if (group.sampling->logprobs >= 0) result.logprobs.push_back(choice.logprob);
    if (group.sampling->logprobs > 0) result.top.push_back(std::move(choice.top));
    int next = 0;
    for (; next < drafts; ++next) {
      const auto at = static_cast<std::size_t>(next);
      const int parent = group.parents.empty() ? next - 1 : group.parents[at];
      if (parent == last && group.drafts[at] == choice.token) break;
    }
    if (next == drafts) return result;
    result.drafts.push_back(next);
    if (group.sampling->needs_history()) ++history[choice.token].in_output;
    last = next;
  }
}

}  // namespace draftwerk
