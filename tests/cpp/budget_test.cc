// What the draft budget does step by step, and how it follows changes. What that is worth: budget_goodput_test.cc.
#include "drafting/budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "budget_simulation.h"

namespace draftwerk {
namespace {

constexpr int kLimit = 8;

BudgetSimulation simulate(int sequences, std::function<double(int)> seconds,
                          std::function<double(int step, int sequence)> acceptance, unsigned seed) {
  return {sequences, kLimit, std::move(seconds), {steady_drafter(kLimit, 4, std::move(acceptance))}, seed};
}

std::function<double(int)> sloped(double slope) {
  return [slope](int rows) { return 0.01 * (1.0 + slope * (rows - 1)); };
}

TEST(DraftBudget, ServesEachSequenceByItsOwnAcceptance) {
  // Every second sequence repeats itself; drafts for the others cost rows and yield nothing.
  const auto acceptance = [](int, int sequence) { return sequence % 2 == 0 ? 0.9 : 0.0; };
  BudgetSimulation simulation = simulate(8, sloped(0.05), acceptance, 2);
  simulation.run(300);
  EXPECT_GE(simulation.run(300).of_best(), 1.1);
}

TEST(DraftBudget, FollowsAcceptanceThatRises) {
  for (const int sequences : {1, 4, 16}) {
    const auto acceptance = [](int step, int) { return step < 500 ? 0.0 : 0.9; };
    BudgetSimulation simulation = simulate(sequences, sloped(0.03), acceptance, 3);
    EXPECT_GE(simulation.run(500).of_none(), 0.99) << sequences;
    simulation.run(60);
    EXPECT_GE(simulation.run(40).of_best(), 0.9) << sequences;
  }
}

TEST(DraftBudget, FollowsAcceptanceThatFalls) {
  for (const int sequences : {1, 4, 16}) {
    const auto acceptance = [](int step, int) { return step < 500 ? 0.9 : 0.0; };
    BudgetSimulation simulation = simulate(sequences, sloped(0.03), acceptance, 4);
    simulation.run(500);
    simulation.run(40);
    EXPECT_GE(simulation.run(40).of_none(), 0.97) << sequences;
  }
}

TEST(DraftBudget, FollowsCostsThatChange) {
  // Halfway the machine gets busy and rows stop being free.
  double slope = 0.02;
  BudgetSimulation simulation =
      simulate(4, [&](int rows) { return 0.01 * (1.0 + slope * (rows - 1)); }, [](int, int) { return 0.7; }, 5);
  simulation.run(400);
  slope = 1.0;
  simulation.run(200);
  EXPECT_GE(simulation.run(200).of_best(), 0.95);
  slope = 0.02;
  simulation.run(800);
  EXPECT_GE(simulation.run(200).of_best(), 0.95);
}

TEST(DraftBudget, SurvivesStepsThatTakeFiftyTimesAsLong) {
  for (const double p : {0.0, 0.6, 0.9}) {
    BudgetSimulation simulation = simulate(3, sloped(0.05), [p](int, int) { return p; }, 6);
    simulation.outlier_share = 0.02;
    simulation.run(400);
    EXPECT_GE(simulation.run(400).of_best(), 0.95) << p;
  }
}

TEST(DraftBudget, CountsWhatDraftingCosts) {
  // A drafter as slow as the target never pays at this acceptance, one ten times as fast does.
  for (const double draft_seconds : {0.01, 0.001}) {
    SimulatedDrafter drafter = steady_drafter(kLimit, 4, [](int, int) { return 0.7; });
    drafter.row_seconds = draft_seconds;
    BudgetSimulation simulation(1, kLimit, sloped(0.0), {drafter}, 7);
    simulation.run(300);
    EXPECT_GE(simulation.run(300).of_best(), 0.95) << draft_seconds;
    EXPECT_NEAR(simulation.budget.draft_cost(0), draft_seconds, 0.05 * draft_seconds);
  }
}

TEST(DraftBudget, AFirstRoundThatWasDisturbedDoesNotEndDrafting) {
  for (const int sequences : {1, 16}) {
    SimulatedDrafter drafter = steady_drafter(kLimit, 4, [](int, int) { return 0.8; });
    drafter.row_seconds = 0.0002;
    BudgetSimulation simulation(sequences, kLimit, sloped(0.03), {drafter}, 8);
    simulation.run(1);  // without drafts, as it is the first
    simulation.budget.observe_drafting(0, 1, 1, 1.0);
    simulation.run(300);
    EXPECT_GE(simulation.run(300).of_best(), 0.95) << sequences;
  }
}

TEST(DraftBudget, ADrafterThatSeemedTooDearIsAskedAgainOneDay) {
  SimulatedDrafter drafter = steady_drafter(kLimit, 4, [](int, int) { return 0.8; });
  drafter.row_seconds = 0.0002;
  BudgetSimulation simulation(1, kLimit, sloped(0.03), {drafter}, 9);
  simulation.run(1);
  for (int round = 0; round < 2; ++round) simulation.budget.observe_drafting(0, 1, 1, 0.1);
  simulation.run(50'000);
  EXPECT_GE(simulation.run(300).of_best(), 0.95);
}

TEST(DraftBudget, TracksTheCostOfEachDrafter) {
  DraftBudget budget;
  EXPECT_EQ(budget.draft_cost(0), 0.0);
  for (int i = 0; i < 5; ++i) {
    budget.observe_drafting(0, 0, 1, 0.001);
    budget.observe_drafting(1, 0, 1, 0.004);
  }
  EXPECT_DOUBLE_EQ(budget.draft_cost(0), 0.001);
  EXPECT_DOUBLE_EQ(budget.draft_cost(1), 0.004);
}

/// Sequences whose drafts of class 4 are always accepted, and of a budget that knows what steps cost.
class TrainedBudget : public testing::Test {
 protected:
  void train(const std::function<double(int)>& seconds) {
    for (int i = 0; i < 100; ++i) {
      for (int rows = 64; rows > 0; --rows) budget_.observe_step(rows, seconds(rows));
      budget_.observe_acceptance(sequence_, 4, 8, first_drafts(8));
    }
  }
  /// A step of one sequence.
  DraftCandidate plan(DraftOutlook first, DraftOutlook second, int limit = 8) {
    DraftCandidate candidate{&sequence_, {{first, second}}, limit};
    budget_.plan(std::span(&candidate, 1), 0, 64);
    return candidate;
  }

  DraftBudget budget_;
  SequenceAcceptance sequence_;
};

TEST_F(TrainedBudget, TakesTheDrafterThatPaysBest) {
  train(sloped(0.02));
  for (int i = 0; i < 30; ++i) {
    budget_.observe_acceptance(sequence_, kModelConfidence, 8, first_drafts(i % 2));
    budget_.observe_drafting(1, 0, 1, 0.0004);
  }
  // Surely accepted and free against every second time and not free.
  EXPECT_EQ(plan({8, 4}, {8, kModelConfidence}).drafter, 0);
  EXPECT_EQ(plan({8, 4}, {8, kModelConfidence}).granted, 8);
  // Where lookup's match is a poor one, the model's drafts are worth their time.
  for (int i = 0; i < 30; ++i) budget_.observe_acceptance(sequence_, 0, 8, first_drafts(0));
  const DraftCandidate poor = plan({8, 0}, {8, kModelConfidence});
  EXPECT_EQ(poor.drafter, 1);
  EXPECT_GT(poor.granted, 0);
  // And where they would take as long as a step, they are not.
  for (int i = 0; i < 30; ++i) budget_.observe_drafting(1, 0, 1, 0.01);
  EXPECT_EQ(plan({0, 0}, {8, kModelConfidence}).granted, 0);
  EXPECT_EQ(plan({8, 4}, {8, kModelConfidence}).granted, 8);
}

// What all plans are compared with is measured the oftener, the less drafts seem to gain.
TEST_F(TrainedBudget, MeasuresStepsWithoutDrafts) {
  const auto steps_without = [&](double slope) {
    budget_ = {};
    train(sloped(slope));
    int without = 0;
    for (int step = 0; step < 1000; ++step) {
      const int granted = plan({8, 4}, {}).granted;
      without += granted == 0 ? 1 : 0;
      budget_.observe_step(1 + granted, sloped(slope)(1 + granted));
    }
    return without;
  };
  // Nine tokens in steps of 1.16 and of 8.2 times the time of one row.
  const int of_much = steps_without(0.02);
  EXPECT_GE(of_much, 2);
  EXPECT_LE(of_much, 6);
  const int of_little = steps_without(0.9);
  EXPECT_GE(of_little, 15);
  EXPECT_LE(of_little, 60);
}

TEST_F(TrainedBudget, ComparesADrafterThatIsNotUsed) {
  train(sloped(0.02));
  const DraftCandidate both = plan({8, 4}, {8, kModelConfidence});
  EXPECT_EQ(both.drafter, 0);
  EXPECT_EQ(both.compared_drafter, 1) << "as it costs nothing";
  EXPECT_EQ(plan({8, 4}, {0, kModelConfidence}).compared_drafter, -1) << "it has nothing to offer";
  // A sequence that gets no drafts compares its drafters in turn.
  for (int i = 0; i < 60; ++i) {
    budget_.observe_acceptance(sequence_, 0, 8, first_drafts(0));
    budget_.observe_acceptance(sequence_, kModelConfidence, 8, first_drafts(0));
  }
  const DraftCandidate idle = plan({8, 0}, {8, kModelConfidence});
  EXPECT_EQ(idle.granted, 0);
  EXPECT_GE(idle.compared_drafter, 0);
  EXPECT_EQ(plan({8, 0}, {8, kModelConfidence}).compared_drafter, 1 - idle.compared_drafter);
}

TEST_F(TrainedBudget, ComparesNoOftenerThanItCanAfford) {
  train(sloped(0.02));
  for (int i = 0; i < 60; ++i) {
    budget_.observe_acceptance(sequence_, kModelConfidence, 1, first_drafts(0));
    budget_.observe_drafting(1, 0, 1, 0.001);
  }
  // Leaves what is there at first aside.
  for (int step = 0; step < 500; ++step) {
    plan({}, {8, kModelConfidence});
    budget_.observe_step(1, 0.01);
  }
  int compared = 0;
  for (int step = 0; step < 1000; ++step) {
    const DraftCandidate candidate = plan({}, {8, kModelConfidence});
    EXPECT_EQ(candidate.granted, 0);
    if (candidate.compared_drafter == 1) ++compared;
    budget_.observe_step(1, 0.01);
  }
  // A draft takes a tenth of a step: what is set aside, 0.4% and 0.3% of the time, pays for one in 14 steps.
  EXPECT_GE(compared, 35);
  EXPECT_LE(compared, 75);
}

TEST_F(TrainedBudget, ProbesDeeperWhereDraftsPayTogetherOrNotAtAll) {
  // A second row doubles the step and seven more cost nothing: first drafts that are accepted do not pay alone.
  train([](int rows) { return rows == 1 ? 0.01 : 0.02; });
  for (int i = 0; i < 300; ++i) budget_.observe_acceptance(sequence_, 6, 1, first_drafts(i % 10 < 7 ? 1 : 0));
  for (int i = 0; i < 4; ++i) budget_.observe_acceptance(sequence_, 6, 2, first_drafts(1));
  EXPECT_LT(budget_.acceptance(sequence_, 6, 1), 0.4) << "bad luck with the later ones";
  int probes = 0;
  for (int step = 0; step < 200; ++step) {
    const DraftCandidate candidate = plan({8, 6}, {});
    if (candidate.granted > 1) {
      ++probes;
      budget_.observe_acceptance(sequence_, 6, candidate.granted, first_drafts(candidate.granted));
    }
    budget_.observe_step(1 + candidate.granted, candidate.granted > 0 ? 0.02 : 0.01);
  }
  EXPECT_GT(probes, 100) << "that luck was found out, and drafting pays";
}

TEST(DraftBudget, KeepsEveryLimit) {
  std::mt19937 random(8);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  DraftBudget budget;
  std::vector<SequenceAcceptance> sequences(20);
  for (int step = 0; step < 3000; ++step) {
    std::vector<DraftCandidate> candidates;
    const int count = below(21);
    for (int i = 0; i < count; ++i) {
      DraftCandidate candidate{&sequences[static_cast<std::size_t>(i)],
                               {{{below(10), below(8)}, {below(3) * below(10), kModelConfidence}}},
                               below(10) - 1};
      candidate.drafter = candidate.granted = candidate.compared_drafter = 77;
      candidates.push_back(candidate);
    }
    const int prefill_rows = below(2) * below(100);
    const int max_rows = below(150);
    budget.plan(candidates, prefill_rows, max_rows);
    int drafts = 0;
    std::vector<int> by_drafter(kMaxDrafters, 0);
    for (const DraftCandidate& candidate : candidates) {
      ASSERT_GE(candidate.drafter, 0);
      ASSERT_LT(candidate.drafter, kMaxDrafters);
      const DraftOutlook& outlook = candidate.outlooks[candidate.drafter];
      ASSERT_GE(candidate.granted, 0);
      ASSERT_LE(candidate.granted, std::max(std::min(candidate.limit, outlook.available), 0));
      drafts += candidate.granted;
      by_drafter[candidate.drafter] += candidate.granted;
      if (candidate.granted > 0) {
        budget.observe_acceptance(*candidate.acceptance, outlook.confidence, candidate.granted,
                                  first_drafts(below(candidate.granted + 1)));
      }
      if (candidate.compared_drafter == -1) continue;
      ASSERT_GE(candidate.compared_drafter, 0);
      ASSERT_LT(candidate.compared_drafter, kMaxDrafters);
      ASSERT_TRUE(candidate.granted == 0 || candidate.compared_drafter != candidate.drafter);
      const DraftOutlook& compared = candidate.outlooks[candidate.compared_drafter];
      ASSERT_GE(std::min(candidate.limit, compared.available), 1);
      by_drafter[candidate.compared_drafter] += 1;
      budget.observe_acceptance(*candidate.acceptance, compared.confidence, 1, first_drafts(below(2)));
    }
    ASSERT_TRUE(drafts == 0 || prefill_rows + count + drafts <= max_rows);
    for (int d = 0; d < kMaxDrafters; ++d) budget.observe_drafting(d, 0, by_drafter[d], 1e-5 * by_drafter[d]);
    if (prefill_rows == 0) budget.observe_step(count + drafts, 0.01);
  }
}

TEST(DraftBudget, GrantsNothingBeforeAStepWithoutDraftsWasMeasured) {
  DraftBudget budget;
  SequenceAcceptance sequence;
  DraftCandidate candidate{&sequence, {{{8, 7}}}, 8};
  budget.plan(std::span(&candidate, 1), 0, 64);
  EXPECT_EQ(candidate.granted, 0);
  budget.plan(std::span(&candidate, 1), 32, 64);
  EXPECT_EQ(candidate.granted, 0);
  budget.observe_step(1, 0.01);
  budget.plan(std::span(&candidate, 1), 0, 64);
  EXPECT_GT(candidate.granted, 0);
}

TEST_F(TrainedBudget, BesidePrefillADraftIsWorthTheDecodeStepItSaves) {
  DraftCandidate candidate{&sequence_, {{{8, 4}}}, 8};
  train(sloped(0.02));
  budget_.plan(std::span(&candidate, 1), 40, 4096);
  EXPECT_EQ(candidate.granted, 8);
}

TEST_F(TrainedBudget, BesidePrefillADraftThatSavesWhatItCostsIsNone) {
  DraftCandidate candidate{&sequence_, {{{8, 4}}}, 8};
  train(sloped(1.0));
  budget_.plan(std::span(&candidate, 1), 40, 4096);
  EXPECT_EQ(candidate.granted, 0);
}

TEST_F(TrainedBudget, IgnoresMeasurementsThatCannotBe) {
  train(sloped(0.02));
  const double cost = budget_.step_cost(4);
  for (const double seconds : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    for (int i = 0; i < 20; ++i) budget_.observe_step(4, seconds);
    budget_.observe_drafting(0, 0, 1, seconds == 0.0 ? -1.0 : seconds);
  }
  budget_.observe_step(0, 1.0);
  budget_.observe_drafting(0, 0, 0, 1.0);
  EXPECT_EQ(budget_.step_cost(4), cost);
  EXPECT_EQ(budget_.draft_cost(0), 0.0);
}

TEST(DraftBudget, GivesUpADrafterThatFindsNothingWorthARow) {
  DraftBudget budget;
  SequenceAcceptance sequence;
  int rounds = 0;
  for (int step = 0; step < 400; ++step) {
    DraftCandidate candidate{&sequence, {{{8, kTreeConfidence}}}, 8};
    budget.plan(std::span(&candidate, 1), 0, 64);
    // It is so unsure that nothing pays for its row, but its pass takes its time all the same. What has no price is
    // verified, and rejected.
    const int drafted = candidate.row_prices.empty() ? candidate.granted : 0;
    if (candidate.granted > 0) {
      budget.observe_drafting(0, 1, 1, 0.001);
      budget.observe_acceptance(sequence, kTreeConfidence, std::max(drafted, candidate.planned), {});
      if (step >= 200) ++rounds;
    }
    budget.observe_step(1 + drafted, 0.01 + 0.0003 * drafted);
  }
  EXPECT_LT(rounds, 10);
}

}  // namespace
}  // namespace draftwerk
