// The CPU's sampler against the specification (reference_sampler), and both against the distributions they promise.
#include "backend/cpu/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/worker_pool.h"
#include "backend/reference_sampler.h"
#include "backend/sampling_validation.h"
#include "sampler_fixture.h"

namespace draftwerk {
namespace {

using cpu::Isa;
using cpu::LogitRows;
using cpu::Sampler;
using cpu::WorkerPool;
using testing::Case;
using testing::describe;
using testing::draw;
using testing::expect_equal;
using testing::fill_logits;
using testing::kInfinity;
using testing::pick;
using testing::Random;
using testing::random_case;
using testing::Rows;
using testing::rows_from;

class SamplerOnIsa : public ::testing::TestWithParam<Isa> {
 protected:
  /// Several groups at once against the specification, group by group.
  void check_random_step(Random& random, int vocabulary, WorkerPool& pool, std::vector<VerifyResult>& results) {
    const bool large = vocabulary > 10000;  // where the specification takes its time
    const int groups = large ? 1 : pick(random, 1, 4);
    std::vector<int> drafts;
    for (int g = 0; g < groups; ++g) drafts.push_back(pick(random, 0, large ? 1 : 4));
    const int outputs = std::accumulate(drafts.begin(), drafts.end(), groups);
    Rows rows(outputs, vocabulary);
    for (int r = 0; r < outputs; ++r) fill_logits(random, rows.row(r), vocabulary);

    std::vector<Case> cases;
    int first = 0;
    for (const int k : drafts) {
      cases.push_back(random_case(random, rows, first, k));
      first += k + 1;
    }
    std::vector<VerifyGroup> verify;
    std::vector<VerifyResult> expected;
    for (const Case& c : cases) {
      verify.push_back(c.group());
      expected.push_back(reference_verify(rows_from(rows, c.first_output), vocabulary, verify.back()));
    }
    Sampler sampler(GetParam(), vocabulary, outputs, pool.size());
    results.resize(cases.size());
    sampler.verify_logits(rows.view(), verify, results, pool);
    for (std::size_t g = 0; g < cases.size(); ++g) {
      expect_equal(results[g], expected[g],
                   "vocabulary " + std::to_string(vocabulary) + " group " + std::to_string(g) + ": " +
                       describe(cases[g].sampling));
      if (HasFatalFailure()) return;
    }
  }

