// The draft budget: how many drafts each sequence gets in the next step, none included, and from which drafter.
//
// A draft pays if the tokens that it is expected to yield are worth the time that its row adds to the step and that
// proposing it takes. All of this is measured while the engine runs: the time of a step by its number of rows
// (step_cost.h), the time of a drafter's round (draft_cost.h), and how often drafts are accepted, by sequence, class of
// confidence and depth (acceptance.h). The plan maximises goodput, expected tokens per second, over drafters and
// numbers of drafts (Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput",
// arXiv:2406.14066). Measurements change how many drafts are made and never which tokens come out.
//
// The plan of a step:
//   1. Each sequence takes the drafter that would yield most per second if all sequences drafted as it does. Where
//      drafters compete, it does so once more at the price of a second that comes out of 2.
//   2. All drafts of these drafters are put in order, the likeliest to be accepted first, and of the plans "the first
//      g of them" whose cost is known the one with the highest goodput is best. A drafter whose passes take long is
//      kept from going deeper than pays for all sequences together. Drafting has to beat not drafting by more than
//      costs are known to.
//      How many drafts of a tree pay differs from step to step: its drafter gets the prices of rows and of its passes
//      and decides when it knows how sure it is.
//   3. What is not known is found out at a bounded price:
//      - A trial is a step of another number of rows than the best: one that was not measured yet and may pay, or the
//        sequences' own alone, to measure that anew. A few thousandths of all time are set aside for trials, and
//        two more for steps without drafts where drafting seems to pay: the less it does, the more often.
//      - A comparison shows how good a drafter is without being verified: a sequence that does not use it has it
//        propose one draft, and the token that comes out of the step tells whether it would have been accepted. It
//        costs the drafting alone.
//      - A probe grants more drafts than is best, where later drafts may well be accepted more often than they are
//        known to be: where a second row doubles the step, drafts pay by several at once or not at all.
//      For comparisons and probes a sequence sets aside a few thousandths of its own time; while little is known they
//      may draw on what is set aside for trials as well.
// After 400 steps goodput is within 5% of that of the best fixed number of drafts, and from the first step on within
// 10% of it and within 2% of that without drafts: tests/cpp/budget_goodput_test.cc says where, and what luck may do to
// a single sequence.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "drafting/acceptance.h"
#include "drafting/draft_cost.h"
#include "drafting/drafter.h"
#include "drafting/step_cost.h"

namespace draftwerk {

/// What the budget knows of one sequence. Belongs to the sequence; a new sequence starts with a fresh one.
struct SequenceAcceptance {
  AcceptanceBeliefs beliefs{};
  std::array<int, kMaxDrafters> unused{};  ///< steps since it had drafts of each drafter
  double savings = 0.0;                    ///< seconds that comparisons and probes may lose
};

/// One decoding sequence in DraftBudget::plan().
struct DraftCandidate {
  SequenceAcceptance* acceptance = nullptr;
  std::array<DraftOutlook, kMaxDrafters> outlooks{};  ///< by drafter; 0 available: nothing from that one
  int limit = 0;                                      ///< most drafts allowed for it
  int drafter = 0;                                    ///< out: whose drafts are granted
  int granted = 0;                                    ///< out: 0 .. min(limit, outlooks[drafter].available)
  /// out: of a tree, how many drafts the plan counts on; what granted allows beyond that is up to the drafter.
  int planned = 0;
  /// out: [granted + 1], of a tree: what so many drafts have to promise to pay for their rows (DraftJob). Good until
  /// the next plan.
  std::span<const double> row_prices = {};
  /// out: a drafter, not the one whose drafts are granted, that is to propose one draft too. It takes no row: it is
  /// compared with the first token that comes out of the step, and observe_acceptance() told of one draft of that
  /// drafter's class. -1: none.
  int compared_drafter = -1;
};

/// Used from the engine thread alone. Throws nothing but std::bad_alloc, and allocates only when plan() sees more
/// candidates or drafts than ever before.
///
/// Per step: plan() or plan_fixed(); then, in any order, observe_drafting() for every drafter that proposed something,
/// observe_acceptance() for every sequence's granted drafts and for its compared one, observe_step() if the step had no
/// prefill rows.
class DraftBudget {
 public:
  /// Decides what the candidates get. `candidates` are all the sequences that decode in this step, one row each beside
  /// their drafts, also those that cannot draft (limit or available 0). `prefill_rows` are the other rows of the step.
  /// The step's rows stay within `max_rows` as far as that is up to the drafts.
  void plan(std::span<DraftCandidate> candidates, int prefill_rows, int max_rows);

  /// plan() for a fixed number of drafts, as many of them as can be had and `room` rows allow: decides whose alone.
  void plan_fixed(std::span<DraftCandidate> candidates, int drafts, int room);

