#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <thread>

#include "backend/cpu/cpu_backend_impl.h"
#include "engine/evaluation.h"
#include "gate.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::collect;
using testing::kPlenty;
using testing::kTight;
using testing::Outcome;
using testing::run_all;
using testing::TinyModel;

/// Prompts of mixed lengths, some sharing prefixes, with alternating sampling parameters.
std::vector<Request> mixed_requests() {
  std::mt19937 random(11);
  std::vector<Request> requests;
  const std::vector<TokenId> shared = testing::random_prompt(random, 40, 300);
  for (int i = 0; i < 8; ++i) {
    Request request;
    if (i % 2 == 0) request.prompt = shared;
    const auto tail = testing::random_prompt(random, 1 + 11 * i, 300);
    request.prompt.insert(request.prompt.end(), tail.begin(), tail.end());
    request.max_tokens = 20 + i;
    request.sampling.seed = static_cast<std::uint64_t>(i) * 1000003U;
    if (i % 4 == 1) request.sampling.temperature = 1.0F;
    if (i % 4 == 2) {
      request.sampling.temperature = 0.8F;
      request.sampling.top_k = 20;
      request.sampling.top_p = 0.95F;
    }
    if (i % 4 == 3) {
      request.sampling.repetition_penalty = 1.3F;
      request.sampling.frequency_penalty = 0.2F;
    }
    requests.push_back(request);
  }
  return requests;
}

/// The same prompts, sampled so that the head need not compute all logits.
std::vector<Request> screenable_requests() {
  std::vector<Request> requests = mixed_requests();
  for (std::size_t i = 1; i < requests.size(); i += 2) {
    SamplingParams sampling;
    sampling.temperature = 1.0F;
    sampling.top_k = 64;
    sampling.min_p = i % 4 == 3 ? 0.02F : 0.0F;
    sampling.seed = requests[i].sampling.seed;
    requests[i].sampling = sampling;
  }
  return requests;
}

/// The specification: one request at a time, nothing drafted, nothing cached, one thread.
std::vector<std::vector<TokenId>> expected_tokens(WeightType type, const std::vector<Request>& requests) {
  TinyModel tiny(type);
  EngineOptions options;
  options.prefix_cache = false;
  Engine engine(tiny.model(), options, {}, {});
  std::vector<std::vector<TokenId>> expected;
  for (const Request& request : requests) expected.push_back(run_all(engine, {request}).front());
  return expected;
}

struct Variant {
  const char* drafter;
  int draft_length;
  int prefill_chunk;
  int threads;
  std::size_t kv_bytes;
  bool prefix_cache;
  int max_sequences;
};

class Promise : public ::testing::TestWithParam<std::tuple<WeightType, Variant>> {
 protected:
  using Expected = std::map<WeightType, std::vector<std::vector<TokenId>>>;  // of the same requests

  /// Runs the requests as the variant says, and once more. Returns how many steps took no more than part of the head.
  std::int64_t check(const std::vector<Request>& requests, Expected& expected) {
    const auto& [type, variant] = GetParam();
    if (!expected.contains(type)) expected[type] = expected_tokens(type, requests);

    TinyModel tiny(type, variant.threads);
    tiny.model().screen_head();  // what is expected takes all logits
    EngineOptions options;
    options.draft_length = variant.draft_length;
    options.prefill_chunk = variant.prefill_chunk;
    options.kv_memory_bytes = variant.kv_bytes;
    options.prefix_cache = variant.prefix_cache;
    options.max_sequences = variant.max_sequences;
    Engine engine(tiny.model(), options, tiny.drafters(variant.drafter), {});
    EXPECT_EQ(run_all(engine, requests), expected[type]);
    EXPECT_EQ(run_all(engine, requests), expected[type]) << "with a warm prefix cache";
    engine.close();
    const auto* cpu_backend = dynamic_cast<const cpu::CpuBackend*>(&tiny.backend());
    return cpu_backend == nullptr ? 0 : cpu_backend->screened_steps();
  }
};

TEST_P(Promise, TokensDoNotDependOnHowTheyAreComputed) {
  static Expected expected;
  check(mixed_requests(), expected);
}

TEST_P(Promise, TokensDoNotDependOnScreening) {
  if (!testing::test_backend_is_cpu()) GTEST_SKIP() << "other backends compute all logits";
  static Expected expected;
  const bool screens = std::get<WeightType>(GetParam()) == WeightType::q8_0;
  EXPECT_EQ(check(screenable_requests(), expected) > 0, screens);
}

