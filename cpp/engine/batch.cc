#include "engine/batch.h"

#include <algorithm>

namespace draftwerk {

void StepBatch::assemble(const StepPlan& plan, std::span<const ProposedDrafts> drafts) {
  tokens_.clear();
  positions_.clear();
  segments_.clear();
  output_rows_.clear();
  growths_.clear();
  groups_.clear();
  group_sequences_.clear();
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const PlannedSequence& planned = plan.sequences[i];
    const Sequence& sequence = *planned.sequence;
    const int first_row = static_cast<int>(tokens_.size());
    const auto known =
        std::span(sequence.tokens)
            .subspan(static_cast<std::size_t>(sequence.computed), static_cast<std::size_t>(planned.rows));
    tokens_.insert(tokens_.end(), known.begin(), known.end());
    tokens_.insert(tokens_.end(), drafts[i].tokens.begin(), drafts[i].tokens.end());
    const int rows = static_cast<int>(tokens_.size()) - first_row;
    const std::size_t first_draft = positions_.size() + known.size();
    for (int r = 0; r < rows; ++r) positions_.push_back(sequence.computed + r);
    const std::span<const std::int32_t> parents = drafts[i].parents;
    for (std::size_t d = 0; d < parents.size(); ++d) {
      const std::int64_t parent = static_cast<std::int64_t>(first_draft) + parents[d];
      positions_[first_draft + d] = positions_[static_cast<std::size_t>(parent)] + 1;
    }
    if (drafts[i].proposed >= 0) growths_.push_back({static_cast<int>(segments_.size()), drafts[i].proposed});
    segments_.push_back({first_row, rows, sequence.computed, {sequence.kv.table(0), sequence.kv.table(1)}, parents});
    if (!planned.decides) continue;

    const auto draft_count = static_cast<int>(drafts[i].tokens.size());
    VerifyGroup group;
    group.first_output = static_cast<int>(output_rows_.size());
    group.drafts = drafts[i].tokens;
    group.parents = parents;
    group.position = sequence.length();
    group.sampling = &sequence.request.sampling;
    group.history = sequence.request.sampling.needs_history() ? &sequence.history : nullptr;
    group.banned = sequence.banned;
    group.banned_tokens = static_cast<int>(
        std::clamp<std::int64_t>(sequence.request.min_tokens - sequence.generated(), 0, draft_count + 1));
    groups_.push_back(group);
    group_sequences_.push_back(i);
    for (int r = rows - draft_count - 1; r < rows; ++r) output_rows_.push_back(first_row + r);
  }
}

}  // namespace draftwerk