  void check_random_steps(int seed, int steps, const std::vector<int>& vocabularies, int threads) {
    Random random(static_cast<unsigned>(seed));
    WorkerPool pool(threads);
    std::vector<VerifyResult> results;  // reused from step to step, as the engine does
    for (int i = 0; i < steps; ++i) {
      const int vocabulary =
          vocabularies[static_cast<std::size_t>(pick(random, 0, static_cast<int>(vocabularies.size()) - 1))];
      check_random_step(random, vocabulary, pool, results);
      if (HasFatalFailure()) return;
    }
  }
};

TEST_P(SamplerOnIsa, ChoosesWhatTheSpecificationChooses) {
  check_random_steps(1, 2500, {1, 2, 7, 15, 16, 17, 33, 100, 255, 256, 257, 300}, 1);
}

TEST_P(SamplerOnIsa, ChoosesTheSameOverManyChunks) { check_random_steps(2, 150, {511, 512, 513, 1000, 2304, 5000}, 1); }

TEST_P(SamplerOnIsa, ChoosesTheSameOnSeveralThreads) { check_random_steps(3, 400, {7, 256, 1000}, 3); }

TEST_P(SamplerOnIsa, ChoosesTheSameOverAWholeVocabulary) { check_random_steps(4, 8, {262144}, 2); }

TEST_P(SamplerOnIsa, RareNoiseLetsUnlikelyTokensWin) {
  // One token far above very many: about every other draw goes to one of the many, for noise that only one in some
  // ten thousand tokens has. Skipping must leave those in.
  constexpr int kVocabulary = 40000;
  Rows rows(1, kVocabulary);
  rows.values[12345] = 10.6F;
  SamplingParams sampling;
  sampling.temperature = 1.0F;
  WorkerPool pool(1);
  Sampler sampler(GetParam(), kVocabulary, 1, pool.size());
  std::vector<VerifyResult> results(1);
  int unlikely = 0;
  for (int position = 0; position < 60; ++position) {
    VerifyGroup group;
    group.position = position;
    group.sampling = &sampling;
    sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
    TokenId best = 0;
    const auto score = [&](TokenId token) {
      return rows.values[static_cast<std::size_t>(token)] + gumbel_noise(0, position, token);
    };
    for (TokenId token = 1; token < kVocabulary; ++token) {
      if (score(token) > score(best)) best = token;
    }
    ASSERT_EQ(results[0].tokens, (std::vector<TokenId>{best})) << position;
    unlikely += best != 12345 ? 1 : 0;
  }
  EXPECT_GT(unlikely, 15);
  EXPECT_LT(unlikely, 45);
}

/// `draws` tokens from one row, each at a position of its own.
std::vector<int> histogram(Isa isa, Rows& rows, const SamplingParams& sampling, int draws) {
  constexpr int kAtOnce = 1000;
  WorkerPool pool(1);
  Sampler sampler(isa, rows.vocabulary, kAtOnce, pool.size());
  LogitRows logits = rows.view();
  logits.stride = 0;  // every output is the same row
  logits.chunk_stride = 0;
  std::vector<VerifyGroup> groups(kAtOnce);
  std::vector<VerifyResult> results(kAtOnce);
  std::vector<int> counts(static_cast<std::size_t>(rows.vocabulary));
  for (int done = 0; done < draws; done += kAtOnce) {
    for (int i = 0; i < kAtOnce; ++i) {
      VerifyGroup& group = groups[static_cast<std::size_t>(i)];
      group.first_output = i;
      group.position = done + i;
      group.sampling = &sampling;
    }
    sampler.verify_logits(logits, groups, results, pool);
    for (const VerifyResult& result : results) ++counts[static_cast<std::size_t>(result.tokens.at(0))];
  }
  return counts;
}

/// Softmax after the filters, in double and by sorting: what the draws should be distributed like.
std::vector<double> expected_distribution(const Rows& rows, const SamplingParams& sampling) {
  const auto n = static_cast<std::size_t>(rows.vocabulary);
  std::vector<double> p(n);
  for (std::size_t i = 0; i < n; ++i) {
    p[i] = std::exp(static_cast<double>(rows.values[i]) / static_cast<double>(sampling.temperature));
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
  const std::size_t k = sampling.top_k > 0 ? static_cast<std::size_t>(sampling.top_k) : n;
  double total = 0;
  for (std::size_t i = 0; i < n; ++i) total += i < k ? p[order[i]] : 0;
  double before = 0;
  double kept = 0;
  std::vector<double> result(n);
  for (std::size_t i = 0; i < k; ++i) {
    const double x = p[order[i]];
    if (before < static_cast<double>(sampling.top_p) * total &&
        x >= static_cast<double>(sampling.min_p) * p[order[0]]) {
      result[order[i]] = x;
      kept += x;
    }
    before += x;
  }
  for (double& x : result) x /= kept;
  return result;
}

// Every instruction set draws the same (above), so one is enough.
TEST(Sampler, DrawsAreDistributedLikeSoftmax) {
  const Isa isa = cpu::available_isas().back();
  constexpr int kDraws = 200000;
  Rows rows(1, 50);
  Random random(5);
  for (float& x : rows.values) x = draw(random, -2.5F, 2.5F);
  std::vector<SamplingParams> settings(6);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    settings[i].temperature = 1.0F;
    settings[i].seed = 1000 + i;
  }
  settings[1].temperature = 0.7F;
  settings[2].top_k = 12;
  settings[3].top_p = 0.8F;
  settings[4].min_p = 0.1F;
  settings[5].top_k = 30;
  settings[5].top_p = 0.9F;
  settings[5].min_p = 0.05F;
  for (const SamplingParams& sampling : settings) {
    const std::vector<int> counts = histogram(isa, rows, sampling, kDraws);
    const std::vector<double> p = expected_distribution(rows, sampling);
    double statistic = 0;
    int categories = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0) {
        ASSERT_EQ(counts[i], 0) << "token " << i << " was filtered out: " << describe(sampling);
        continue;
      }
      const double expected = p[i] * kDraws;
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
      ++categories;
    }
    // Five standard deviations above the mean of the chi-square distribution.
    const double freedom = categories - 1;
    EXPECT_LT(statistic, freedom + 5 * std::sqrt(2 * freedom)) << describe(sampling);
    EXPECT_GT(statistic, std::max(0.0, freedom - 5 * std::sqrt(2 * freedom))) << describe(sampling);
  }
}

