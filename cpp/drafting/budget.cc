#include "drafting/budget.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

namespace draftwerk {
namespace {

// --- trials -----------------------------------------------------------------------------------------------------

/// Share of the time of all steps that trials may lose. In steps: what there is at first, what may be saved up, and
/// what comparisons and probes leave to trials.
constexpr double kTrialShare = 0.003;
constexpr double kFirstAllowance = 6.0;
constexpr double kLargestAllowance = 4.0;
constexpr double kReserve = 1.0;
/// A step that takes so many times as long as expected was disturbed.
constexpr double kDisturbed = 2.5;
/// Steps after which nothing is known any more of a drafter's time, for each step that a draft of it was thought to
/// take: one that is thought to be too dear is never asked, and could not show that it is not.
constexpr double kForgetSteps = 4096.0;
/// What a number of rows that is not known has to promise over the best known plan, as a factor.
constexpr double kWorthTrying = 1.01;
/// Steps between trials that are expected to lose.
constexpr std::int64_t kTrialSpacing = 8;
/// Steps between measurements of a step without drafts, for each sample that its cost rests on and in proportion to how
/// much drafting gains: the less it is known and the more it matters, the sooner.
constexpr double kBaselineSpacing = 16.0;
constexpr double kMostGain = 4.0;
/// Share of all time that such measurements may lose besides: often where drafting gains little, which may be an error.
constexpr double kBaselineShare = 0.002;
constexpr double kLeastBaselineSpacing = 8.0;

// --- comparisons and probes -------------------------------------------------------------------------------------

/// Share of a sequence's time that they may lose.
constexpr double kExploreShare = 0.004;
/// Standard errors by which what may well be is better than what is expected, and by which what a probe is charged for
/// is worse: without the latter those that look better than they are would be charged too little.
constexpr double kHope = 2.0;
constexpr double kCaution = 0.6;

// --- plans ------------------------------------------------------------------------------------------------------

/// What drafting has to gain over none, as a factor, beside what costs are known to.
constexpr double kWorthDrafting = 1.015;
/// Drafts that a tree may have beyond those that were planned for it, where it is surer of itself than usual.
constexpr int kMoreDrafts = 8;
/// Promises over which what comes of them reaches back, and the least part of them that is believed to be kept: a
/// drafter that has nothing verified any more could never show that it got better.
constexpr double kPromiseWindow = 512.0;
constexpr double kLeastKept = 0.25;
/// Drafts less likely to be accepted than this are not thought of.
constexpr double kLeastReach = 0.002;
/// Share of a step from which the time of a drafter's pass counts in how deep it drafts.
constexpr double kDearPass = 0.002;

/// Passes for so many drafts of one sequence: one for each in a chain; in a tree, which is deepened as long as that
/// pays, about so many.
int passes_of(int confidence, int drafts) {
  return confidence == kTreeConfidence ? std::bit_width(static_cast<unsigned>(drafts)) : drafts;
}

int capacity(const DraftCandidate& candidate, int drafter) {
  return std::max(std::min(candidate.limit, candidate.outlooks[drafter].available), 0);
}

/// The drafter with something to offer that was not used for longest, apart from the one that was granted drafts; -1 if
/// there is none.
int longest_unused(const DraftCandidate& candidate) {
  int longest = -1;
  for (int d = 0; d < kMaxDrafters; ++d) {
    if (capacity(candidate, d) == 0 || (candidate.granted > 0 && candidate.drafter == d)) continue;
    if (longest < 0 || candidate.acceptance->unused[d] > candidate.acceptance->unused[longest]) longest = d;
  }
  return longest;
}

}  // namespace

void DraftBudget::Rounds::add(int drafter, int confidence, int from, int count) {
  if (count == 0) return;
  passes[drafter] = std::max(passes[drafter], passes_of(confidence, from + count));
  drafts[drafter] += count;
}

double DraftBudget::drafting_seconds(const Rounds& rounds) const {
  double seconds = 0.0;
  for (int d = 0; d < kMaxDrafters; ++d) seconds += draft_costs_[d].seconds(rounds.passes[d], rounds.drafts[d]);
  return seconds;
}

// ----------------------------------------------------------------------------------------------------------------

void DraftBudget::plan(std::span<DraftCandidate> candidates, int prefill_rows, int max_rows) {
  pending_ = {};
  const int sequences = static_cast<int>(candidates.size());
  for (DraftCandidate& candidate : candidates) {
    candidate.granted = 0;
    candidate.planned = 0;
    candidate.row_prices = {};
    candidate.compared_drafter = -1;
  }
  list_drafts(candidates, max_rows - prefill_rows - sequences);
  const auto grant = [&](int drafts) {
    for (int g = 0; g < drafts; ++g) ++candidates[drafts_[g].candidate].granted;
  };
  if (prefill_rows > 0) {
    grant(best_beside_prefill(sequences, prefill_rows));
  } else if (step_costs_.measured(sequences)) {
    const int best = best_known(sequences);
    best_rate_ = rate(sequences, best);
    if (baseline_is_due(sequences, best)) return note_rounds(candidates);
    const int drafts = trial(sequences, best);
    grant(drafts);
    if (drafts == best) {
      explore(candidates, max_rows);
      free_trees(candidates, max_rows);
    } else {
      pending_ = {true, sequences + drafts, drafting_[drafts], expected_[drafts]};
      last_trial_ = steps_;
    }
  }
  // Otherwise none: a step without drafts is measured first, for all else is compared with it.

  note_rounds(candidates);
}

void DraftBudget::plan_fixed(std::span<DraftCandidate> candidates, int drafts, int room) {
  pending_ = {};
  if (drafters_compete(candidates)) choose_drafters(candidates, 0.0);
  for (DraftCandidate& candidate : candidates) {
    candidate.granted = std::min({drafts, capacity(candidate, candidate.drafter), room});
    candidate.planned = 0;
    candidate.row_prices = {};
    candidate.compared_drafter = -1;
    room -= candidate.granted;
  }
  note_rounds(candidates);
}

/// Remembers what the drafters were given to do.
void DraftBudget::note_rounds(std::span<DraftCandidate> candidates) {
  rounds_ = {};
  for (const DraftCandidate& candidate : candidates) {
    for (int& unused : candidate.acceptance->unused) ++unused;
    if (candidate.granted > 0) {
      rounds_.add(candidate.drafter, candidate.outlooks[candidate.drafter].confidence, 0, candidate.granted);
      candidate.acceptance->unused[candidate.drafter] = 0;
    }
    if (candidate.compared_drafter >= 0) {
      rounds_.add(candidate.compared_drafter, candidate.outlooks[candidate.compared_drafter].confidence, 0, 1);
      candidate.acceptance->unused[candidate.compared_drafter] = 0;
    }
  }
}

/// Chooses drafters, puts their drafts in order and sums up what they yield and take.
void DraftBudget::list_drafts(std::span<DraftCandidate> candidates, int most) {
  const int sequences = static_cast<int>(candidates.size());
  const auto list_at = [&](double price) {
    order_drafts(candidates, most, price);
    limit_depths(sequences);
    tabulate(sequences);
  };
  if (!drafters_compete(candidates)) {
    list_at(0.0);
    return;
  }
  choose_drafters(candidates, 0.0);
  list_at(0.0);
  const double price = rate(sequences, best_known(sequences));
  choose_drafters(candidates, price);
  list_at(price);
}

/// Counts what the drafters have to offer. If there is but one that has, it becomes that of all sequences.
bool DraftBudget::drafters_compete(std::span<DraftCandidate> candidates) {
  offers_ = {};
  for (const DraftCandidate& candidate : candidates) {
    for (int d = 0; d < kMaxDrafters; ++d) offers_[d] += capacity(candidate, d) > 0 ? 1 : 0;
  }
  const auto most = std::max_element(offers_.begin(), offers_.end());
  for (DraftCandidate& candidate : candidates) candidate.drafter = static_cast<int>(most - offers_.begin());
  return std::count(offers_.begin(), offers_.end(), 0) < kMaxDrafters - 1;
}

/// For each sequence the drafter that is worth most if all sequences draft as much as it does: in tokens, less the
/// price of the seconds, or in tokens per second while there is no price.
void DraftBudget::choose_drafters(std::span<DraftCandidate> candidates, double price) {
  const int sequences = static_cast<int>(candidates.size());
  shares_.assign(1, step_costs_.cost(sequences) / sequences);
  for (DraftCandidate& candidate : candidates) {
    double best = -std::numeric_limits<double>::infinity();
    for (int d = 0; d < kMaxDrafters; ++d) {
      const int most = capacity(candidate, d);
      if (most == 0) continue;
      const double pass = draft_costs_[d].seconds(1, offers_[d]) / offers_[d];
      const int confidence = candidate.outlooks[d].confidence;
      DraftReach reach = acceptance_.reach(candidate.acceptance->beliefs, confidence);
      double tokens = 1.0;
      for (int k = 1; k <= most; ++k) {
        if (static_cast<int>(shares_.size()) == k) shares_.push_back(step_costs_.cost(sequences * (1 + k)) / sequences);
        tokens += reach.next();
        const double seconds = shares_[k] + passes_of(confidence, k) * pass;
        const double worth = price > 0.0 ? tokens - price * seconds : tokens / seconds;
        if (worth <= best) continue;
        best = worth;
        candidate.drafter = d;
      }
    }
  }
}

/// A draft is never likelier to be reached and accepted than the one before it in its sequence, so the first g of this
/// order are g drafts that can be granted, and none of as many would yield more.
void DraftBudget::order_drafts(std::span<const DraftCandidate> candidates, int most, double price) {
  drafts_.clear();
  std::array<double, kMaxDrafters> pass_price{};  // of a draft's part in its pass
  for (int d = 0; d < kMaxDrafters; ++d) {
    if (offers_[d] > 0) pass_price[d] = price * draft_costs_[d].seconds(1, offers_[d]) / offers_[d];
  }
  for (int i = 0; i < static_cast<int>(candidates.size()); ++i) {
    const DraftCandidate& candidate = candidates[i];
    const int drafter = candidate.drafter;
    const int available = capacity(candidate, drafter);
    if (available == 0) continue;
    const int confidence = candidate.outlooks[drafter].confidence;
    DraftReach reaches = acceptance_.reach(candidate.acceptance->beliefs, confidence);
    for (int index = 0; index < available; ++index) {
      const double reach = reaches.next();
      if (reach < kLeastReach) break;
      drafts_.push_back({reach - pass_price[drafter], reach, i, drafter, index, passes_of(confidence, index + 1) - 1});
    }
  }
  std::sort(drafts_.begin(), drafts_.end(), [](const Draft& a, const Draft& b) {
    if (a.worth != b.worth) return a.worth > b.worth;
    return a.index != b.index ? a.index < b.index : a.candidate < b.candidate;
  });
  if (static_cast<int>(drafts_.size()) > most) drafts_.resize(static_cast<std::size_t>(std::max(most, 0)));
}

/// Strikes out drafts that are too deep: a pass costs much the same for few sequences as for many, and the last few
/// that would go on do not pay for it. Rows beyond those measured are taken to be free here, so that they can be tried.
void DraftBudget::limit_depths(int sequences) {
  if (sequences < 2) return;
  const int largest = std::max(step_costs_.largest(), sequences);
  for (int d = 0; d < kMaxDrafters; ++d) {
    if (offers_[d] < 2) continue;
    // As if a pass took so much and so much more for each row.
    const double one = draft_costs_[d].seconds(1, 1);
    const double row = (draft_costs_[d].seconds(1, offers_[d]) - one) / (offers_[d] - 1);
    const double pass = one - row;
    if (pass < kDearPass * step_costs_.cost(sequences)) continue;
    int deepest = 0;
    for (const Draft& draft : drafts_) deepest = std::max(deepest, draft.drafter == d ? draft.pass + 1 : 0);
    int best = deepest;
    double best_rate = 0.0;
    for (int limit = 1; limit <= deepest; limit += 1 + limit / 8) {
      double tokens = sequences;
      double seconds = 0.0;
      int rows = sequences;
      int passes = 0;
      for (const Draft& draft : drafts_) {
        if (draft.drafter == d) {
          if (draft.pass >= limit) continue;
          passes = std::max(passes, draft.pass + 1);
          seconds += row;
        }
        ++rows;
        tokens += draft.reach;
        const double rate = tokens / (step_costs_.cost(std::min(rows, largest)) + seconds + passes * pass);
        if (rate <= best_rate) continue;
        best_rate = rate;
        best = limit;
      }
    }
    std::erase_if(drafts_, [&](const Draft& draft) { return draft.drafter == d && draft.pass >= best; });
  }
}

void DraftBudget::tabulate(int sequences) {
  expected_.assign(1, static_cast<double>(sequences));
  drafting_.assign(1, 0.0);
  Rounds rounds;
  for (const Draft& draft : drafts_) {
    rounds.passes[draft.drafter] = std::max(rounds.passes[draft.drafter], draft.pass + 1);
    ++rounds.drafts[draft.drafter];
    expected_.push_back(expected_.back() + draft.reach);
    drafting_.push_back(drafting_seconds(rounds));
  }
}

double DraftBudget::rate(int sequences, int drafts) const {
  return expected_[drafts] / (step_costs_.cost(sequences + drafts) + drafting_[drafts]);
}

/// The number of drafts with the highest goodput among those whose cost was measured or lies between measured ones.
/// All of them are looked at, since the cost may rise in steps.
int DraftBudget::best_known(int sequences) const {
  const int most = std::min(static_cast<int>(drafts_.size()), step_costs_.largest() - sequences);
  int best = 0;
  double best_rate = rate(sequences, 0) * (kWorthDrafting + step_costs_.error(sequences));
  for (int g = 1; g <= most; ++g) {
    // Of many costs, those known worst look best.
    const double candidate = rate(sequences, g) / (1.0 + step_costs_.error(sequences + g));
    if (candidate <= best_rate) continue;
    best = g;
    best_rate = candidate;
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
    if (surplus <= best_surplus) continue;
    best = g;
    best_surplus = surplus;
  }
  return best;
}

// --- finding out ------------------------------------------------------------------------------------------------

/// Most drafts that may be tried: twice those measured so far, one for each sequence at first, so that a steep curve is
/// noticed while it is cheap.
int DraftBudget::most_tried(int sequences) const {
  const int known = step_costs_.largest() - sequences;
  return std::max({2 * known, sequences, known > 0 ? 4 : 1});
}

/// Whether a step without drafts is to be measured, by time that is set aside for nothing else: what all plans are
/// compared with must not be what a slow spell made of it.
bool DraftBudget::baseline_is_due(int sequences, int best) const {
  if (best == 0) return false;
  const double lost = 1.0 - rate(sequences, 0) / best_rate_;  // of a step
  return static_cast<double>(step_costs_.age(sequences)) >= std::max(lost / kBaselineShare, kLeastBaselineSpacing);
}

/// Another number of drafts than `best`, if there is one that should be tried now; else `best`.
int DraftBudget::trial(int sequences, int best) const {
  if (allowance_ < 0.0) return best;
  const bool may_lose = steps_ - last_trial_ >= kTrialSpacing;
  const double gain = std::min(best_rate_ / rate(sequences, 0), kMostGain);
  if (best > 0 && step_costs_.age(sequences) > kBaselineSpacing * step_costs_.samples(sequences) * gain) {
    const double loss = step_costs_.cost(sequences) - expected_[0] / best_rate_;
    return may_lose && loss <= allowance_ ? 0 : best;
  }
  const int most = std::min(static_cast<int>(drafts_.size()), most_tried(sequences));
  double bound = 0.0;  // costs never fall with the number of rows
  double pick_loss = may_lose ? allowance_ : 0.0;
  int pick = best;
  for (int g = 0; g <= most; ++g) {
    const int rows = sequences + g;
    const double cost = step_costs_.cost(rows);
    if (step_costs_.measured(rows)) bound = std::max(bound, cost * (1.0 - kHope * step_costs_.error(rows)));
    if (g == 0 || step_costs_.reliable(rows)) continue;
    const double hoped = expected_[g] / (bound + drafting_[g]);
    const double loss = (bound + cost) / 2 + drafting_[g] - expected_[g] / best_rate_;
    if (hoped <= best_rate_ * kWorthTrying || loss >= pick_loss) continue;
    pick = g;
    pick_loss = loss;
  }
  return pick;
}

/// Spends what sequences have saved on probes and comparisons.
void DraftBudget::explore(std::span<DraftCandidate> candidates, int max_rows) {
  const int sequences = static_cast<int>(candidates.size());
  const double step = step_costs_.cost(sequences);
  const double share = step / sequences;
  const int most_rows = std::min(max_rows, sequences + most_tried(sequences));
  int rows = sequences;
  Rounds rounds;
  for (const DraftCandidate& candidate : candidates) {
    rows += candidate.granted;
    rounds.add(candidate.drafter, candidate.outlooks[candidate.drafter].confidence, 0, candidate.granted);
  }
  for (DraftCandidate& candidate : candidates) {
    SequenceAcceptance& own = *candidate.acceptance;
    own.savings = std::min(own.savings + kExploreShare * share, kLargestAllowance * share);
    const double funds = own.savings + std::max(allowance_ - kReserve * step, 0.0);
    const auto pay = [&](double loss) {
      const double extra = std::max(loss - own.savings, 0.0);
      allowance_ -= extra;
      own.savings -= std::max(loss, 0.0) - extra;
    };

    const Probe deeper = probe(candidate, rows, rounds, most_rows);
    if (deeper.drafts > 0 && deeper.loss <= funds) {
      pay(deeper.loss);
      rows += deeper.drafts - candidate.granted;
      rounds.add(candidate.drafter, candidate.outlooks[candidate.drafter].confidence, candidate.granted,
                 deeper.drafts - candidate.granted);
      candidate.granted = deeper.drafts;
      continue;
    }
    const int other = longest_unused(candidate);
    if (other < 0) continue;
    Rounds with = rounds;
    with.add(other, candidate.outlooks[other].confidence, 0, 1);
    const double loss = drafting_seconds(with) - drafting_seconds(rounds);
    // While a probe is saved for, comparisons may have half of what comes in.
    if (loss > (deeper.drafts > 0 ? kExploreShare * share / 2 : funds)) continue;
    pay(loss);
    rounds = with;
    candidate.compared_drafter = other;
  }
}

/// More drafts than are granted, if they would pay should later ones be accepted as often as may well be: those that
/// tell most for what they lose. With two drafts and more, what is known of later ones comes by itself.
DraftBudget::Probe DraftBudget::probe(const DraftCandidate& candidate, int rows, const Rounds& rounds,
                                      int max_rows) const {
  Probe best;
  if (candidate.granted > 1) return best;
  const AcceptanceBeliefs& beliefs = candidate.acceptance->beliefs;
  const int confidence = candidate.outlooks[candidate.drafter].confidence;
  DraftReach expected = acceptance_.reach(beliefs, confidence);
  DraftReach hoped = acceptance_.reach(beliefs, confidence, 0.0, kHope);
  DraftReach feared = acceptance_.reach(beliefs, confidence, -kCaution, -kCaution);
  const double now = step_costs_.cost(rows) * (1.0 - step_costs_.error(rows)) + drafting_seconds(rounds);
  const int others = rows - candidate.granted;
  const int most = std::min(capacity(candidate, candidate.drafter), max_rows - others);
  double reach = expected.next();
  double hoped_gain = hoped.next();
  double feared_gain = feared.next();
  if (candidate.granted > 0) hoped_gain = feared_gain = 0.0;
  double outcomes = 0.0;  // of later drafts
  double best_outcomes = 0.0;
  for (int k = 2; k <= most; ++k) {
    // A place in a tree shows in every step what it is worth, a draft of a chain only where those before it are right.
    outcomes += confidence == kTreeConfidence ? 1.0 : reach;
    reach = expected.next();
    hoped_gain += hoped.next();
    feared_gain += feared.next();
    Rounds with = rounds;
    with.add(candidate.drafter, confidence, candidate.granted, k - candidate.granted);
    const double step = step_costs_.cost(others + k) * (1.0 + step_costs_.error(others + k));
    const double cost = step + drafting_seconds(with) - now;
    if (hoped_gain <= cost * best_rate_) continue;
    const double loss = cost - feared_gain / best_rate_;
    if (best.drafts > 0 && loss * best_outcomes >= best.loss * outcomes) continue;
    best = {k, loss};
    best_outcomes = outcomes;
  }
  return best;
}

/// How many drafts pay differs from step to step, and a drafter of trees knows how sure it is of each when it has them:
/// so it gets prices, those of the rows around the planned ones, instead of a number.
void DraftBudget::free_trees(std::span<DraftCandidate> candidates, int max_rows) {
  const auto has_tree = [](const DraftCandidate& candidate) {
    return candidate.granted > 0 && candidate.outlooks[candidate.drafter].confidence == kTreeConfidence;
  };
  const int trees = static_cast<int>(std::count_if(candidates.begin(), candidates.end(), has_tree));
  if (trees == 0) return;
  int rows = static_cast<int>(candidates.size());
  for (const DraftCandidate& candidate : candidates) rows += candidate.granted;
  const int more = std::clamp((max_rows - rows) / trees, 0, kMoreDrafts);
  std::size_t prices = 0;
  for (DraftCandidate& candidate : candidates) {
    if (has_tree(candidate)) prices += static_cast<std::size_t>(candidate.granted + more) + 1;
  }
  row_prices_.resize(std::max(prices, row_prices_.size()));
  double* next = row_prices_.data();
  const double rate = best_rate_ / promise_scale();
  for (DraftCandidate& candidate : candidates) {
    if (!has_tree(candidate)) continue;
    const int others = rows - candidate.granted;
    candidate.planned = candidate.granted;
    candidate.granted = std::min(candidate.granted + more, capacity(candidate, candidate.drafter));
    candidate.row_prices = {next, static_cast<std::size_t>(candidate.granted) + 1};
    for (int k = 0; k <= candidate.granted; ++k) {
      *next++ = rate * (step_costs_.cost(others + k) - step_costs_.cost(others));
    }
  }
}

// --- observations -----------------------------------------------------------------------------------------------

void DraftBudget::observe_acceptance(SequenceAcceptance& sequence, int confidence, int drafted,
                                     std::span<const int> accepted) {
  acceptance_.observe(sequence.beliefs, confidence, drafted, accepted);
}

double DraftBudget::promise_scale() const { return std::max(kept_ / promised_, kLeastKept); }

void DraftBudget::observe_promise(double promised, int accepted) {
  promised_ += promised - promised_ / kPromiseWindow;
  kept_ += accepted - kept_ / kPromiseWindow;
}

void DraftBudget::observe_step(int rows, double seconds) {
  if (rows < 1 || !std::isfinite(seconds) || seconds <= 0.0) return;
  const bool first = step_costs_.largest() == 0;
  const double expected_seconds = first ? seconds : step_costs_.cost(rows);
  step_costs_.observe(rows, seconds);
  ++steps_;
  // A disturbed step says nothing of what a trial or a step costs.
  const double charged = seconds > kDisturbed * expected_seconds ? expected_seconds : seconds;
  if (pending_.active && pending_.rows == rows) {
    allowance_ -= std::max(charged + pending_.drafting - pending_.tokens / best_rate_, 0.0);
  }
  pending_.active = false;
  if (first) {
    allowance_ = kFirstAllowance * charged;
  } else if (allowance_ < kLargestAllowance * charged) {
    allowance_ = std::min(allowance_ + kTrialShare * charged, kLargestAllowance * charged);
  }
  for (int d = 0; d < kMaxDrafters; ++d) {
    const double dear = draft_cost(d) / step_costs_.cost(1);
    if (dear > 0.0 && static_cast<double>(steps_ - timed_at_[d]) > kForgetSteps * std::max(dear, 1.0)) {
      draft_costs_[d] = {};
    }
  }
}

void DraftBudget::observe_drafting(int drafter, int passes, int drafts, double seconds) {
  if (drafts < 1 || !std::isfinite(seconds) || seconds < 0.0) return;
  if (passes == 0) passes = rounds_.passes[drafter];
  timed_at_[drafter] = steps_;
  // A first round may be disturbed like any step, or load what the next ones find there: then the second one counts.
  if (!std::exchange(begun_[drafter], true) && seconds > kDisturbed * step_costs_.cost(1)) return;
  draft_costs_[drafter].observe(std::clamp(passes, 1, drafts), drafts, seconds);
}

double DraftBudget::step_cost(int rows) const { return step_costs_.cost(rows); }

double DraftBudget::draft_cost(int drafter) const { return draft_costs_[drafter].seconds(1, 1); }

double DraftBudget::pass_price(int drafter) const {
  const int sequences = std::max(offers_[drafter], 1);
  const double pass = draft_costs_[drafter].seconds(2, 2 * sequences) - draft_costs_[drafter].seconds(1, sequences);
  return best_rate_ * pass / sequences / promise_scale();
}

double DraftBudget::acceptance(const SequenceAcceptance& sequence, int confidence, int index) const {
  return acceptance_.estimate(sequence.beliefs, confidence, index);
}

}  // namespace draftwerk