  /// A sequence drafted `drafted` tokens of class `confidence`, of which `accepted` were accepted: ascending indices,
  /// in a chain those of the first ones. Drafts of a tree that were planned and did not pay count as rejected ones:
  /// that is what granting them was worth.
  void observe_acceptance(SequenceAcceptance& acceptance, int confidence, int drafted, std::span<const int> accepted);
  /// A drafter promised that so many drafts of a tree would be accepted, and so many were.
  void observe_promise(double promised, int accepted);
  /// A step of `rows` rows, none of them prefill, took `seconds` (the target's pass and verification).
  void observe_step(int rows, double seconds);
  /// Proposing what the last plan wanted of this drafter, `drafts` tokens in all, compared ones included, took
  /// `seconds` and so many passes; 0: as many as the longest chain of drafts has.
  void observe_drafting(int drafter, int passes, int drafts, double seconds);

  /// Estimated seconds of a step with `rows` rows; before any observation, in units of a step with one row.
  [[nodiscard]] double step_cost(int rows) const;
  /// Estimated seconds for this drafter to propose one draft for one sequence.
  [[nodiscard]] double draft_cost(int drafter) const;
  /// What one sequence's part in another pass of this drafter costs in the last plan, in tokens that the time would
  /// yield.
  [[nodiscard]] double pass_price(int drafter) const;
  /// Estimated probability that a draft of the sequence is accepted; `index` 0 is the first one of a step, given for
  /// the others that those before it were accepted; in a tree given nothing.
  [[nodiscard]] double acceptance(const SequenceAcceptance& sequence, int confidence, int index) const;

 private:
  struct Draft {
    double worth = 0.0;  ///< reach, less the price of drafting it
    double reach = 0.0;  ///< probability that it is reached and accepted
    int candidate = 0;
    int drafter = 0;
    int index = 0;  ///< in its sequence
    int pass = 0;   ///< of the drafter, from 0
  };
  /// What the drafters have to do in a step.
  struct Rounds {
    std::array<int, kMaxDrafters> passes{};
    std::array<int, kMaxDrafters> drafts{};
    /// Of one sequence, `count` drafts of this class behind the first `from` ones.
    void add(int drafter, int confidence, int from, int count);
  };
  /// The last plan, if it was a trial.
  struct Trial {
    bool active = false;
    int rows = 0;
    double drafting = 0.0;  ///< seconds
    double tokens = 0.0;    ///< expected
  };
  struct Probe {
    int drafts = 0;
    double loss = 0.0;  ///< seconds
  };

  void list_drafts(std::span<DraftCandidate> candidates, int most);
  [[nodiscard]] bool drafters_compete(std::span<DraftCandidate> candidates);
  void choose_drafters(std::span<DraftCandidate> candidates, double price);
  void note_rounds(std::span<DraftCandidate> candidates);
  void order_drafts(std::span<const DraftCandidate> candidates, int most, double price);
  void limit_depths(int sequences);
  void tabulate(int sequences);
  [[nodiscard]] double drafting_seconds(const Rounds& rounds) const;
  [[nodiscard]] double rate(int sequences, int drafts) const;
  [[nodiscard]] int best_known(int sequences) const;
  [[nodiscard]] int best_beside_prefill(int sequences, int prefill_rows) const;
  [[nodiscard]] int most_tried(int sequences) const;
  [[nodiscard]] bool baseline_is_due(int sequences, int best) const;
  [[nodiscard]] int trial(int sequences, int best) const;
  void explore(std::span<DraftCandidate> candidates, int max_rows);
  void free_trees(std::span<DraftCandidate> candidates, int max_rows);
  [[nodiscard]] double promise_scale() const;
  [[nodiscard]] Probe probe(const DraftCandidate& candidate, int rows, const Rounds& rounds, int max_rows) const;

  StepCostTable step_costs_;
  std::array<DraftCost, kMaxDrafters> draft_costs_;
  std::array<bool, kMaxDrafters> begun_{};             ///< drafters that have had a round
  std::array<std::int64_t, kMaxDrafters> timed_at_{};  ///< steps_ at the last one of each
  AcceptanceModel acceptance_;
  double promised_ = 64.0;  ///< by drafters of trees, old promises fading,
  double kept_ = 64.0;      ///< and what came of it
  double allowance_ = 0.0;  ///< seconds that trials may lose
  std::int64_t steps_ = 0;
  std::int64_t last_trial_ = 0;
  // Of the last plan.
  Trial pending_;
  Rounds rounds_;
  double best_rate_ = 0.0;  ///< tokens per second of the best one that was known
  // Scratch of plan().
  std::array<int, kMaxDrafters> offers_{};  ///< sequences that each drafter has something for
  std::vector<double> shares_;              ///< a sequence's share of a step in which each has k drafts
  std::vector<Draft> drafts_;               ///< in the order in which they are granted
  std::vector<double> expected_;            ///< tokens of a step with the first g of them, g = 0 .. drafts_.size()
  std::vector<double> drafting_;            ///< seconds that these drafts take
  std::vector<double> row_prices_;          ///< of all trees
};

}  // namespace draftwerk