TEST_P(SamplerOnIsa, GroupStopsAtTheFirstDisagreement) {
  constexpr int kVocabulary = 600;
  Rows rows(4, kVocabulary);
  for (int r = 0; r < 4; ++r) rows.row(r)[100 * r + 7] = 5.0F;  // row r chooses 100 r + 7
  const SamplingParams greedy;
  WorkerPool pool(2);
  Sampler sampler(GetParam(), kVocabulary, 4, pool.size());
  std::vector<VerifyResult> results(1);
  const std::vector<std::vector<TokenId>> drafts = {{}, {7}, {8}, {7, 107, 207}, {7, 207, 207}, {7, 107, 0}};
  const std::vector<std::vector<TokenId>> expected = {{7}, {7, 107}, {7}, {7, 107, 207, 307}, {7, 107}, {7, 107, 207}};
  for (std::size_t i = 0; i < drafts.size(); ++i) {
    VerifyGroup group;
    group.drafts = drafts[i];
    group.sampling = &greedy;
    sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
    EXPECT_EQ(results[0].tokens, expected[i]) << i;
  }
}

TEST_P(SamplerOnIsa, DraftedTokensChooseLikeUndraftedOnes) {
  // Penalties count the drafts that a row stands behind: one group of five rows gives what five single rows give.
  constexpr int kVocabulary = 300;
  Random random(6);
  WorkerPool pool(2);
  for (int trial = 0; trial < 50; ++trial) {
    Rows rows(5, kVocabulary);
    for (float& x : rows.values) x = draw(random, -1.0F, 1.0F);
    Case c;
    c.sampling.temperature = trial % 2 == 0 ? 0.0F : 0.8F;
    c.sampling.repetition_penalty = 1.7F;
    c.sampling.presence_penalty = 0.5F;
    c.sampling.frequency_penalty = 0.4F;
    c.sampling.seed = static_cast<std::uint64_t>(trial);
    c.has_history = true;
    c.history[3] = {true, 1};
    Sampler sampler(GetParam(), kVocabulary, 5, pool.size());
    std::vector<VerifyResult> results(1);
    std::vector<TokenId> tokens;
    TokenHistory history = c.history;
    for (int r = 0; r < 5; ++r) {
      Rows one(1, kVocabulary);
      std::copy_n(rows.row(r), kVocabulary, one.row(0));
      VerifyGroup group = c.group();
      group.history = &history;
      group.position = r;
      sampler.verify_logits(one.view(), std::span(&group, 1), results, pool);
      tokens.push_back(results[0].tokens.at(0));
      ++history[tokens.back()].in_output;
    }
    c.drafts.assign(tokens.begin(), tokens.end() - 1);
    const VerifyGroup group = c.group();
    sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
    ASSERT_EQ(results[0].tokens, tokens) << trial;
  }
}

TEST_P(SamplerOnIsa, BannedTokensAreOutForTheFirstChoicesOnly) {
  Rows rows(3, 20);
  for (int r = 0; r < 3; ++r) {
    rows.row(r)[4] = 9.0F;
    rows.row(r)[5] = 8.0F;
  }
  Case c;
  c.banned = {4, 99, -1};
  c.banned_tokens = 2;
  c.drafts = {5, 5};
  const VerifyGroup group = c.group();
  WorkerPool pool(1);
  Sampler sampler(GetParam(), 20, 3, pool.size());
  std::vector<VerifyResult> results(1);
  sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
  EXPECT_EQ(results[0].tokens, (std::vector<TokenId>{5, 5, 4}));
}

TEST_P(SamplerOnIsa, LogprobsAreThoseOfTheUntouchedLogits) {
  Random random(7);
  Rows rows(1, 700);
  for (float& x : rows.values) x = draw(random, -3.0F, 3.0F);
  double sum = 0;
  for (const float x : rows.values) sum += std::exp(static_cast<double>(x));
  const std::vector<float> untouched = rows.values;
  Case c;
  c.sampling.logprobs = 5;
  c.sampling.logit_bias = {{321, 50.0F}, {321, 50.0F}, {650, -50.0F}};
  const VerifyGroup group = c.group();
  WorkerPool pool(1);
  Sampler sampler(GetParam(), 700, 1, pool.size());
  std::vector<VerifyResult> results(1);
  sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
  ASSERT_EQ(results[0].tokens, (std::vector<TokenId>{321}));
  EXPECT_NEAR(results[0].logprobs.at(0), static_cast<double>(untouched[321]) - std::log(sum), 1e-5);
  ASSERT_EQ(results[0].top.at(0).size(), 5U);
  float previous = 0.0F;
  for (const TokenLogprob& entry : results[0].top[0]) {
    EXPECT_NEAR(entry.logprob, static_cast<double>(untouched[static_cast<std::size_t>(entry.token)]) - std::log(sum),
                1e-5);
    EXPECT_LE(entry.logprob, previous);
    previous = entry.logprob;
  }
  EXPECT_EQ(results[0].top[0][0].token, std::max_element(untouched.begin(), untouched.end()) - untouched.begin());
}

