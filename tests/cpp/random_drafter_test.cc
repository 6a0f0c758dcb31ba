#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "drafting/random.h"

namespace draftwerk {
namespace {

struct Drawn {
  std::vector<TokenId> tokens;
  std::vector<std::int32_t> parents;
};

Drawn draw_tree(int vocabulary, std::span<const TokenId> tokens, int count, std::uint64_t seed) {
  const auto drafter = make_random_drafter(vocabulary);
  SamplingParams sampling;
  sampling.seed = seed;
  DraftContext context;
  context.tokens = tokens;
  context.sampling = &sampling;
  EXPECT_EQ(drafter->outlook(context, count).available, count);
  Drawn drawn{std::vector<TokenId>(static_cast<std::size_t>(count), -1),
              std::vector<std::int32_t>(static_cast<std::size_t>(count), -2)};
  DraftJob job{.context = context,
               .count = count,
               .drafts = drawn.tokens.data(),
               .parents = drawn.parents.data(),
               .produced = -1};
  drafter->propose(std::span(&job, 1));
  EXPECT_EQ(job.produced, count);
  return drawn;
}

std::vector<TokenId> draw(int vocabulary, std::span<const TokenId> tokens, int count, std::uint64_t seed) {
  return draw_tree(vocabulary, tokens, count, seed).tokens;
}

TEST(RandomDrafter, StaysInsideTheVocabularyAndReachesAllOfIt) {
  for (const int vocabulary : {1, 2, 7, 100}) {
    std::vector<int> seen(static_cast<std::size_t>(vocabulary), 0);
    for (const TokenId token : draw(vocabulary, {}, 4000, 11)) {
      ASSERT_GE(token, 0);
      ASSERT_LT(token, vocabulary);
      ++seen[static_cast<std::size_t>(token)];
    }
    // 4000 / 100 = 40 expected: none of 100 counts falls below 10 unless the draw is biased (p < 1e-6).
    EXPECT_GE(*std::min_element(seen.begin(), seen.end()), 10) << vocabulary;
  }
}

TEST(RandomDrafter, HalfOfTheDraftsComeFromTheSequence) {
  const std::vector<TokenId> tokens = {200001, 200002, 200003};
  int repeated = 0;
  for (const TokenId token : draw(100000, tokens, 4000, 5)) {
    if (token >= 100000) {
      EXPECT_LE(token, 200003);
      EXPECT_GE(token, 200001);
      ++repeated;
    }
  }
  EXPECT_NEAR(repeated, 2000, 200);  // six standard deviations
}

TEST(RandomDrafter, IsAFunctionOfSeedAndPosition) {
  const std::vector<TokenId> tokens = {3, 1, 4, 1, 5};
  EXPECT_EQ(draw(1000, tokens, 8, 42), draw(1000, tokens, 8, 42));
  EXPECT_NE(draw(1000, tokens, 8, 42), draw(1000, tokens, 8, 43));
  EXPECT_NE(draw(1000, tokens, 8, 42), draw(1000, tokens, 8, 42ULL | 1ULL << 40));
  EXPECT_NE(draw(1000, tokens, 8, 42), draw(1000, std::span(tokens).first(4), 8, 42));
}

TEST(RandomDrafter, DrawsTreesWhoseSiblingsDiffer) {
  int branches = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const Drawn drawn = draw_tree(3, {}, 12, seed);  // three tokens: many would be equal
    std::set<std::pair<std::int32_t, TokenId>> seen;
    for (std::int32_t i = 0; i < 12; ++i) {
      const auto at = static_cast<std::size_t>(i);
      ASSERT_GE(drawn.parents[at], -1);
      ASSERT_LT(drawn.parents[at], i);
      EXPECT_TRUE(seen.emplace(drawn.parents[at], drawn.tokens[at]).second) << "seed " << seed << ", draft " << i;
      branches += drawn.parents[at] != i - 1 ? 1 : 0;
    }
  }
  EXPECT_GT(branches, 200);
}

TEST(RandomDrafter, ProposesNothingWhenNothingIsWanted) { EXPECT_TRUE(draw(10, {}, 0, 1).empty()); }

}  // namespace
}  // namespace draftwerk
