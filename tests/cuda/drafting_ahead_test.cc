// Drafts whose passes follow each other on the device are those of passes that the host is told of one by one.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "drafting/mtp.h"
#include "engine/engine.h"
#include "engine/evaluation.h"
#include "engine/single_sequence_kv.h"
#include "reference_engine.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

using testing::TinyModel;

constexpr int kDrafts = 8;

/// The target's pass over the first `known` tokens of a text, and what the host does while the device is at it.
template <typename Meanwhile = void (*)()>
void compute(
    Gemma& model, const std::vector<TokenId>& text, int known, const SingleSequenceKv& kv,
    Meanwhile&& meanwhile = [] {}) {
  std::vector<std::int64_t> positions(static_cast<std::size_t>(known));
  std::iota(positions.begin(), positions.end(), 0);
  const Segment segment = kv.segment(known, 0);
  const int last = known - 1;
  const SamplingParams greedy;
  VerifyGroup group;
  group.position = known;
  group.sampling = &greedy;
  VerifyResult result;
  model.forward({std::span(text).first(positions.size()), positions, {&segment, 1}, {&last, 1}}, kv.arena());
  model.backend().begin_verify({&group, 1});
  meanwhile();
  model.backend().verify({&group, 1}, {&result, 1});
}

/// The keys and values of a text, and the target's state of its last token but one, as after a step of the engine.
class Known {
 public:
  Known(Gemma& model, const std::vector<TokenId>& text)
      : text_(text), kv_(model, static_cast<std::int64_t>(text.size())) {
    compute(model, text, static_cast<int>(text.size()) - 1, kv_);
  }

  [[nodiscard]] DraftContext context(const SamplingParams& sampling) const {
    DraftContext context;
    context.tokens = text_;
    context.target_row = 0;
    for (int t = 0; t < kPageTables; ++t) context.pages[t] = kv_.pages(t);
    context.arena = kv_.arena();
    context.sampling = &sampling;
    return context;
  }

 private:
  const std::vector<TokenId>& text_;
  SingleSequenceKv kv_;
};

/// What one round of drafts gives, likeliest draft first.
struct Round {
  std::vector<TokenId> drafts;
  std::vector<std::int32_t> parents;
  int passes = 0;

  Round(MtpModel& mtp, const DraftContext& context, double pass_price)
      : drafts(kDrafts), parents(kDrafts), drafter_(make_mtp_drafter(mtp)) {
    run(context, pass_price);
  }
  /// `settle` has the drafter settle, and may do something else before.
  template <typename Settle = void (*)(Drafter&)>
  void run(
      const DraftContext& context, double pass_price, Settle&& settle = [](Drafter& drafter) { drafter.settle(); }) {
    drafts.resize(kDrafts);
    parents.resize(kDrafts);
    DraftJob job{.context = context,
                 .count = kDrafts,
                 .pass_price = pass_price,
                 .drafts = drafts.data(),
                 .parents = parents.data()};
    passes = drafter_->propose({&job, 1});
    settle(*drafter_);
    drafts.resize(static_cast<std::size_t>(job.produced));
    parents.resize(drafts.size());
  }

 private:
  std::unique_ptr<Drafter> drafter_;
};

std::vector<TokenId> text() {
  std::mt19937 random(5);
  return testing::random_prompt(random, 41, 300);
}

SamplingParams sampled() {
  SamplingParams sampling;
  sampling.temperature = 1.0F;
  sampling.top_k = 40;
  sampling.seed = 99;
  return sampling;
}

TEST(DraftingAhead, IsAChainWithWhatElseWasLikelyBesideIt) {
  for (const auto& [clusters, draft_vocabulary] : {std::pair(0, 0), {60, 0}, {0, 150}, {25, 150}}) {
    TinyModel tiny(WeightType::bf16, 1, 128, testing::tiny_edge_config());
    MtpModel& mtp = tiny.mtp(clusters, draft_vocabulary);
    for (const SamplingParams& sampling : {SamplingParams{}, sampled()}) {
      const std::vector<TokenId> tokens = text();
      const std::vector<TokenId> chain = draft(mtp, tokens, kDrafts, sampling, 0).tokens;
      const Known known(tiny.model(), tokens);
      const Round round(mtp, known.context(sampling), 0.0);
      EXPECT_EQ(round.passes, kDrafts);
      ASSERT_EQ(round.drafts.size(), std::size_t{kDrafts});
      int deepest = 0;
      for (std::size_t d = 0; d < round.drafts.size(); ++d) {
        std::vector<TokenId> before;
        for (std::int32_t at = round.parents[d]; at >= 0; at = round.parents[static_cast<std::size_t>(at)]) {
          before.insert(before.begin(), round.drafts[static_cast<std::size_t>(at)]);
        }
        EXPECT_TRUE(std::equal(before.begin(), before.end(), chain.begin())) << "draft " << d;
        if (round.drafts[d] == chain[before.size()]) deepest = std::max(deepest, static_cast<int>(before.size()) + 1);
      }
      EXPECT_GT(deepest, 1);
    }
  }
}

