// What the tests of samplers share: rows of logits, and cases of verification with whatever they refer to.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/sampler.h"
#include "backend/cpu/sampler_kernels.h"
#include "backend/reference_sampler.h"

namespace draftwerk::testing {

using cpu::kLogitChunk;
using cpu::LogitRows;
using Random = std::mt19937;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
inline float draw(Random& random, float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random);
}
inline bool chance(Random& random, double p) { return std::bernoulli_distribution(p)(random); }

/// Rows of logits with the chunk maxima that the head would deliver.
struct Rows {
  Rows(int rows, int vocabulary)
      : vocabulary(vocabulary),
        chunks((vocabulary + kLogitChunk - 1) / kLogitChunk),
        values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(vocabulary)),
        chunk_max(static_cast<std::size_t>(rows) * static_cast<std::size_t>(chunks)) {}

  [[nodiscard]] float* row(int r) { return values.data() + static_cast<std::ptrdiff_t>(r) * vocabulary; }

  LogitRows view() {
    std::fill(chunk_max.begin(), chunk_max.end(), -kInfinity);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto width = static_cast<std::size_t>(vocabulary);
      float& most = chunk_max[i / width * static_cast<std::size_t>(chunks) + i % width / kLogitChunk];
      if (values[i] > most) most = values[i];
    }
    return {values.data(), vocabulary, vocabulary, chunk_max.data(), chunks};
  }

  int vocabulary;
  int chunks;
  std::vector<float> values;
  std::vector<float> chunk_max;
};

/// Logits as models produce them, and as they never should.
inline void fill_logits(Random& random, float* logits, int vocabulary) {
  const int kind = pick(random, 0, 11);
  std::normal_distribution<float> normal(0.0F, draw(random, 0.1F, 6.0F));
  for (int i = 0; i < vocabulary; ++i) logits[i] = normal(random);
  const auto each = [&](auto&& change) {
    for (int i = 0; i < vocabulary; ++i) logits[i] = change(logits[i]);
  };
  const auto anywhere = [&] { return pick(random, 0, vocabulary - 1); };
  switch (kind) {
    case 0:  // ties
      each([](float x) { return std::round(x); });
      break;
    case 1: {  // all equal
      const float same = logits[0];
      each([same](float) { return same; });
      break;
    }
    case 2:  // mostly excluded
      each([&](float x) { return chance(random, 0.97) ? -kInfinity : x; });
      break;
    case 3:  // nothing to choose from
      each([](float) { return -kInfinity; });
      break;
    case 4:  // not numbers
      each([&](float x) { return chance(random, 0.3) ? NAN : x; });
      break;
    case 5:  // out of float's range once scaled
      each([](float x) { return x * 1e37F; });
      break;
    case 6:  // infinite
      each([&](float x) { return chance(random, 0.01) ? kInfinity : x; });
      break;
    case 7:  // zeros of both signs
      each([&](float x) { return x > 1.0F ? x : (x > 0.0F ? 0.0F : -0.0F); });
      break;
    case 8:  // one certain token
      logits[anywhere()] = 40.0F;
      break;
    default:  // a few likely tokens, like a language model's
      for (int i = 0; i < 5; ++i) logits[anywhere()] += draw(random, 5.0F, 15.0F);
  }
}

inline SamplingParams random_sampling(Random& random, int vocabulary) {
  SamplingParams sampling;
  constexpr float kTemperatures[] = {0.0F, 0.001F, 0.3F, 0.7F, 1.0F, 1.0F, 1.0F, 1.5F, 4.0F, 100.0F};
  sampling.temperature = kTemperatures[pick(random, 0, 9)];
  if (chance(random, 0.5)) {
    const int choices[] = {1, 2, 64, pick(random, 1, vocabulary), vocabulary, vocabulary + 1, vocabulary * 2};
    sampling.top_k = choices[pick(random, 0, 6)];
  }
  if (chance(random, 0.5)) {
    const float choices[] = {1e-6F, 0.1F, 0.5F, 0.95F, 0.999F, draw(random, 0.001F, 1.0F)};
    sampling.top_p = choices[pick(random, 0, 5)];
  }
  if (chance(random, 0.3)) {
    const float choices[] = {1e-6F, 0.05F, 0.5F, 1.0F};
    sampling.min_p = choices[pick(random, 0, 3)];
  }
  if (chance(random, 0.2)) sampling.repetition_penalty = draw(random, 0.5F, 2.0F);
  if (chance(random, 0.2)) sampling.presence_penalty = draw(random, -3.0F, 3.0F);
  if (chance(random, 0.2)) sampling.frequency_penalty = draw(random, -2.0F, 2.0F);
  if (chance(random, 0.2)) {
    for (int i = pick(random, 1, 5); i > 0; --i) {
      sampling.logit_bias.emplace_back(pick(random, 0, vocabulary - 1), draw(random, -20.0F, 20.0F));
    }
  }
  if (chance(random, 0.3)) sampling.logprobs = pick(random, 0, 64);
  sampling.seed = std::uniform_int_distribution<std::uint64_t>()(random);
  return sampling;
}

