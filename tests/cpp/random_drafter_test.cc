#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "drafting/random.h"

namespace draftwerk {
namespace {

std::vector<TokenId> draw(int vocabulary, std::span<const TokenId> tokens, int count, std::uint64_t seed) {
  const auto drafter = make_random_drafter(vocabulary);
  SamplingParams sampling;
  sampling.seed = seed;
  DraftContext context;
  context.tokens = tokens;
  context.sampling = &sampling;
  EXPECT_EQ(drafter->outlook(context, count).available, count);
  std::vector<TokenId> drafts(static_cast<std::size_t>(count), -1);
  DraftJob job{.context = context, .count = count, .drafts = drafts.data(), .produced = -1};
  drafter->propose(std::span(&job, 1));
  EXPECT_EQ(job.produced, count);
  return drafts;
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

TEST(RandomDrafter, ProposesNothingWhenNothingIsWanted) { EXPECT_TRUE(draw(10, {}, 0, 1).empty()); }

}  // namespace
}  // namespace draftwerk