INSTANTIATE_TEST_SUITE_P(
    Variants, Promise,
    ::testing::Combine(
        ::testing::Values(WeightType::q8_0, WeightType::f32),
        ::testing::Values(Variant{"none", -1, 64, 1, kPlenty, true, 16}, Variant{"none", -1, 3, 2, kPlenty, false, 16},
                          Variant{"none", -1, 17, 1, kTight, true, 16}, Variant{"lookup", -1, 64, 1, kPlenty, true, 16},
                          Variant{"lookup", 1, 64, 2, kPlenty, true, 4}, Variant{"lookup", 5, 7, 3, kPlenty, false, 16},
                          Variant{"random", 0, 64, 1, kPlenty, true, 16}, Variant{"random", 1, 16, 1, kTight, true, 16},
                          Variant{"random", 3, 1, 2, kPlenty, true, 3}, Variant{"random", 8, 64, 2, kTight, false, 16},
                          Variant{"random", 8, 64, 1, kPlenty, true, 16},
                          Variant{"random", -1, 64, 1, kPlenty, true, 1})));

// A thread rounds as the one that makes it does.
TEST(EngineTest, ComputesInTheDefaultFloatingPointEnvironment) {
  class Witness : public Drafter {
   public:
    explicit Witness(std::atomic<float>& sum) : sum_(sum) {}
    [[nodiscard]] const char* name() const override { return "witness"; }
    std::unique_ptr<DraftState> open() override { return std::make_unique<DraftState>(); }
    DraftOutlook outlook(const DraftContext& /*context*/, int /*limit*/) override {
      const volatile float one = 1.0F;
      sum_ = one + 0x1p-30F;
      return {};
    }
    int propose(std::span<DraftJob> /*jobs*/) override { return 0; }

   private:
    std::atomic<float>& sum_;
  };
  std::atomic<float> sum{0.0F};
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::make_unique<Witness>(sum));
  const std::vector<Request> requests = mixed_requests();
  TinyModel tiny;
  std::fesetround(FE_UPWARD);
  Engine engine(tiny.model(), {}, std::move(drafters), {});
  std::fesetround(FE_TONEAREST);
  EXPECT_EQ(run_all(engine, requests), expected_tokens(WeightType::q8_0, requests));
  EXPECT_EQ(sum, 1.0F);
}

TEST(EngineTest, SaysHowLongAStepHasTaken) {
  TinyModel tiny(WeightType::q8_0);
  EngineOptions options;
  options.kv_memory_bytes = kPlenty;
  testing::Gate gate(1);
  Engine engine(tiny.model(), options, gate.drafter(), {});
  EXPECT_EQ(engine.step_seconds(), 0.0);
  Request request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 5;
  const RequestId id = engine.submit(request);
  gate.wait_until_held();
  const double before = engine.step_seconds();
  EXPECT_GT(before, 0.0);
  EXPECT_GT(engine.step_seconds(), before);
  gate.let_pass();
  collect(engine, {id});
  engine.close();
  EXPECT_EQ(engine.step_seconds(), 0.0);
}

TEST(EngineTest, TightMemoryReallyPreempts) {
  TinyModel tiny(WeightType::q8_0);
  EngineOptions options;
  options.kv_memory_bytes = kTight / 2;
  testing::Gate gate(1);  // the first ones must not have ended before the last are there
  Engine engine(tiny.model(), options, gate.drafter(), {});
  std::vector<RequestId> ids;
  for (const Request& request : mixed_requests()) ids.push_back(engine.submit(request));
  gate.let_pass();
  testing::collect(engine, ids);
  EXPECT_GT(engine.statistics().preemptions, 0);
  EXPECT_LE(engine.statistics().kv.peak_bytes, options.kv_memory_bytes);
}

TEST(EngineTest, GreedyTokensAreTheArgmaxOfTheScoredLogits) {
  TinyModel tiny(WeightType::f32);
  std::mt19937 random(3);
  Request request;
  request.prompt = testing::random_prompt(random, 50, 300);
  request.max_tokens = 30;
  std::vector<TokenId> text = request.prompt;
  {
    Engine engine(tiny.model(), {}, {}, {});
    const auto tokens = run_all(engine, {request}).front();
    text.insert(text.end(), tokens.begin(), tokens.end());
  }
  std::vector<float> logits(text.size() * 300);
  score(tiny.model(), text, 7, logits);
  for (std::size_t i = request.prompt.size(); i < text.size(); ++i) {
    const auto row = logits.begin() + static_cast<std::ptrdiff_t>((i - 1) * 300);
    EXPECT_EQ(std::max_element(row, row + 300) - row, text[i]) << "position " << i;
  }
  std::vector<float> whole(logits.size());
  score(tiny.model(), text, 0, whole);
  EXPECT_EQ(logits, whole);
}

