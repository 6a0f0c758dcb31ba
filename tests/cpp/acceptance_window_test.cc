// The window over a drafter's last rounds, against a plain record of all rounds.
#include "engine/acceptance_window.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace draftwerk {
namespace {

using Counts = std::vector<std::int64_t>;

TEST(AcceptanceWindow, IsEmptyAtFirst) {
  const AcceptanceWindow window;
  EXPECT_EQ(window.recent().rounds, 0);
  EXPECT_TRUE(window.recent().drafted_by_position.empty());
  EXPECT_TRUE(window.recent().accepted_by_position.empty());
}

TEST(AcceptanceWindow, CountsByPosition) {
  AcceptanceWindow window;
  window.observe(3, 2);
  window.observe(1, 0);
  window.observe(2, 2);
  EXPECT_EQ(window.recent().rounds, 3);
  EXPECT_EQ(window.recent().drafted_by_position, (Counts{3, 2, 1}));
  EXPECT_EQ(window.recent().accepted_by_position, (Counts{2, 2, 0}));
}

TEST(AcceptanceWindow, ForgetsByBlocks) {
  AcceptanceWindow window(4);
  for (int round = 0; round < 4; ++round) window.observe(3, 3);
  EXPECT_EQ(window.recent().rounds, 4);
  for (int round = 0; round < 3; ++round) window.observe(1, 0);
  EXPECT_EQ(window.recent().rounds, 7);
  EXPECT_EQ(window.recent().accepted_by_position, (Counts{4, 4, 4}));
  window.observe(1, 0);  // the second block is full: the first one goes, and with it the positions that only it had
  EXPECT_EQ(window.recent().rounds, 4);
  EXPECT_EQ(window.recent().drafted_by_position, (Counts{4}));
  EXPECT_EQ(window.recent().accepted_by_position, (Counts{0}));
}

TEST(AcceptanceWindow, CoversTheLastOneOrTwoBlocksOfAnyRounds) {
  constexpr int kBlock = 16;
  AcceptanceWindow window(kBlock);
  std::mt19937 random(7);
  std::vector<std::pair<int, int>> rounds;
  for (int i = 1; i <= 20 * kBlock; ++i) {
    const int drafted = std::uniform_int_distribution<int>(1, 8)(random);
    rounds.emplace_back(drafted, std::uniform_int_distribution<int>(0, drafted)(random));
    window.observe(rounds.back().first, rounds.back().second);
    const int covered = i < kBlock ? i : kBlock + i % kBlock;
    Counts drafted_by_position(8);
    Counts accepted_by_position(8);
    int longest = 0;
    for (int r = i - covered; r < i; ++r) {
      longest = std::max(longest, rounds[r].first);
      for (int p = 0; p < rounds[r].first; ++p) ++drafted_by_position[p];
      for (int p = 0; p < rounds[r].second; ++p) ++accepted_by_position[p];
    }
    drafted_by_position.resize(longest);
    accepted_by_position.resize(longest);
    ASSERT_EQ(window.recent().rounds, covered) << "after " << i;
    ASSERT_EQ(window.recent().drafted_by_position, drafted_by_position) << "after " << i;
    ASSERT_EQ(window.recent().accepted_by_position, accepted_by_position) << "after " << i;
  }
}

// Growing again after a reset must not move the vectors: the engine observes in every step.
TEST(AcceptanceWindow, KeepsItsMemory) {
  AcceptanceWindow window(4);
  for (int round = 0; round < 12; ++round) window.observe(8, 8);
  const std::int64_t* const drafted = window.recent().drafted_by_position.data();
  const std::int64_t* const accepted = window.recent().accepted_by_position.data();
  for (int round = 0; round < 12; ++round) {
    window.observe(round % 2 == 0 ? 1 : 8, 0);
    EXPECT_EQ(window.recent().drafted_by_position.data(), drafted);
    EXPECT_EQ(window.recent().accepted_by_position.data(), accepted);
  }
}

}  // namespace
}  // namespace draftwerk
