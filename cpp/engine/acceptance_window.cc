#include "engine/acceptance_window.h"

#include <algorithm>
#include <cstddef>

namespace draftwerk {
namespace {

void add_round(RecentDrafts& counts, int drafted, int accepted) {
  ++counts.rounds;
  count_by_position(counts.drafted_by_position, drafted);
  count_by_position(counts.accepted_by_position, accepted);
  counts.accepted_by_position.resize(counts.drafted_by_position.size());
}

}  // namespace

void count_by_position(std::vector<std::int64_t>& counts, int positions) {
  counts.resize(std::max(counts.size(), static_cast<std::size_t>(positions)));
  for (int i = 0; i < positions; ++i) ++counts[static_cast<std::size_t>(i)];
}

void AcceptanceWindow::observe(int drafted, int accepted) {
  add_round(current_, drafted, accepted);
  add_round(recent_, drafted, accepted);
  if (current_.rounds < block_rounds_) return;
  recent_ = current_;  // the block before is forgotten; this one takes its place, and keeps its memory
  current_.rounds = 0;
  current_.drafted_by_position.clear();
  current_.accepted_by_position.clear();
}

}  // namespace draftwerk
