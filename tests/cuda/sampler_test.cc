// Choosing tokens on the device against the specification (reference_sampler): the same tokens, candidates, values and
// log-probabilities, bit for bit, in whatever order threads run.
#include "backend/cuda/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"
#include "backend/reference_sampler.h"
#include "sampler_fixture.h"
#include "sampler_on_device.h"

namespace draftwerk::cuda {
namespace {

using testing::behind_drafts;
using testing::Case;
using testing::chance;
using testing::describe;
using testing::expect_equal;
using testing::fill_logits;
using testing::kInfinity;
using testing::pick;
using testing::Random;
using testing::random_case;
using testing::random_tree;
using testing::Rows;
using testing::rows_from;
using testing::SamplerOnDevice;

class CudaSampler : public testing::InAnyOrder {
 protected:
  /// Steps of several groups, chains or trees, each against the specification.
  void check_random_steps(unsigned seed, int steps, const std::vector<int>& vocabularies, int most_groups,
                          int most_drafts) {
    Random random(seed);
    SamplerOnDevice device;
    for (int step = 0; step < steps; ++step) {
      any_order(step);
      const int vocabulary = vocabularies[static_cast<std::size_t>(step) % vocabularies.size()];
      const int groups = pick(random, 1, most_groups);
      const int padded = groups * (most_drafts + 1) + pick(random, 0, 2);
      Rows rows(padded, vocabulary);
      for (int r = 0; r < padded; ++r) fill_logits(random, rows.row(r), vocabulary);
      std::vector<Case> cases;
      int first = 0;
      for (int g = 0; g < groups; ++g) {
        const int drafts = pick(random, 0, most_drafts);
        const bool tree = chance(random, 0.5);
        cases.push_back(tree ? random_tree(random, rows, first, drafts) : random_case(random, rows, first, drafts));
        first += static_cast<int>(cases.back().drafts.size()) + 1;
        add_what_is_ignored(random, cases.back(), vocabulary);
      }
      std::vector<VerifyGroup> verify;
      for (const Case& c : cases) verify.push_back(c.group());
      const std::vector<VerifyResult> results = device.verify(rows, verify, padded);
      for (std::size_t g = 0; g < cases.size(); ++g) {
        const VerifyResult expected = reference_verify(rows_from(rows, cases[g].first_output), vocabulary, verify[g]);
        expect_equal(results[g], expected,
                     "step " + std::to_string(step) + " vocabulary " + std::to_string(vocabulary) + " group " +
                         std::to_string(g) + ": " + describe(cases[g].sampling));
        if (HasFatalFailure()) return;
        accepted_ += results[g].drafts.size();
      }
    }
  }

  /// Tokens outside of the vocabulary, and repeated ones.
  static void add_what_is_ignored(Random& random, Case& c, int vocabulary) {
    if (!chance(random, 0.3)) return;
    c.sampling.logit_bias.emplace_back(vocabulary + pick(random, 0, 5), 3.0F);
    c.sampling.logit_bias.emplace_back(-1, 3.0F);
    c.history[vocabulary] = {true, 2};
    if (!c.banned.empty()) {
      c.banned.push_back(c.banned.front());
      c.banned.push_back(-7);
      c.banned.push_back(vocabulary);
    }
  }

