#include "drafting/draft_cost.h"

#include <algorithm>

namespace draftwerk {

void DraftCost::observe(int passes, int drafts, double seconds) {
  pass_costs_.observe((drafts + passes / 2) / passes, seconds / passes);
}

double DraftCost::seconds(int passes, int drafts) const {
  if (passes == 0 || pass_costs_.largest() == 0) return 0.0;
  if (drafts >= passes * pass_costs_.largest()) return passes * pass_costs_.cost(pass_costs_.largest());
  const int rows = drafts / passes;
  const double below = pass_costs_.cost(rows);
  const double part = static_cast<double>(drafts % passes) / passes;
  return passes * (part == 0.0 ? below : below + part * (pass_costs_.cost(rows + 1) - below));
}

}  // namespace draftwerk
