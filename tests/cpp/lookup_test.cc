// The lookup drafter against a search of the whole sequence.
#include "drafting/lookup.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

namespace draftwerk {
namespace {

struct Proposal {
  DraftOutlook outlook;
  std::vector<TokenId> drafts;
};

DraftContext context_of(DraftState& state, std::span<const TokenId> tokens) {
  DraftContext context;
  context.state = &state;
  context.tokens = tokens;
  return context;
}

Proposal propose(Drafter& drafter, DraftState& state, std::span<const TokenId> tokens, int count) {
  Proposal proposal;
  proposal.outlook = drafter.outlook(context_of(state, tokens), count);
  proposal.drafts.resize(static_cast<std::size_t>(count));
  DraftJob job{.context = context_of(state, tokens), .count = count, .drafts = proposal.drafts.data(), .produced = -1};
  drafter.propose(std::span(&job, 1));
  EXPECT_LE(job.produced, count);
  proposal.drafts.resize(static_cast<std::size_t>(std::max(job.produced, 0)));
  return proposal;
}

/// Equal tokens up to a and up to b, counted to the drafter's limit.
int common_suffix(std::span<const TokenId> tokens, int a, int b) {
  int length = 0;
  while (length <= a && length < kLookupLongestMatch &&
         tokens[static_cast<std::size_t>(a - length)] == tokens[static_cast<std::size_t>(b - length)]) {
    ++length;
  }
  return length;
}

/// What lookup.h promises, by comparing every position with the end.
Proposal brute_force(std::span<const TokenId> tokens, int count) {
  const int last = static_cast<int>(tokens.size()) - 1;
  int longest = 0;
  for (int end = 0; end < last; ++end) longest = std::max(longest, common_suffix(tokens, end, last));
  if (longest < kLookupShortestMatch) return {};
  int order = kLookupShortestMatch;
  while (order * 2 <= std::min(longest, 16)) order *= 2;

  int best = 0;
  int best_end = -1;
  int seen = 0;
  for (int end = last - 1; end >= 0 && seen < kLookupCandidates; --end) {
    const int length = common_suffix(tokens, end, last);
    if (length < order) continue;
    ++seen;
    if (length > best) {
      best = length;
      best_end = end;
    }
  }
  std::vector<TokenId> text(tokens.begin(), tokens.end());
  for (int i = 0; i < count; ++i) text.push_back(text[static_cast<std::size_t>(best_end + 1 + i)]);
  const int classes[] = {2, 3, 4, 5, 7, 10, 16, 32};
  int confidence = 0;
  for (int c = 0; c < kModelConfidence; ++c) {
    if (best >= classes[c]) confidence = c;
  }
  return {{.available = count, .confidence = confidence}, {text.end() - count, text.end()}};
}

/// Text with many recurrences at every length: fresh tokens, copies of earlier stretches (that may run into
/// themselves), some of them with a flaw.
std::vector<TokenId> recurring_text(std::mt19937& random, int size, int vocabulary) {
  std::vector<TokenId> text;
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  while (static_cast<int>(text.size()) < size) {
    if (text.empty() || below(3) == 0) {
      const int fresh = 1 + below(8);
      for (int i = 0; i < fresh; ++i) text.push_back(below(vocabulary));
    } else {
      const int start = below(static_cast<int>(text.size()));
      const int length = 1 << below(7);
      for (int i = 0; i < length; ++i) text.push_back(text[static_cast<std::size_t>(start + i)]);
      if (below(2) == 0) text.back() = below(vocabulary);
    }
  }
  text.resize(static_cast<std::size_t>(size));
  return text;
}

void expect_equal(const Proposal& actual, const Proposal& expected, std::size_t size) {
  ASSERT_EQ(actual.outlook.available, expected.outlook.available) << "after " << size << " tokens";
  ASSERT_EQ(actual.outlook.confidence, expected.outlook.confidence) << "after " << size << " tokens";
  ASSERT_EQ(actual.drafts, expected.drafts) << "after " << size << " tokens";
}

class LookupAgainstBruteForce : public testing::TestWithParam<int> {};

TEST_P(LookupAgainstBruteForce, AgreesAtEveryLength) {
  const int vocabulary = GetParam();
  const auto drafter = make_lookup_drafter();
  for (unsigned seed = 0; seed < 6; ++seed) {
    std::mt19937 random(seed * 1000 + static_cast<unsigned>(vocabulary));
    const std::vector<TokenId> text = recurring_text(random, 600, vocabulary);
    const auto state = drafter->open();
    // Accepted tokens come several at a time.
    for (std::size_t size = 0; size <= text.size(); size += 1 + random() % 4) {
      const std::span tokens(text.data(), size);
      const int count = static_cast<int>(random() % 9);
      expect_equal(propose(*drafter, *state, tokens, count), size == 0 ? Proposal{} : brute_force(tokens, count), size);
      if (HasFatalFailure()) return;
    }
  }
}

// Vocabularies from "everything recurs, and more often than candidates are compared" to "hardly anything does".
INSTANTIATE_TEST_SUITE_P(Vocabularies, LookupAgainstBruteForce, testing::Values(1, 2, 3, 5, 20, 300, 262144));

TEST(Lookup, StateDoesNotDependOnHowTheSequenceGrew) {
  std::mt19937 random(7);
  const std::vector<TokenId> text = recurring_text(random, 3000, 50);
  const auto drafter = make_lookup_drafter();
  const auto stepwise = drafter->open();
  for (std::size_t size = 1; size <= text.size(); ++size) {
    drafter->outlook(context_of(*stepwise, std::span(text.data(), size)), 8);
    if (size % 97 != 0) continue;
    const auto fresh = drafter->open();
    expect_equal(propose(*drafter, *stepwise, std::span(text.data(), size), 8),
                 propose(*drafter, *fresh, std::span(text.data(), size), 8), size);
    if (HasFatalFailure()) return;
  }
}

TEST(Lookup, ExtendsARepetitionWithItsPeriod) {
  const std::vector<TokenId> text = {9, 1, 2, 3, 1, 2, 3, 1, 2};
  const auto drafter = make_lookup_drafter();
  const auto state = drafter->open();
  const Proposal proposal = propose(*drafter, *state, text, 8);
  EXPECT_EQ(proposal.drafts, (std::vector<TokenId>{3, 1, 2, 3, 1, 2, 3, 1}));
  EXPECT_EQ(proposal.outlook.confidence, 3);  // five tokens match
}

TEST(Lookup, PrefersTheLongestThenTheMostRecentMatch) {
  const auto drafter = make_lookup_drafter();
  const auto longest = drafter->open();
  const std::vector<TokenId> long_before = {1, 2, 3, 70, 8, 2, 3, 80, 8, 1, 2, 3};
  EXPECT_EQ(propose(*drafter, *longest, long_before, 1).drafts, std::vector<TokenId>{70});
  const auto recent = drafter->open();
  const std::vector<TokenId> twice = {1, 2, 3, 70, 8, 1, 2, 3, 80, 9, 1, 2, 3};
  EXPECT_EQ(propose(*drafter, *recent, twice, 1).drafts, std::vector<TokenId>{80});
}

TEST(Lookup, SaysNothingWithoutARecurringPair) {
  const auto drafter = make_lookup_drafter();
  for (const std::vector<TokenId>& text : {std::vector<TokenId>{}, {5}, {5, 5}, {1, 2, 3, 4, 2}}) {
    const auto state = drafter->open();
    const Proposal proposal = propose(*drafter, *state, text, 4);
    EXPECT_EQ(proposal.outlook.available, 0);
    EXPECT_TRUE(proposal.drafts.empty());
  }
}

TEST(Lookup, ServesSeveralSequencesInOneCall) {
  const auto drafter = make_lookup_drafter();
  const std::vector<TokenId> first = {1, 2, 3, 1, 2};
  const std::vector<TokenId> second = {4, 5, 6};
  const std::vector<TokenId> third = {7, 7, 7};
  const auto a = drafter->open();
  const auto b = drafter->open();
  const auto c = drafter->open();
  TokenId drafts[6] = {};
  DraftJob jobs[] = {{.context = context_of(*a, first), .count = 2, .drafts = drafts, .produced = -1},
                     {.context = context_of(*b, second), .count = 2, .drafts = drafts + 2, .produced = -1},
                     {.context = context_of(*c, third), .count = 2, .drafts = drafts + 4, .produced = -1}};
  drafter->propose(jobs);
  EXPECT_EQ(jobs[0].produced, 2);
  EXPECT_EQ(jobs[1].produced, 0);
  EXPECT_EQ(jobs[2].produced, 2);
  EXPECT_EQ((std::vector<TokenId>{drafts[0], drafts[1]}), (std::vector<TokenId>{3, 1}));
  EXPECT_EQ((std::vector<TokenId>{drafts[4], drafts[5]}), (std::vector<TokenId>{7, 7}));
}

TEST(Lookup, BeginsAnewWhenTheSequenceShrank) {
  const auto drafter = make_lookup_drafter();
  const auto state = drafter->open();
  std::mt19937 random(3);
  const std::vector<TokenId> text = recurring_text(random, 300, 5);
  drafter->outlook(context_of(*state, text), 4);
  const std::span shorter(text.data(), 100);
  expect_equal(propose(*drafter, *state, shorter, 4), brute_force(shorter, 4), shorter.size());
}

}  // namespace
}  // namespace draftwerk
