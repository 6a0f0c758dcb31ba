// The engine: a thread that plans, drafts, verifies and accepts, step after step. engine.cc reads top to bottom.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "backend/backend.h"
#include "drafting/drafter.h"
#include "engine/batch.h"
#include "engine/draft_rounds.h"
#include "engine/event_queue.h"
#include "engine/parked_kv.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/validation.h"
#include "kvcache/kv_cache.h"
#include "model/gemma.h"

namespace draftwerk {

struct EngineOptions {
  std::size_t kv_memory_bytes = std::size_t{256} << 20;
  int max_sequences = 64;
  int prefill_chunk = 512;    ///< most prefill rows in one step; cut to the model's max_rows
  int draft_length = -1;      ///< drafts per sequence and step; -1: decided by the draft budget
  int max_draft_length = 16;  ///< most drafts per sequence and step, for draft_length and for requests too; <= 64
  bool prefix_cache = true;
  /// Prompt tokens of requests that may wait for their first token; with none waiting, a larger prompt is taken too.
  std::int64_t max_queued_tokens = std::int64_t{1} << 20;
  std::vector<TokenId> eos_token_ids;
  std::int64_t max_context = 0;  ///< prompt and output of one sequence; 0: the model's maximum
};

/// A request that cannot be served as it is; says which field, which value, and what is allowed.
class RequestError : public std::invalid_argument {
 public:
  explicit RequestError(FieldError error);
  [[nodiscard]] const FieldError& field() const { return field_; }

 private:
  FieldError field_;
};

/// No room: in the queue now, so that trying again later may work, or in all of the KV memory; the message says which.
class QueueFull : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class EngineClosed : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Totals since the engine started, and its state now.
struct EngineStatistics : DraftCounts {
  std::int64_t steps = 0;
  std::int64_t rows = 0;          ///< that the target computed: prefill, last known tokens and drafts
  std::int64_t prefill_rows = 0;  ///< see StepPlan::prefill_rows
  std::int64_t generated_tokens = 0;
  std::vector<DrafterStatistics> drafters;  ///< of all drafters what the counts of drafts sum up
  std::int64_t requests = 0;
  std::int64_t finished = 0;  ///< for whatever reason
  std::int64_t preemptions = 0;
  double schedule_seconds = 0.0;  ///< planning and laying out rows
  double draft_seconds = 0.0;     ///< the draft budget's decision and the drafter
  double target_seconds = 0.0;    ///< the target's pass, sampling and verification included
  double commit_seconds = 0.0;    ///< accepting tokens, KV bookkeeping, events
  int running = 0;
  int waiting = 0;
  int paused = 0;
  int conversations = 0;           ///< open
  std::int64_t queued_tokens = 0;  ///< see EngineOptions::max_queued_tokens
  KvUse kv;
  std::size_t parked_bytes = 0;  ///< of kv.used_bytes, free on demand too: see ParkedKv::bytes
};

class Engine {
 public:
  /// Starts the engine thread. `model` must outlive the engine and belongs to it meanwhile. Of up to kMaxDrafters
  /// drafters each sequence drafts with the one that pays best in a step; with none, nothing is drafted.
  /// Throws std::invalid_argument if the options make no sense for the model.
  Engine(Gemma& model, EngineOptions options, std::vector<std::unique_ptr<Drafter>> drafters, TokenBytes token_bytes);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  Engine(Engine&&) = delete;
  Engine& operator=(Engine&&) = delete;
  ~Engine();

  /// Queues a request; its events follow. Throws RequestError, QueueFull or EngineClosed, and DeviceFailure once
  /// failure() says something. Any thread.
  RequestId submit(Request request);
  /// Ends a request: its pages are free before the next step and one last event says so. As with all that follow, any
  /// thread may call it, and ids that are unknown or have ended are ignored.
  void cancel(RequestId id);
  /// Sets a request aside before the next step: no events, no place among max_sequences or in the queue, and its K/V
  /// stays only until its pages are needed. Idempotent, as is resume().
  void pause(RequestId id);
  void resume(RequestId id);

  /// A conversation keeps the K/V of its last request for its next one (Request::conversation), while pages last. For
  /// one request at a time: a second one finds nothing. Throws EngineClosed.
  ConversationId open_conversation();
  void close_conversation(ConversationId id);

  /// Events of the steps since the last call; see EventQueue::take.
  std::vector<Event> wait_events(std::chrono::duration<double> timeout) { return events_.take(timeout); }
  [[nodiscard]] int event_descriptor() const { return events_.descriptor(); }
  [[nodiscard]] EngineStatistics statistics() const;
  /// Why nothing is computed any more, which every request since then has ended with; empty as long as all is well.
  [[nodiscard]] std::string failure() const;
  /// Seconds since the step began that is being made; 0 while none is. A device that hangs keeps it growing. Any
  /// thread.
  [[nodiscard]] double step_seconds() const;
  /// Cancels what is left, ends the thread and frees the KV memory. Idempotent.
  void close();

 private:
  struct Submit {
    std::unique_ptr<Sequence> sequence;
  };
  struct Cancel {
    RequestId id;
  };
  struct Pause {
    RequestId id;
  };
  struct Resume {
    RequestId id;
  };
  struct OpenConversation {
    ConversationId id;
  };
  struct CloseConversation {
    ConversationId id;
  };
  using Command = std::variant<Submit, Cancel, Pause, Resume, OpenConversation, CloseConversation>;

  FieldError too_long(const Request& request) const;
  void post(Command command);
  void run();
  bool take_commands();
  void execute(Submit& command);
  void execute(const Cancel& command);
  void execute(const Pause& command);
  void execute(const Resume& command);
  void execute(const OpenConversation& command);
  void execute(const CloseConversation& command);
  void step();
  void commit(const StepPlan& plan);
  void accept(Sequence& sequence, const VerifyResult& result);
  void append(Sequence& sequence, TokenId token);
  void retire(RequestId id);
  void abort(RequestId id, FinishReason reason, const std::string& error);
  void abort_all(FinishReason reason, const std::string& error);
  RequestStatistics final_statistics(const Sequence& sequence) const;
  void release_queue_tokens(Sequence& sequence);
  void publish();
  void publish_statistics();

  Gemma& model_;
  const EngineOptions options_;
  const TokenBytes token_bytes_;
  RequestLimits limits_;

  // The engine thread's own, but for KvCache::fits() and DraftRounds::open(), which any thread may call.
  KvCache kv_;
  std::unique_ptr<Buffer> arena_;
  ParkedKv parked_;
  Scheduler scheduler_;
  DraftRounds drafts_;
  StepBatch batch_;
  std::vector<KvMove> moves_;  // of accepted drafts to where a chain would have put them
  std::vector<VerifyResult> results_;
  std::vector<Event> step_events_;
  std::vector<RequestId> ended_;
  EngineStatistics totals_;

  std::atomic<std::chrono::steady_clock::rep> step_began_ = 0;  // 0: no step is being made

  EventQueue events_;
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::vector<Command> commands_;  // not yet executed, in the order in which they came
  std::int64_t queued_tokens_ = 0;
  std::int64_t next_id_ = 1;  // of requests and conversations
  bool closing_ = false;
  std::string failure_;
  EngineStatistics published_;

  std::thread thread_;
};

}  // namespace draftwerk
