#include "engine/draft_rounds.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace draftwerk {
namespace {

std::vector<std::unique_ptr<Drafter>> checked(std::vector<std::unique_ptr<Drafter>> drafters) {
  if (drafters.size() > kMaxDrafters) {
    throw std::invalid_argument(std::to_string(drafters.size()) + " drafters, at most " + std::to_string(kMaxDrafters) +
                                " can be used together");
  }
  return drafters;
}

// `Counts` is DraftCounts or RequestStatistics.
template <typename Counts>
void count_drafts(Counts& counts, int drafted, int ahead, int accepted) {
  counts.drafted += drafted;
  counts.accepted += accepted;
  count_by_position(counts.drafted_by_position, ahead);
  count_by_position(counts.accepted_by_position, accepted);
  counts.accepted_by_position.resize(counts.drafted_by_position.size());
}

bool is_chain(std::span<const std::int32_t> parents) {
  for (std::size_t i = 0; i < parents.size(); ++i) {
    if (parents[i] != static_cast<std::int32_t>(i) - 1) return false;
  }
  return true;
}

}  // namespace

DraftRounds::DraftRounds(std::vector<std::unique_ptr<Drafter>> drafters, const DraftLimits& limits, ParkedKv& parked,
                         KvArena arena)
    : drafters_(checked(std::move(drafters))),
      limits_(limits),
      parked_(parked),
      arena_(arena),
      counts_(drafters_.size()),
      acceptance_(drafters_.size()),
      rounds_(drafters_.size()) {}

void DraftRounds::open(Sequence& sequence) {
  for (std::size_t d = 0; d < drafters_.size(); ++d) sequence.draft_states[d] = drafters_[d]->open();
}

std::span<const ProposedDrafts> DraftRounds::propose(const StepPlan& plan, std::int64_t steps) {
  steps_ = steps;
  drafts_.assign(plan.sequences.size(), {});
  origins_.assign(plan.sequences.size(), {});
  compared_.assign(plan.sequences.size(), {});
  if (drafters_.empty()) return drafts_;
  grant(plan);
  tokens_.resize(plan.sequences.size() * static_cast<std::size_t>(limits_.max_draft_length));
  parents_.resize(tokens_.size());
  for (std::size_t d = 0; d < drafters_.size(); ++d) propose_with(d, plan);
  return drafts_;
}

// Decides how many drafts each decoding sequence gets, and whose.
void DraftRounds::grant(const StepPlan& plan) {
  candidates_.clear();
  candidate_sequences_.clear();
  const int room = std::min(limits_.step.max_step_rows - plan.rows, limits_.step.max_outputs - plan.outputs);
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const PlannedSequence& planned = plan.sequences[i];
    if (!planned.decides || planned.rows != 1) continue;
    Sequence& sequence = *planned.sequence;
    DraftCandidate candidate;
    candidate.acceptance = &sequence.acceptance;
    if (sequence.request.drafting) {
      const int own = sequence.request.max_draft_length;
      // The step yields one token beside the accepted drafts, so a draft for the last token would be in vain.
      const std::int64_t useful = sequence.request.max_tokens - sequence.generated() - 1;
      candidate.limit = static_cast<int>(
          std::min<std::int64_t>({limits_.max_draft_length, own < 0 ? limits_.max_draft_length : own, useful}));
      for (std::size_t d = 0; d < drafters_.size(); ++d) {
        candidate.outlooks[d] = drafters_[d]->outlook(context(sequence, d), candidate.limit);
      }
    }
    candidates_.push_back(candidate);
    candidate_sequences_.push_back(i);
  }
  if (limits_.draft_length < 0) {
    budget_.plan(candidates_, plan.rows - static_cast<int>(candidates_.size()), plan.rows + room);
  } else {
    budget_.plan_fixed(candidates_, limits_.draft_length, room);
  }
}

DraftContext DraftRounds::context(const Sequence& sequence, std::size_t drafter) const {
  DraftContext context;
  context.state = sequence.draft_states[drafter].get();
  context.tokens = sequence.tokens;
  if (sequence.target_step == steps_) context.target_row = sequence.target_row;
  for (int t = 0; t < kPageTables; ++t) context.pages[t] = sequence.kv.table(t);
  context.arena = arena_;
  context.sampling = &sequence.request.sampling;
  context.history = sequence.request.sampling.needs_history() ? &sequence.history : nullptr;
  context.banned = sequence.banned;
  context.banned_tokens = static_cast<int>(
      std::clamp<std::int64_t>(sequence.request.min_tokens - sequence.generated(), 0, limits_.max_draft_length + 1));
  return context;
}

