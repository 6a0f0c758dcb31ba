#include "drafting/step_cost.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

namespace draftwerk {
namespace {

TEST(RecentMedian, IsThatOfTheLatestFifteenSamples) {
  std::mt19937 random(4);
  for (int round = 0; round < 100; ++round) {
    RecentMedian median;
    std::vector<double> samples;
    for (unsigned i = 0; i < 1 + random() % 40; ++i) {
      samples.push_back(static_cast<double>(random() % 1000));
      median.add(samples.back());
      std::vector<double> latest(samples.end() - static_cast<std::ptrdiff_t>(std::min<std::size_t>(samples.size(), 15)),
                                 samples.end());
      std::sort(latest.begin(), latest.end());
      ASSERT_EQ(median.count(), static_cast<int>(latest.size()));
      ASSERT_EQ(median.value(), latest.size() < 3 ? latest.front() : latest[latest.size() / 2]);
    }
    median.clear();
    EXPECT_EQ(median.count(), 0);
    median.add(7.0);
    EXPECT_EQ(median.value(), 7.0);
  }
}

TEST(StepCostTable, BeforeAnyStepCountsInStepsOfOneRow) {
  const StepCostTable table;
  EXPECT_EQ(table.cost(1), 1.0);
  EXPECT_GT(table.cost(2), 1.0);
  EXPECT_LT(table.cost(8), 2.0);
  EXPECT_EQ(table.largest(), 0);
  EXPECT_FALSE(table.measured(1));
}

TEST(StepCostTable, KnowsWhatWasMeasuredAndWhen) {
  StepCostTable table;
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(table.reliable(5)) << i;
    table.observe(5, 0.01);
    EXPECT_TRUE(table.measured(5));
  }
  EXPECT_TRUE(table.reliable(5));
  EXPECT_FALSE(table.measured(6));
  EXPECT_EQ(table.age(5), 0);
  for (int i = 0; i < 512; ++i) table.observe(7, 0.01);
  EXPECT_EQ(table.age(5), 512);
  EXPECT_TRUE(table.reliable(5));
  table.observe(7, 0.01);
  EXPECT_FALSE(table.measured(5)) << "forgotten";
  EXPECT_FALSE(table.reliable(5));
  for (const double seconds : {0.0, -1.0, std::numeric_limits<double>::infinity()}) table.observe(9, seconds);
  EXPECT_FALSE(table.measured(9)) << "no time that a step can take";
}

TEST(StepCostTable, NeverFallsWithTheNumberOfRows) {
  std::mt19937 random(9);
  std::lognormal_distribution<double> noise(0.0, 0.5);
  for (int round = 0; round < 50; ++round) {
    StepCostTable table;
    for (int i = 0; i < 40; ++i) {
      const int rows = 1 << (random() % 12);
      table.observe(1 + static_cast<int>(random() % static_cast<unsigned>(rows)), noise(random));
      double before = 0.0;
      for (int r = 1; r < 12000; r += 1 + r / 16) {
        ASSERT_GE(table.cost(r), before * (1.0 - 1e-12)) << r;
        before = table.cost(r);
      }
    }
  }
}

TEST(StepCostTable, FindsTheCurveFromAFewOfItsPoints) {
  const auto curve = [](int rows) { return 0.004 + 0.0005 * rows; };
  StepCostTable table;
  for (int i = 0; i < 5; ++i) {
    for (const int rows : {1, 2, 4, 8, 9, 12, 16, 32, 48, 64, 100, 128, 250, 256, 512})
      table.observe(rows, curve(rows));
  }
  EXPECT_EQ(table.largest(), 512);
  for (int rows = 1; rows <= 512; ++rows) EXPECT_NEAR(table.cost(rows) / curve(rows), 1.0, 0.06) << rows;
  for (const int rows : {9, 32, 64, 128, 512}) EXPECT_NEAR(table.cost(rows) / curve(rows), 1.0, 1e-3) << rows;
}

TEST(StepCostTable, OneWildSampleHardlyMoves) {
  StepCostTable table;
  for (int i = 0; i < 5; ++i) {
    for (const int rows : {1, 4, 8}) table.observe(rows, 0.01 + 0.001 * rows + 1e-5 * i);
  }
  const double before = table.cost(4);
  table.observe(4, 0.7);
  EXPECT_NEAR(table.cost(4), before, 2e-5);
}

TEST(StepCostTable, ASlowSpellIsOneOfAllCounts) {
  StepCostTable table;
  for (int i = 0; i < 5; ++i) {
    for (const int rows : {1, 4, 8}) table.observe(rows, 0.01 + 0.001 * rows);
  }
  for (int i = 0; i < 60; ++i) table.observe(1, 1.4 * 0.011);
  EXPECT_NEAR(table.cost(1), 1.4 * 0.011, 1e-4);
  EXPECT_NEAR(table.cost(8), 1.4 * 0.018, 1e-3) << "though it was not measured in the spell";
  for (int i = 0; i < 60; ++i) table.observe(8, 0.018);
  EXPECT_NEAR(table.cost(1), 0.011, 1e-3) << "and it is over";
}

// What was measured in a slow spell and not since, while the machine got faster and other counts were met for the first
// time: one step puts it right once the next one shows that the pace is the same.
TEST(StepCostTable, AnOldMeasurementGivesWayToWhatContradictsIt) {
  StepCostTable table;
  for (int i = 0; i < 6; ++i) table.observe(16, 0.058);
  for (int i = 0; i < 20; ++i) table.observe(20, 0.054);
  EXPECT_GT(table.cost(16), 0.05);
  table.observe(16, 0.044);
  table.observe(20, table.cost(20));
  EXPECT_NEAR(table.cost(16), 0.044, 0.002);
  EXPECT_GT(table.cost(20), 0.05);
}

TEST(StepCostTable, AnOldMeasurementDoesNotGiveWayToADisturbance) {
  StepCostTable table;
  for (int i = 0; i < 6; ++i) {
    for (const int rows : {16, 20}) table.observe(rows, 0.0026 * rows);
  }
  for (int i = 0; i < 20; ++i) table.observe(20, 0.052);
  table.observe(16, 0.08);
  table.observe(20, 0.052);
  EXPECT_NEAR(table.cost(16), 0.0416, 0.001);
}

TEST(StepCostTable, ForgetsWhatIsLongPast) {
  // The machine was busy when it measured eight rows; that shall not keep it from trying them for ever.
  StepCostTable table;
  for (int i = 0; i < 5; ++i) table.observe(8, 0.1);
  for (int i = 0; i < 513; ++i) table.observe(2, 0.01);
  EXPECT_EQ(table.largest(), 2);
  EXPECT_LT(table.cost(8), 0.02);
  table.observe(8, 0.013);
  EXPECT_DOUBLE_EQ(table.cost(8), 0.013);
}

TEST(StepCostTable, DoubtsAFirstSampleFarFromWhatWasExpected) {
  StepCostTable table;
  for (int i = 0; i < 5; ++i) table.observe(4, 0.01);
  table.observe(6, 0.5);
  EXPECT_FALSE(table.measured(6));
  table.observe(6, 0.012);
  EXPECT_DOUBLE_EQ(table.cost(6), 0.012);
  // What comes twice is so.
  table.observe(8, 0.05);
  EXPECT_FALSE(table.measured(8));
  table.observe(8, 0.05);
  EXPECT_DOUBLE_EQ(table.cost(8), 0.05);
}

TEST(StepCostTable, KnowsHowWellItKnows) {
  std::mt19937 random(10);
  std::normal_distribution<double> noise(1.0, 0.05);
  StepCostTable table;
  for (int i = 0; i < 200; ++i) table.observe(1, 0.01 * noise(random));
  table.observe(4, 0.012);
  // A median of fifteen has 1.25 / sqrt(15) times the samples' standard deviation.
  EXPECT_NEAR(table.error(1), 0.05 * 0.32, 0.008);
  EXPECT_NEAR(table.error(4), 0.05 * 1.25, 0.03);
  EXPECT_EQ(table.error(2), table.error(4)) << "between the two, as the worse";
  EXPECT_EQ(table.error(9), table.error(4)) << "beyond, as the nearest";
  for (int i = 0; i < 400; ++i) table.observe(1, 0.01);
  EXPECT_LT(table.error(1), 1e-3) << "the machine is quiet now";
}

TEST(StepCostTable, FollowsALastingChange) {
  StepCostTable table;
  for (int i = 0; i < 100; ++i) table.observe(3, 0.01);
  for (int i = 0; i < 10; ++i) table.observe(3, 0.02);
  EXPECT_NEAR(table.cost(3), 0.02, 2e-4);
}

}  // namespace
}  // namespace draftwerk
