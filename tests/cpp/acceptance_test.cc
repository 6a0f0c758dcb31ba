#include "drafting/acceptance.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "budget_simulation.h"

namespace draftwerk {
namespace {

/// Rolls the dice for `steps` steps of `drafts` drafts, each accepted with probability p.
void draft(AcceptanceModel& model, AcceptanceBeliefs& sequence, int confidence, int drafts, double p, int steps,
           std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  for (int step = 0; step < steps; ++step) {
    int accepted = 0;
    while (accepted < drafts && uniform(random) < p) ++accepted;
    model.observe(sequence, confidence, drafts, first_drafts(accepted));
  }
}

TEST(AcceptanceModel, LearnsByClassAndDepth) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  const double untouched = model.estimate(sequence, 2, 0);
  for (int i = 0; i < 100; ++i) model.observe(sequence, 5, 4, first_drafts(i % 2 == 0 ? 0 : 4));
  EXPECT_NEAR(model.estimate(sequence, 5, 0), 0.5, 0.05);
  EXPECT_GT(model.estimate(sequence, 5, 1), 0.97);
  EXPECT_EQ(model.estimate(sequence, 5, 1), model.estimate(sequence, 5, 7));
  EXPECT_EQ(model.estimate(sequence, 2, 0), untouched);
}

TEST(AcceptanceModel, ANewSequenceStartsFromWhatTheOthersShowed) {
  AcceptanceModel model;
  AcceptanceBeliefs first{};
  for (int i = 0; i < 100; ++i) model.observe(first, 5, 4, first_drafts(i % 2 == 0 ? 0 : 4));
  EXPECT_NEAR(model.estimate(AcceptanceBeliefs{}, 5, 0), 0.5, 0.05);
}

TEST(AcceptanceModel, AModelsDraftsStartAsIsPublishedOfThem) {
  const AcceptanceModel model;
  EXPECT_NEAR(model.estimate(AcceptanceBeliefs{}, kModelConfidence, 0), 0.7, 1e-6);
  EXPECT_NEAR(model.estimate(AcceptanceBeliefs{}, kModelConfidence, 1), 0.65, 1e-6);
}

TEST(AcceptanceModel, RestsOnAllSequencesWhereTheyAreAlike) {
  // Of 32 sequences that had 30 drafts each, the estimates are closer to the truth than 30 drafts could tell: these
  // have a standard error of 0.09.
  AcceptanceModel model;
  std::mt19937 random(1);
  std::vector<AcceptanceBeliefs> sequences(32);
  for (int step = 0; step < 30; ++step) {
    for (AcceptanceBeliefs& sequence : sequences) draft(model, sequence, 4, 1, 0.6, 1, random);
  }
  double squares = 0.0;
  for (const AcceptanceBeliefs& sequence : sequences) {
    const double off = model.estimate(sequence, 4, 0) - 0.6;
    squares += off * off / 32;
  }
  EXPECT_LT(squares, 0.06 * 0.06);
}

TEST(AcceptanceModel, TellsSequencesApartWhereTheyDiffer) {
  AcceptanceModel model;
  std::mt19937 random(2);
  std::vector<AcceptanceBeliefs> sequences(8);
  for (int step = 0; step < 40; ++step) {
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      draft(model, sequences[i], 4, 1, i % 2 == 0 ? 0.95 : 0.05, 1, random);
    }
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_NEAR(model.estimate(sequences[i], 4, 0), i % 2 == 0 ? 0.95 : 0.05, 0.12) << i;
  }
}

TEST(AcceptanceModel, AFewOutcomesTellThatTheTextHasChanged) {
  for (const double before : {0.05, 0.95}) {
    AcceptanceModel model;
    AcceptanceBeliefs sequence{};
    std::mt19937 random(3);
    draft(model, sequence, 4, 1, before, 1000, random);
    EXPECT_NEAR(model.estimate(sequence, 4, 0), before, 0.04);
    draft(model, sequence, 4, 1, 1.0 - before, 20, random);
    EXPECT_NEAR(model.estimate(sequence, 4, 0), 1.0 - before, 0.25);
  }
}

