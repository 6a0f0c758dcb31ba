// Where a token stands in its row, as one integer: tokens sorted by a float descending, then by id ascending, have
// descending ranks, all different. So every filter of sampling.h is one comparison, and the best of a row is a maximum,
// whoever takes it in whichever order.
#pragma once

#include <cstdint>

#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {

using Rank = std::uint64_t;

/// That of a token whose float is minus infinity or no number: it is nowhere.
inline constexpr Rank kNowhere = 0;
/// At least this is every other rank.
inline constexpr Rank kLowestRank = 1;

/// Integers in the order of the floats above minus infinity, both zeros the same; 0 for the others.
__device__ __forceinline__ std::uint32_t order_of(float x) {
  const std::uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0F));
  const std::uint32_t order = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return x > __uint_as_float(0xFF800000U) ? order : 0;
}

/// The lowest rank of a float >= `x`, which is above minus infinity.
__device__ __forceinline__ Rank rank_from(float x) { return Rank{order_of(x)} << 32; }

__device__ __forceinline__ Rank rank_of(float x, std::int32_t token) {
  const std::uint32_t order = order_of(x);
  return order == 0 ? kNowhere : Rank{order} << 32 | ~static_cast<std::uint32_t>(token);
}

/// The float of a rank; minus infinity of kNowhere.
__host__ __device__ __forceinline__ std::uint32_t bits_of(Rank rank) {
  const auto order = static_cast<std::uint32_t>(rank >> 32);
  if (order == 0) return 0xFF800000U;
  return (order & 0x80000000U) != 0 ? order ^ 0x80000000U : ~order;
}
__device__ __forceinline__ float value_of(Rank rank) { return __uint_as_float(bits_of(rank)); }

/// Its token; -1 of kNowhere.
__host__ __device__ __forceinline__ std::int32_t token_of(Rank rank) {
  return rank == kNowhere ? -1 : static_cast<std::int32_t>(~static_cast<std::uint32_t>(rank));
}

/// A rank that k to k + spare of some different ranks reach, or `low` if no more than k reach it; fewer than k reach
/// `high`. By bisection: counting needs neither memory nor order. All threads get the same.
template <typename CountAtLeast>
__device__ Rank rank_of_kth(int k, int spare, Rank low, Rank high, CountAtLeast&& count_at_least) {
  if (count_at_least(low) <= k) return low;
  while (high - low > 1) {
    const Rank middle = low + (high - low) / 2;
    const int count = count_at_least(middle);
    if (count < k) {
      high = middle;
      continue;
    }
    low = middle;
    if (count <= k + spare) break;
  }
  return low;
}

}  // namespace draftwerk::cuda
