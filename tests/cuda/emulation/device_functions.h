// What kernels call, in the meaning that CUDA's programming guide gives it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

inline const uint3& threadIdx = emulation::thread_index;
inline const uint3& blockIdx = emulation::block_index;
inline const dim3& blockDim = emulation::block_size;
inline const dim3& gridDim = emulation::grid_size;
inline constexpr int warpSize = emulation::kWarpSize;

// --- waiting for each other ---------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::sync_block(); }
inline int __syncthreads_or(int predicate) { return emulation::sync_block(predicate != 0) != 0; }
inline int __syncthreads_count(int predicate) { return emulation::sync_block(predicate != 0); }
inline void __syncwarp(std::uint32_t mask = 0xFFFFFFFFU) { emulation::meet(mask, nullptr, nullptr); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(std::uint32_t mask, T value, int source, int width = 32) {
  const unsigned first = emulation::lane() & ~static_cast<unsigned>(width - 1);
  return emulation::exchange(mask, value, first + (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)));
}
template <typename T>
T __shfl_xor_sync(std::uint32_t mask, T value, int bits, int width = 32) {
  const unsigned source = emulation::lane() ^ static_cast<unsigned>(bits);
  const bool inside = source / static_cast<unsigned>(width) == emulation::lane() / static_cast<unsigned>(width);
  return emulation::exchange(mask, value, inside ? source : emulation::lane());
}
template <typename T>
T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned source = emulation::lane() + delta;
  const bool inside = source / static_cast<unsigned>(width) == emulation::lane() / static_cast<unsigned>(width);
  return emulation::exchange(mask, value, inside ? source : emulation::lane());
}
template <typename T>
T __shfl_up_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned within = emulation::lane() % static_cast<unsigned>(width);
  return emulation::exchange(mask, value, delta <= within ? emulation::lane() - delta : emulation::lane());
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, int predicate) {
  const std::uint32_t own = predicate != 0 ? 1U << emulation::lane() : 0U;
  return emulation::fold<std::bit_or<>>(mask, own, 0U);
}
inline int __any_sync(std::uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(std::uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline std::uint32_t __reduce_max_sync(std::uint32_t mask, std::uint32_t value) {
  using Max = decltype([](std::uint32_t a, std::uint32_t b) { return std::max(a, b); });
  return emulation::fold<Max>(mask, value, 0U);
}
inline std::uint32_t __reduce_min_sync(std::uint32_t mask, std::uint32_t value) {
  using Min = decltype([](std::uint32_t a, std::uint32_t b) { return std::min(a, b); });
  return emulation::fold<Min>(mask, value, 0xFFFFFFFFU);
}
inline std::uint32_t __reduce_add_sync(std::uint32_t mask, std::uint32_t value) {
  return emulation::fold<std::plus<>>(mask, value, 0U);
}

// --- atomics: fibers give way only where they wait ----------------------------------------------------------------

template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
template <typename T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicMin(T* address, T value) {
  return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicOr(T* address, T value) {
  return std::exchange(*address, *address | value);
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return std::exchange(*address, *address == compare ? value : *address);
}
/// Counts up to `limit`, then from 0 again.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return std::exchange(*address, *address >= limit ? 0 : *address + 1);
}

// --- memory and numbers -------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline unsigned long long __float2ull_rn(float x) { return static_cast<unsigned long long>(std::nearbyint(x)); }
inline int __popc(std::uint32_t x) { return std::popcount(x); }
inline int __popcll(std::uint64_t x) { return std::popcount(x); }
inline int __clz(std::uint32_t x) { return std::countl_zero(x); }
inline int __ffs(std::uint32_t x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32);
}
/// Four products of signed bytes, added to c.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<std::int8_t>(static_cast<std::uint32_t>(a) >> 8 * i) *
         static_cast<std::int8_t>(static_cast<std::uint32_t>(b) >> 8 * i);
  }
  return c;
}
/// Bytes of b:a (a: 0 to 3) by the low three bits of each nibble of `selector`.
inline std::uint32_t __byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t all = std::uint64_t{b} << 32 | a;
  std::uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<std::uint32_t>(all >> 8 * (selector >> 4 * i & 7U) & 0xFFU) << 8 * i;
  }
  return result;
}
inline float __saturatef(float x) { return x > 0.0F ? std::min(x, 1.0F) : 0.0F; }
using std::max;
using std::min;
