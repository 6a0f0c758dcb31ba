#include "drafting/draft_cost.h"

#include <gtest/gtest.h>

namespace draftwerk {
namespace {

constexpr double kPass = 0.0004;
constexpr double kRow = 0.00005;

double round_of(int passes, int drafts) { return kPass * passes + kRow * drafts; }

TEST(DraftCost, IsNothingBeforeAnyRoundAndForNone) {
  DraftCost cost;
  EXPECT_EQ(cost.seconds(3, 5), 0.0);
  cost.observe(1, 1, 0.001);
  EXPECT_EQ(cost.seconds(0, 0), 0.0);
  EXPECT_EQ(cost.seconds(1, 1), 0.001);
}

TEST(DraftCost, IsThatOfPassesOfTheMeanNumberOfRows) {
  DraftCost cost;
  for (int i = 0; i < 5; ++i) {
    for (int rows = 1; rows <= 16; ++rows) cost.observe(4, 4 * rows, round_of(4, 4 * rows));
  }
  // Exact for passes that cost so much and so much more per row, also where they are not all of as many rows.
  for (const int passes : {1, 3, 8}) {
    for (int drafts = passes; drafts <= 16 * passes; ++drafts) {
      EXPECT_NEAR(cost.seconds(passes, drafts), round_of(passes, drafts), 1e-9) << passes << " " << drafts;
    }
  }
}

TEST(DraftCost, LearnsFromRoundsOfUnevenPasses) {
  // Sixteen sequences, a few of which go on to the fourth draft: 16, 12, 5 and 2 rows.
  DraftCost cost;
  for (int i = 0; i < 5; ++i) cost.observe(4, 35, round_of(4, 35));
  EXPECT_NEAR(cost.seconds(4, 35), round_of(4, 35), 0.03 * round_of(4, 35));
}

TEST(DraftCost, TakesMoreRowsThanItHasMetToBeFree) {
  DraftCost cost;
  for (int i = 0; i < 5; ++i) cost.observe(2, 4, round_of(2, 4));
  EXPECT_NEAR(cost.seconds(2, 60), round_of(2, 4), 1e-12);
  cost.observe(2, 60, round_of(2, 60));
  EXPECT_NEAR(cost.seconds(2, 60), round_of(2, 60), 1e-12) << "until it meets them";
}

}  // namespace
}  // namespace draftwerk
