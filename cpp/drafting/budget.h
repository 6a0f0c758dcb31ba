// The draft budget: how many drafts each sequence gets in the next step, zero included.
//
// A draft pays if the tokens it is expected to yield are worth the time that its row adds to the step. Both are
// measured while the engine runs: the time of a step by its number of rows, the time of a draft, and per sequence how
// often drafts are accepted. The plan maximises goodput, expected tokens per second, over the number of drafts (Liu et
// al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", arXiv:2406.14066).
// Measurements change how many drafts are made and never which tokens come out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "drafting/drafter.h"
#include "drafting/step_cost.h"

namespace draftwerk {

/// Drafts that were verified (all before them accepted) and how many of these were accepted, old ones fading.
struct AcceptanceCounts {
  float verified = 0.0F;
  float accepted = 0.0F;
};

/// The first draft of a step and the later ones are counted apart: a lookup that got one token right is likely to go
/// on so, a model that drafts from its own drafts gets worse.
inline constexpr int kDraftDepths = 2;
using AcceptanceTable = std::array<std::array<AcceptanceCounts, kDraftDepths>, kConfidenceClasses>;

/// The latest drafts in a row that all were accepted, or all were not.
struct AcceptanceRun {
  bool accepted = false;
  int length = 0;
  float chance = 1.0F;  ///< of such a run, by what was estimated before each of its drafts
};

/// What the budget knows of one sequence. Belongs to the sequence; a new sequence starts with a fresh one.
struct SequenceAcceptance {
  AcceptanceTable counts{};
  std::array<std::array<AcceptanceRun, kDraftDepths>, kConfidenceClasses> runs{};
  int steps_without_draft = 0;  ///< steps in a row in which it could have drafted and was granted nothing
  int probe_interval = 0;  ///< such steps before a draft is tried all the same; 0 at first and once one is accepted
};

/// One decoding sequence in DraftBudget::plan().
struct DraftCandidate {
  SequenceAcceptance* acceptance = nullptr;
  std::array<DraftOutlook, kMaxDrafters> outlooks{};  ///< by drafter; 0 available: nothing from that one
  int limit = 0;                                      ///< most drafts allowed for it
  int drafter = 0;                                    ///< out: whose drafts are granted
  int granted = 0;                                    ///< out: 0 .. min(limit, outlooks[drafter].available)
};

/// Used from the engine thread alone. Throws nothing but std::bad_alloc, and allocates only when plan() sees more
/// candidates or drafts than ever before.
///
/// What it does not know it finds out at a bounded price: a plan other than the best known one (a number of rows that
/// may pay, a step without drafts to measure it again, a draft for a sequence whose drafts used to fail) is tried
/// when what it is expected to lose fits in an allowance that grows by one hundredth of the time of every step.
///
/// Per step: plan(); then, in any order, observe_drafting() if something was drafted, observe_acceptance() for every
/// sequence that drafted, observe_step() if the step had no prefill rows.
class DraftBudget {
 public:
  /// Sets `granted` of every candidate. `candidates` are all the sequences that decode in this step, one row each
  /// beside their drafts, also those that cannot draft (limit or available 0). `prefill_rows` are the other rows of
  /// the step. The step's rows stay within `max_rows` as far as that is up to the drafts.
  void plan(std::span<DraftCandidate> candidates, int prefill_rows, int max_rows);

  /// Sets `drafter` of every candidate alone, for a fixed number of drafts: the one whose drafts are likelier accepted.
  void choose_drafters(std::span<DraftCandidate> candidates) const;

  /// A sequence drafted `drafted` tokens of class `confidence`, of which the first `accepted` were accepted.
  void observe_acceptance(SequenceAcceptance& acceptance, int confidence, int drafted, int accepted);
  /// A step of `rows` rows, none of them prefill, took `seconds` (the target's pass and verification).
  void observe_step(int rows, double seconds);
  /// Proposing `drafts` tokens in all took this drafter `seconds`.
  void observe_drafting(int drafter, int drafts, double seconds);

  /// Estimated seconds of a step with `rows` rows; before any observation, in units of a step with one row.
  [[nodiscard]] double step_cost(int rows) const;
  /// Estimated seconds for this drafter to propose one draft.
  [[nodiscard]] double draft_cost(int drafter) const;
  /// Estimated probability that a draft of the sequence is accepted; `depth` 0 is the first one of a step, given for
  /// the others that those before it were accepted.
  [[nodiscard]] double acceptance(const SequenceAcceptance& sequence, int confidence, int depth) const;

 private:
  /// A sequence's next draft in rank_drafts().
  struct Head {
    double reach = 0.0;  ///< probability that this draft is reached and accepted
    int candidate = 0;
    int depth = 0;
  };
  /// The last plan, if it was not the best known one.
  struct Trial {
    bool active = false;
    int rows = 0;
    double drafting = 0.0;  ///< seconds expected of the drafters
    double tokens = 0.0;    ///< expected
    double rate = 0.0;      ///< tokens per second of the best known plan
  };

  void rank_drafts(std::span<DraftCandidate> candidates, int most);
  void grant(std::span<DraftCandidate> candidates, int drafts) const;
  [[nodiscard]] double rate(int sequences, int drafts) const;
  [[nodiscard]] int best_known(int sequences) const;
  [[nodiscard]] int best_beside_prefill(int sequences, int prefill_rows) const;
  [[nodiscard]] int trial(int sequences, int best) const;
  void probe(std::span<DraftCandidate> candidates, int max_rows);

  StepCostTable step_costs_;
  std::array<RecentMedian, kMaxDrafters> draft_costs_;
  AcceptanceTable shared_{};  ///< over all sequences
  double allowance_ = 0.0;    ///< seconds that trials may lose
  std::int64_t steps_ = 0;
  std::int64_t last_trial_ = 0;
  Trial pending_;
  std::size_t probe_cursor_ = 0;
  // Scratch of plan().
  std::vector<Head> heads_;
  std::vector<int> ranked_;       ///< candidates by the gain of their next draft, descending
  std::vector<double> expected_;  ///< tokens of a step with the first g of ranked_, g = 0 .. ranked_.size()
  std::vector<double> drafting_;  ///< seconds that these drafts take
};

}  // namespace draftwerk
