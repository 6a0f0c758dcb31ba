// Conversations, whose K/V stays open between requests.
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
using testing::run;
using testing::small_options;
using testing::SmallModel;
using testing::Tokens;
using testing::operator+;

struct Variant {
  const char* drafter;
  int prefill_chunk;
  bool prefix_cache;
};

class EngineConversation : public ::testing::TestWithParam<Variant> {};

struct Turn {
  Request request;
  Tokens output;
};

/// A conversation of lengths on both sides of page and window borders; the last turn adds nothing to the text so far.
std::vector<Turn> expected_turns() {
  const bool few = !testing::test_backend_is_cpu();
  const int count = few ? 4 : 8;
  Reference reference;
  std::vector<Turn> turns;
  Tokens text;
  for (int i = 0; i < count; ++i) {
    const auto seed = static_cast<unsigned>(i);
    const Tokens added = random_tokens(i + 1 == count ? 0 : 1 + 9 * i, seed);
    const Request request = make_request(text + added, 3 + (few ? 4 : 7) * i, seed);
    turns.push_back({request, reference(request)});
    text = request.prompt + turns.back().output;
  }
  return turns;
}

TEST_P(EngineConversation, ComputesOnlyWhatIsNewAndTheSameTokens) {
  SmallModel small;
  EngineOptions options = small_options();
  options.prefix_cache = GetParam().prefix_cache;
  options.prefill_chunk = GetParam().prefill_chunk;
  options.draft_length = 3;
  Engine engine(small.model(), options, small.drafters(GetParam().drafter), {});
  static const std::vector<Turn> kTurns = expected_turns();
  const ConversationId conversation = engine.open_conversation();
  std::int64_t computed = 0;
  for (const Turn& turn : kTurns) {
    Request request = turn.request;
    request.conversation = conversation;
    const std::int64_t rows = engine.statistics().prefill_rows;
    const Outcome outcome = run(engine, request);
    ASSERT_EQ(outcome.token_ids, turn.output) << "after " << computed << " positions";
    EXPECT_EQ(outcome.statistics.cached_tokens, computed);
    const auto fresh = std::ssize(request.prompt) - computed;
    EXPECT_EQ(engine.statistics().prefill_rows - rows, fresh > 1 ? fresh : 0);
    computed = std::ssize(request.prompt) + std::ssize(outcome.token_ids) - 1;
  }
  EXPECT_EQ(engine.statistics().conversations, 1);
  EXPECT_GT(engine.statistics().parked_bytes, 0U);
  engine.close_conversation(conversation);
  expect_nothing_left(engine);
}

std::vector<Variant> variants() {
  if (!testing::test_backend_is_cpu()) return {{"none", 3, true}, {"random", 16, false}};
  return {{"none", 64, false}, {"none", 3, true}, {"random", 64, true}, {"random", 16, false}, {"lookup", 64, true}};
}

INSTANTIATE_TEST_SUITE_P(Variants, EngineConversation, ::testing::ValuesIn(variants()));

TEST(EngineConversationTest, AnotherBeginningOrAnotherSaltTakesNothingOver) {
  if (!testing::test_backend_is_cpu()) GTEST_SKIP() << "what is taken over is no matter of the device";
  SmallModel small;
  Reference reference;
  for (const bool prefix_cache : {false, true}) {
    EngineOptions options = small_options();
    options.prefix_cache = prefix_cache;
    Engine engine(small.model(), options, {}, {});
    unsigned seed = 0;
    const auto second_turn = [&](auto change) {
      Request request = make_request(random_tokens(50, ++seed), 10);
      request.conversation = engine.open_conversation();
      const Outcome first = run(engine, request);
      request.prompt = request.prompt + first.token_ids + random_tokens(5, 2);
      change(request);
      const Outcome second = run(engine, request);
      EXPECT_EQ(second.token_ids, reference(request));
      return second.statistics.cached_tokens;
    };
    const auto cached = [&](std::int64_t positions) { return prefix_cache ? positions : 0; };
    EXPECT_EQ(second_turn([](Request&) {}), 59);
    EXPECT_EQ(second_turn([](Request& r) { r.prompt[58] = 1; }), cached(48)) << "the last position that is parked";
    EXPECT_EQ(second_turn([](Request& r) { r.prompt[59] = 1; }), 59) << "the first that is not";
    EXPECT_EQ(second_turn([](Request& r) { r.prompt.resize(60); }), 59);
    EXPECT_EQ(second_turn([](Request& r) { r.prompt.resize(59); }), cached(48)) << "its last row has to be computed";
    EXPECT_EQ(second_turn([](Request& r) { r.prompt.resize(20); }), cached(16));
    EXPECT_EQ(second_turn([](Request& r) { r.salt = "another"; }), 0);
    EXPECT_EQ(second_turn([&](Request& r) { r.conversation = engine.open_conversation(); }), cached(48));
    expect_nothing_left(engine);
  }
}

