#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace draftwerk {

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
  const auto has_id = [id](const auto& sequence) { return sequence->id == id; };
  std::unique_ptr<Sequence> sequence;
  if (const auto it = std::find_if(running_.begin(), running_.end(), has_id); it != running_.end()) {
    sequence = std::move(*it);
    running_.erase(it);
    kv_.close(sequence->kv);
    admission_closed_ = false;
  } else if (const auto it = std::find_if(waiting_.begin(), waiting_.end(), has_id); it != waiting_.end()) {
    sequence = std::move(*it);
    waiting_.erase(it);
  }
  return sequence;
}

std::vector<RequestId> Scheduler::ids() const {
  std::vector<RequestId> ids;
  ids.reserve(running_.size() + waiting_.size());
  for (const auto& sequence : running_) ids.push_back(sequence->id);
  for (const auto& sequence : waiting_) ids.push_back(sequence->id);
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
  while (!kv_.reserve(running_[index]->kv, positions)) {
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
  const auto place =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& s) { return s->id > sequence->id; });
  waiting_.insert(place, std::move(sequence));
  admission_closed_ = !running_.empty();
}

void Scheduler::admit(int prefill_left) {
  while (!admission_closed_ && prefill_left > 0 && !waiting_.empty() && running() < limits_.max_sequences) {
    Sequence& sequence = *waiting_.front();
    sequence.kv = kv_.open(sequence.request.salt, sequence.tokens, sequence.length() - 1);
    sequence.computed = sequence.kv.positions();
    const int rows = static_cast<int>(std::min<std::int64_t>(sequence.uncomputed(), prefill_left));
    if (!kv_.reserve(sequence.kv, sequence.computed + rows)) {
      kv_.close(sequence.kv);
      sequence.computed = 0;
      return;
    }
    if (!sequence.was_scheduled) {
      sequence.was_scheduled = true;
      sequence.statistics.cached_tokens = sequence.computed;
      sequence.statistics.queue_seconds = std::chrono::duration<double>(Clock::now() - sequence.submitted).count();
    }
    prefill_left -= rows;
    add_to_plan(sequence, rows);
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

}  // namespace draftwerk