TEST(EngineTest, LookupDraftsAreAcceptedOnRepeatingTextAndCounted) {
  TinyModel tiny;
  Request request;
  request.prompt = {5, 6, 7, 8};
  request.max_tokens = 200;  // greedy text of a small model falls into a loop
  EngineOptions options;
  options.draft_length = 4;
  Engine engine(tiny.model(), options, tiny.drafters("lookup"), {});
  const RequestId id = engine.submit(request);
  const Outcome outcome = collect(engine, {id})[id];
  ASSERT_EQ(outcome.token_ids.size(), 200U);
  const RequestStatistics& s = outcome.statistics;
  EXPECT_GT(s.accepted, 0);
  EXPECT_EQ(std::count(outcome.drafted.begin(), outcome.drafted.end(), true), s.accepted);
  EXPECT_EQ(s.generated_tokens, s.steps + s.accepted);
  EXPECT_LT(s.steps, 200);
  std::int64_t drafted = 0;
  std::int64_t accepted = 0;
  for (std::size_t i = 0; i < s.drafted_by_position.size(); ++i) {
    EXPECT_LE(s.accepted_by_position[i], s.drafted_by_position[i]);
    drafted += s.drafted_by_position[i];
    accepted += s.accepted_by_position[i];
  }
  EXPECT_EQ(drafted, s.drafted);
  EXPECT_EQ(accepted, s.accepted);
  const EngineStatistics all = engine.statistics();
  EXPECT_EQ(all.accepted, s.accepted);
  ASSERT_EQ(all.drafters.size(), 1U);
  EXPECT_EQ(all.drafters[0].name, "lookup");
  EXPECT_EQ(all.drafters[0].drafted_by_position, s.drafted_by_position);
  EXPECT_EQ(all.drafters[0].recent.rounds, s.drafted_by_position[0]);
  EXPECT_EQ(all.drafters[0].recent.drafted_by_position, s.drafted_by_position);
  EXPECT_EQ(all.drafters[0].recent.accepted_by_position, s.accepted_by_position);
}

TEST(EngineTest, DraftingCanBeSwitchedOffPerRequest) {
  TinyModel tiny;
  EngineOptions options;
  options.draft_length = 4;
  Engine engine(tiny.model(), options, tiny.drafters("random"), {});
  Request request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 10;
  request.drafting = false;
  const RequestId off = engine.submit(request);
  EXPECT_EQ(collect(engine, {off})[off].statistics.drafted, 0);
  request.drafting = true;
  request.max_draft_length = 2;
  const RequestId two = engine.submit(request);
  const Outcome outcome = collect(engine, {two})[two];
  EXPECT_EQ(outcome.statistics.drafted_by_position.size(), 2U);
}

TEST(EngineTest, StopTokenEndsAndMinTokensHoldsItOff) {
  TinyModel tiny;
  Engine engine(tiny.model(), {}, {}, {});
  Request request;
  request.prompt = {9, 8, 7};
  request.max_tokens = 12;
  const auto free_run = run_all(engine, {request}).front();
  request.stop_token_ids = {free_run[4]};
  const auto first =
      static_cast<std::size_t>(std::find(free_run.begin(), free_run.end(), free_run[4]) - free_run.begin());
  const RequestId id = engine.submit(request);
  const Outcome stopped = collect(engine, {id})[id];
  EXPECT_EQ(stopped.finish_reason, FinishReason::stop);
  EXPECT_EQ(stopped.token_ids,
            std::vector<TokenId>(free_run.begin(), free_run.begin() + static_cast<std::ptrdiff_t>(first) + 1));
  request.min_tokens = 12;
  const RequestId held = engine.submit(request);
  const Outcome outcome = collect(engine, {held})[held];
  EXPECT_EQ(outcome.token_ids.size(), 12U);
  EXPECT_EQ(std::count(outcome.token_ids.begin(), outcome.token_ids.end(), free_run[4]), 0);
}

