// The tree of drafts while it grows; how the target verifies one is in draft_tree_test.cc.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "drafting/draft_tree.h"
#include "taken_drafts.h"

namespace draftwerk {
namespace {

using testing::take;
using testing::Taken;

std::vector<Candidate> candidates(TokenId first, int count) {
  std::vector<Candidate> found;
  for (int i = 0; i < count; ++i) found.push_back({first + i, -static_cast<float>(i), 0.1F});
  return found;
}

TEST(ChoiceProbabilities, AreLessThanOneInAllAndFollowTheDraftersOwn) {
  for (const bool greedy : {true, false}) {
    const std::vector<Candidate> sure = {{7, 5.0F, 0.97F}, {8, 1.0F, 0.01F}, {9, 0.5F, 0.005F}, {-1, 0.0F, 0.0F}};
    const std::vector<Candidate> unsure = {{7, 5.0F, 0.2F}, {8, 4.9F, 0.15F}, {9, 4.5F, 0.1F}, {-1, 0.0F, 0.0F}};
    const auto of_sure = choice_probabilities(sure, greedy);
    const auto of_unsure = choice_probabilities(unsure, greedy);
    EXPECT_GT(of_sure[0], 0.85F);
    EXPECT_LT(of_unsure[0], 0.5F);
    EXPECT_LT(of_sure[1], of_unsure[1]);
    for (const auto& weights : {of_sure, of_unsure}) {
      EXPECT_LT(std::accumulate(weights.begin(), weights.end(), 0.0F), 1.0F);
      EXPECT_TRUE(std::is_sorted(weights.rbegin(), weights.rend()));
      EXPECT_EQ(weights[3], 0.0F) << "there is no such candidate";
    }
  }
}

TEST(ChoiceProbabilities, TakesWhatAFilterKeptOut) {
  const std::vector<Candidate> found = {{7, 5.0F, 0.9F}, {8, 11.0F, 0.01F}, {9, 4.0F, 0.0F}};
  const auto weights = choice_probabilities(found, false);
  EXPECT_GT(weights[0], weights[1]) << "its value is larger, but the target's filter will keep it out as well";
  EXPECT_EQ(weights[2], 0.0F);
}

TEST(DraftTree, KeepsTheLikeliest) {
  DraftTree tree;
  tree.start(3, {}, 1.0);  // no second pass is worth so much
  tree.add(0, candidates(10, 4), std::vector{0.4F, 0.3F, 0.2F, 0.05F});
  EXPECT_FALSE(tree.advance(4));
  const Taken taken = take(tree, 3);
  EXPECT_EQ(taken.drafts, (std::vector<TokenId>{10, 11, 12}));
  EXPECT_EQ(taken.parents, (std::vector<std::int32_t>{-1, -1, -1}));
}

TEST(DraftTree, TakesWhatWasDraftedAhead) {
  DraftTree tree;
  tree.start(4, {}, 1.0);
  tree.add(0, candidates(10, 4), std::vector{0.4F, 0.45F, 0.1F, 0.01F});
  EXPECT_TRUE(tree.advance_ahead()) << "the first was followed up, likeliest or not, and whatever a pass costs";
  EXPECT_FLOAT_EQ(tree.reach(), 0.4F);
  tree.add(0, candidates(20, 4), std::vector{0.9F, 0.05F, 0.01F, 0.01F});
  EXPECT_TRUE(tree.advance_ahead());
  EXPECT_FLOAT_EQ(tree.reach(), 0.36F);
  tree.add(0, std::vector<Candidate>{{-1, 0.0F, 0.0F}}, std::vector{0.0F});
  EXPECT_FALSE(tree.advance_ahead()) << "nothing was found";
  const Taken taken = take(tree, 4);
  EXPECT_EQ(taken.drafts, (std::vector<TokenId>{11, 10, 20, 12}));
  EXPECT_EQ(taken.parents, (std::vector<std::int32_t>{-1, -1, 1, -1}));
}

TEST(DraftTree, FollowsUpWhatPromisesMost) {
  DraftTree tree;
  tree.start(4, {}, 0.0);
  tree.add(0, candidates(10, 4), std::vector{0.8F, 0.1F, 0.05F, 0.01F});
  ASSERT_TRUE(tree.advance(4));
  // What follows the first, 0.8 * 0.8, displaces 0.01, what follows the second, 0.1 * 0.8, displaces 0.05; what follows
  // the third would be worth less than what it displaces.
  ASSERT_EQ(tree.frontier_size(), 2);
  EXPECT_EQ(tree.token(0), 10);
  EXPECT_EQ(tree.token(1), 11);
  EXPECT_EQ(tree.before(1), 0);
  EXPECT_EQ(std::vector<TokenId>(tree.path(1).begin(), tree.path(1).end()), (std::vector<TokenId>{11}));
  tree.add(0, candidates(20, 4), std::vector{0.5F, 0.2F, 0.1F, 0.1F});     // reach 0.4, 0.16, 0.08, 0.08
  tree.add(1, candidates(30, 4), std::vector{0.9F, 0.02F, 0.02F, 0.02F});  // 0.09, the rest next to nothing
  ASSERT_TRUE(tree.advance(1));
  ASSERT_EQ(tree.frontier_size(), 1);
  EXPECT_EQ(tree.before(0), 0);
  EXPECT_EQ(std::vector<TokenId>(tree.path(0).begin(), tree.path(0).end()), (std::vector<TokenId>{10, 20}));
  tree.add(0, candidates(40, 1), std::vector{0.1F, 0.0F, 0.0F, 0.0F});  // 0.04
  EXPECT_FALSE(tree.advance(4));
  const Taken taken = take(tree, 4);
  EXPECT_EQ(taken.drafts, (std::vector<TokenId>{10, 20, 21, 11}));
  EXPECT_EQ(taken.parents, (std::vector<std::int32_t>{-1, 0, 0, -1}));
}

TEST(DraftTree, APassHasToPay) {
  for (const bool pays : {true, false}) {
    DraftTree tree;
    tree.start(8, {}, pays ? 0.24 : 0.26);
    tree.add(0, candidates(10, 1), std::vector{0.5F, 0.0F, 0.0F, 0.0F});  // the next one: 0.25, as far as can be seen
    EXPECT_EQ(tree.advance(4), pays);
  }
}

TEST(DraftTree, ADraftHasToPay) {
  DraftTree tree;
  std::vector<double> prices(9);
  for (std::size_t i = 0; i < prices.size(); ++i) prices[i] = 0.15 * static_cast<double>(i);
  tree.start(8, prices, 0.0);
  tree.add(0, candidates(10, 4), std::vector{0.5F, 0.2F, 0.1F, 0.1F});
  ASSERT_TRUE(tree.advance(4));
  ASSERT_EQ(tree.frontier_size(), 1) << "what follows the second cannot be worth 0.15";
  tree.add(0, candidates(20, 4), std::vector{0.4F, 0.2F, 0.2F, 0.1F});
  EXPECT_FALSE(tree.advance(4));
  std::vector<TokenId> drafts(8);
  std::vector<std::int32_t> parents(8);
  const DraftTree::Size size = tree.take(drafts.data(), parents.data());
  ASSERT_EQ(size.drafts, 3);
  EXPECT_EQ(std::vector<TokenId>(drafts.begin(), drafts.begin() + 3), (std::vector<TokenId>{10, 11, 20}));
  EXPECT_NEAR(size.promised, 0.5 + 0.2 + 0.2, 1e-6);
}

TEST(DraftTree, GoesBeyondADearRowForWhatIsBehindIt) {
  DraftTree tree;
  const std::vector<double> prices = {0.0, 0.1, 0.5, 0.55};  // the second row is dear, the third is not
  for (const float third : {0.25F, 0.1F}) {
    tree.start(3, prices, 1.0);
    tree.add(0, candidates(10, 3), std::vector{0.4F, 0.3F, third, 0.0F});
    tree.advance(4);
    EXPECT_EQ(take(tree, 3).drafts.size(), third > 0.2F ? 3U : 1U);
  }
}

TEST(DraftTree, ASureDrafterDraftsAChainAsDeepAsItGets) {
  DraftTree tree;
  tree.start(64, {}, 0.05);
  int passes = 0;
  do {
    tree.add(0, candidates(passes, 1), std::vector{0.99F, 0.0F, 0.0F, 0.0F});
    ++passes;
  } while (tree.advance(4));
  EXPECT_EQ(passes, kDeepestDraft);
  const Taken taken = take(tree, 64);
  ASSERT_EQ(taken.drafts.size(), static_cast<std::size_t>(kDeepestDraft));
  for (std::size_t i = 0; i < taken.drafts.size(); ++i) EXPECT_EQ(taken.parents[i], static_cast<std::int32_t>(i) - 1);
}

TEST(DraftTree, MissingCandidatesEndIt) {
  DraftTree tree;
  tree.start(4, {}, 0.0);
  tree.add(0, std::vector<Candidate>(4), std::vector{0.0F, 0.0F, 0.0F, 0.0F});
  EXPECT_FALSE(tree.advance(4));
  EXPECT_TRUE(take(tree, 4).drafts.empty());
}

TEST(DraftTree, IsATreeWhateverItIsGiven) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform;
  DraftTree tree;
  for (int round = 0; round < 500; ++round) {
    const int count = 1 + static_cast<int>(random() % 64);
    const int width = 1 + static_cast<int>(random() % 6);
    std::vector<double> prices(static_cast<std::size_t>(count) + 1);
    for (std::size_t i = 1; i < prices.size(); ++i) prices[i] = prices[i - 1] + uniform(random) * 0.1;
    tree.start(count, round % 2 == 0 ? std::span<const double>(prices) : std::span<const double>(),
               uniform(random) * 0.1);
    TokenId next = 0;
    const auto add = [&](int index) {
      const int found = static_cast<int>(random() % 5);
      std::vector<Candidate> choice = candidates(next, kDraftBranches);
      for (int i = found; i < kDraftBranches; ++i) choice[static_cast<std::size_t>(i)].token = -1;
      next += kDraftBranches;
      std::vector<float> probabilities(kDraftBranches);
      for (float& p : probabilities) p = uniform(random) / 4.0F;
      std::sort(probabilities.rbegin(), probabilities.rend());
      tree.add(index, choice, probabilities);
    };
    add(0);
    while (tree.advance(width)) {
      ASSERT_LE(tree.frontier_size(), std::min(width, kDraftWidth));
      const int rows = tree.frontier_size();
      for (int index = 0; index < rows; ++index) {
        EXPECT_EQ(tree.path(index).back(), tree.token(index));
        add(index);
      }
    }
    const Taken taken = take(tree, count);
    for (std::size_t i = 0; i < taken.drafts.size(); ++i) {
      ASSERT_GE(taken.parents[i], -1);
      ASSERT_LT(taken.parents[i], static_cast<std::int32_t>(i));
    }
  }
}

}  // namespace
}  // namespace draftwerk