TEST(AcceptanceModel, KnowsHowWellItKnows) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  std::mt19937 random(4);
  const double at_first = model.error(sequence, 4, 0);
  EXPECT_GT(at_first, 0.15);
  draft(model, sequence, 4, 1, 0.5, 20, random);
  const double after_twenty = model.error(sequence, 4, 0);
  EXPECT_LT(after_twenty, 0.8 * at_first);
  draft(model, sequence, 4, 1, 0.5, 500, random);
  EXPECT_LT(model.error(sequence, 4, 0), 0.5 * after_twenty);
  EXPECT_GT(model.error(sequence, 4, 0), 0.01);
}

TEST(AcceptanceModel, KnowsLessAndLessOfLaterDraftsThatAreNotMade) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  std::mt19937 random(5);
  draft(model, sequence, 4, 8, 0.8, 60, random);
  const double estimate = model.estimate(sequence, 4, 1);
  const double error = model.error(sequence, 4, 1);
  draft(model, sequence, 4, 1, 0.8, 400, random);
  EXPECT_NEAR(model.estimate(sequence, 4, 1), estimate, 1e-3);
  EXPECT_GT(model.error(sequence, 4, 1), 2.0 * error);
}

TEST(AcceptanceModel, DraftsAfterARejectedOneTellNothing) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  const double later = model.estimate(sequence, 4, 1);
  for (int i = 0; i < 50; ++i) model.observe(sequence, 4, 8, first_drafts(0));
  EXPECT_EQ(model.estimate(sequence, 4, 1), later);
  EXPECT_LT(model.estimate(sequence, 4, 0), 0.02);
}

TEST(AcceptanceModel, CountsThePlacesOfATreeApart) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  // The second draft follows the first, the third is another first token.
  const std::vector<int> outcomes[] = {{0, 1}, {0}, {2}, {}};
  for (int i = 0; i < 400; ++i) model.observe(sequence, kTreeConfidence, 3, outcomes[i % 4]);
  EXPECT_NEAR(model.estimate(sequence, kTreeConfidence, 0), 0.5, 0.05);
  EXPECT_NEAR(model.estimate(sequence, kTreeConfidence, 1), 0.25, 0.05);
  EXPECT_NEAR(model.estimate(sequence, kTreeConfidence, 2), 0.25, 0.05);
  EXPECT_NEAR(model.estimate(sequence, kTreeConfidence, 3), 0.25 * kTreeTail, 0.05) << "not seen: a little less";
  EXPECT_EQ(model.estimate(sequence, kModelConfidence, 0), model.estimate(AcceptanceBeliefs{}, kModelConfidence, 0));
}

TEST(DraftReach, OfAChainIsAProductAndOfATreeNeverRises) {
  AcceptanceModel model;
  AcceptanceBeliefs sequence{};
  for (int i = 0; i < 200; ++i) model.observe(sequence, 5, 4, first_drafts(i % 2 == 0 ? 0 : 4));
  DraftReach chain = model.reach(sequence, 5);
  const double first = model.estimate(sequence, 5, 0);
  const double later = model.estimate(sequence, 5, 1);
  EXPECT_DOUBLE_EQ(chain.next(), first);
  EXPECT_DOUBLE_EQ(chain.next(), first * later);
  EXPECT_DOUBLE_EQ(chain.next(), first * later * later);

  const std::vector<int> second = {1};  // the second place fares better than the first
  for (int i = 0; i < 200; ++i) model.observe(sequence, kTreeConfidence, 2, second);
  DraftReach tree = model.reach(sequence, kTreeConfidence);
  double before = 1.0;
  for (int place = 0; place < 2 * kTreePlaces; ++place) {
    const double reach = tree.next();
    EXPECT_LE(reach, before) << place;
    EXPECT_GT(reach, 0.0) << place;
    before = reach;
  }
  DraftReach hoped = model.reach(sequence, kTreeConfidence, 2.0, 2.0);
  EXPECT_GT(hoped.next(), model.estimate(sequence, kTreeConfidence, 0));
}

}  // namespace
}  // namespace draftwerk