TEST(EngineTest, ModelEndTokensEndUnlessIgnored) {
  TinyModel tiny;
  Request request;
  request.prompt = {9, 8, 7};
  request.max_tokens = 12;
  TokenId end = 0;
  {
    Engine engine(tiny.model(), {}, {}, {});
    end = run_all(engine, {request}).front()[3];
  }
  EngineOptions options;
  options.eos_token_ids = {end};
  Engine engine(tiny.model(), options, {}, {});
  const RequestId id = engine.submit(request);
  EXPECT_EQ(collect(engine, {id})[id].finish_reason, FinishReason::stop);
  request.ignore_eos = true;
  const RequestId ignoring = engine.submit(request);
  EXPECT_EQ(collect(engine, {ignoring})[ignoring].token_ids.size(), 12U);
}

TEST(EngineTest, StopStringEndsTheTextBeforeIt) {
  TinyModel tiny;
  const TokenBytes bytes = testing::letter_bytes(300);
  Request request;
  request.prompt = {9, 8, 7};
  request.max_tokens = 30;
  EngineOptions options;
  options.draft_length = 5;
  Engine engine(tiny.model(), options, tiny.drafters("random"), testing::letter_bytes(300));
  const auto free_run = run_all(engine, {request}).front();
  std::string text;
  for (const TokenId token : free_run) text += bytes[token];
  request.stop_strings = {"@never", text.substr(10, 3)};
  const auto start = static_cast<std::int64_t>(text.find(request.stop_strings[1]));
  const RequestId id = engine.submit(request);
  const Outcome outcome = collect(engine, {id})[id];
  EXPECT_EQ(outcome.finish_reason, FinishReason::stop);
  EXPECT_EQ(outcome.text_bytes, start);
}

TEST(EngineTest, LogprobsAreThoseOfTheScoredLogits) {
  TinyModel tiny(WeightType::f32);
  Request request;
  request.prompt = {4, 5, 6, 7};
  request.max_tokens = 8;
  request.sampling.logprobs = 3;
  request.sampling.temperature = 1.0F;
  Outcome outcome;
  {
    Engine engine(tiny.model(), {}, {}, {});
    const RequestId id = engine.submit(request);
    outcome = collect(engine, {id})[id];
  }
  std::vector<TokenId> text = request.prompt;
  text.insert(text.end(), outcome.token_ids.begin(), outcome.token_ids.end());
  std::vector<float> logits(text.size() * 300);
  score(tiny.model(), text, 0, logits);
  ASSERT_EQ(outcome.logprobs.size(), 8U);
  ASSERT_EQ(outcome.top_logprobs.size(), 8U);
  for (std::size_t i = 0; i < 8; ++i) {
    const std::size_t row = (request.prompt.size() + i - 1) * 300;
    double sum = 0.0;
    for (std::size_t v = 0; v < 300; ++v) sum += std::exp(static_cast<double>(logits[row + v]));
    const auto token = static_cast<std::size_t>(outcome.token_ids[i]);
    EXPECT_NEAR(outcome.logprobs[i], logits[row + token] - std::log(sum), 1e-4);
    ASSERT_EQ(outcome.top_logprobs[i].size(), 3U);
    EXPECT_GE(outcome.top_logprobs[i][0].logprob, outcome.top_logprobs[i][1].logprob);
    const auto best = static_cast<std::size_t>(outcome.top_logprobs[i][0].token);
    EXPECT_NEAR(outcome.top_logprobs[i][0].logprob, logits[row + best] - std::log(sum), 1e-4);
  }
}

TEST(EngineTest, NoTopLogprobsWhereNoneAreAskedFor) {
  TinyModel tiny;
  Engine engine(tiny.model(), {}, {}, {});
  Request request;
  request.prompt = {4, 5, 6, 7};
  request.max_tokens = 8;
  request.sampling.logprobs = 0;
  const RequestId id = engine.submit(request);
  const Outcome outcome = collect(engine, {id})[id];
  EXPECT_EQ(outcome.logprobs.size(), 8U);
  EXPECT_TRUE(outcome.top_logprobs.empty());
}

