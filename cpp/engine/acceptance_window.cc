#include "engine/acceptance_window.h"

#include <algorithm>
#include <cstddef>

namespace draftwerk {
namespace {

void add_round(RecentDrafts& counts, int drafted, int accepted) {
  ++counts.rounds;
  const auto positions = std::max(counts.drafted_by_position.size(), static_cast<std::size_t>(drafted));
  counts.drafted_by_position.resize(positions);
  counts.accepted_by_position.resize(positions);
  for (int i = 0; i < drafted; ++i) ++counts.drafted_by_position[static_cast<std::size_t>(i)];
  for (int i = 0; i < accepted; ++i) ++counts.accepted_by_position[static_cast<std::size_t>(i)];
}

}  // namespace

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
