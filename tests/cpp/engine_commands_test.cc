// Everything that callers may do to an engine, in random order: no command may change a token of any request.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::expect_nothing_left;
using testing::kPlenty;
using testing::make_request;
using testing::Outcome;
using testing::random_tokens;
using testing::Reference;
using testing::SmallModel;
using testing::Tokens;
using testing::operator+;

/// How much there is of everything.
struct Sizes {
  unsigned seeds;
  int commands;
  int most_tokens;   ///< of an output
  int most_added;    ///< to the text of a conversation
  int longest_text;  ///< after which it starts anew
  std::size_t tight_pages;
};

/// Random commands against an engine, with everything that came back checked against the reference at the end.
class RandomCommands {
 public:
  RandomCommands(unsigned seed, const Sizes& sizes, Engine& engine) : random_(seed), sizes_(sizes), engine_(engine) {}

  void run() {
    for (int i = 0; i < sizes_.commands; ++i) {
      act();
      // By steps and not by time, so that much comes to its end however slow the engine is.
      if (pick(0, 2) > 0) read();
    }
    for (const RequestId id : paused_) engine_.resume(id);
    paused_.clear();
    while (!open_.empty() && !::testing::Test::HasFatalFailure()) read();
  }

  void check(Reference& reference) {
    for (auto& [id, request] : requests_) {
      const Outcome& outcome = outcomes_[id];
      const Tokens expected = reference(request);
      if (outcome.finish_reason == FinishReason::cancelled) {
        ASSERT_LE(outcome.token_ids.size(), expected.size());
        ++cancelled;
      } else {
        ASSERT_EQ(outcome.finish_reason, FinishReason::length) << outcome.error;
        ASSERT_EQ(outcome.token_ids.size(), expected.size());
        ++finished;
      }
      ASSERT_TRUE(std::equal(outcome.token_ids.begin(), outcome.token_ids.end(), expected.begin())) << "request " << id;
    }
  }

  int finished = 0;
  int cancelled = 0;
  int taken_over = 0;  // requests that started inside of a page, which only parked K/V makes possible

 private:
  struct Conversation {
    ConversationId id;
    Tokens text;
    RequestId running = 0;
  };

  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  RequestId any() { return *std::next(open_.begin(), pick(0, static_cast<int>(open_.size()) - 1)); }

  void act() {
    const int action = pick(0, 9);
    if (action == 0 && conversations_.size() < 6) conversations_.push_back({engine_.open_conversation(), {}, 0});
    if (action == 1 && !conversations_.empty() && pick(0, 3) == 0) {
      const int index = pick(0, static_cast<int>(conversations_.size()) - 1);
      engine_.close_conversation(conversations_[index].id);
      conversations_.erase(conversations_.begin() + index);
    }
    if (action >= 2 && action <= 5) submit();
    if (open_.empty()) return;
    if (action == 6 && pick(0, 1) == 0) cancel(any());
    if (action == 7) {
      const RequestId id = any();
      engine_.pause(id);
      paused_.insert(id);
    }
    if (action >= 8) {
      const RequestId id = any();
      engine_.resume(id);
      paused_.erase(id);
    }
  }

  void cancel(RequestId id) {
    engine_.cancel(id);
    paused_.erase(id);
  }

  void submit() {
    if (open_.size() > 10) return;
    Request request = make_request({}, pick(1, sizes_.most_tokens), random_());
    if (pick(0, 1) == 0) request.sampling.temperature = 0.0F;
    Conversation* conversation = nullptr;
    if (!conversations_.empty() && pick(0, 3) > 0) {
      conversation = &conversations_[pick(0, static_cast<int>(conversations_.size()) - 1)];
      if (conversation->running != 0 && pick(0, 9) > 0) return;
      if (std::ssize(conversation->text) > sizes_.longest_text) conversation->text.resize(pick(0, sizes_.most_added));
      request.conversation = conversation->id;
      request.prompt = conversation->text;
      if (!request.prompt.empty() && pick(0, 5) == 0) request.prompt[random_() % request.prompt.size()] = 1;
    }
    request.prompt = request.prompt + random_tokens(pick(1, sizes_.most_added), pick(0, 5));
    const RequestId id = engine_.submit(request);
    if (conversation != nullptr) conversation->running = id;
    requests_[id] = request;
    open_.insert(id);
  }

  void read() {
    if (std::includes(paused_.begin(), paused_.end(), open_.begin(), open_.end())) return;
    const std::vector<Event> events = engine_.wait_events(std::chrono::seconds(60));
    ASSERT_FALSE(events.empty()) << "no event for a minute";
    for (const Event& event : events) {
      Outcome& outcome = outcomes_[event.request_id];
      outcome.token_ids.insert(outcome.token_ids.end(), event.token_ids.begin(), event.token_ids.end());
      if (event.finish_reason == FinishReason::none) continue;
      outcome.finish_reason = event.finish_reason;
      outcome.error = event.error;
      if (event.statistics->cached_tokens % kPageSize != 0) ++taken_over;
      open_.erase(event.request_id);
      paused_.erase(event.request_id);
      for (Conversation& conversation : conversations_) {
        if (conversation.running != event.request_id) continue;
        conversation.text = requests_[event.request_id].prompt + outcome.token_ids;
        conversation.running = 0;
      }
    }
  }

  std::mt19937 random_;
  const Sizes& sizes_;
  Engine& engine_;
  std::map<RequestId, Request> requests_;
  std::map<RequestId, Outcome> outcomes_;
  std::set<RequestId> open_;
  std::set<RequestId> paused_;
  std::vector<Conversation> conversations_;
};

TEST(EngineCommandsTest, RandomCommandsChangeNoToken) {
  const bool few = !testing::test_backend_is_cpu();
  const Sizes sizes = few ? Sizes{3, 20, 12, 16, 30, 9} : Sizes{8, 150, 30, 40, 120, 27};
  SmallModel small;
  Reference reference;
  int finished = 0;
  int cancelled = 0;
  int taken_over = 0;
  std::int64_t preemptions = 0;
  for (unsigned seed = 0; seed < sizes.seeds && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    EngineOptions options;
    options.kv_memory_bytes = seed % 3 == 0 ? kPlenty : sizes.tight_pages * SmallModel::kPage;
    options.prefix_cache = seed % 2 == 0;
    options.max_sequences = seed % 4 == 3 ? 2 : 16;
    options.prefill_chunk = seed % 4 == 2 ? 7 : 64;
    options.draft_length = 3;
    Engine engine(small.model(), options, small.drafters(seed % 5 == 0 ? "lookup" : "random"), {});
    RandomCommands commands(seed, sizes, engine);
    commands.run();
    commands.check(reference);
    preemptions += engine.statistics().preemptions;
    finished += commands.finished;
    cancelled += commands.cancelled;
    taken_over += commands.taken_over;
    expect_nothing_left(engine);
  }
  // The commands must have been where it is interesting; so few need not have been everywhere.
  EXPECT_GT(finished, few ? 10 : 200);
  EXPECT_GT(cancelled, few ? 0 : 20);
  if (!few) {
    EXPECT_GT(taken_over, 10);
    EXPECT_GT(preemptions, 0);
  }
}

}  // namespace
}  // namespace draftwerk