TEST(EngineTest, CancelFreesPagesAndSaysSo) {
  TinyModel tiny;
  EngineOptions options;
  options.prefix_cache = false;
  Engine engine(tiny.model(), options, {}, {});
  Request request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 1000;
  std::vector<RequestId> ids;
  for (int i = 0; i < 5; ++i) ids.push_back(engine.submit(request));
  for (const RequestId id : ids) engine.cancel(id);
  engine.cancel(999);  // never existed
  auto outcomes = collect(engine, ids);
  for (const RequestId id : ids) EXPECT_EQ(outcomes[id].finish_reason, FinishReason::cancelled);
  EXPECT_EQ(engine.statistics().kv.used_bytes, 0U);
  EXPECT_EQ(engine.statistics().queued_tokens, 0);
}

TEST(EngineTest, CloseCancelsWhatIsLeftAndRefusesMore) {
  TinyModel tiny;
  Engine engine(tiny.model(), {}, {}, {});
  Request request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 1000;
  const RequestId id = engine.submit(request);
  engine.close();
  EXPECT_EQ(collect(engine, {id})[id].finish_reason, FinishReason::cancelled);
  EXPECT_THROW(engine.submit(request), EngineClosed);
  EXPECT_TRUE(engine.wait_events(std::chrono::seconds(0)).empty());
}

TEST(EngineTest, RefusesWhatNeverFitsAndWhatOverfillsTheQueue) {
  TinyModel tiny;
  EngineOptions options;
  options.kv_memory_bytes = std::size_t{256} << 10;
  options.max_queued_tokens = 50;
  Engine engine(tiny.model(), options, {}, {});
  Request request;
  request.prompt = std::vector<TokenId>(40, 3);
  request.max_tokens = 900;
  EXPECT_THROW(engine.submit(request), RequestError);
  request.max_tokens = 5;
  std::vector<RequestId> ids;
  bool refused = false;
  for (int i = 0; i < 200 && !refused; ++i) {
    try {
      ids.push_back(engine.submit(request));
    } catch (const QueueFull&) {
      refused = true;
    }
  }
  EXPECT_TRUE(refused);
  auto outcomes = collect(engine, ids);
  for (const RequestId id : ids) EXPECT_EQ(outcomes[id].finish_reason, FinishReason::length);
}

TEST(EngineTest, WhatGoesOnWithAcceptedWorkIsTakenThoughTheQueueIsFull) {
  TinyModel tiny;
  EngineOptions options;
  options.max_sequences = 1;
  options.max_queued_tokens = 50;
  testing::Gate gate(1);
  Engine engine(tiny.model(), options, gate.drafter(), {});
  Request request;
  request.prompt = std::vector<TokenId>(40, 3);
  request.max_tokens = 5;
  request.ignore_eos = true;
  std::vector<RequestId> ids = {engine.submit(request)};
  gate.wait_until_held();
  ids.push_back(engine.submit(request));
  EXPECT_THROW(engine.submit(request), QueueFull);
  request.continues = true;
  ids.push_back(engine.submit(request));
  EXPECT_EQ(engine.statistics().queued_tokens, 80);
  gate.let_pass();
  auto outcomes = collect(engine, ids);
  for (const RequestId id : ids) EXPECT_EQ(outcomes[id].finish_reason, FinishReason::length);
  EXPECT_EQ(engine.statistics().queued_tokens, 0);
}

// What the message says would work does work, and one more does not.
TEST(EngineTest, WhatIsLongerThanTheMemoryIsToldWhatFits) {
  TinyModel tiny;
  EngineOptions options;
  options.kv_memory_bytes = std::size_t{256} << 10;
  Engine engine(tiny.model(), options, {}, {});
  Request request;
  std::string allowed;
  const auto refused = [&](std::size_t prompt, int max_tokens) {
    request.prompt = std::vector<TokenId>(prompt, 3);
    request.max_tokens = max_tokens;
    try {
      engine.cancel(engine.submit(request));
    } catch (const RequestError& error) {
      allowed = error.field().allowed;
      return error.field().field;
    }
    return std::string("nothing");
  };
  const auto most = [&] { return std::stoi(allowed.substr(std::string("at most ").size())); };
  ASSERT_EQ(refused(40, 900), "max_tokens");
  const int tokens = most();
  EXPECT_EQ(refused(40, tokens), "nothing");
  EXPECT_EQ(refused(40, tokens + 1), "max_tokens");
  ASSERT_EQ(refused(1000, 1), "prompt") << "no number of tokens would do";
  const int prompt = most();
  EXPECT_EQ(prompt, 40 + tokens - 1);
  EXPECT_EQ(refused(prompt, 1), "nothing");
  EXPECT_EQ(refused(prompt + 1, 1), "prompt");
}

