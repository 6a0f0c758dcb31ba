// How often drafts are accepted, learned from those that were verified.
#pragma once

#include <array>
#include <span>

#include "drafting/drafter.h"

namespace draftwerk {

/// Drafts that were verified (all before them accepted) and how many of these were accepted, old ones fading.
struct AcceptanceCounts {
  float verified = 0.0F;
  float accepted = 0.0F;
};

/// The first draft of a step and the later ones are counted apart: a lookup that got one token right is likely to go
/// on so, a model that drafts from its own drafts gets worse.
inline constexpr int kDraftDepths = 2;

/// Ways to estimate a sequence's acceptance, from what is steady and shared to what is quick and its own.
inline constexpr int kAcceptanceViews = 3;

/// In a tree of drafts, likeliest first, every place is counted by itself, up to this many; what comes behind goes on
/// as kTreeTail has it.
inline constexpr int kTreePlaces = 16;
inline constexpr double kTreeTail = 0.8;

/// What is known of some drafts of one sequence.
struct AcceptanceBelief {
  AcceptanceCounts recent;  ///< over the last eight drafts or so
  AcceptanceCounts longer;  ///< over the last hundred or so
  /// How far each view is trusted, in all 1: that of all sequences, the longer one, the recent one.
  std::array<float, kAcceptanceViews> trust = {0.6F, 0.3F, 0.1F};
};

/// Classes whose drafts each follow the one before.
inline constexpr int kChainClasses = kTreeConfidence;

template <typename T>
struct ByDraft {
  std::array<std::array<T, kDraftDepths>, kChainClasses> chains;
  std::array<T, kTreePlaces> tree;
};

/// What is known of one sequence. Takes 1 kB.
using AcceptanceBeliefs = ByDraft<AcceptanceBelief>;

/// How likely the drafts of one round are to be reached and accepted, the first, the second and so on: never rising.
class DraftReach {
 public:
  /// Of the next draft.
  double next();

 private:
  friend class AcceptanceModel;
  double reach_ = 1.0;
  double first_ = 1.0;  ///< of a chain
  double later_ = 1.0;  ///< of a chain, for each draft more
  std::array<double, kTreePlaces> places_{};
  bool tree_ = false;
  int index_ = 0;
};

/// Estimates how often drafts are accepted: in a chain each one given that those before it were, in a tree each place
/// by itself.
///
/// Three views compete, each an estimate by itself: all sequences over a long time; this sequence over its last
/// hundred drafts; this sequence over its last eight. Each is trusted by how well it has predicted the outcomes so
/// far, recent ones above all (the fixed-share forecaster of Herbster and Warmuth, "Tracking the Best Expert", 1998),
/// and the estimate is their mean. So where sequences are alike and steady it rests on hundreds of outcomes, and where
/// one differs or its text changes a few outcomes are enough to move it.
class AcceptanceModel {
 public:
  /// Of a chain's draft at this depth, given that those before it were accepted; of a tree's draft in this place.
  [[nodiscard]] double estimate(const AcceptanceBeliefs& sequence, int confidence, int index) const;
  /// Standard error of the estimate.
  [[nodiscard]] double error(const AcceptanceBeliefs& sequence, int confidence, int index) const;
  /// Of a round; its first draft `first_bias`, all later ones `later_bias` standard errors better than estimated.
  [[nodiscard]] DraftReach reach(const AcceptanceBeliefs& sequence, int confidence, double first_bias = 0.0,
                                 double later_bias = 0.0) const;
  /// Of `drafted` tokens of this class, `accepted` (ascending) were accepted; in a chain these are the first ones. What
  /// is known of later drafts fades where there could have been some and were none.
  void observe(AcceptanceBeliefs& sequence, int confidence, int drafted, std::span<const int> accepted);

 private:
  using Views = std::array<double, kAcceptanceViews>;
  [[nodiscard]] Views views(const AcceptanceBelief& belief, int confidence, int bucket) const;
  [[nodiscard]] double shared_view(int confidence, int bucket) const;
  void learn(AcceptanceBelief& belief, int confidence, int bucket, bool agreed);

  ByDraft<AcceptanceCounts> shared_{};  ///< over all sequences
};

}  // namespace draftwerk
