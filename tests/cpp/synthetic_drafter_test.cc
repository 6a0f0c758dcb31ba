#include "drafting/synthetic.h"

#include <gtest/gtest.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cstddef>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace draftwerk {
namespace {

constexpr int kVocabulary = 500;

using Tokens = std::vector<TokenId>;

Tokens random_tokens(unsigned seed, int size) {
  std::mt19937 random(seed);
  Tokens tokens;
  for (int i = 0; i < size; ++i) tokens.push_back(static_cast<TokenId>(random() % kVocabulary));
  return tokens;
}

DraftContext context_of(DraftState* state, std::span<const TokenId> tokens) {
  DraftContext context;
  context.state = state;
  context.tokens = tokens;
  return context;
}

Tokens propose(Drafter& drafter, DraftState* state, std::span<const TokenId> tokens, int count) {
  Tokens drafts(static_cast<std::size_t>(count), -1);
  DraftJob job{.context = context_of(state, tokens), .count = count, .drafts = drafts.data(), .produced = -1};
  drafter.propose(std::span(&job, 1));
  EXPECT_GE(job.produced, 0);
  EXPECT_LE(job.produced, count);
  drafts.resize(static_cast<std::size_t>(std::clamp(job.produced, 0, count)));
  return drafts;
}

/// Always right, unless told otherwise.
std::unique_ptr<Drafter> drafter_for(std::vector<Tokens> recordings, double acceptance = 1.0, std::uint64_t seed = 1) {
  return make_synthetic_drafter(std::move(recordings), acceptance, seed, kVocabulary, nullptr);
}

TEST(SyntheticDrafter, IsRightAsOftenAsSet) {
  const Tokens recording = random_tokens(1, 20000);
  for (const double acceptance : {0.0, 0.1, 0.5, 0.9, 0.95, 1.0}) {
    const auto drafter = drafter_for({recording}, acceptance);
    const auto state = drafter->open();
    const std::span tokens(recording.data(), 10);
    const Tokens drafts = propose(*drafter, state.get(), tokens, 19990);
    ASSERT_EQ(drafts.size(), 19990U);
    int right = 0;
    for (std::size_t i = 0; i < drafts.size(); ++i) {
      ASSERT_GE(drafts[i], 0);
      ASSERT_LT(drafts[i], kVocabulary);
      right += drafts[i] == recording[10 + i] ? 1 : 0;
    }
    // Five standard deviations are at most 0.018; none or all are exact.
    EXPECT_NEAR(right / 19990.0, acceptance, acceptance == 0.0 || acceptance == 1.0 ? 0.0 : 0.018) << acceptance;
  }
}

TEST(SyntheticDrafter, IsWrongWithAnyOtherToken) {
  const Tokens recording(20000, 7);
  const auto drafter = make_synthetic_drafter({recording}, 0.0, 3, 8, nullptr);
  const auto state = drafter->open();
  std::vector<int> seen(8, 0);
  for (const TokenId draft : propose(*drafter, state.get(), std::span(recording).first(1), 19999)) {
    ASSERT_GE(draft, 0);
    ASSERT_LT(draft, 8);
    ++seen[static_cast<std::size_t>(draft)];
  }
  EXPECT_EQ(seen[7], 0);
  for (int token = 0; token < 7; ++token) EXPECT_NEAR(seen[static_cast<std::size_t>(token)], 2857, 300) << token;
}

TEST(SyntheticDrafter, ADraftDependsOnSeedAndPositionAlone) {
  const Tokens recording = random_tokens(2, 400);
  const auto drafter = drafter_for({recording}, 0.6, 42);
  const auto whole_state = drafter->open();
  const Tokens whole = propose(*drafter, whole_state.get(), std::span(recording).first(1), 399);

  // Other lengths, other steps on the way, drafts accepted or not: the same drafts at the same positions.
  std::mt19937 random(5);
  const auto state = drafter->open();
  for (std::size_t size = 1; size < 380; size += 1 + random() % 9) {
    const auto count = static_cast<int>(random() % 17);
    const Tokens drafts = propose(*drafter, state.get(), std::span(recording).first(size), count);
    ASSERT_EQ(drafts, Tokens(whole.begin() + static_cast<std::ptrdiff_t>(size) - 1,
                             whole.begin() + static_cast<std::ptrdiff_t>(size) - 1 + count));
  }
  const auto again = drafter_for({recording}, 0.6, 42);
  EXPECT_EQ(propose(*again, again->open().get(), std::span(recording).first(1), 399), whole);
  for (const std::uint64_t seed : {std::uint64_t{43}, std::uint64_t{42} | std::uint64_t{1} << 40}) {
    const auto other = drafter_for({recording}, 0.6, seed);
    EXPECT_NE(propose(*other, other->open().get(), std::span(recording).first(1), 399), whole) << seed;
  }
}

TEST(SyntheticDrafter, FollowsTheRecordingThatBeginsWithTheSequence) {
  const Tokens shared = random_tokens(3, 50);
  std::vector<Tokens> recordings;
  for (TokenId branch = 0; branch < 40; ++branch) {
    Tokens recording = shared;
    recording.push_back(branch);
    for (const TokenId token : random_tokens(100 + static_cast<unsigned>(branch), 30)) recording.push_back(token);
    recordings.push_back(recording);
  }
  std::shuffle(recordings.begin(), recordings.end(), std::mt19937(4));
  const auto drafter = drafter_for(recordings);
  for (const Tokens& recording : recordings) {
    const auto state = drafter->open();
    // While several begin alike it follows one of them; which one is decided where they part.
    EXPECT_EQ(propose(*drafter, state.get(), std::span(recording).first(20), 30),
              Tokens(recording.begin() + 20, recording.begin() + 50));
    EXPECT_EQ(propose(*drafter, state.get(), std::span(recording).first(51), 30),
              Tokens(recording.begin() + 51, recording.end()));
  }
}

TEST(SyntheticDrafter, SaysNothingWithoutARecordingOrPastItsEnd) {
  const Tokens recording = {1, 2, 3, 4, 5, 6};
  const auto drafter = drafter_for({{9, 9}, recording});
  const auto expect_drafts = [&](DraftState* state, const Tokens& tokens, int limit, const Tokens& drafts) {
    const DraftOutlook outlook = drafter->outlook(context_of(state, tokens), limit);
    EXPECT_EQ(outlook.available, static_cast<int>(drafts.size()));
    EXPECT_EQ(outlook.confidence, kModelConfidence);
    EXPECT_EQ(propose(*drafter, state, tokens, limit), drafts);
  };
  const auto known = drafter->open();
  expect_drafts(known.get(), {1, 2}, 3, {3, 4, 5});
  expect_drafts(known.get(), {1, 2, 3, 4}, 3, {5, 6});
  expect_drafts(known.get(), {1, 2, 3, 4, 5, 6}, 3, {});
  expect_drafts(known.get(), {1, 2, 3, 4, 5, 6, 7}, 3, {});
  const auto unknown = drafter->open();
  expect_drafts(unknown.get(), {1, 3}, 3, {});
  const auto parting = drafter->open();
  expect_drafts(parting.get(), {1, 2}, 1, {3});
  expect_drafts(parting.get(), {1, 2, 3, 8}, 3, {});
  expect_drafts(parting.get(), {1, 2, 3, 8, 5}, 3, {});
  const auto shrinking = drafter->open();
  expect_drafts(shrinking.get(), {1, 2, 3, 8}, 3, {});
  expect_drafts(shrinking.get(), {1, 2, 3}, 2, {4, 5});
  const auto nothing_recorded = drafter_for({});
  EXPECT_EQ(nothing_recorded->outlook(context_of(nothing_recorded->open().get(), recording), 4).available, 0);
}

TEST(SyntheticDrafter, OfRecordingsThatContinueEachOtherTheLongestCounts) {
  const auto drafter = drafter_for({{1, 2}, {1, 2, 3, 4}, {1, 2, 3}, {1, 2, 3, 4}, {1}});
  EXPECT_EQ(propose(*drafter, drafter->open().get(), Tokens{1, 2}, 8), (Tokens{3, 4}));
}

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)
TEST(SyntheticDrafter, KeepsNoMoreForALongSequence) {
  const Tokens recording = random_tokens(6, 100000);
  const auto drafter = drafter_for({recording, random_tokens(7, 100)}, 0.5);
  const auto state = drafter->open();
  TokenId drafts[8];
  const auto step = [&](std::size_t size) {
    const DraftContext context = context_of(state.get(), std::span(recording).first(size));
    DraftJob job{.context = context, .count = drafter->outlook(context, 8).available, .drafts = drafts, .produced = 0};
    drafter->propose(std::span(&job, 1));
    return job.produced;
  };
  step(1);
  const std::size_t before = mallinfo2().uordblks;
  int produced = 0;
  for (std::size_t size = 2; size < recording.size(); size += 7) produced += step(size);
  EXPECT_EQ(mallinfo2().uordblks, before);
  EXPECT_GT(produced, 100000);
}
#endif