TEST(EngineTest, ErrorsNameFieldValueAndRange) {
  TinyModel tiny;
  Engine engine(tiny.model(), {}, {}, {});
  const auto field_of = [&](const auto& change) {
    Request request;
    request.prompt = {1};
    request.max_tokens = 5;
    change(request);
    try {
      engine.submit(request);
    } catch (const RequestError& error) {
      EXPECT_FALSE(error.field().value.empty());
      EXPECT_FALSE(error.field().allowed.empty());
      return error.field().field;
    }
    return std::string("accepted");
  };
  EXPECT_EQ(field_of([](Request&) {}), "accepted");
  EXPECT_EQ(field_of([](Request& r) { r.prompt.clear(); }), "prompt");
  EXPECT_EQ(field_of([](Request& r) { r.prompt = std::vector<TokenId>(1024, 1); }), "prompt");
  EXPECT_EQ(field_of([](Request& r) { r.prompt = {1, -1}; }), "prompt[1]");
  EXPECT_EQ(field_of([](Request& r) { r.prompt = {300}; }), "prompt[0]");
  EXPECT_EQ(field_of([](Request& r) { r.max_tokens = 0; }), "max_tokens");
  EXPECT_EQ(field_of([](Request& r) { r.max_tokens = 1024; }), "max_tokens");
  EXPECT_EQ(field_of([](Request& r) { r.min_tokens = 6; }), "min_tokens");
  EXPECT_EQ(field_of([](Request& r) { r.sampling.temperature = -1.0F; }), "temperature");
  EXPECT_EQ(field_of([](Request& r) { r.sampling.top_p = 0.0F; }), "top_p");
  EXPECT_EQ(field_of([](Request& r) { r.stop_token_ids = {300}; }), "stop_token_ids[0]");
  EXPECT_EQ(field_of([](Request& r) { r.stop_strings = {"x"}; }), "stop");
  EXPECT_EQ(field_of([](Request& r) { r.max_draft_length = 17; }), "max_draft_length");
  EXPECT_EQ(field_of([](Request& r) { r.salt = std::string(300, 'x'); }), "salt");
}

TEST(EngineTest, PrefixCacheServesTheSecondRequestAndSaltsKeepApart) {
  TinyModel tiny;
  Engine engine(tiny.model(), {}, {}, {});
  std::mt19937 random(5);
  Request request;
  request.prompt = testing::random_prompt(random, 100, 300);
  request.max_tokens = 4;
  const auto cached = [&](const std::string& salt) {
    request.salt = salt;
    const RequestId id = engine.submit(request);
    return collect(engine, {id})[id].statistics.cached_tokens;
  };
  EXPECT_EQ(cached("one"), 0);
  EXPECT_EQ(cached("one"), 96);
  EXPECT_EQ(cached("two"), 0);
}

TEST(EngineTest, ManyThreadsMaySubmitAndCancel) {
  TinyModel tiny;
  EngineOptions options;
  options.draft_length = 2;
  Engine engine(tiny.model(), options, tiny.drafters("random"), {});
  std::mutex mutex;
  std::vector<RequestId> ids;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        Request request;
        request.prompt = {1 + t, 2 + i, 3};
        request.max_tokens = 20;
        const RequestId id = engine.submit(request);
        if (i % 3 == 0) engine.cancel(id);
        (void)engine.statistics();
        const std::lock_guard lock(mutex);
        ids.push_back(id);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto outcomes = collect(engine, ids);
  EXPECT_EQ(outcomes.size(), 40U);
}

TEST(EngineTest, OptionsThatMakeNoSenseAreRefused) {
  TinyModel tiny;
  const auto refused = [&](const auto& change) {
    EngineOptions options;
    change(options);
    EXPECT_THROW(Engine(tiny.model(), options, {}, {}), std::invalid_argument);
  };
  refused([](EngineOptions& o) { o.max_sequences = 0; });
  refused([](EngineOptions& o) { o.max_sequences = 1000; });
  refused([](EngineOptions& o) { o.max_context = 1025; });
  refused([](EngineOptions& o) { o.draft_length = 17; });
  refused([](EngineOptions& o) { o.prefill_chunk = 0; });
  refused([](EngineOptions& o) { o.kv_memory_bytes = 10; });
}

}  // namespace
}  // namespace draftwerk
