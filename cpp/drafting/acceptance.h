// How often drafts are accepted, learned from those that were verified.
#pragma once

#include <array>

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

/// What is known of the drafts of one class and depth in one sequence.
struct AcceptanceBelief {
  AcceptanceCounts recent;  ///< over the last eight drafts or so
  AcceptanceCounts longer;  ///< over the last hundred or so
  /// How far each view is trusted, in all 1: that of all sequences, the longer one, the recent one.
  std::array<float, kAcceptanceViews> trust = {0.6F, 0.3F, 0.1F};
};

template <typename T>
using ByClassAndDepth = std::array<std::array<T, kDraftDepths>, kConfidenceClasses>;

/// What is known of one sequence. Takes 0.5 kB.
using AcceptanceBeliefs = ByClassAndDepth<AcceptanceBelief>;

/// Estimates the probability that a draft is accepted, given that those before it were.
///
/// Three views compete, each an estimate by itself: all sequences over a long time; this sequence over its last
/// hundred drafts; this sequence over its last eight. Each is trusted by how well it has predicted the outcomes so
/// far, recent ones above all (the fixed-share forecaster of Herbster and Warmuth, "Tracking the Best Expert", 1998),
/// and the estimate is their mean. So where sequences are alike and steady it rests on hundreds of outcomes, and where
/// one differs or its text changes a few outcomes are enough to move it.
class AcceptanceModel {
 public:
  [[nodiscard]] double estimate(const AcceptanceBeliefs& sequence, int confidence, int depth) const;
  /// Standard error of the estimate.
  [[nodiscard]] double error(const AcceptanceBeliefs& sequence, int confidence, int depth) const;
  /// Of `drafted` tokens of this class the first `accepted` were accepted. What is known of later drafts fades where
  /// there could have been some and were none.
  void observe(AcceptanceBeliefs& sequence, int confidence, int drafted, int accepted);

 private:
  using Views = std::array<double, kAcceptanceViews>;
  [[nodiscard]] Views views(const AcceptanceBelief& belief, int confidence, int bucket) const;

  ByClassAndDepth<AcceptanceCounts> shared_{};  ///< over all sequences
};

}  // namespace draftwerk
