#include "drafting/budget.h"

#include <algorithm>
#include <cmath>

namespace draftwerk {
namespace {

// --- acceptance -------------------------------------------------------------------------------------------------

/// Where the classes start from, first draft and later ones: lookup's acceptance in Markdown and Python source in
/// Gemma's tokens, at 1,000 tokens of context, rounded down.
constexpr float kPriorAcceptance[kConfidenceClasses][kDraftDepths] = {{0.3F, 0.5F},  {0.45F, 0.6F}, {0.5F, 0.7F},
                                                                      {0.6F, 0.7F},  {0.7F, 0.75F}, {0.7F, 0.8F},
                                                                      {0.8F, 0.85F}, {0.9F, 0.95F}, {0.7F, 0.65F}};
/// Drafts that the prior counts for against those of all sequences, and these against the sequence's own.
constexpr double kPriorWeight = 4.0;
constexpr double kSharedWeight = 1.0;
/// Drafts over which counts reach back.
constexpr float kSharedWindow = 256.0F;
constexpr float kSequenceWindow = 24.0F;
/// A run of equal outcomes that had a smaller chance means that the text changed: only the run still counts, as
/// a third of a window at least. No single outcome is taken to be unlikelier than kLeastChance, so three are needed.
constexpr float kSurprise = 0.0011F;
constexpr double kLeastChance = 0.1;

// --- trials -----------------------------------------------------------------------------------------------------

/// Share of the time of all steps that trials may lose, and what may be saved up, in steps.
constexpr double kTrialShare = 0.01;
constexpr double kLargestAllowance = 4.0;
constexpr double kFirstAllowance = 0.5;
/// What drafting has to gain over none, as a factor: less is within what costs and acceptance are known to.
constexpr double kWorthDrafting = 1.01;
/// What an unknown number of rows has to promise over the best known plan, as a factor.
constexpr double kWorthTrying = 1.01;
/// Steps between trials that are expected to lose, and between measurements of a step without drafts.
constexpr std::int64_t kTrialSpacing = 8;
constexpr std::int64_t kBaselineSpacing = 256;
/// Most steps until a sequence that gets no drafts is probed; the wait doubles with every probe that fails.
constexpr int kLongestProbeInterval = 32;
/// Acceptance of a first draft from which a probe takes a second one, to learn of later drafts too.
constexpr double kDeepProbe = 0.5;

void fade(AcceptanceCounts& counts, float window) {
  counts.verified *= 1.0F - 1.0F / window;
  counts.accepted *= 1.0F - 1.0F / window;
}

void count_draft(AcceptanceCounts& counts, bool accepted, float window) {
  fade(counts, window);
  counts.verified += 1.0F;
  if (accepted) counts.accepted += 1.0F;
}

int depth_bucket(int depth) { return std::min(depth, kDraftDepths - 1); }

std::size_t class_index(int confidence) {
  return static_cast<std::size_t>(std::clamp(confidence, 0, kConfidenceClasses - 1));
}

const DraftOutlook& outlook_of(const DraftCandidate& candidate) { return candidate.outlooks[candidate.drafter]; }

int capacity(const DraftCandidate& candidate, int drafter) {
  return std::max(std::min(candidate.limit, candidate.outlooks[drafter].available), 0);
}
int capacity(const DraftCandidate& candidate) { return capacity(candidate, candidate.drafter); }

}  // namespace

void DraftBudget::plan(std::span<DraftCandidate> candidates, int prefill_rows, int max_rows) {
  pending_ = {};
  const int sequences = static_cast<int>(candidates.size());
  choose_drafters(candidates);
  rank_drafts(candidates, max_rows - prefill_rows - sequences);

  if (prefill_rows > 0) {
    grant(candidates, best_beside_prefill(sequences, prefill_rows));
  } else if (step_costs_.measured(sequences)) {
    const int best = best_known(sequences);
    pending_.rate = rate(sequences, best);
    const int drafts = trial(sequences, best);
    grant(candidates, drafts);
    pending_.tokens = expected_[drafts];
    pending_.rows = sequences + drafts;
    pending_.drafting = drafting_[drafts];
    pending_.active = drafts != best;
    if (!pending_.active) probe(candidates, max_rows);
    if (pending_.active) last_trial_ = steps_;
  }
  // Otherwise none: a step without drafts is measured first, for all else is compared with it.

  for (const DraftCandidate& candidate : candidates) {
    if (capacity(candidate) == 0) continue;
    int& idle = candidate.acceptance->steps_without_draft;
    idle = candidate.granted > 0 ? 0 : idle + 1;
  }
}

/// For each sequence the drafter with the highest goodput, if all sequences drafted as much as it does.
void DraftBudget::choose_drafters(std::span<DraftCandidate> candidates) const {
  const auto sequences = static_cast<int>(candidates.size());
  for (DraftCandidate& candidate : candidates) {
    candidate.drafter = 0;
    double best = 0.0;
    for (int drafter = 0; drafter < kMaxDrafters; ++drafter) {
      double tokens = 1.0;
      double reach = 1.0;
      for (int depth = 0; depth < capacity(candidate, drafter); ++depth) {
        reach *= acceptance(*candidate.acceptance, candidate.outlooks[drafter].confidence, depth);
        tokens += reach;
        const int drafts = depth + 1;
        const double seconds = step_costs_.cost(sequences * (1 + drafts)) / sequences + draft_cost(drafter) * drafts;
        if (tokens / seconds <= best) continue;
        best = tokens / seconds;
        candidate.drafter = drafter;
      }
    }
  }
}

/// Orders the drafts that could be granted by what they are expected to yield, greedily: a sequence's next draft is
/// never likelier to be reached and accepted than the one before it, so every prefix of the order is the best choice
/// of as many drafts.
void DraftBudget::rank_drafts(std::span<DraftCandidate> candidates, int most) {
  ranked_.clear();
  heads_.clear();
  expected_.assign(1, static_cast<double>(candidates.size()));
  drafting_.assign(1, 0.0);
  const auto less = [](const Head& a, const Head& b) {
    return a.reach != b.reach ? a.reach < b.reach : a.candidate > b.candidate;
  };
  for (int i = 0; i < static_cast<int>(candidates.size()); ++i) {
    DraftCandidate& candidate = candidates[i];
    candidate.granted = 0;
    if (capacity(candidate) == 0) continue;
    heads_.push_back({acceptance(*candidate.acceptance, outlook_of(candidate).confidence, 0), i, 0});
  }
  std::make_heap(heads_.begin(), heads_.end(), less);
  while (static_cast<int>(ranked_.size()) < most && !heads_.empty()) {
    std::pop_heap(heads_.begin(), heads_.end(), less);
    Head& head = heads_.back();
    ranked_.push_back(head.candidate);
    expected_.push_back(expected_.back() + head.reach);
    const DraftCandidate& candidate = candidates[head.candidate];
    drafting_.push_back(drafting_.back() + draft_cost(candidate.drafter));
    if (++head.depth == capacity(candidate)) {
      heads_.pop_back();
      continue;
    }
    head.reach *= acceptance(*candidate.acceptance, outlook_of(candidate).confidence, head.depth);
    std::push_heap(heads_.begin(), heads_.end(), less);
  }
}

void DraftBudget::grant(std::span<DraftCandidate> candidates, int drafts) const {
  for (int g = 0; g < drafts; ++g) ++candidates[ranked_[g]].granted;
}

double DraftBudget::rate(int sequences, int drafts) const {
  return expected_[drafts] / (step_costs_.cost(sequences + drafts) + drafting_[drafts]);
}

/// The number of drafts with the highest goodput among those whose cost was measured or lies between measured ones.
/// All of them are looked at, since the cost may rise in steps.
int DraftBudget::best_known(int sequences) const {
  const int most = std::min(static_cast<int>(ranked_.size()), step_costs_.largest() - sequences);
  int best = 0;
  double best_rate = rate(sequences, 0) * kWorthDrafting;
  for (int g = 1; g <= most; ++g) {
    const double candidate = rate(sequences, g);
    if (candidate > best_rate) {
      best = g;
      best_rate = candidate;
    }
  }
  return best;
}

/// Beside prefill rows, a draft is worth what a token costs in the steps of pure decoding that it saves: with that
/// price of a second, the best number of drafts.
int DraftBudget::best_beside_prefill(int sequences, int prefill_rows) const {
  if (step_costs_.largest() == 0 || sequences == 0) return 0;
  const double price = rate(sequences, best_known(sequences));
  int best = 0;
  double best_surplus = 0.0;
  const double base = step_costs_.cost(sequences + prefill_rows);
  for (int g = 1; g < static_cast<int>(expected_.size()); ++g) {
    const double seconds = step_costs_.cost(sequences + prefill_rows + g) - base + drafting_[g];
    const double surplus = expected_[g] - expected_[0] - price * seconds;
    if (surplus > best_surplus) {
      best = g;
      best_surplus = surplus;
    }
  }
  return best;
}

/// Another number of drafts than `best`, if there is one that should be tried now; else `best`.
int DraftBudget::trial(int sequences, int best) const {
  const double best_rate = pending_.rate;
  if (allowance_ < 0.0) return best;
  const bool may_lose = steps_ - last_trial_ >= kTrialSpacing;
  // Costs never fall with the number of rows, so the closest reliable one below bounds an unknown one. Not further
  // than twice the drafts measured so far: a steep curve is noticed while it is cheap.
  const int known = std::max(step_costs_.largest() - sequences, 0);
  const int most = std::min(static_cast<int>(ranked_.size()), std::max(2 * known, 1));
  double bound = step_costs_.cost(sequences);
  double pick_rate = best_rate * kWorthTrying;
  int pick = best;
  for (int g = 1; g <= most; ++g) {
    const double cost = step_costs_.cost(sequences + g);
    if (step_costs_.reliable(sequences + g)) {
      bound = cost;
      continue;
    }
    const double hoped = expected_[g] / (bound + drafting_[g]);
    const double loss = (bound + cost) / 2 + drafting_[g] - expected_[g] / best_rate;
    const bool gains = rate(sequences, g) > best_rate;
    if (hoped > pick_rate && (gains || (may_lose && loss <= allowance_))) {
      pick = g;
      pick_rate = hoped;
    }
  }
  if (pick != best) return pick;
  if (best > 0 && may_lose && step_costs_.age(sequences) > kBaselineSpacing) {
    const double loss = step_costs_.cost(sequences) - expected_[0] / best_rate;
    if (loss <= allowance_) return 0;
  }
  return best;
}

/// Adds a draft or two for sequences that have had none for long, within the allowance.
void DraftBudget::probe(std::span<DraftCandidate> candidates, int max_rows) {
  const std::size_t count = candidates.size();
  double allowance = allowance_;
  for (std::size_t i = 0; i < count && pending_.rows < max_rows; ++i) {
    const std::size_t at = (probe_cursor_ + i) % count;
    DraftCandidate& candidate = candidates[at];
    SequenceAcceptance& sequence = *candidate.acceptance;
    if (candidate.granted > 0 || capacity(candidate) == 0) continue;
    if (sequence.steps_without_draft + 1 < sequence.probe_interval) continue;
    double gain = acceptance(sequence, outlook_of(candidate).confidence, 0);
    int drafts = 1;
    if (gain >= kDeepProbe && capacity(candidate) > 1 && pending_.rows + 1 < max_rows) {
      gain += gain * acceptance(sequence, outlook_of(candidate).confidence, 1);
      drafts = 2;
    }
    const double loss = step_costs_.cost(pending_.rows + drafts) - step_costs_.cost(pending_.rows) +
                        draft_cost(candidate.drafter) * drafts - gain / pending_.rate;
    if (loss > allowance) {
      probe_cursor_ = at;
      break;
    }
    allowance -= std::max(loss, 0.0);
    candidate.granted = drafts;
    sequence.probe_interval = std::clamp(2 * sequence.probe_interval, 1, kLongestProbeInterval);
    pending_.tokens += gain;
    pending_.rows += drafts;
    pending_.drafting += draft_cost(candidate.drafter) * drafts;
    pending_.active = true;
  }
}

void DraftBudget::observe_acceptance(SequenceAcceptance& sequence, int confidence, int drafted, int accepted) {
  AcceptanceCounts* own = sequence.counts[class_index(confidence)].data();
  AcceptanceCounts* shared = shared_[class_index(confidence)].data();
  // The first rejected draft ends what is known: those after it were never compared with what the target would say.
  for (int depth = 0; depth < std::min(drafted, accepted + 1); ++depth) {
    const int bucket = depth_bucket(depth);
    const bool agreed = depth < accepted;
    const double p = this->acceptance(sequence, confidence, depth);
    AcceptanceRun& run = sequence.runs[class_index(confidence)][bucket];
    if (run.accepted != agreed) run = {agreed, 0, 1.0F};
    ++run.length;
    run.chance *= static_cast<float>(std::clamp(agreed ? p : 1.0 - p, kLeastChance, 1.0));
    count_draft(own[bucket], agreed, kSequenceWindow);
    count_draft(shared[bucket], agreed, kSharedWindow);
    if (run.chance < kSurprise) {
      const float length = std::max(static_cast<float>(run.length), kSequenceWindow / 3);
      own[bucket] = {length, agreed ? length : 0.0F};
      run.chance = 1.0F;
    }
  }
  // Where drafts are single ones, what was known of later ones must not stand for ever.
  if (drafted == 1) {
    fade(own[1], kSequenceWindow);
    fade(shared[1], kSharedWindow);
  }
  if (accepted > 0) sequence.probe_interval = 0;
}

void DraftBudget::observe_step(int rows, double seconds) {
  if (rows < 1 || !std::isfinite(seconds) || seconds <= 0.0) return;
  const bool first = step_costs_.largest() == 0;
  const double expected_seconds = first ? seconds : step_costs_.cost(rows);
  step_costs_.observe(rows, seconds);
  ++steps_;
  // A disturbed step says nothing of what a trial or a step costs: bound it.
  const double charged = std::min(seconds, 4.0 * expected_seconds);
  if (pending_.active && pending_.rows == rows) {
    allowance_ -= std::max(charged + pending_.drafting - pending_.tokens / pending_.rate, 0.0);
  }
  pending_.active = false;
  allowance_ = std::min(allowance_ + charged * (first ? kFirstAllowance : kTrialShare), kLargestAllowance * charged);
}

void DraftBudget::observe_drafting(int drafter, int drafts, double seconds) {
  if (drafts < 1 || !std::isfinite(seconds) || seconds < 0.0) return;
  draft_costs_[drafter].add(seconds / drafts);
}

double DraftBudget::step_cost(int rows) const { return step_costs_.cost(rows); }

double DraftBudget::draft_cost(int drafter) const {
  const RecentMedian& costs = draft_costs_[drafter];
  return costs.count() == 0 ? 0.0 : costs.value();
}

double DraftBudget::acceptance(const SequenceAcceptance& sequence, int confidence, int depth) const {
  const std::size_t c = class_index(confidence);
  const int bucket = depth_bucket(depth);
  const AcceptanceCounts& shared = shared_[c][bucket];
  const AcceptanceCounts& own = sequence.counts[c][bucket];
  const double prior = kPriorAcceptance[c][bucket];
  const double over_all = (prior * kPriorWeight + shared.accepted) / (kPriorWeight + shared.verified);
  return (over_all * kSharedWeight + own.accepted) / (kSharedWeight + own.verified);
}

}  // namespace draftwerk