TEST_P(SamplerOnIsa, NoFiniteLogitGivesTokenZero) {
  for (const float nothing : {-kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const float temperature : {0.0F, 1.0F}) {
      Rows rows(1, 300);
      std::fill(rows.values.begin(), rows.values.end(), nothing);
      Case c;
      c.sampling.temperature = temperature;
      c.sampling.top_k = 5;
      c.sampling.top_p = 0.9F;
      c.sampling.logprobs = 2;
      const VerifyGroup group = c.group();
      WorkerPool pool(1);
      Sampler sampler(GetParam(), 300, 1, pool.size());
      std::vector<VerifyResult> results(1);
      sampler.verify_logits(rows.view(), std::span(&group, 1), results, pool);
      EXPECT_EQ(results[0].tokens, (std::vector<TokenId>{0}));
      EXPECT_EQ(results[0].logprobs, (std::vector<float>{-kInfinity}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SamplerOnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::isa_name(info.param)); });

TEST(SamplingValidation, AcceptsTheEdgesOfEveryRange) {
  SamplingParams sampling;
  EXPECT_FALSE(validate(sampling, 100));
  sampling.temperature = 0.001F;
  sampling.top_k = 1000;
  sampling.top_p = 1e-6F;
  sampling.min_p = 1.0F;
  sampling.repetition_penalty = 10.0F;
  sampling.presence_penalty = -10.0F;
  sampling.frequency_penalty = 10.0F;
  sampling.logit_bias = {{0, -1000.0F}, {99, 1000.0F}};
  sampling.logprobs = kMaxLogprobs;
  EXPECT_FALSE(validate(sampling, 100));
}

TEST(SamplingValidation, NamesFieldValueAndRange) {
  struct Rejected {
    const char* field;
    void (*spoil)(SamplingParams&);
  };
  const Rejected cases[] = {
      {"temperature", [](SamplingParams& s) { s.temperature = -0.1F; }},
      {"temperature", [](SamplingParams& s) { s.temperature = 1e-4F; }},
      {"temperature", [](SamplingParams& s) { s.temperature = 101.0F; }},
      {"temperature", [](SamplingParams& s) { s.temperature = NAN; }},
      {"temperature", [](SamplingParams& s) { s.temperature = kInfinity; }},
      {"top_k", [](SamplingParams& s) { s.top_k = -1; }},
      {"top_p", [](SamplingParams& s) { s.top_p = 0.0F; }},
      {"top_p", [](SamplingParams& s) { s.top_p = 1.01F; }},
      {"top_p", [](SamplingParams& s) { s.top_p = NAN; }},
      {"min_p", [](SamplingParams& s) { s.min_p = -0.01F; }},
      {"min_p", [](SamplingParams& s) { s.min_p = 1.01F; }},
      {"min_p", [](SamplingParams& s) { s.min_p = NAN; }},
      {"repetition_penalty", [](SamplingParams& s) { s.repetition_penalty = 0.0F; }},
      {"repetition_penalty", [](SamplingParams& s) { s.repetition_penalty = 10.1F; }},
      {"presence_penalty", [](SamplingParams& s) { s.presence_penalty = -10.1F; }},
      {"frequency_penalty", [](SamplingParams& s) { s.frequency_penalty = NAN; }},
      {"logit_bias", [](SamplingParams& s) { s.logit_bias.resize(kMaxLogitBias + 1); }},
      {"logit_bias", [](SamplingParams& s) { s.logit_bias = {{1, 1.0F}, {100, 1.0F}}; }},
      {"logit_bias", [](SamplingParams& s) { s.logit_bias = {{-1, 1.0F}}; }},
      {"logit_bias[1]", [](SamplingParams& s) { s.logit_bias = {{1, -kInfinity}}; }},
      {"logprobs", [](SamplingParams& s) { s.logprobs = -2; }},
      {"logprobs", [](SamplingParams& s) { s.logprobs = kMaxLogprobs + 1; }},
  };
  for (const Rejected& rejected : cases) {
    SamplingParams sampling;
    rejected.spoil(sampling);
    const auto error = validate(sampling, 100);
    ASSERT_TRUE(error) << rejected.field;
    EXPECT_EQ(error->field, rejected.field);
    EXPECT_FALSE(error->value.empty());
    EXPECT_FALSE(error->allowed.empty());
  }
  SamplingParams sampling;
  sampling.top_p = 1.5F;
  EXPECT_EQ(validate(sampling, 100)->message(), "top_p is 1.5, must be greater than 0 and at most 1");
}

}  // namespace
}  // namespace draftwerk