// What one drafter proposes for the sequences that were granted its drafts, and for those it is compared on.
void DraftRounds::propose_with(std::size_t drafter, const StepPlan& plan) {
  const auto stride = static_cast<std::size_t>(limits_.max_draft_length);
  Round& round = rounds_[drafter];
  round.jobs.clear();
  round.sequences.clear();
  round.on_device = false;
  const double price = budget_.pass_price(static_cast<int>(drafter));
  for (std::size_t c = 0; c < candidates_.size(); ++c) {
    const std::size_t planned = candidate_sequences_[c];
    Sequence& sequence = *plan.sequences[planned].sequence;
    const DraftCandidate& candidate = candidates_[c];
    const int confidence = candidate.outlooks[drafter].confidence;
    if (candidate.compared_drafter == static_cast<int>(drafter)) {
      compared_[planned] = {drafter, 0, confidence};
      round.jobs.push_back({.context = context(sequence, drafter),
                            .count = 1,
                            .drafts = &compared_[planned].token,
                            .parents = &parents_[planned * stride]});
    } else if (candidate.granted > 0 && candidate.drafter == static_cast<int>(drafter)) {
      // Drafts are worth parked K/V and cached prefixes, which would have to go a few tokens later, but never a
      // sequence.
      if (!parked_.reserve(sequence.kv, sequence.length() + candidate.granted)) continue;
      origins_[planned] = {.drafter = drafter, .confidence = confidence, .planned = candidate.planned};
      round.jobs.push_back({.context = context(sequence, drafter),
                            .count = candidate.granted,
                            .row_prices = candidate.row_prices,
                            .pass_price = price,
                            .planned = candidate.planned,
                            .drafts = &tokens_[planned * stride],
                            .parents = &parents_[planned * stride]});
    } else {
      continue;
    }
    round.sequences.push_back(planned);
  }
  if (round.jobs.empty()) return;
  const auto start = std::chrono::steady_clock::now();
  round.passes = drafters_[drafter]->propose(round.jobs);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  round.on_device =
      std::any_of(round.jobs.begin(), round.jobs.end(), [](const auto& job) { return job.proposed >= 0; });
  if (!round.on_device) observe_round(drafter, seconds);
  for (std::size_t j = 0; j < round.jobs.size(); ++j) {
    const std::size_t planned = round.sequences[j];
    if (round.jobs[j].drafts != &compared_[planned].token) {
      take(round.jobs[j], drafts_[planned], origins_[planned]);
    } else if (round.jobs[j].produced == 0) {
      compared_[planned] = {};
    }
  }
}

// Tells the budget what a drafter's part in the step took.
void DraftRounds::observe_round(std::size_t drafter, double seconds) {
  const Round& round = rounds_[drafter];
  int drafts = 0;
  for (const DraftJob& job : round.jobs) drafts += round.passes > 0 ? std::max(job.produced, 1) : job.count;
  budget_.observe_drafting(static_cast<int>(drafter), round.passes, drafts, seconds);
}

// What a job proposed.
void DraftRounds::take(const DraftJob& job, ProposedDrafts& drafts, Origin& origin) {
  const auto count = static_cast<std::size_t>(job.produced);
  drafts.tokens = {job.drafts, count};
  drafts.proposed = count > 0 ? job.proposed : -1;
  origin.ahead = job.produced;
  origin.promised = job.promised;
  const std::span<const std::int32_t> parents{job.parents, count};
  if (origin.confidence != kTreeConfidence || (is_chain(parents) && drafts.proposed < 0)) return;
  drafts.parents = parents;
  measure_tree(job, origin);
}

// How far a tree of drafts reaches.
void DraftRounds::measure_tree(const DraftJob& job, Origin& origin) {
  origin.ahead = 0;
  for (int d = 0; d < job.produced; ++d) {
    int ahead = 1;
    for (std::int32_t at = job.parents[d]; at >= 0; at = job.parents[at]) ++ahead;
    origin.ahead = std::max(origin.ahead, ahead);
  }
}

double DraftRounds::settle() {
  double seconds = 0.0;
  for (std::size_t d = 0; d < rounds_.size(); ++d) {
    Round& round = rounds_[d];
    if (!std::exchange(round.on_device, false)) continue;
    const double of_round = drafters_[d]->settle();
    observe_round(d, of_round);
    seconds += of_round;
    for (std::size_t j = 0; j < round.jobs.size(); ++j) {
      const std::size_t planned = round.sequences[j];
      if (round.jobs[j].drafts == &compared_[planned].token) continue;
      origins_[planned].promised = round.jobs[j].promised;
      measure_tree(round.jobs[j], origins_[planned]);
    }
  }
  return seconds;
}

void DraftRounds::observe(std::size_t index, Sequence& sequence, const VerifyResult& result) {
  const auto drafted = static_cast<int>(drafts_[index].tokens.size());
  const auto accepted = static_cast<int>(result.drafts.size());
  const Origin& origin = origins_[index];
  if (const int counted = std::max(drafted, origin.planned); counted > 0) {
    budget_.observe_acceptance(sequence.acceptance, origin.confidence, counted, result.drafts);
  }
  if (origin.promised > 0.0) budget_.observe_promise(origin.promised, accepted);
  if (drafted > 0) {
    count_drafts(sequence.statistics, drafted, origin.ahead, accepted);
    count_drafts(totals_, drafted, origin.ahead, accepted);
    count_drafts(counts_[origin.drafter], drafted, origin.ahead, accepted);
    acceptance_[origin.drafter].observe(origin.ahead, accepted);
  }
  if (const ComparedDraft& draft = compared_[index]; draft.confidence >= 0) {
    const bool agreed = draft.token == result.tokens.front();
    const int first[] = {0};
    budget_.observe_acceptance(sequence.acceptance, draft.confidence, 1, std::span(first).first(agreed ? 1 : 0));
    acceptance_[draft.drafter].observe(1, agreed ? 1 : 0);  // a useless drafter is hardly asked otherwise
  }
}

void DraftRounds::report(std::vector<DrafterStatistics>& statistics) const {
  statistics.resize(drafters_.size());
  for (std::size_t d = 0; d < drafters_.size(); ++d) {
    static_cast<DraftCounts&>(statistics[d]) = counts_[d];
    statistics[d].name = drafters_[d]->name();
    statistics[d].recent = acceptance_[d].recent();
  }
}

}  // namespace draftwerk
