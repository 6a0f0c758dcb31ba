// Requests that are paused.
#include <gtest/gtest.h>

#include "gate.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::expect_nothing_left;
using testing::Gate;
using testing::make_request;
using testing::Outcome;
using testing::random_tokens;
using testing::Reference;
using testing::small_options;
using testing::SmallModel;
using testing::Tokens;
using testing::operator+;

TEST(EnginePauseTest, PausedRequestsHoldNoPlaceAndGetNoEvents) {
  SmallModel small;
  EngineOptions options = small_options();
  options.max_sequences = 1;
  options.prefix_cache = false;
  Gate gate(1);
  Engine engine(small.model(), options, gate.drafter(), {});
  Reference reference;
  const Request slow = make_request(random_tokens(40, 1), 40, 1);
  Request quick = make_request(random_tokens(5, 2), 5, 2);
  quick.drafting = false;
  const Tokens quick_output = reference(quick);
  const RequestId paused = engine.submit(slow);
  Tokens output;
  // Tokens that it has when the pause comes; the step that is on its way still yields one.
  const std::vector<int> pauses = {1, 7, 24, 30};
  for (std::size_t i = 0; i < pauses.size(); ++i) {
    gate.wait_until_held();
    engine.pause(paused);
    engine.pause(paused);
    engine.pause(999);
    const RequestId running = engine.submit(quick);
    i + 1 < pauses.size() ? gate.let_pass(pauses[i + 1]) : gate.let_pass();
    Tokens second;
    for (bool ended = false; !ended;) {
      const std::vector<Event> events = engine.wait_events(std::chrono::seconds(60));
      ASSERT_FALSE(events.empty());
      for (const Event& event : events) {
        Tokens& to = event.request_id == running ? second : output;
        to = to + event.token_ids;
        ended = event.finish_reason != FinishReason::none;
      }
    }
    EXPECT_EQ(second, quick_output);
    EXPECT_EQ(output.size(), static_cast<std::size_t>(pauses[i]) + 1);
    EXPECT_EQ(engine.statistics().paused, 1);
    EXPECT_EQ(engine.statistics().running, 0);
    engine.resume(paused);
    engine.resume(paused);
    engine.resume(999);
  }
  const Outcome outcome = testing::collect(engine, {paused})[paused];
  EXPECT_EQ(output + outcome.token_ids, reference(slow));
  EXPECT_EQ(outcome.statistics.preemptions, 0);
  EXPECT_EQ(engine.statistics().prefill_rows, 40 + 4 * 5) << "what stayed parked is not computed again";
  expect_nothing_left(engine);
}

TEST(EnginePauseTest, PausedBeforeTheFirstTokenLeavesTheQueue) {
  SmallModel small;
  EngineOptions options = small_options();
  options.max_sequences = 1;
  options.max_queued_tokens = 50;
  Gate gate(1);
  Engine engine(small.model(), options, gate.drafter(), {});
  const RequestId blocker = engine.submit(make_request({1}, 1000));
  gate.wait_until_held();
  const Request request = make_request(random_tokens(40, 1), 5);
  const RequestId paused = engine.submit(request);
  EXPECT_THROW(engine.submit(request), QueueFull);
  engine.pause(paused);
  gate.let_pass(2);
  gate.wait_until_held();
  EXPECT_EQ(engine.statistics().queued_tokens, 0);
  const RequestId other = engine.submit(request);
  EXPECT_EQ(engine.statistics().queued_tokens, 40);
  engine.resume(paused);
  engine.cancel(paused);
  engine.cancel(blocker);
  gate.let_pass();
  auto outcomes = testing::collect(engine, {paused, other, blocker});
  EXPECT_EQ(outcomes[paused].finish_reason, FinishReason::cancelled);
  EXPECT_EQ(outcomes[other].finish_reason, FinishReason::length);
  expect_nothing_left(engine);
}

TEST(EnginePauseTest, PagesOfPausedRequestsGoToThoseThatRun) {
  SmallModel small;
  EngineOptions options = small_options();
  options.kv_memory_bytes = 10 * SmallModel::kPage;
  options.prefix_cache = false;
  Gate gate(10);
  Engine engine(small.model(), options, gate.drafter(), {});
  Reference reference;
  const Request shorter = make_request(random_tokens(30, 1), 20, 1);
  Request longer = make_request(random_tokens(60, 2), 1, 2);
  longer.drafting = false;
  const RequestId paused = engine.submit(shorter);
  gate.wait_until_held();
  engine.pause(paused);
  const RequestId running = engine.submit(longer);
  gate.let_pass();
  auto outcomes = testing::collect(engine, {running});
  EXPECT_EQ(outcomes[running].token_ids, reference(longer));
  EXPECT_EQ(engine.statistics().paused, 1);
  EXPECT_EQ(engine.statistics().parked_bytes, 0U);
  EXPECT_EQ(engine.statistics().preemptions, 0);
  engine.resume(paused);
  const Outcome rest = testing::collect(engine, {paused})[paused];
  EXPECT_EQ(outcomes[paused].token_ids + rest.token_ids, reference(shorter));
  EXPECT_EQ(engine.statistics().prefill_rows, 30 + 60 + 41) << "prompt and output are computed again";
  expect_nothing_left(engine);
}

TEST(EnginePauseTest, CloseEndsPausedRequests) {
  SmallModel small;
  Gate gate(1);
  Engine engine(small.model(), small_options(), gate.drafter(), {});
  const RequestId id = engine.submit(make_request({1, 2, 3}, 1000));
  gate.wait_until_held();
  engine.pause(id);
  gate.let_pass();
  engine.close();
  EXPECT_EQ(testing::collect(engine, {id})[id].finish_reason, FinishReason::cancelled);
  engine.pause(id);
  engine.resume(id);
  expect_nothing_left(engine);
}

}  // namespace
}  // namespace draftwerk
