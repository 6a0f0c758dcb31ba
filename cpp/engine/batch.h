// One step laid out as rows: known tokens and drafts of every planned sequence, one after the other.
#pragma once

#include <span>
#include <vector>

#include "backend/backend.h"
#include "engine/scheduler.h"

namespace draftwerk {

/// Drafts of one sequence.
struct ProposedDrafts {
  std::span<const TokenId> tokens;
  /// Of each, as in VerifyGroup; empty for a chain. Drafts that form a tree follow a single known token.
  std::span<const std::int32_t> parents;
  /// DraftJob::proposed: where the device is still choosing them; -1: they are known.
  int proposed = -1;
};

class StepBatch {
 public:
  /// Lays out `plan`; drafts[i] follow the last known token of plan.sequences[i] (empty where it does not decide), as a
  /// tree or a chain.
  /// What the other functions return refers to this object, the plan's sequences and the drafts, until the next call.
  void assemble(const StepPlan& plan, std::span<const ProposedDrafts> drafts);

  [[nodiscard]] StepRows rows() const { return {tokens_, positions_, segments_, output_rows_, growths_}; }
  [[nodiscard]] std::span<const VerifyGroup> groups() const { return groups_; }
  /// Index in the plan of each group's sequence.
  [[nodiscard]] std::span<const std::size_t> group_sequences() const { return group_sequences_; }

 private:
  std::vector<TokenId> tokens_;
  std::vector<std::int64_t> positions_;
  std::vector<Segment> segments_;
  std::vector<int> output_rows_;
  std::vector<Growth> growths_;
  std::vector<VerifyGroup> groups_;
  std::vector<std::size_t> group_sequences_;
};

}  // namespace draftwerk
