// Several candidates for a draft, and verification of trees that are made of such, by whole rows of logits: the CPU's
// sampler against the specification (reference_sampler).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"
#include "backend/reference_sampler.h"
#include "sampler_fixture.h"

namespace draftwerk {
namespace {

using cpu::Isa;
using cpu::Sampler;
using cpu::WorkerPool;
using testing::behind_drafts;
using testing::Case;
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

class CandidatesOnIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void check_trees(unsigned seed, int steps, const std::vector<int>& vocabularies, int threads) {
    Random random(seed);
    WorkerPool pool(threads);
    std::vector<VerifyResult> results;
    std::size_t accepted = 0;
    std::size_t jumps = 0;
    for (int step = 0; step < steps; ++step) {
      const int vocabulary = vocabularies[static_cast<std::size_t>(step) % vocabularies.size()];
      std::vector<Case> cases;
      const int groups = pick(random, 1, 3);
      Rows rows(groups * 10, vocabulary);
      for (int r = 0; r < groups * 10; ++r) fill_logits(random, rows.row(r), vocabulary);
      int first = 0;
      for (int g = 0; g < groups; ++g) {
        cases.push_back(random_tree(random, rows, first, pick(random, 0, 9)));
        first += static_cast<int>(cases.back().drafts.size()) + 1;
      }
      std::vector<VerifyGroup> verify;
      std::vector<VerifyResult> expected;
      for (const Case& c : cases) {
        verify.push_back(c.group());
        expected.push_back(reference_verify(rows_from(rows, c.first_output), vocabulary, verify.back()));
      }
      Sampler sampler(GetParam(), vocabulary, groups * 10, pool.size());
      results.resize(cases.size());
      sampler.verify_logits(rows.view(), verify, results, pool);
      for (std::size_t g = 0; g < cases.size(); ++g) {
        expect_equal(
            results[g], expected[g],
            "step " + std::to_string(step) + " group " + std::to_string(g) + ": " + describe(cases[g].sampling));
        if (HasFatalFailure()) return;
        accepted += results[g].drafts.size();
        for (std::size_t i = 0; i < results[g].drafts.size(); ++i) {
          jumps += results[g].drafts[i] > static_cast<int>(i) ? 1U : 0U;
        }
      }
    }
    // Neither are all trees refused nor is what is accepted always the first draft of all.
    EXPECT_GT(accepted, static_cast<std::size_t>(steps) / 2);
    EXPECT_GT(jumps, static_cast<std::size_t>(steps) / 10);
  }
};

TEST_P(CandidatesOnIsa, TreesAreVerifiedAsTheSpecificationDoes) { check_trees(1, 600, {2, 7, 33, 256, 300, 600}, 1); }

TEST_P(CandidatesOnIsa, TreesAreVerifiedTheSameOnSeveralThreads) { check_trees(2, 300, {7, 300, 1000}, 3); }

TEST_P(CandidatesOnIsa, AnAcceptedPathIsWhatAChainOfItGives) {
  constexpr int kVocabulary = 50;
  Random random(3);
  WorkerPool pool(1);
  std::size_t longest = 0;
  for (int trial = 0; trial < 300; ++trial) {
    Rows rows(10, kVocabulary);
    for (int r = 0; r < 10; ++r) fill_logits(random, rows.row(r), kVocabulary);
    const Case c = random_tree(random, rows, 0, 9);
    Sampler sampler(GetParam(), kVocabulary, 10, pool.size());
    std::vector<VerifyResult> results(2);
    Rows of_tree = rows;
    const VerifyGroup tree = c.group();
    sampler.verify_logits(of_tree.view(), std::span(&tree, 1), std::span(results).first(1), pool);
    Case chain = c;
    chain.parents.clear();
    chain.drafts.clear();
    Rows of_chain(10, kVocabulary);
    std::copy_n(rows.row(0), kVocabulary, of_chain.row(0));
    for (const int draft : results[0].drafts) {
      chain.drafts.push_back(c.drafts[static_cast<std::size_t>(draft)]);
      std::copy_n(rows.row(draft + 1), kVocabulary, of_chain.row(static_cast<int>(chain.drafts.size())));
    }
    const VerifyGroup path = chain.group();
    sampler.verify_logits(of_chain.view(), std::span(&path, 1), std::span(results).last(1), pool);
    ASSERT_EQ(results[0].tokens, results[1].tokens) << trial;
    ASSERT_EQ(results[0].logprobs, results[1].logprobs) << trial;
    longest = std::max(longest, results[0].drafts.size());
  }
  EXPECT_GE(longest, 4U);
}

TEST_P(CandidatesOnIsa, ATreeIsFollowedWhereItAgrees) {
  constexpr int kVocabulary = 600;
  // 0 -> {1, 2}, 1 -> 3, 2 -> {4, 5}, of tokens:      7 -> {107, 207}, 107 -> 300, 207 -> {301, 302}
  const std::vector<TokenId> drafts = {7, 107, 207, 300, 301, 302};
  const std::vector<std::int32_t> parents = {-1, 0, 0, 1, 2, 2};
  const SamplingParams greedy;
  WorkerPool pool(2);
  Sampler sampler(GetParam(), kVocabulary, 7, pool.size());
  struct Expected {
    std::vector<TokenId> choices;  // of the last known token's row and of each draft's
    std::vector<TokenId> tokens;
    std::vector<int> accepted;
  };
  const Expected cases[] = {{{8, 107, 1, 1, 1, 1, 1}, {8}, {}},
                            {{7, 8, 1, 1, 1, 1, 1}, {7, 8}, {0}},
                            {{7, 107, 300, 301, 9, 1, 1}, {7, 107, 300, 9}, {0, 1, 3}},
                            {{7, 107, 301, 301, 9, 1, 1}, {7, 107, 301}, {0, 1}},
                            {{7, 207, 300, 302, 9, 1, 5}, {7, 207, 302, 5}, {0, 2, 5}},
                            {{7, 207, 300, 300, 9, 1, 5}, {7, 207, 300}, {0, 2}}};
  for (const Expected& expected : cases) {
    Rows rows(7, kVocabulary);
    for (int r = 0; r < 7; ++r) rows.row(r)[expected.choices[static_cast<std::size_t>(r)]] = 5.0F;
    VerifyGroup group;
    group.drafts = drafts;
    group.parents = parents;
    group.sampling = &greedy;
    VerifyResult result;
    sampler.verify_logits(rows.view(), std::span(&group, 1), std::span(&result, 1), pool);
    EXPECT_EQ(result.tokens, expected.tokens);
    EXPECT_EQ(result.drafts, expected.accepted);
  }
}

TEST_P(CandidatesOnIsa, RowsThatAreNotReachedAreLeftAlone) {
  constexpr int kVocabulary = 300;
  SamplingParams biased;
  biased.logit_bias = {{3, 1.0F}};  // shows in the logits of a row that was chosen from
  const std::vector<TokenId> drafts = {7, 8, 9, 10, 11};
  const std::vector<std::int32_t> parents = {-1, -1, 1, 2, 0};
  Rows rows(6, kVocabulary);
  for (int r = 0; r < 6; ++r) rows.row(r)[r == 0 ? 8 : 9] = 5.0F;
  VerifyGroup group;
  group.drafts = drafts;
  group.parents = parents;
  group.sampling = &biased;
  WorkerPool pool(1);
  Sampler sampler(GetParam(), kVocabulary, 6, pool.size());
  VerifyResult result;
  sampler.verify_logits(rows.view(), std::span(&group, 1), std::span(&result, 1), pool);
  EXPECT_EQ(result.tokens, (std::vector<TokenId>{8, 9, 9}));
  std::vector<float> touched;
  for (int r = 0; r < 6; ++r) touched.push_back(rows.row(r)[3]);
  EXPECT_EQ(touched, (std::vector<float>{1, 0, 1, 1, 0, 0}));
}

TEST_P(CandidatesOnIsa, AreWhatVerificationWouldChooseOneAfterTheOther) {
  Random random(9);
  WorkerPool pool(2);
  int full = 0;
  for (int round = 0; round < 280; ++round) {
    constexpr int kVocabularies[] = {1, 7, 33, 256, 300, 1000, 5000};
    const int vocabulary = kVocabularies[round % 7];
    const int sequences = pick(random, 1, 4);
    const int count = pick(random, 1, 8);
    Rows last(sequences, vocabulary);  // of each sequence, the row behind its drafts
    std::vector<Case> cases;
    std::vector<Candidate> expected;
    for (int i = 0; i < sequences; ++i) {
      const int drafts = pick(random, 0, 4);
      Rows rows(drafts + 1, vocabulary);
      for (int r = 0; r <= drafts; ++r) fill_logits(random, rows.row(r), vocabulary);
      std::copy_n(rows.row(drafts), vocabulary, last.row(i));
      cases.push_back(random_case(random, rows, 0, drafts));
      const std::vector<Candidate> candidates =
          reference_propose({last.row(i), static_cast<std::size_t>(vocabulary)}, behind_drafts(cases.back()), count);
      expected.insert(expected.end(), candidates.begin(), candidates.end());
      const VerifyResult verified = reference_verify(rows.values, vocabulary, cases.back().group());
      if (verified.tokens.size() > cases.back().drafts.size()) {
        ASSERT_EQ(verified.tokens.back(), candidates[0].token);
        ++full;
      }
    }
    std::vector<ProposeRow> propose;
    for (const Case& c : cases) propose.push_back(behind_drafts(c));
    std::vector<Candidate> candidates(expected.size());
    Sampler sampler(GetParam(), vocabulary, sequences, pool.size());
    sampler.propose(last.view(), propose, count, candidates, pool);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(candidates[i].token, expected[i].token) << "round " << round << " candidate " << i;
      ASSERT_EQ(candidates[i].value, expected[i].value) << "round " << round << " candidate " << i;
    }
  }
  EXPECT_GT(full, 280);
}

