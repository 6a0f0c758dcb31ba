#include "drafting/acceptance.h"

#include <algorithm>
#include <cmath>

namespace draftwerk {
namespace {

/// Where the classes start from, first draft and later ones. Lookup's: its acceptance in Markdown and Python source in
/// Gemma's tokens, at 1,000 tokens of context, rounded down. The model's: what is published of MTP drafters.
constexpr double kPriorAcceptance[kChainClasses][kDraftDepths] = {
    {0.3, 0.5}, {0.45, 0.6}, {0.5, 0.7}, {0.6, 0.7}, {0.7, 0.75}, {0.7, 0.8}, {0.8, 0.85}, {0.9, 0.95}, {0.7, 0.65}};
/// A tree's: its first place as a model's first draft. The places behind are taken to be this much worse each, until
/// they are seen.
constexpr double kPriorTree = 0.7;
/// Drafts that each view starts with: those of all sequences as the prior has it, a sequence's own as all show.
constexpr double kSharedStart = 4.0;
constexpr double kLongerStart = 4.0;
constexpr double kRecentStart = 1.0;
/// Drafts over which they reach back.
constexpr float kSharedWindow = 1024.0F;
constexpr float kLongerWindow = 128.0F;
constexpr float kRecentWindow = 8.0F;
/// Trust that is dealt out anew, evenly, at every outcome: a view that has failed so far must be able to come back.
constexpr double kTrustRenewed = 0.003;
/// No outcome is taken to be likelier than this, or impossible.
constexpr double kSurest = 0.98;

int bucket_of(int confidence, int index) {
  return std::min(index, (confidence == kTreeConfidence ? kTreePlaces : kDraftDepths) - 1);
}

/// That of a class and bucket in what is counted by draft.
template <typename ByDraft>
auto& entry(ByDraft& counted, int confidence, int bucket) {
  if (confidence == kTreeConfidence) return counted.tree[static_cast<std::size_t>(bucket)];
  const int c = std::clamp(confidence, 0, kChainClasses - 1);
  return counted.chains[static_cast<std::size_t>(c)][static_cast<std::size_t>(bucket)];
}

void fade(AcceptanceCounts& counts, float window) {
  counts.verified *= 1.0F - 1.0F / window;
  counts.accepted *= 1.0F - 1.0F / window;
}

void count(AcceptanceCounts& counts, bool accepted, float window) {
  fade(counts, window);
  counts.verified += 1.0F;
  if (accepted) counts.accepted += 1.0F;
}

double share(const AcceptanceCounts& counts) { return counts.accepted / counts.verified; }

AcceptanceCounts counts_of(double weight, double share) {
  return {.verified = static_cast<float>(weight), .accepted = static_cast<float>(weight * share)};
}

}  // namespace

double DraftReach::next() {
  if (!tree_) {
    reach_ *= index_++ == 0 ? first_ : later_;
  } else if (index_ < kTreePlaces) {
    reach_ = std::min(reach_, places_[static_cast<std::size_t>(index_++)]);
  } else {
    reach_ *= kTreeTail;
  }
  return reach_;
}

double AcceptanceModel::shared_view(int confidence, int bucket) const {
  const AcceptanceCounts& shared = entry(shared_, confidence, bucket);
  if (shared.verified > 0.0F) return share(shared);
  if (confidence != kTreeConfidence) {
    return kPriorAcceptance[std::clamp(confidence, 0, kChainClasses - 1)][bucket];
  }
  return bucket == 0 ? kPriorTree : kTreeTail * shared_view(confidence, bucket - 1);
}

AcceptanceModel::Views AcceptanceModel::views(const AcceptanceBelief& belief, int confidence, int bucket) const {
  const double over_all = shared_view(confidence, bucket);
  if (belief.recent.verified == 0.0F) return {over_all, over_all, over_all};
  return {over_all, share(belief.longer), share(belief.recent)};
}

double AcceptanceModel::estimate(const AcceptanceBeliefs& sequence, int confidence, int index) const {
  const int bucket = bucket_of(confidence, index);
  const AcceptanceBelief& belief = entry(sequence, confidence, bucket);
  const Views view = views(belief, confidence, bucket);
  double estimate = 0.0;
  for (int v = 0; v < kAcceptanceViews; ++v) estimate += belief.trust[v] * view[v];
  return estimate;
}

double AcceptanceModel::error(const AcceptanceBeliefs& sequence, int confidence, int index) const {
  const int bucket = bucket_of(confidence, index);
  const AcceptanceBelief& belief = entry(sequence, confidence, bucket);
  const double drafts = belief.trust[0] * entry(shared_, confidence, bucket).verified +
                        belief.trust[1] * belief.longer.verified + belief.trust[2] * belief.recent.verified;
  const double p = estimate(sequence, confidence, index);
  const double smooth = (p * drafts + 1.0) / (drafts + 2.0);
  return std::sqrt(smooth * (1.0 - smooth) / (drafts + 1.0));
}

DraftReach AcceptanceModel::reach(const AcceptanceBeliefs& sequence, int confidence, double first_bias,
                                  double later_bias) const {
  const auto biased = [&](int index) {
    const double bias = index == 0 ? first_bias : later_bias;
    const double better = bias == 0.0 ? 0.0 : bias * error(sequence, confidence, index);
    return std::clamp(estimate(sequence, confidence, index) + better, 0.0, 1.0);
  };
  DraftReach reach;
  reach.tree_ = confidence == kTreeConfidence;
  if (reach.tree_) {
    for (int place = 0; place < kTreePlaces; ++place) reach.places_[static_cast<std::size_t>(place)] = biased(place);
  } else {
    reach.first_ = biased(0);
    reach.later_ = biased(1);
  }
  return reach;
}

void AcceptanceModel::learn(AcceptanceBelief& belief, int confidence, int bucket, bool agreed) {
  const Views view = views(belief, confidence, bucket);
  Views likelihood;
  double total = 0.0;
  for (int v = 0; v < kAcceptanceViews; ++v) {
    likelihood[v] = belief.trust[v] * std::clamp(agreed ? view[v] : 1.0 - view[v], 1.0 - kSurest, kSurest);
    total += likelihood[v];
  }
  for (int v = 0; v < kAcceptanceViews; ++v) {
    belief.trust[v] =
        static_cast<float>((1.0 - kTrustRenewed) * likelihood[v] / total + kTrustRenewed / kAcceptanceViews);
  }
  AcceptanceCounts& shared = entry(shared_, confidence, bucket);
  if (shared.verified == 0.0F) shared = counts_of(kSharedStart, view[0]);
  if (belief.recent.verified == 0.0F) {
    belief.recent = counts_of(kRecentStart, view[0]);
    belief.longer = counts_of(kLongerStart, view[0]);
  }
  count(belief.recent, agreed, kRecentWindow);
  count(belief.longer, agreed, kLongerWindow);
  count(shared, agreed, kSharedWindow);
}

void AcceptanceModel::observe(AcceptanceBeliefs& sequence, int confidence, int drafted, std::span<const int> accepted) {
  const auto count_accepted = static_cast<int>(accepted.size());
  if (confidence == kTreeConfidence) {
    // From the last place on: where nothing is known of a place yet, the one before it says what to begin with.
    for (int place = std::min(drafted, kTreePlaces) - 1; place >= 0; --place) {
      const bool agreed = std::find(accepted.begin(), accepted.end(), place) != accepted.end();
      learn(sequence.tree[static_cast<std::size_t>(place)], confidence, place, agreed);
    }
  } else {
    // The first rejected draft ends what is known: those after it were never compared with what the target would say.
    for (int depth = 0; depth < std::min(drafted, count_accepted + 1); ++depth) {
      const int bucket = bucket_of(confidence, depth);
      learn(entry(sequence, confidence, bucket), confidence, bucket, depth < count_accepted);
    }
  }
  // Where drafts are single ones, less and less is known of later ones.
  if (drafted == 1 && count_accepted == 1) {
    AcceptanceBelief& later = entry(sequence, confidence, 1);
    for (AcceptanceCounts* counts : {&later.recent, &later.longer, &entry(shared_, confidence, 1)}) {
      if (counts->verified > 1.0F) fade(*counts, kLongerWindow);
    }
  }
}

}  // namespace draftwerk
