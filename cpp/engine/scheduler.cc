#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace draftwerk {
namespace {

using Sequences = std::deque<std::unique_ptr<Sequence>>;

void insert_by_age(Sequences& sequences, std::unique_ptr<Sequence> sequence) {
  const auto younger =
      std::find_if(sequences.begin(), sequences.end(), [&](const auto& s) { return s->id > sequence->id; });
  sequences.insert(younger, std::move(sequence));
}

/// Null if there is none of that id.
std::unique_ptr<Sequence> extract(Sequences& sequences, RequestId id) {
  const auto found = std::find_if(sequences.begin(), sequences.end(), [id](const auto& s) { return s->id == id; });
  if (found == sequences.end()) return nullptr;
  std::unique_ptr<Sequence> sequence = std::move(*found);
  sequences.erase(found);
  return sequence;
}

}  // namespace

void Scheduler::add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

const StepPlan& Scheduler::plan() {
  plan_.sequences.clear();
  plan_.rows = plan_.outputs = plan_.prefill_rows = 0;

  // One row of every sequence that decodes is set aside before prompts may take any.
  const auto decoding =
      std::count_if(running_.begin(), running_.end(), [](const auto& s) { return s->uncomputed() == 1; });
  int prefill_left = std::min(limits_.prefill_chunk, limits_.max_step_rows - static_cast<int>(decoding));

  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    const int rows = planned_rows(sequence, prefill_left);
    if (rows == 0) continue;
    if (!make_room(i, sequence.computed + rows)) break;  // preempted itself, as the youngest
    if (sequence.uncomputed() > 1) prefill_left -= rows;
    add_to_plan(sequence, rows);
  }
  admit(prefill_left);
  return plan_;
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id) {
  std::unique_ptr<Sequence> sequence = take_out(id);
  if (!sequence) sequence = extract(paused_, id);
  if (!sequence) return nullptr;
  if (!sequence->kv.is_open()) sequence->kv = parked_.take(id, sequence->request.salt, sequence->tokens);
  if (!sequence->kv.is_open()) return sequence;
  if (parked_.is_open(sequence->request.conversation)) {
    parked_.park(sequence->request.conversation, sequence->request.salt, sequence->tokens, sequence->kv);
  } else {
    kv_.close(sequence->kv);
  }
  return sequence;
}

Sequence* Scheduler::pause(RequestId id) {
  std::unique_ptr<Sequence> sequence = take_out(id);
  if (!sequence) return nullptr;
  if (sequence->kv.is_open()) parked_.park(id, sequence->request.salt, sequence->tokens, sequence->kv);
  Sequence* const paused = sequence.get();
  insert_by_age(paused_, std::move(sequence));
  return paused;
}

void Scheduler::resume(RequestId id) {
  if (std::unique_ptr<Sequence> sequence = extract(paused_, id)) insert_by_age(waiting_, std::move(sequence));
}

// Takes a sequence that runs or waits out of its list.
std::unique_ptr<Sequence> Scheduler::take_out(RequestId id) {
  if (std::unique_ptr<Sequence> sequence = extract(running_, id)) {
    admission_closed_ = false;
    return sequence;
  }
  return extract(waiting_, id);
}

std::vector<RequestId> Scheduler::ids() const {
  std::vector<RequestId> ids;
  ids.reserve(running_.size() + waiting_.size() + paused_.size());
  for (const auto* sequences : {&running_, &waiting_, &paused_}) {
    for (const auto& sequence : *sequences) ids.push_back(sequence->id);
  }
  return ids;
}

int Scheduler::planned_rows(const Sequence& sequence, int prefill_left) const {
  if (sequence.uncomputed() == 1) return 1;
  return static_cast<int>(std::min<std::int64_t>(sequence.uncomputed(), std::max(prefill_left, 0)));
}

void Scheduler::add_to_plan(Sequence& sequence, int rows) {
  const bool decides = sequence.computed + rows == sequence.length();
  if (sequence.uncomputed() > 1) plan_.prefill_rows += rows;
  plan_.sequences.push_back({&sequence, rows, decides});
  plan_.rows += rows;
  plan_.outputs += decides ? 1 : 0;
}

// Reserves `positions` for running_[index], preempting from the young end; false if that took the sequence itself.
bool Scheduler::make_room(std::size_t index, std::int64_t positions) {
  while (!parked_.reserve(running_[index]->kv, positions)) {
    const bool itself = running_.size() - 1 == index;
    preempt_youngest();
    if (itself) return false;
  }
  return true;
}

void Scheduler::preempt_youngest() {
  std::unique_ptr<Sequence> sequence = std::move(running_.back());
  running_.pop_back();
  kv_.close(sequence->kv);
  sequence->computed = 0;
  ++sequence->statistics.preemptions;
  ++preemptions_;
  insert_by_age(waiting_, std::move(sequence));
  admission_closed_ = !running_.empty();
}

void Scheduler::admit(int prefill_left) {
  while (!admission_closed_ && prefill_left > 0 && !waiting_.empty() && running() < limits_.max_sequences) {
    Sequence& sequence = *waiting_.front();
    // Alone and yet short of pages: those that it started from were scattered over the arena, and closing them has
    // emptied it (KvCache::reserve). So the second try succeeds.
    if (!start(sequence, prefill_left) && (!running_.empty() || !start(sequence, prefill_left))) return;
    const int rows = planned_rows(sequence, prefill_left);
    if (!sequence.was_scheduled) {
      sequence.was_scheduled = true;
      sequence.statistics.cached_tokens = sequence.computed;
      sequence.statistics.queue_seconds = std::chrono::duration<double>(Clock::now() - sequence.submitted).count();
    }
    prefill_left -= rows;
    add_to_plan(sequence, rows);
    insert_by_age(running_, std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// Opens the K/V of a waiting sequence, with what is there of it already, and makes room for its first rows. False if
// pages are short, and then it is closed.
bool Scheduler::start(Sequence& sequence, int prefill_left) {
  const std::string& salt = sequence.request.salt;
  sequence.kv = parked_.take(sequence.id, salt, sequence.tokens);
  if (!sequence.kv.is_open()) sequence.kv = parked_.take(sequence.request.conversation, salt, sequence.tokens);
  const bool looks_up = !sequence.kv.is_open();
  if (looks_up) sequence.kv = kv_.open(salt, sequence.tokens, sequence.length() - 1);
  sequence.computed = sequence.kv.positions();
  const std::int64_t positions = sequence.computed + planned_rows(sequence, prefill_left);
  // While others run, what is parked is given up only for one that can start then: it may have to wait for their pages.
  const bool in_vain = !running_.empty() && !parked_.may_reserve(sequence.kv, positions);
  if (!in_vain && parked_.reserve(sequence.kv, positions)) {
    if (looks_up && !sequence.was_scheduled) kv_.count_lookup(sequence.kv, sequence.length() - 1);
    return true;
  }
  kv_.close(sequence.kv);
  sequence.computed = 0;
  return false;
}

}  // namespace draftwerk
