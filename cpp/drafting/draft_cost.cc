#include "drafting/draft_cost.h"

#include <algorithm>

namespace draftwerk {
namespace {

/// A later pass takes at least this share of the first one, whatever noise says.
constexpr double kLeastLater = 0.05;

/// Seconds of a pass of a mean number of rows; beyond what was measured as of the most rows that were.
double pass_seconds(const StepCostTable& table, double rows) {
  if (rows >= table.largest()) return table.cost(table.largest());
  const int below = static_cast<int>(rows);
  const double part = rows - below;
  return part == 0.0 ? table.cost(below) : table.cost(below) + part * (table.cost(below + 1) - table.cost(below));
}

}  // namespace

void DraftCost::observe(int passes, int drafts, double seconds) {
  const int rows = (drafts + passes / 2) / passes;
  if (passes == 1) {
    apart_ = true;
    first_.observe(rows, seconds);
    return;
  }
  if (!apart_) {
    first_.observe(rows, seconds / passes);
    later_.observe(rows, seconds / passes);
    return;
  }
  const double first = pass_seconds(first_, rows);
  later_.observe(rows, std::max((seconds - first) / (passes - 1), kLeastLater * first));
}

double DraftCost::seconds(int passes, int drafts) const {
  if (passes == 0 || first_.largest() == 0) return 0.0;
  const double rows = static_cast<double>(drafts) / passes;
  const double first = pass_seconds(first_, rows);
  return passes == 1 ? first : first + (passes - 1) * (later_.largest() == 0 ? first : pass_seconds(later_, rows));
}

}  // namespace draftwerk