TEST(EngineConversationTest, CancelledRequestsLeaveWhatTheyHaveComputed) {
  SmallModel small;
  Reference reference;
  for (const bool paused : {false, true}) {
    EngineOptions options = small_options();
    options.prefix_cache = false;
    Gate gate(5);
    Engine engine(small.model(), options, gate.drafter(), {});
    Request request = make_request(random_tokens(30, 1), 900);
    request.conversation = engine.open_conversation();
    const RequestId id = engine.submit(request);
    gate.wait_until_held();
    if (paused) engine.pause(id);
    engine.cancel(id);
    gate.let_pass();
    const Outcome outcome = testing::collect(engine, {id})[id];
    EXPECT_EQ(outcome.finish_reason, FinishReason::cancelled);
    EXPECT_EQ(outcome.token_ids.size(), 6U);

    request.prompt = request.prompt + outcome.token_ids + random_tokens(3, 2);
    request.max_tokens = 10;
    const Outcome next = run(engine, request);
    EXPECT_EQ(next.statistics.cached_tokens, 35);
    EXPECT_EQ(next.token_ids, reference(request));
    expect_nothing_left(engine);
  }
}

TEST(EngineConversationTest, CancelBeforeTheStartKeepsWhatTheRequestBeforeLeft) {
  SmallModel small;
  EngineOptions options = small_options();
  options.max_sequences = 1;
  options.prefix_cache = false;
  Gate gate(1);
  Engine engine(small.model(), options, gate.drafter(), {});
  Request request = make_request(random_tokens(30, 1), 10);
  request.drafting = false;
  request.conversation = engine.open_conversation();
  request.prompt = request.prompt + run(engine, request).token_ids;
  const RequestId blocker = engine.submit(make_request({1, 2, 3}, 900));
  const RequestId waiting = engine.submit(request);
  gate.wait_until_held();
  engine.cancel(waiting);
  engine.cancel(blocker);
  gate.let_pass();
  testing::collect(engine, {blocker, waiting});
  EXPECT_EQ(run(engine, request).statistics.cached_tokens, 39);
}

TEST(EngineConversationTest, OfTwoRequestsAtOnceOneFindsNothing) {
  SmallModel small;
  EngineOptions options = small_options();
  options.prefix_cache = false;
  Engine engine(small.model(), options, {}, {});
  Reference reference;
  Request request = make_request(random_tokens(30, 1), 10);
  request.conversation = engine.open_conversation();
  request.prompt = request.prompt + run(engine, request).token_ids;
  const RequestId first = engine.submit(request);
  const RequestId second = engine.submit(request);
  auto outcomes = testing::collect(engine, {first, second});
  EXPECT_EQ(outcomes[first].statistics.cached_tokens, 39);
  const Tokens expected = reference(request);
  EXPECT_EQ(outcomes[first].token_ids, expected);
  EXPECT_EQ(outcomes[second].token_ids, expected);
  expect_nothing_left(engine);
}

TEST(EngineConversationTest, ClosingFreesThePagesEvenWhileARequestRuns) {
  SmallModel small;
  EngineOptions options = small_options();
  options.prefix_cache = false;
  Gate gate(1);
  Engine engine(small.model(), options, gate.drafter(), {});
  Request request = make_request(random_tokens(30, 1), 20);
  request.drafting = false;
  request.conversation = engine.open_conversation();
  run(engine, request);
  EXPECT_GT(engine.statistics().parked_bytes, 0U);
  EXPECT_EQ(engine.statistics().parked_bytes, engine.statistics().kv.used_bytes);
  engine.close_conversation(request.conversation);
  engine.close_conversation(request.conversation);
  engine.close_conversation(12345);  // never existed
  run(engine, request);              // commands are executed in order; and it leaves nothing to a closed conversation
  EXPECT_EQ(engine.statistics().kv.used_bytes, 0U);
  EXPECT_EQ(engine.statistics().conversations, 0);

  request.conversation = engine.open_conversation();
  request.drafting = true;
  const RequestId id = engine.submit(request);
  gate.wait_until_held();
  engine.close_conversation(request.conversation);
  gate.let_pass();
  testing::collect(engine, {id});
  EXPECT_EQ(engine.statistics().kv.used_bytes, 0U);
  engine.close();
  EXPECT_THROW(engine.open_conversation(), EngineClosed);
  engine.close_conversation(request.conversation);
}

TEST(EngineConversationTest, ParkedIsGivenUpOldestFirstBeforeAnybodyWaitsOrIsPreempted) {
  SmallModel small;
  EngineOptions options = small_options();
  options.prefix_cache = false;
  options.kv_memory_bytes = 20 * SmallModel::kPage;
  Engine engine(small.model(), options, {}, {});
  Reference reference;
  Request turns[3];
  for (unsigned c = 0; c < 3; ++c) {
    turns[c] = make_request(random_tokens(25, c), 5, c);
    turns[c].conversation = engine.open_conversation();
    turns[c].prompt = turns[c].prompt + run(engine, turns[c]).token_ids;
  }
  // Grows until the pages of one parked conversation, but not of two, have to go.
  const std::size_t parked = engine.statistics().parked_bytes;
  std::int64_t length = 0;
  for (length = 40; engine.statistics().parked_bytes == parked; length += 32) {
    const Request large = make_request(random_tokens(static_cast<int>(length), 9), 1);
    EXPECT_EQ(run(engine, large).token_ids, reference(large));
  }
  EXPECT_EQ(engine.statistics().parked_bytes, parked / 3 * 2);
  EXPECT_EQ(engine.statistics().preemptions, 0);
  for (unsigned c = 1; c < 4; ++c) {  // the oldest last: it would take the pages of another one
    const Outcome outcome = run(engine, turns[c % 3]);
    EXPECT_EQ(outcome.token_ids, reference(turns[c % 3]));
    EXPECT_EQ(outcome.statistics.cached_tokens, c % 3 == 0 ? 0 : 29);
  }
  expect_nothing_left(engine);
}

}  // namespace
}  // namespace draftwerk
