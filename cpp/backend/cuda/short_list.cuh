// The few best tokens of a row, sorted in shared memory: top_k, log-probabilities.
#pragma once

#include <cstdint>

#include "backend/cuda/block_reduction.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/logit_row.cuh"
#include "backend/cuda/rank.cuh"
#include "backend/cuda/sampler_kernels.h"

namespace draftwerk::cuda {

/// Ranks by z, descending. All threads of a block work on it and know its length.
struct ShortList {
  Rank rank[kListCapacity];
  std::uint64_t before[kListCapacity];  ///< mass of those before each, where a nucleus is asked for
  std::uint32_t found;
};

/// Puts those of a row that reach `cut` into the list, in any order; the number of them, which may be more than fit.
__device__ inline int collect(const LogitRow& row, const Rank* best, Rank cut, ShortList& list) {
  __syncthreads();
  if (thread() == 0) list.found = 0;
  __syncthreads();
  for_chunks(row, best, cut, [&](const Chunk& chunk) {
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      const Rank rank = row.rank(chunk.z[i], chunk.column(i));
      if (rank < cut) continue;
      const std::uint32_t at = atomicAdd(&list.found, 1U);
      if (at < kListCapacity) list.rank[at] = rank;
    }
  });
  __syncthreads();
  return static_cast<int>(list.found);
}

/// Sorts the first `count` ranks, descending (a bitonic network, by which equal numbers take equal time).
__device__ inline void sort(ShortList& list, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + thread(); i < size; i += threads()) list.rank[i] = kNowhere;
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = thread(); i < size / 2; i += threads()) {
        const int low = 2 * i - (i & (stride - 1));
        const Rank a = list.rank[low];
        const Rank b = list.rank[low + stride];
        const bool descending = (low & run) == 0;
        if ((a < b) != descending) continue;
        list.rank[low] = b;
        list.rank[low + stride] = a;
      }
    }
  }
  __syncthreads();
}

/// Fills the list with the k best of a row and perhaps some more, sorted; all there are if they are fewer than k, which
/// is at most kListCapacity. Returns their number.
__device__ inline int list_best(const LogitRow& row, const Rank* best, int k, ShortList& list) {
  const int chunks = row.chunks();
  const Rank top = block_best(best, chunks);
  if (top == kNowhere) return 0;
  // Of many groups of tokens, the k-th best of their best bounds the k-th best token from below, closely. Groups are
  // chunks, or what a lane has of a chunk where chunks are few.
  const Rank* groups = best;
  int count = chunks;
  if (chunks <= kListCapacity / kWarp) {
    for (int c = warp(); c < chunks; c += warps()) list.before[c * kWarp + lane()] = lane_best(row, load_chunk(row, c));
    __syncthreads();
    groups = list.before;
    count = chunks * kWarp;
  }
  const Rank bound = rank_of_kth(k, k / 8, kLowestRank, top + 1, [&](Rank cut) {
    std::uint32_t reach = 0;
    for (int i = thread(); i < count; i += threads()) reach += groups[i] >= cut ? 1 : 0;
    return static_cast<int>(block_sum(reach));
  });
  int found = collect(row, best, bound, list);
  if (found > kListCapacity) found = collect(row, best, cut_of_best(row, best, k, bound), list);
  sort(list, found);
  return found;
}

/// Takes entry `at` out of a list of `count`.
__device__ inline void remove(ShortList& list, int at, int count) {
  for (int first = at; first < count - 1; first += threads()) {
    const int i = first + thread();
    const Rank next = i < count - 1 ? list.rank[i + 1] : kNowhere;
    __syncthreads();
    if (i < count - 1) list.rank[i] = next;
    __syncthreads();
  }
}

}  // namespace draftwerk::cuda
