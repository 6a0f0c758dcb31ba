// Reductions of integers over a warp and over a block of whole warps: none depends on an order.
#pragma once

#include <cstdint>

#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int warps() { return threads() / kWarp; }

__device__ __forceinline__ std::uint64_t warp_max(std::uint64_t x) {
  const auto own = static_cast<std::uint32_t>(x >> 32);
  const std::uint32_t high = __reduce_max_sync(kAllLanes, own);
  const std::uint32_t low = __reduce_max_sync(kAllLanes, own == high ? static_cast<std::uint32_t>(x) : 0);
  return std::uint64_t{high} << 32 | low;
}

__device__ __forceinline__ std::uint64_t warp_sum(std::uint64_t x) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

__device__ __forceinline__ std::uint32_t warp_sum(std::uint32_t x) { return __reduce_add_sync(kAllLanes, x); }

/// reduce over the warps of a block of what each got of its lanes, in every thread.
template <typename T, typename Reduce>
__device__ T over_warps(T of_warp, Reduce&& reduce) {
  __shared__ T partial[kWarp];
  __shared__ T result;
  if (lane() == 0) partial[warp()] = of_warp;
  __syncthreads();
  if (warp() == 0) {
    const T all = reduce(lane() < warps() ? partial[lane()] : T{0});
    if (lane() == 0) result = all;
  }
  __syncthreads();
  return result;
}

__device__ inline std::uint64_t block_max(std::uint64_t x) {
  return over_warps(warp_max(x), [](std::uint64_t y) { return warp_max(y); });
}
template <typename T>
__device__ T block_sum(T x) {
  return over_warps(warp_sum(x), [](T y) { return warp_sum(y); });
}

/// The sum of x of the lanes up to this one.
__device__ __forceinline__ std::uint64_t warp_sum_upto(std::uint64_t x) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const std::uint64_t other = __shfl_up_sync(kAllLanes, x, static_cast<unsigned>(distance));
    if (lane() >= distance) x += other;
  }
  return x;
}

/// The sum of x of the threads before this one; `total` becomes that of all.
__device__ inline std::uint64_t block_sum_before(std::uint64_t x, std::uint64_t& total) {
  __shared__ std::uint64_t upto_warp[kWarp];
  const std::uint64_t upto = warp_sum_upto(x);
  if (lane() == kWarp - 1) upto_warp[warp()] = upto;
  __syncthreads();
  if (warp() == 0) {
    const std::uint64_t all = warp_sum_upto(lane() < warps() ? upto_warp[lane()] : 0);
    if (lane() < warps()) upto_warp[lane()] = all;
  }
  __syncthreads();
  const std::uint64_t before_warp = warp() == 0 ? 0 : upto_warp[warp() - 1];
  total = upto_warp[warps() - 1];
  __syncthreads();
  return before_warp + upto - x;
}

}  // namespace draftwerk::cuda
