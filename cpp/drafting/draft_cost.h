// What proposing drafts costs, learned while the engine runs.
#pragma once

#include "drafting/step_cost.h"

namespace draftwerk {

/// Seconds of one drafter's round. A drafter works in passes: pass d proposes the draft at depth d of every sequence
/// that wants one so deep, so k drafts for each of n sequences are k passes of n rows. Of a pass the table of step
/// costs learns the time by its number of rows; a round counts as passes of its mean number of rows, which is exact
/// where a pass costs so much and so much more per row. The first pass of a round is another matter than those behind
/// it: the target's pass has left little of the drafter's weights in the caches. A drafter that does not work in
/// passes, like lookup, shows a cost that grows with the rows of a pass.
class DraftCost {
 public:
  /// `drafts` >= `passes` >= 1 drafts in so many passes took `seconds`.
  void observe(int passes, int drafts, double seconds);
  /// Estimated seconds of a round; 0 for none, and before any observation.
  [[nodiscard]] double seconds(int passes, int drafts) const;

 private:
  StepCostTable first_;
  StepCostTable later_;
  bool apart_ = false;  ///< rounds of a single pass have shown what the first one costs
};

}  // namespace draftwerk
