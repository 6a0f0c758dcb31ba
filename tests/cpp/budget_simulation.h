// The draft budget in a simulated engine: made-up costs of steps and drafters, made-up acceptance, seeded dice.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "drafting/budget.h"

namespace draftwerk {

/// Indices of the first `count` drafts.
inline std::vector<int> first_drafts(int count) {
  std::vector<int> indices(static_cast<std::size_t>(count));
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

struct StepCurve {
  std::string name;
  std::function<double(int)> seconds;  ///< of a step, by rows
};

/// What a drafter has for a sequence in one step.
struct Offer {
  int available = 0;
  int confidence = 0;
  double acceptance = 0.0;  ///< of each draft, given that those before it were accepted
};

struct SimulatedDrafter {
  std::function<Offer(int step, int sequence)> offer;
  double pass_seconds = 0.0;  ///< a round takes so much for each depth it goes to,
  double row_seconds = 0.0;   ///< and so much for each draft
};

/// A drafter that always has `limit` drafts of this class, accepted with a probability that may change.
inline SimulatedDrafter steady_drafter(int limit, int confidence, std::function<double(int step, int sequence)> p) {
  const auto offer = [=](int step, int sequence) { return Offer{limit, confidence, p(step, sequence)}; };
  return {.offer = offer};
}

/// Tokens over seconds, in one stretch of steps. Tokens are counted at their expectation given what was granted, so
/// that the budget is judged and not the dice.
struct Goodput {
  double tokens = 0.0;
  double seconds = 0.0;
  [[nodiscard]] double rate() const { return tokens / seconds; }
  void add(const Goodput& other) {
    tokens += other.tokens;
    seconds += other.seconds;
  }
};

/// What a stretch of steps yielded, and what fixed numbers of drafts would have yielded in the same steps.
struct Stretch {
  Goodput budget;
  double none = 0.0;  ///< tokens per second without drafts
  double best_fixed =
      0.0;  ///< with the best number of drafts of the best single drafter, where it has so many to offer
  [[nodiscard]] double of_none() const { return budget.rate() / none; }
  [[nodiscard]] double of_best() const { return budget.rate() / best_fixed; }
};

class BudgetSimulation {
 public:
  BudgetSimulation(int sequences, int limit, std::function<double(int)> step_seconds,
                   std::vector<SimulatedDrafter> drafters, unsigned seed)
      : limit_(limit),
        step_seconds_(std::move(step_seconds)),
        drafters_(std::move(drafters)),
        random_(seed),
        sequences_(static_cast<std::size_t>(sequences)),
        offers_(sequences_.size()) {
    fixed_.resize(drafters_.size() * static_cast<std::size_t>(limit + 1));
  }

  DraftBudget budget;
  double noise = 0.03;         ///< relative standard deviation of what times are measured to be
  double outlier_share = 0.0;  ///< of steps that seem to take 50 times as long
  /// How slow the machine is in a step: a factor of all times.
  std::function<double(int step)> pace = [](int) { return 1.0; };
  int step = 0;

  Stretch run(int steps) {
    std::fill(fixed_.begin(), fixed_.end(), Goodput{});
    Stretch stretch;
    for (int end = step + steps; step < end; ++step) stretch.budget.add(run_step());
    stretch.none = fixed_.front().rate();
    for (const Goodput& goodput : fixed_) stretch.best_fixed = std::max(stretch.best_fixed, goodput.rate());
    return stretch;
  }

 private:
  using Offers = std::array<Offer, kMaxDrafters>;

  Goodput run_step() {
    candidates_.clear();
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      DraftCandidate candidate;
      candidate.acceptance = &sequences_[i];
      candidate.limit = limit_;
      for (std::size_t d = 0; d < drafters_.size(); ++d) {
        offers_[i][d] = drafters_[d].offer(step, static_cast<int>(i));
        candidate.outlooks[d] = {offers_[i][d].available, offers_[i][d].confidence};
      }
      candidates_.push_back(candidate);
    }
    count_fixed();
    budget.plan(candidates_, 0, kManyRows);

    Goodput result;
    int rows = 0;
    for (const DraftCandidate& candidate : candidates_) rows += 1 + candidate.granted;
    result.seconds = pace(step) * step_seconds_(rows) + draft();
    for (std::size_t i = 0; i < candidates_.size(); ++i) result.tokens += verify(candidates_[i], offers_[i]);
    const bool outlier = uniform_(random_) < outlier_share;
    budget.observe_step(rows, pace(step) * step_seconds_(rows) * (outlier ? 50.0 : disturbance()));
    return result;
  }

  /// Seconds that the drafters took for what was planned.
  double draft() {
    double seconds = 0.0;
    for (int d = 0; d < static_cast<int>(drafters_.size()); ++d) {
      int passes = 0;
      int drafts = 0;
      for (const DraftCandidate& candidate : candidates_) {
        const int granted = candidate.drafter == d ? candidate.granted : 0;
        const int compared = candidate.compared_drafter == d ? 1 : 0;
        passes = std::max({passes, granted, compared});
        drafts += granted + compared;
      }
      const double round = pace(step) * (drafters_[static_cast<std::size_t>(d)].pass_seconds * passes +
                                         drafters_[static_cast<std::size_t>(d)].row_seconds * drafts);
      if (drafts > 0) budget.observe_drafting(d, passes, drafts, round * disturbance());
      seconds += round;
    }
    return seconds;
  }

  /// Rolls the dice for one sequence's drafts and tells the budget. Returns the tokens that were to be expected.
  double verify(const DraftCandidate& candidate, const Offers& offers) {
    double expected = 1.0;
    if (candidate.granted > 0) {
      const Offer& offer = offers[static_cast<std::size_t>(candidate.drafter)];
      int accepted = 0;
      while (accepted < candidate.granted && uniform_(random_) < offer.acceptance) ++accepted;
      budget.observe_acceptance(*candidate.acceptance, offer.confidence, candidate.granted, first_drafts(accepted));
      double reach = 1.0;
      for (int depth = 0; depth < candidate.granted; ++depth) expected += reach *= offer.acceptance;
    }
    if (candidate.compared_drafter >= 0) {
      const Offer& offer = offers[static_cast<std::size_t>(candidate.compared_drafter)];
      const int agrees = uniform_(random_) < offer.acceptance ? 1 : 0;
      budget.observe_acceptance(*candidate.acceptance, offer.confidence, 1, first_drafts(agrees));
    }
    return expected;
  }

  void count_fixed() {
    for (std::size_t d = 0; d < drafters_.size(); ++d) {
      for (int drafts = 0; drafts <= limit_; ++drafts) {
        Goodput& goodput = fixed_[d * static_cast<std::size_t>(limit_ + 1) + static_cast<std::size_t>(drafts)];
        int rows = 0;
        int passes = 0;
        int drafted = 0;
        for (const Offers& offers : offers_) {
          const int here = std::min(drafts, offers[d].available);
          double reach = 1.0;
          goodput.tokens += 1.0;
          for (int depth = 0; depth < here; ++depth) goodput.tokens += reach *= offers[d].acceptance;
          rows += 1 + here;
          passes = std::max(passes, here);
          drafted += here;
        }
        goodput.seconds += pace(step) * (step_seconds_(rows) + drafters_[d].pass_seconds * passes +
                                         drafters_[d].row_seconds * drafted);
      }
    }
  }

  double disturbance() { return std::max(1.0 + noise * normal_(random_), 0.5); }

  static constexpr int kManyRows = 4096;

  int limit_;
  std::function<double(int)> step_seconds_;
  std::vector<SimulatedDrafter> drafters_;
  std::mt19937 random_;
  std::uniform_real_distribution<double> uniform_;
  std::normal_distribution<double> normal_;
  std::vector<SequenceAcceptance> sequences_;
  std::vector<DraftCandidate> candidates_;
  std::vector<Offers> offers_;
  std::vector<Goodput> fixed_;  ///< of this stretch, by drafter and number of drafts
};

}  // namespace draftwerk