/// What a VerifyGroup refers to.
struct Case {
  SamplingParams sampling;
  TokenHistory history;
  bool has_history = false;
  std::vector<TokenId> banned;
  int banned_tokens = 0;
  std::vector<TokenId> drafts;
  std::vector<std::int32_t> parents;
  std::int64_t position = 0;
  int first_output = 0;

  [[nodiscard]] VerifyGroup group() const {
    VerifyGroup group;
    group.first_output = first_output;
    group.drafts = drafts;
    group.parents = parents;
    group.position = position;
    group.sampling = &sampling;
    group.history = has_history ? &history : nullptr;
    group.banned = banned;
    group.banned_tokens = banned_tokens;
    return group;
  }
};

inline std::span<const float> rows_from(const Rows& rows, int first) {
  return std::span<const float>(rows.values)
      .subspan(static_cast<std::size_t>(first) * static_cast<std::size_t>(rows.vocabulary));
}

/// A case whose drafts mostly agree with what the specification chooses.
inline Case random_case(Random& random, const Rows& rows, int first_output, int drafts) {
  Case c;
  c.sampling = random_sampling(random, rows.vocabulary);
  c.first_output = first_output;
  c.position = pick(random, 0, 1 << 20) + (chance(random, 0.1) ? std::int64_t{1} << 33 : 0);
  c.has_history = chance(random, 0.8);
  for (int i = pick(random, 0, 20); i > 0; --i) {
    c.history[pick(random, 0, rows.vocabulary - 1)] = {chance(random, 0.5), pick(random, 0, 3)};
  }
  if (chance(random, 0.3)) {
    for (int i = pick(random, 1, 4); i > 0; --i) c.banned.push_back(pick(random, 0, rows.vocabulary - 1));
    c.banned_tokens = pick(random, 0, 3);
  }
  for (int i = 0; i < drafts; ++i) {
    const VerifyResult next = reference_verify(rows_from(rows, first_output), rows.vocabulary, c.group());
    c.drafts.push_back(chance(random, 0.85) ? next.tokens.back() : pick(random, 0, rows.vocabulary - 1));
  }
  return c;
}

/// Where the drafts of a case lead.
inline ProposeRow behind_drafts(const Case& c) {
  return {c.drafts, c.position, &c.sampling, c.has_history ? &c.history : nullptr, c.banned, c.banned_tokens};
}

/// The drafts from the last known token to draft `last`, itself included.
inline std::vector<TokenId> path_of(const Case& c, int last) {
  std::vector<TokenId> path;
  for (; last >= 0; last = c.parents[static_cast<std::size_t>(last)]) {
    path.insert(path.begin(), c.drafts[static_cast<std::size_t>(last)]);
  }
  return path;
}

/// A tree of up to `drafts` drafts, of which many are what the specification chooses or would choose next.
inline Case random_tree(Random& random, const Rows& rows, int first_output, int drafts) {
  Case c = random_case(random, rows, first_output, 0);
  for (int i = 0; i < drafts; ++i) {
    const int latest = static_cast<int>(c.drafts.size()) - 1;
    const int parent = chance(random, 0.7) ? latest : pick(random, -1, latest);
    const std::vector<TokenId> path = path_of(c, parent);
    ProposeRow row = behind_drafts(c);
    row.drafts = path;
    const auto width = static_cast<std::size_t>(rows.vocabulary);
    const int count = chance(random, 0.7) ? 1 : pick(random, 2, 3);
    const Candidate best =
        reference_propose(rows_from(rows, first_output + parent + 1).first(width), row, count).back();
    const TokenId token = best.token >= 0 && chance(random, 0.95) ? best.token : pick(random, 0, rows.vocabulary - 1);
    bool taken = false;
    for (std::size_t j = 0; j < c.drafts.size(); ++j) taken |= c.parents[j] == parent && c.drafts[j] == token;
    if (taken) continue;
    c.drafts.push_back(token);
    c.parents.push_back(parent);
  }
  return c;
}

inline std::string describe(const SamplingParams& s) {
  return "temperature " + std::to_string(s.temperature) + " top_k " + std::to_string(s.top_k) + " top_p " +
         std::to_string(s.top_p) + " min_p " + std::to_string(s.min_p);
}

inline void expect_equal(const VerifyResult& actual, const VerifyResult& expected, const std::string& where) {
  ASSERT_EQ(actual.tokens, expected.tokens) << where;
  ASSERT_EQ(actual.drafts, expected.drafts) << where;
  ASSERT_EQ(actual.logprobs, expected.logprobs) << where;
  ASSERT_EQ(actual.top.size(), expected.top.size()) << where;
  for (std::size_t i = 0; i < actual.top.size(); ++i) {
    ASSERT_EQ(actual.top[i].size(), expected.top[i].size()) << where;
    for (std::size_t j = 0; j < actual.top[i].size(); ++j) {
      ASSERT_EQ(actual.top[i][j].token, expected.top[i][j].token) << where;
      ASSERT_EQ(actual.top[i][j].logprob, expected.top[i][j].logprob) << where;
    }
  }
}

}  // namespace draftwerk::testing