/// Offers a few drafts, all of token 0, and notes what it is asked for.
class NotingDrafter final : public Drafter {
 public:
  struct Note {
    DraftState* state = nullptr;
    std::size_t tokens = 0;
    int count = 0;
    int target_row = 0;
  };

  explicit NotingDrafter(std::vector<Note>& notes) : notes_(notes) {}
  [[nodiscard]] const char* name() const override { return "noting"; }
  std::unique_ptr<DraftState> open() override { return std::make_unique<State>(); }
  DraftOutlook outlook(const DraftContext& context, int limit) override {
    return {.available = context.target_row < 0 ? 0 : std::min(limit, 5), .confidence = 0};
  }
  int propose(std::span<DraftJob> jobs) override {
    for (DraftJob& job : jobs) {
      EXPECT_NE(dynamic_cast<State*>(job.context.state), nullptr);
      notes_.push_back({job.context.state, job.context.tokens.size(), job.count, job.context.target_row});
      job.produced = std::min(job.count, 5);
      std::fill_n(job.drafts, job.produced, 0);
    }
    return 0;
  }
  [[nodiscard]] int look_back() const override { return 77; }

 private:
  class State final : public DraftState {};
  std::vector<Note>& notes_;
};

TEST(SyntheticDrafter, RunsAnotherDrafterForItsCost) {
  std::vector<NotingDrafter::Note> notes;
  const Tokens recording = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const auto drafter = make_synthetic_drafter({recording}, 1.0, 1, kVocabulary, std::make_unique<NotingDrafter>(notes));
  EXPECT_EQ(drafter->look_back(), 77);
  const auto first = drafter->open();
  const auto second = drafter->open();
  const auto lost = drafter->open();
  DraftContext context = context_of(first.get(), std::span(recording).first(2));
  EXPECT_EQ(drafter->outlook(context, 8).available, 0) << "the other one has no hidden state to start from";
  context.target_row = 3;
  EXPECT_EQ(drafter->outlook(context, 8).available, 5);
  EXPECT_EQ(drafter->outlook(context, 8).confidence, kModelConfidence);

  const Tokens elsewhere = {2, 2};
  TokenId drafts[24] = {};
  DraftJob jobs[] = {{.context = context, .count = 8, .drafts = drafts, .produced = -1},
                     {.context = context_of(lost.get(), elsewhere), .count = 8, .drafts = drafts + 8, .produced = -1},
                     {.context = context_of(second.get(), std::span(recording).first(7)),
                      .count = 8,
                      .drafts = drafts + 16,
                      .produced = -1}};
  drafter->propose(jobs);
  EXPECT_EQ(jobs[0].produced, 5) << "as many as the other one made";
  EXPECT_EQ(jobs[1].produced, 0);
  EXPECT_EQ(jobs[2].produced, 3) << "as many as are recorded";
  EXPECT_EQ(Tokens(drafts, drafts + 5), (Tokens{3, 4, 5, 6, 7}));
  EXPECT_EQ(Tokens(drafts + 16, drafts + 19), (Tokens{8, 9, 10}));
  EXPECT_EQ(jobs[0].context.state, first.get());
  ASSERT_EQ(notes.size(), 3U);
  EXPECT_EQ(notes[0].count, 8);
  EXPECT_EQ(notes[0].tokens, 2U);
  EXPECT_EQ(notes[0].target_row, 3);
  EXPECT_EQ(notes[1].count, 0);
  EXPECT_EQ(notes[2].count, 3);
  EXPECT_NE(notes[0].state, notes[2].state);
}

}  // namespace
}  // namespace draftwerk
