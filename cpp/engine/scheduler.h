// Which sequences take part in the next step, and with how many rows.
//
// First come, first served, by continuous batching: every running sequence whose prompt is done decodes in every step,
// and what is left of the step's rows goes to prompts, cut into chunks (chunked prefill). When pages run out the cache
// first evicts prefixes that nobody uses; then parked K/V is given up; then the youngest running sequence is preempted
// (its K/V is recomputed later, to the same values). Nobody is preempted for a new sequence: it waits. A paused
// sequence takes no part, and its K/V is parked. None of this can change a token, only when it comes.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine/parked_kv.h"
#include "engine/sequence.h"
#include "kvcache/kv_cache.h"

namespace draftwerk {

struct SchedulerLimits {
  int max_sequences = 64;   ///< running at once
  int max_step_rows = 512;  ///< > max_sequences, so that prompts get rows beside any number of decoding ones
  int max_outputs = 128;    ///< rows with logits in one step: >= max_sequences
  int prefill_chunk = 512;  ///< most prefill rows in one step, all sequences together
};

/// A sequence's part in a step: its next `rows` known tokens and, if those include the last one, drafts after it.
struct PlannedSequence {
  Sequence* sequence = nullptr;
  int rows = 0;
  bool decides = false;  ///< the last known token is among the rows, so the step chooses its successor
};

struct StepPlan {
  std::vector<PlannedSequence> sequences;
  int rows = 0;
  int outputs = 0;
  int prefill_rows = 0;  ///< rows of prompts (or of text recomputed after a preemption)
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, KvCache& kv, ParkedKv& parked) : limits_(limits), kv_(kv), parked_(parked) {}

  void add(std::unique_ptr<Sequence> sequence);
  /// Chooses the next step and reserves the pages of its rows, not yet those of drafts. Empty when nothing is left to
  /// do, or when the pages do not suffice for any sequence. Valid until the next call of plan(), remove() or pause().
  const StepPlan& plan();
  /// Takes a sequence out, wherever it is; null if there is none of that id. Its K/V is left to its conversation, or
  /// closed.
  std::unique_ptr<Sequence> remove(RequestId id);
  /// Sets a running or waiting sequence aside until resume(); null if there is none of that id.
  Sequence* pause(RequestId id);
  /// Lets a paused sequence go on, in the place of its age; other ids are ignored.
  void resume(RequestId id);

  /// Whether there is nothing to plan: no sequence but paused ones.
  [[nodiscard]] bool idle() const { return running_.empty() && waiting_.empty(); }
  [[nodiscard]] int running() const { return static_cast<int>(running_.size()); }
  [[nodiscard]] int waiting() const { return static_cast<int>(waiting_.size()); }
  [[nodiscard]] int paused() const { return static_cast<int>(paused_.size()); }
  [[nodiscard]] std::int64_t preemptions() const { return preemptions_; }
  [[nodiscard]] const SchedulerLimits& limits() const { return limits_; }
  /// Every sequence here: running ones, waiting ones, paused ones.
  [[nodiscard]] std::vector<RequestId> ids() const;

 private:
  int planned_rows(const Sequence& sequence, int prefill_left) const;
  void add_to_plan(Sequence& sequence, int rows);
  bool make_room(std::size_t index, std::int64_t positions);
  void preempt_youngest();
  void admit(int prefill_left);
  bool start(Sequence& sequence, int prefill_left);
  std::unique_ptr<Sequence> take_out(RequestId id);

  SchedulerLimits limits_;
  KvCache& kv_;
  ParkedKv& parked_;
  std::deque<std::unique_ptr<Sequence>> running_;  // oldest first, as the others
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::deque<std::unique_ptr<Sequence>> paused_;
  StepPlan plan_;
  std::int64_t preemptions_ = 0;
  // After a preemption, nothing is admitted before one of the sequences still running has left: pages that were too
  // few for those running would otherwise be handed out, filled and taken back in every step.
  bool admission_closed_ = false;
};

}  // namespace draftwerk
