// The drafting side of the engine: which drafter proposes how much for which sequence in a step, and what is learned
// from what came of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "drafting/budget.h"
#include "drafting/drafter.h"
#include "engine/acceptance_window.h"
#include "engine/batch.h"
#include "engine/parked_kv.h"
#include "engine/scheduler.h"

namespace draftwerk {

/// How many drafts there were, and what became of them.
struct DraftCounts {
  std::int64_t drafted = 0;
  std::int64_t accepted = 0;
  std::vector<std::int64_t> drafted_by_position;  ///< see RequestStatistics
  std::vector<std::int64_t> accepted_by_position;
};

/// How the drafts of one drafter fared since the engine started, and lately.
struct DrafterStatistics : DraftCounts {
  std::string name;
  RecentDrafts recent;  ///< see AcceptanceWindow
};

struct DraftLimits {
  int draft_length = -1;      ///< see EngineOptions
  int max_draft_length = 16;  ///< likewise
  SchedulerLimits step;
};

/// Used from the engine thread alone, but for open(). Per step: propose(); once verification has begun, settle();
/// after it, observe_step() and, before the sequences grow, observe() for each that decided.
class DraftRounds {
 public:
  /// `parked` and `arena` are those of the sequences that will come. Throws std::invalid_argument: too many drafters.
  DraftRounds(std::vector<std::unique_ptr<Drafter>> drafters, const DraftLimits& limits, ParkedKv& parked,
              KvArena arena);

  /// What the drafters keep of a new sequence. Any thread, at any time.
  void open(Sequence& sequence);

  /// What is proposed for the sequences of a plan, by their index in it; the pages of the drafts are reserved. `step`
  /// is the number of this step: target states are those of the one before. Valid until the next call.
  std::span<const ProposedDrafts> propose(const StepPlan& plan, std::int64_t step);
  /// Hears of the drafts that the device has chosen while the step was on its way. Returns the seconds that it took for
  /// them, which are part of the step's.
  double settle();
  /// The target's pass and verification of a step without prefill rows took so long.
  void observe_step(int rows, double seconds) { budget_.observe_step(rows, seconds); }
  /// Learns from what became of the drafts of the sequence with this index in the plan.
  void observe(std::size_t index, Sequence& sequence, const VerifyResult& result);

  [[nodiscard]] const DraftCounts& totals() const { return totals_; }
  /// By drafter. Allocates only the first time, and when somebody drafts further ahead than ever before.
  void report(std::vector<DrafterStatistics>& statistics) const;

 private:
  /// What one drafter was asked in this step.
  struct Round {
    std::vector<DraftJob> jobs;
    std::vector<std::size_t> sequences;  ///< their indices in the plan
    int passes = 0;
    bool on_device = false;  ///< where the drafts are still being chosen
  };
  /// Where the drafts of a sequence come from.
  struct Origin {
    std::size_t drafter = 0;
    int confidence = 0;
    int ahead = 0;          ///< tokens from the last known one to the furthest draft
    int planned = 0;        ///< DraftCandidate::planned
    double promised = 0.0;  ///< how many were expected to be accepted, where the drafter says so
  };
  /// A draft that is made for comparison with what the target says.
  struct ComparedDraft {
    std::size_t drafter = 0;
    TokenId token = 0;
    int confidence = -1;  ///< -1: none
  };

  void grant(const StepPlan& plan);
  void propose_with(std::size_t drafter, const StepPlan& plan);
  void observe_round(std::size_t drafter, double seconds);
  [[nodiscard]] DraftContext context(const Sequence& sequence, std::size_t drafter) const;
  static void take(const DraftJob& job, ProposedDrafts& drafts, Origin& origin);
  static void measure_tree(const DraftJob& job, Origin& origin);

  const std::vector<std::unique_ptr<Drafter>> drafters_;
  const DraftLimits limits_;
  ParkedKv& parked_;
  const KvArena arena_;
  DraftBudget budget_;
  DraftCounts totals_;
  std::vector<DraftCounts> counts_;           // by drafter
  std::vector<AcceptanceWindow> acceptance_;  // likewise
  // Of the step.
  std::int64_t steps_ = 0;
  std::vector<DraftCandidate> candidates_;        // the sequences that decode
  std::vector<std::size_t> candidate_sequences_;  // their indices in the plan
  std::vector<Round> rounds_;                     // by drafter
  // Of the step, by index in the plan.
  std::vector<TokenId> tokens_;        // max_draft_length of each
  std::vector<std::int32_t> parents_;  // as many
  std::vector<ProposedDrafts> drafts_;
  std::vector<Origin> origins_;
  std::vector<ComparedDraft> compared_;
};

}  // namespace draftwerk