  std::size_t accepted_ = 0;
};

TEST_F(CudaSampler, ChoosesWhatTheSpecificationChooses) {
  check_random_steps(1, 600, {1, 2, 7, 15, 33, 100, 255, 256, 257, 300}, 3, 4);
  EXPECT_GT(accepted_, 600U);
}

TEST_F(CudaSampler, ChoosesTheSameOverManyChunks) { check_random_steps(2, 100, {511, 513, 1000, 2304, 5000}, 2, 3); }

TEST_F(CudaSampler, ChoosesTheSameOverALargeVocabulary) {
  check_random_steps(3, 24, {16384, 16385, 20011, 40000}, 1, 1);
}

/// One row of a vocabulary in which more tokens reach the k-th than fit into a list, or top_k itself is longer.
TEST_F(CudaSampler, KeepsTopKOfAnySize) {
  Random random(4);
  SamplerOnDevice device;
  constexpr int kVocabulary = 6000;
  for (int step = 0; step < 40; ++step) {
    any_order(step);
    Rows rows(1, kVocabulary);
    std::normal_distribution<float> normal(0.0F, 2.0F);
    for (float& x : rows.values)
      x = step % 4 == 0 ? 1.5F : (step % 4 == 1 ? std::round(normal(random)) : normal(random));
    Case c;
    c.sampling.temperature = step % 5 == 0 ? 100.0F : 1.0F;
    constexpr int kSizes[] = {1, 64, 700, 2047, 2048, 2049, 4000, 5999};
    c.sampling.top_k = kSizes[step % 8];
    c.sampling.top_p = step % 3 == 0 ? 1.0F : 0.9F;
    c.sampling.seed = random();
    c.sampling.logprobs = step % 2 == 0 ? 64 : -1;
    const VerifyGroup group = c.group();
    const std::vector<VerifyResult> results = device.verify(rows, std::span(&group, 1), 1);
    expect_equal(results[0], reference_verify(rows.values, kVocabulary, group), "step " + std::to_string(step));
    if (HasFatalFailure()) return;
  }
}

/// One token far above very many: about every other draw goes to one of the many, for noise that only one in some ten
/// thousand tokens has.
TEST_F(CudaSampler, RareNoiseLetsUnlikelyTokensWin) {
  constexpr int kVocabulary = 40000;
  Rows rows(1, kVocabulary);
  rows.values[12345] = 10.6F;
  SamplingParams sampling;
  sampling.temperature = 1.0F;
  SamplerOnDevice device;
  int unlikely = 0;
  for (int position = 0; position < 30; ++position) {
    VerifyGroup group;
    group.position = position;
    group.sampling = &sampling;
    const VerifyResult result = device.verify(rows, std::span(&group, 1), 1)[0];
    const ReferenceChoice best = reference_choose(rows.values, sampling, position, {}, {});
    ASSERT_EQ(result.tokens, (std::vector<TokenId>{best.token})) << position;
    unlikely += best.token != 12345 ? 1 : 0;
  }
  EXPECT_GT(unlikely, 5);
  EXPECT_LT(unlikely, 25);
}

TEST_F(CudaSampler, RepeatedBiasesAreAddedInTheOrderOfTheRequest) {
  SamplerOnDevice device;
  Rows rows(1, 20);
  rows.values[7] = 5e-6F;
  SamplingParams greedy;
  greedy.logit_bias = {{3, 1000.0F}, {5, -1.0F}, {3, -1000.0F}, {5, -1.0F}, {3, 1e-5F}};  // 1e-5 is lost beside 1000
  VerifyGroup group;
  group.sampling = &greedy;
  for (int step = 0; step < 6; ++step) {
    any_order(step);
    EXPECT_EQ(device.verify(rows, std::span(&group, 1), 1)[0].tokens, (std::vector<TokenId>{3}));
  }
}

TEST_F(CudaSampler, ANucleusHasAtLeastOneToken) {
  SamplerOnDevice device;
  Rows rows(1, 300);
  rows.values[123] = 1.0F;
  for (const int top_k : {0, 5}) {
    SamplingParams sampling;
    sampling.temperature = 1.0F;
    sampling.top_k = top_k;
    sampling.top_p = 1e-20F;  // less than a unit of mass
    VerifyGroup group;
    group.sampling = &sampling;
    EXPECT_EQ(device.verify(rows, std::span(&group, 1), 1)[0].tokens, (std::vector<TokenId>{123}));
  }
}

TEST_F(CudaSampler, NoFiniteLogitGivesTokenZero) {
  SamplerOnDevice device;
  for (const float nothing : {-kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const float temperature : {0.0F, 1.0F}) {
      for (const int top_k : {0, 5}) {
        Rows rows(1, 300);
        std::fill(rows.values.begin(), rows.values.end(), nothing);
        Case c;
        c.sampling.temperature = temperature;
        c.sampling.top_k = top_k;
        c.sampling.top_p = 0.9F;
        c.sampling.logprobs = 2;
        const VerifyGroup group = c.group();
        const VerifyResult result = device.verify(rows, std::span(&group, 1), 2)[0];
        EXPECT_EQ(result.tokens, (std::vector<TokenId>{0}));
        EXPECT_EQ(result.logprobs, (std::vector<float>{-kInfinity}));
        EXPECT_TRUE(result.top.at(0).empty());
      }
    }
  }
}

/// 0 -> {1, 2}, 1 -> 3, 2 -> {4, 5}, where tokens repeat on different branches.
TEST_F(CudaSampler, ATreeIsFollowedWhereItAgrees) {
  constexpr int kVocabulary = 600;
  const std::vector<TokenId> drafts = {7, 107, 207, 300, 300, 302};
  const std::vector<std::int32_t> parents = {-1, 0, 0, 1, 2, 2};
  const SamplingParams greedy;
  SamplerOnDevice device;
  struct Expected {
    std::vector<TokenId> choices;  // of the last known token's row and of each draft's
    std::vector<TokenId> tokens;
    std::vector<int> accepted;
  };
  const Expected cases[] = {{{8, 107, 1, 1, 1, 1, 1}, {8}, {}},
                            {{7, 8, 1, 1, 1, 1, 1}, {7, 8}, {0}},
                            {{7, 107, 300, 301, 9, 1, 1}, {7, 107, 300, 9}, {0, 1, 3}},
                            {{7, 207, 301, 300, 9, 6, 1}, {7, 207, 300, 6}, {0, 2, 4}},
                            {{7, 207, 300, 302, 9, 1, 5}, {7, 207, 302, 5}, {0, 2, 5}}};
  for (const Expected& expected : cases) {
    Rows rows(8, kVocabulary);
    for (int r = 0; r < 7; ++r) rows.row(r)[expected.choices[static_cast<std::size_t>(r)]] = 5.0F;
    VerifyGroup group;
    group.drafts = drafts;
    group.parents = parents;
    group.sampling = &greedy;
    const VerifyResult result = device.verify(rows, std::span(&group, 1), 8)[0];
    EXPECT_EQ(result.tokens, expected.tokens);
    EXPECT_EQ(result.drafts, expected.accepted);
  }
}

/// Candidates of rows with whatever drafts are before them: against the specification, their probabilities against the
/// CPU's, which are made from the same masses.
TEST_F(CudaSampler, CandidatesAreWhatVerificationWouldChooseOneAfterTheOther) {
  Random random(5);
  cpu::WorkerPool pool(1);
  SamplerOnDevice device;
  for (int round = 0; round < 360; ++round) {
    any_order(round);
    constexpr int kVocabularies[] = {1, 7, 33, 256, 300, 1000, 300, 33, 2600};
    const int vocabulary = round % 60 == 59 ? 20011 : kVocabularies[round % 9];
    const int sequences = vocabulary > 5000 ? 1 : pick(random, 1, 3);
    const int count = pick(random, 1, kMaxCandidates);
    Rows last(sequences, vocabulary);  // of each sequence, the row behind its drafts
    std::vector<Case> cases;
    std::vector<Candidate> expected;
    for (int i = 0; i < sequences; ++i) {
      const int drafts = pick(random, 0, 3);
      Rows rows(drafts + 1, vocabulary);
      for (int r = 0; r <= drafts; ++r) fill_logits(random, rows.row(r), vocabulary);
      std::copy_n(rows.row(drafts), vocabulary, last.row(i));
      cases.push_back(random_case(random, rows, 0, drafts));
      add_what_is_ignored(random, cases.back(), vocabulary);
      const std::vector<Candidate> candidates =
          reference_propose({last.row(i), static_cast<std::size_t>(vocabulary)}, behind_drafts(cases.back()), count);
      expected.insert(expected.end(), candidates.begin(), candidates.end());
    }
    std::vector<ProposeRow> propose;
    for (const Case& c : cases) propose.push_back(behind_drafts(c));
    const std::vector<Candidate> candidates = device.propose(last, propose, count, sequences + round % 2);
    std::vector<Candidate> on_cpu(expected.size());
    cpu::Sampler sampler(cpu::Isa::portable, vocabulary, sequences, pool.size());
    sampler.propose(last.view(), propose, count, on_cpu, pool);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const std::string where = "round " + std::to_string(round) + " candidate " + std::to_string(i) + ": " +
                                describe(cases[i / static_cast<std::size_t>(count)].sampling);
      ASSERT_EQ(candidates[i].token, expected[i].token) << where;
      ASSERT_EQ(candidates[i].value, expected[i].value) << where;
      ASSERT_EQ(candidates[i].probability, on_cpu[i].probability) << where;
    }
  }
}

/// Whatever the requests ask for, steps of as many outputs of the same kinds can be one graph.
TEST_F(CudaSampler, StepsOfOneShapeAreTheSameLaunches) {
  Random random(6);
  SamplerOnDevice device;
  std::vector<std::byte> bytes;
  for (int step = 0; step < 4; ++step) {
    Rows rows(6, 1000);
    for (int r = 0; r < 6; ++r) fill_logits(random, rows.row(r), 1000);
    std::vector<Case> cases;
    for (int g = 0; g <= step; ++g) {
      Case c;
      c.first_output = g;
      c.position = step;
      c.sampling.temperature = 1.0F;
      c.sampling.top_p = g % 2 == 0 ? 1.0F : 0.8F;
      c.sampling.logit_bias = std::vector<std::pair<TokenId, float>>(static_cast<std::size_t>(step) + 1, {5, 1.0F});
      cases.push_back(c);
    }
    std::vector<VerifyGroup> groups;
    for (const Case& c : cases) groups.push_back(c.group());
    device.verify(rows, groups, 6);
    const auto now = device.launches();
    if (step > 0) {
      EXPECT_EQ(now, bytes);
    }
    bytes = now;
  }
}

}  // namespace
}  // namespace draftwerk::cuda
