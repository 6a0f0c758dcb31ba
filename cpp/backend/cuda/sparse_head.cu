#include "backend/cuda/sparse_head.h"

#include <algorithm>
#include <bit>

#include "backend/cuda/block_reduction.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/rank.cuh"

namespace draftwerk::cuda {
namespace {

/// The rank of a cluster, which has one even where its score is not finite.
__device__ Rank rank_of_cluster(const float* scores, int cluster) {
  return Rank{order_of(scores[cluster])} << 32 | ~static_cast<std::uint32_t>(cluster);
}

/// A block takes a row. Bound by the latency of some 25 countings: about 3 us for 32 of 2,048 clusters.
__global__ void __launch_bounds__(1024) choose_clusters(const ClusterScores a) {
  follow_previous();
  const float* scores = a.scores + static_cast<std::int64_t>(blockIdx.x) * a.stride;
  std::int32_t* chosen = a.chosen + static_cast<std::int64_t>(blockIdx.x) * a.count;
  const Rank cut = rank_of_kth(a.count, 0, Rank{0}, ~Rank{0}, [&](Rank rank) {
    std::uint32_t count = 0;
    for (int c = thread(); c < a.clusters; c += threads()) count += rank_of_cluster(scores, c) >= rank ? 1 : 0;
    return static_cast<int>(block_sum(count));
  });
  std::uint64_t done = 0;
  for (int first = 0; first < a.clusters; first += threads()) {
    const int c = first + thread();
    const bool kept = c < a.clusters && rank_of_cluster(scores, c) >= cut;
    std::uint64_t total = 0;
    const std::uint64_t before = block_sum_before(kept ? 1 : 0, total);
    if (kept) chosen[done + before] = c;
    done += total;
  }
}

}  // namespace

void record_choose_clusters(LaunchList& list, const ClusterScores& scores, int outputs) {
  const unsigned wanted = std::bit_ceil(static_cast<unsigned>(scores.clusters));
  list.add(choose_clusters, {dim3(static_cast<unsigned>(outputs)), dim3(std::clamp(wanted, 32U, 1024U))}, scores);
}

}  // namespace draftwerk::cuda
