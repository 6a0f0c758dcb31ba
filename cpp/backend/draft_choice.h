// How likely each candidate of a drafter is to be what the target chooses: by this, trees of drafts grow, on the host
// (drafting/draft_tree.h) and on devices that grow them on their own (Growth).
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DRAFTWERK_HOST_DEVICE __host__ __device__
#else
#define DRAFTWERK_HOST_DEVICE
#endif

namespace draftwerk {

/// Candidates that are looked at to follow one draft.
inline constexpr int kDraftBranches = 4;

/// What a drafter's preferences say of the target's choice: the weight of a candidate is
///   exp(of_probability * ln p + of_value * (value - that of the best) + of_rank[its rank]),
/// that of all other tokens together exp(of_others * ln(1 - sum of p) + others).
struct DraftPreference {
  float of_probability;
  float of_value;
  float of_rank[kDraftBranches];
  float of_others;
  float others;
};

/// Fitted by maximum likelihood to what gemma-3-270m chose, greedy and at temperature 1, where its drafter had these
/// candidates.
DRAFTWERK_HOST_DEVICE inline DraftPreference draft_preference(bool greedy) {
  return greedy ? DraftPreference{1.25F, 0.0F, {0.0F, -0.1F, 0.1F, 0.2F}, 0.75F, -0.8F}
                : DraftPreference{0.4F, 0.35F, {0.0F, -0.4F, -0.7F, -1.0F}, 1.0F, 0.0F};
}

/// Of the first `count` <= kDraftBranches candidates, best first, with these values and probabilities (Candidate): how
/// likely each is. `chances` has room for kDraftBranches; there is no chance of what is not there.
DRAFTWERK_HOST_DEVICE inline void draft_chances(const float* values, const float* probabilities, int count, bool greedy,
                                                float* chances) {
  constexpr float kLeastOthers = 1e-3F;
  const DraftPreference preference = draft_preference(greedy);
  float others = 1.0F;
  float total = 0.0F;
  for (int i = 0; i < kDraftBranches; ++i) {
    chances[i] = 0.0F;
    if (i >= count) continue;
    others -= probabilities[i];
    // What a filter kept out may have a larger value than what it let pass.
    const float behind = fminf(values[i] - values[0], 0.0F);
    chances[i] =
        expf(preference.of_value * behind + preference.of_rank[i]) * powf(probabilities[i], preference.of_probability);
    total += chances[i];
  }
  total += expf(preference.others) * powf(fmaxf(others, kLeastOthers), preference.of_others);
  for (int i = 0; i < kDraftBranches; ++i) chances[i] /= total;
}

}  // namespace draftwerk