TEST_P(CandidatesOnIsa, EndWithTheFiniteLogits) {
  for (const float temperature : {0.0F, 1.0F}) {
    for (const std::vector<TokenId>& finite : {std::vector<TokenId>{}, {280}, {9, 280}}) {
      Rows rows(1, 300);
      std::fill(rows.values.begin(), rows.values.end(), -kInfinity);
      for (const TokenId token : finite) rows.values[static_cast<std::size_t>(token)] = 1;
      SamplingParams sampling;
      sampling.temperature = temperature;
      const ProposeRow row{{}, 0, &sampling, nullptr, {}, 0};
      WorkerPool pool(1);
      Sampler sampler(GetParam(), 300, 1, pool.size());
      std::vector<Candidate> candidates(3);
      sampler.propose(rows.view(), std::span(&row, 1), 3, candidates, pool);
      std::vector<TokenId> found;
      for (const Candidate& candidate : candidates) {
        if (candidate.value > -kInfinity) found.push_back(candidate.token);
      }
      std::sort(found.begin(), found.end());
      EXPECT_EQ(found, finite);
      if (finite.empty()) {
        EXPECT_EQ(candidates[0].token, 0);
      }
      for (std::size_t i = std::max<std::size_t>(finite.size(), 1); i < 3; ++i) EXPECT_EQ(candidates[i].token, -1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, CandidatesOnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::isa_name(info.param)); });

}  // namespace
}  // namespace draftwerk
