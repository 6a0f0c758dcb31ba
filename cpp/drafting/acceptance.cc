#include "drafting/acceptance.h"

#include <algorithm>
#include <cmath>

namespace draftwerk {
namespace {

/// Where the classes start from, first draft and later ones. Lookup's: its acceptance in Markdown and Python source in
/// Gemma's tokens, at 1,000 tokens of context, rounded down. The model's: what is published of MTP drafters.
constexpr double kPriorAcceptance[kConfidenceClasses][kDraftDepths] = {
    {0.3, 0.5}, {0.45, 0.6}, {0.5, 0.7}, {0.6, 0.7}, {0.7, 0.75}, {0.7, 0.8}, {0.8, 0.85}, {0.9, 0.95}, {0.7, 0.65}};
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

int depth_bucket(int depth) { return std::min(depth, kDraftDepths - 1); }

std::size_t class_index(int confidence) {
  return static_cast<std::size_t>(std::clamp(confidence, 0, kConfidenceClasses - 1));
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

AcceptanceModel::Views AcceptanceModel::views(const AcceptanceBelief& belief, int confidence, int bucket) const {
  const std::size_t c = class_index(confidence);
  const AcceptanceCounts& shared = shared_[c][bucket];
  const double over_all = shared.verified == 0.0F ? kPriorAcceptance[c][bucket] : share(shared);
  if (belief.recent.verified == 0.0F) return {over_all, over_all, over_all};
  return {over_all, share(belief.longer), share(belief.recent)};
}

double AcceptanceModel::estimate(const AcceptanceBeliefs& sequence, int confidence, int depth) const {
  const int bucket = depth_bucket(depth);
  const AcceptanceBelief& belief = sequence[class_index(confidence)][bucket];
  const Views view = views(belief, confidence, bucket);
  double estimate = 0.0;
  for (int v = 0; v < kAcceptanceViews; ++v) estimate += belief.trust[v] * view[v];
  return estimate;
}

double AcceptanceModel::error(const AcceptanceBeliefs& sequence, int confidence, int depth) const {
  const int bucket = depth_bucket(depth);
  const std::size_t c = class_index(confidence);
  const AcceptanceBelief& belief = sequence[c][bucket];
  const double drafts = belief.trust[0] * shared_[c][bucket].verified + belief.trust[1] * belief.longer.verified +
                        belief.trust[2] * belief.recent.verified;
  const double p = estimate(sequence, confidence, depth);
  const double smooth = (p * drafts + 1.0) / (drafts + 2.0);
  return std::sqrt(smooth * (1.0 - smooth) / (drafts + 1.0));
}

void AcceptanceModel::observe(AcceptanceBeliefs& sequence, int confidence, int drafted, int accepted) {
  const std::size_t c = class_index(confidence);
  // The first rejected draft ends what is known: those after it were never compared with what the target would say.
  for (int depth = 0; depth < std::min(drafted, accepted + 1); ++depth) {
    const int bucket = depth_bucket(depth);
    const bool agreed = depth < accepted;
    AcceptanceBelief& belief = sequence[c][bucket];
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
    AcceptanceCounts& shared = shared_[c][bucket];
    if (shared.verified == 0.0F) shared = counts_of(kSharedStart, view[0]);
    if (belief.recent.verified == 0.0F) {
      belief.recent = counts_of(kRecentStart, view[0]);
      belief.longer = counts_of(kLongerStart, view[0]);
    }
    count(belief.recent, agreed, kRecentWindow);
    count(belief.longer, agreed, kLongerWindow);
    count(shared, agreed, kSharedWindow);
  }
  // Where drafts are single ones, less and less is known of later ones.
  if (drafted == 1 && accepted == 1) {
    AcceptanceBelief& later = sequence[c][1];
    for (AcceptanceCounts* counts : {&later.recent, &later.longer, &shared_[c][1]}) {
      if (counts->verified > 1.0F) fade(*counts, kLongerWindow);
    }
  }
}

}  // namespace draftwerk
