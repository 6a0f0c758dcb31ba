// How the drafts of one drafter fared lately: totals since the start cannot show that something has changed.
#pragma once

#include <cstdint>
#include <vector>

namespace draftwerk {

/// Adds one to the first `positions` counts, of which there are as many afterwards at least.
void count_by_position(std::vector<std::int64_t>& counts, int positions);

/// Counts over the last rounds of one drafter. A round is what it drafted for one sequence in one step, be it to be
/// verified or to be compared with the token that came out of the step without it.
struct RecentDrafts {
  std::int64_t rounds = 0;
  std::vector<std::int64_t> drafted_by_position;  ///< see RequestStatistics; as long as the longest draft of them
  std::vector<std::int64_t> accepted_by_position;
};

/// A window over rounds that moves on by whole blocks: it covers all rounds of the current block and of the one before,
/// after the first two blocks between `block_rounds` and 2 * `block_rounds` - 1. So it needs no record of single
/// rounds. Of rounds rather than of seconds, so that there are enough to judge by, however rarely a drafter is asked.
class AcceptanceWindow {
 public:
  /// Rounds per block. The share of accepted first drafts is then known to within 7 percentage points (three standard
  /// errors, at worst), and a change has left the window after 1,023 rounds.
  static constexpr std::int64_t kBlockRounds = 512;

  explicit AcceptanceWindow(std::int64_t block_rounds = kBlockRounds) : block_rounds_(block_rounds) {}

  /// Adds a round that drafted `drafted` >= 1 tokens ahead, of which `accepted` were accepted. Allocates only when one
  /// drafts further ahead than ever before.
  void observe(int drafted, int accepted);

  [[nodiscard]] const RecentDrafts& recent() const { return recent_; }

 private:
  std::int64_t block_rounds_;
  RecentDrafts current_;  ///< of the current block
  RecentDrafts recent_;   ///< of that and of the block before
};

}  // namespace draftwerk