TEST(DraftingAhead, AStepThatFollowsAtOnceChangesNothingOfIt) {
  TinyModel tiny(WeightType::bf16, 1, 128, testing::tiny_edge_config());
  MtpModel& mtp = tiny.mtp();
  const std::vector<TokenId> tokens = text();
  const SamplingParams sampling = sampled();
  const SingleSequenceKv other(tiny.model(), 40);
  const std::vector<TokenId> other_text = testing::random_tokens(40, 6);
  std::optional<Known> known(std::in_place, tiny.model(), tokens);
  const Round alone(mtp, known->context(sampling), 0.0);
  known.emplace(tiny.model(), tokens);
  Round followed(mtp, known->context(sampling), 0.0);
  known.emplace(tiny.model(), tokens);
  std::size_t before = 0;
  std::size_t after = 0;
  const auto told_meanwhile = [&](Drafter& drafter) {
    compute(tiny.model(), other_text, 30, other, [&] {
      before = emulation::operations_ahead();
      drafter.settle();
      after = emulation::operations_ahead();
    });
  };
  const auto told_afterwards = [&](Drafter& drafter) {
    compute(tiny.model(), other_text, 30, other);
    drafter.settle();
  };
  followed.run(known->context(sampling), 0.0, told_afterwards);
  EXPECT_EQ(followed.drafts, alone.drafts);
  EXPECT_EQ(followed.parents, alone.parents);
  known.emplace(tiny.model(), tokens);
  followed.run(known->context(sampling), 0.0, told_meanwhile);
  EXPECT_EQ(followed.drafts, alone.drafts);
  EXPECT_EQ(followed.parents, alone.parents);
  EXPECT_GT(before, after) << "it waits for the passes";
  EXPECT_GT(after, 0) << "and for nothing else";
}

TEST(DraftingAhead, TheTargetFollowsAtOnce) {
  TinyModel tiny(WeightType::bf16, 4, 128, testing::tiny_edge_config());
  MtpModel& mtp = tiny.mtp();
  std::vector<Request> requests;
  for (int i = 0; i < 3; ++i) {
    Request request = testing::make_request(testing::random_tokens(5 + 7 * i, static_cast<unsigned>(i)), 24);
    request.sampling.seed = static_cast<std::uint64_t>(i);
    request.sampling.temperature = i == 1 ? 0.0F : 20.0F;
    // Drafter and target choose among the same four, and sampled by the same noise.
    for (const TokenId token : {11, 12, 200, 299}) request.sampling.logit_bias.emplace_back(token, 1000.0F);
    requests.push_back(request);
  }
  std::vector<std::vector<TokenId>> without;
  {
    Engine engine(tiny.model(), testing::small_options(), {}, {});
    without = testing::run_all(engine, requests);
  }
  for (const int draft_length : {-1, 1, 6}) {
    EngineOptions options = testing::small_options();
    options.draft_length = draft_length;
    std::vector<std::unique_ptr<Drafter>> drafters;
    drafters.push_back(make_mtp_drafter(mtp));
    Engine engine(tiny.model(), options, std::move(drafters), {});
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const std::int64_t waits = emulation::waits();
      const std::int64_t steps = engine.statistics().steps;
      EXPECT_EQ(testing::run(engine, requests[i]).token_ids, without[i]);
      EXPECT_EQ(emulation::waits() - waits, engine.statistics().steps - steps) << "a step waits once";
    }
    EXPECT_EQ(testing::run_all(engine, requests), without);
    const EngineStatistics s = engine.statistics();
    EXPECT_GT(s.drafted, 0);
    if (draft_length == 6) {
      EXPECT_GT(s.accepted, s.steps / 2);
    }
    testing::expect_nothing_left(engine);
  }
}

TEST(DraftingAhead, NoMorePassesAreTakenThanPay) {
  TinyModel tiny(WeightType::bf16, 1, 128, testing::tiny_edge_config());
  MtpModel& mtp = tiny.mtp();
  const std::vector<TokenId> tokens = text();
  const SamplingParams sampling = sampled();
  const Known known(tiny.model(), tokens);
  Round round(mtp, known.context(sampling), 0.999);
  EXPECT_EQ(round.passes, kDrafts) << "before anything is known of how likely drafts are";
  // Nothing is that likely.
  for (int i = 0; i < 40; ++i) round.run(known.context(sampling), 0.999);
  EXPECT_EQ(round.passes, 1);
  round.run(known.context(sampling), 0.0);
  EXPECT_EQ(round.passes, kDrafts);
}

TEST(DraftingAhead, WhatDependsOnDraftsIsDraftedPassByPass) {
  TinyModel tiny(WeightType::bf16, 1, 128, testing::tiny_edge_config());
  MtpModel& mtp = tiny.mtp();
  const std::vector<TokenId> tokens = text();
  SamplingParams sampling;
  sampling.repetition_penalty = 1e6F;
  const Known known(tiny.model(), tokens);
  const Round round(mtp, known.context(sampling), 0.0);
  // With such a penalty no token comes twice on a path, which only somebody who knows the drafts before can see to.
  for (std::size_t d = 0; d < round.drafts.size(); ++d) {
    for (std::int32_t at = round.parents[d]; at >= 0; at = round.parents[static_cast<std::size_t>(at)]) {
      EXPECT_NE(round.drafts[static_cast<std::size_t>(at)], round.drafts[d]);
    }
  }
}

}  // namespace
}  // namespace draftwerk
