// Clusters of a sparse head: which ones a row scores.
#pragma once

#include <cstdint>

#include "backend/cuda/launch.h"

namespace draftwerk::cuda {

/// Scores of a step's output rows, in device memory, and where the chosen clusters go.
struct ClusterScores {
  const float* scores = nullptr;   ///< [outputs, stride]
  std::int32_t* chosen = nullptr;  ///< [outputs, count], of each row ascending, as LogitRows::chosen
  std::int64_t stride = 0;
  std::int32_t clusters = 0;
  std::int32_t count = 0;  ///< to choose: 0 < count <= clusters
};

/// Chooses the clusters of the largest scores for every output row; of equal ones the lower cluster, and NaN counts as
/// minus infinity (SparseHead).
void record_choose_clusters(LaunchList& list, const ClusterScores& scores, int outputs);

}  // namespace draftwerk::cuda
