// How the engine carries out what the draft budget decides.
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::collect;
using testing::Outcome;
using testing::SmallModel;
using testing::TinyModel;

/// Proposes the same token for ever, and counts what it is asked for.
class StubbornDrafter final : public Drafter {
 public:
  struct Asked {
    int rounds = 0;
    int drafts = 0;
  };
  StubbornDrafter(TokenId token, Asked& asked) : token_(token), asked_(asked) {}

  [[nodiscard]] const char* name() const override { return "stubborn"; }
  std::unique_ptr<DraftState> open() override { return nullptr; }
  DraftOutlook outlook(const DraftContext&, int limit) override {
    return {.available = limit, .confidence = kModelConfidence};
  }
  int propose(std::span<DraftJob> jobs) override {
    ++asked_.rounds;
    for (DraftJob& job : jobs) {
      std::fill_n(job.drafts, job.count, token_);
      job.produced = job.count;
      asked_.drafts += job.count;
    }
    return 0;
  }

 private:
  TokenId token_;
  Asked& asked_;
};

Outcome generate(TinyModel& tiny, StubbornDrafter::Asked& asked, const Request& request, int draft_length) {
  EngineOptions options = testing::small_options();
  options.draft_length = draft_length;
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::make_unique<StubbornDrafter>(299, asked));
  Engine engine(tiny.model(), options, std::move(drafters), {});
  const RequestId id = engine.submit(request);
  Outcome outcome = collect(engine, {id})[id];
  engine.close();
  const DrafterStatistics drafter = engine.statistics().drafters.front();
  EXPECT_EQ(drafter.drafted, outcome.statistics.drafted);
  EXPECT_EQ(drafter.recent.rounds, asked.rounds);
  return outcome;
}

Request long_request() {
  Request request;
  request.prompt = {3, 1, 4, 1, 5};
  request.max_tokens = 900;
  request.sampling.temperature = 1.0F;
  request.sampling.logit_bias = {{299, -1000.0F}};  // never what the drafter says
  return request;
}

TEST(EngineDrafting, WhatIsComparedIsNoRowAndCountsAsARoundAlone) {
  TinyModel tiny;
  StubbornDrafter::Asked asked;
  Request request = long_request();
  if (!testing::test_backend_is_cpu()) request.max_tokens = 90;
  const Outcome outcome = generate(tiny, asked, request, -1);
  ASSERT_EQ(std::ssize(outcome.token_ids), request.max_tokens);
  EXPECT_EQ(outcome.statistics.accepted, 0);
  // Drafts that are never right are soon no longer verified, but looked at now and then; unless rows cost nothing.
  if (!tiny.model().backend().asynchronous()) {
    EXPECT_LT(outcome.statistics.drafted, 300);
  }
  EXPECT_GT(asked.drafts, outcome.statistics.drafted);
}

TEST(EngineDrafting, AFixedLengthIsKeptToWhateverComesOfIt) {
  SmallModel small;
  StubbornDrafter::Asked asked;
  Request request = long_request();
  request.max_tokens = 50;
  const Outcome outcome = generate(small, asked, request, 3);
  EXPECT_EQ(outcome.token_ids, testing::Reference()(request));
  EXPECT_EQ(asked.drafts, outcome.statistics.drafted);
  // The first token comes with the prompt; the last three steps have fewer tokens to draft for.
  EXPECT_EQ(outcome.statistics.drafted, 46 * 3 + 2 + 1 + 0);
}

TEST(EngineDrafting, ASequenceMayTakeADrafterOfItsOwn) {
  // Where lookup has nothing to say, the stubborn one drafts; text that repeats is lookup's.
  TinyModel tiny;
  StubbornDrafter::Asked asked;
  EngineOptions options = testing::small_options();
  options.draft_length = 2;
  std::vector<std::unique_ptr<Drafter>> drafters = tiny.drafters("lookup");
  drafters.push_back(std::make_unique<StubbornDrafter>(299, asked));
  Engine engine(tiny.model(), options, std::move(drafters), {});
  Request request = long_request();
  request.max_tokens = 120;
  request.sampling.temperature = 0.0F;
  const RequestId id = engine.submit(request);
  collect(engine, {id});
  engine.close();
  const EngineStatistics s = engine.statistics();
  ASSERT_EQ(s.drafters.size(), 2U);
  EXPECT_GT(s.drafters[0].accepted, 0);
  EXPECT_GT(s.drafters[1].drafted, 0);
  EXPECT_EQ(s.drafters[1].accepted, 0);
  EXPECT_EQ(s.drafters[0].drafted + s.drafters[1].drafted, s.drafted);
}

}  // namespace
}  // namespace draftwerk
