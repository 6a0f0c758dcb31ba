// Noise and softmax weights by the definitions of cpp/backend/sampling.h, with the bits that the CPU computes
// (cpu/sampler_kernels.inl). Arithmetic that decides a token is written as single rounded operations, which the
// compiler must not fuse.
#pragma once

#include <cstdint>

#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {

/// Four words of noise: of tokens 4 block .. 4 block + 3 (Philox4x32-10, see noise_word).
__device__ __forceinline__ uint4 noise_words(std::uint64_t seed, std::int64_t position, std::uint32_t block) {
  std::uint32_t c0 = static_cast<std::uint32_t>(position);
  std::uint32_t c1 = static_cast<std::uint32_t>(static_cast<std::uint64_t>(position) >> 32);
  std::uint32_t c2 = block;
  std::uint32_t c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t n0 = __umulhi(0xCD9E8D57U, c2) ^ c1 ^ k0;
    const std::uint32_t n2 = __umulhi(0xD2511F53U, c0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57U * c2;
    c3 = 0xD2511F53U * c0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return make_uint4(c0, c1, c2, c3);
}

/// The word of one token.
__device__ __forceinline__ std::uint32_t word_of_token(std::uint64_t seed, std::int64_t position, std::int32_t token) {
  const uint4 words = noise_words(seed, position, static_cast<std::uint32_t>(token) / 4);
  const int place = token % 4;
  return place < 2 ? (place == 0 ? words.x : words.y) : (place == 2 ? words.z : words.w);
}

/// ln x for positive normal x, unfused (Cephes logf).
__device__ __forceinline__ float log_unfused(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  int exponent = static_cast<int>(bits >> 23) - 126;
  float m = __uint_as_float((bits & 0x007FFFFFU) | 0x3F000000U);  // [0.5, 1)
  const bool small = m < 0.707106781186547524F;
  exponent -= small ? 1 : 0;
  m = __fsub_rn(small ? __fadd_rn(m, m) : m, 1.0F);
  const float e = static_cast<float>(exponent);
  const float square = __fmul_rn(m, m);
  float p = 7.0376836292e-2F;
  p = __fsub_rn(__fmul_rn(p, m), 1.1514610310e-1F);
  p = __fadd_rn(__fmul_rn(p, m), 1.1676998740e-1F);
  p = __fsub_rn(__fmul_rn(p, m), 1.2420140846e-1F);
  p = __fadd_rn(__fmul_rn(p, m), 1.4249322787e-1F);
  p = __fsub_rn(__fmul_rn(p, m), 1.6668057665e-1F);
  p = __fadd_rn(__fmul_rn(p, m), 2.0000714765e-1F);
  p = __fsub_rn(__fmul_rn(p, m), 2.4999993993e-1F);
  p = __fadd_rn(__fmul_rn(p, m), 3.3333331174e-1F);
  float y = __fmul_rn(__fmul_rn(p, m), square);
  y = __fsub_rn(y, __fmul_rn(e, 2.12194440e-4F));
  y = __fsub_rn(y, __fmul_rn(square, 0.5F));
  return __fadd_rn(__fadd_rn(m, y), __fmul_rn(e, 0.693359375F));
}

/// (word + 0.5) / 2^32; may be 1.
__device__ __forceinline__ float uniform(std::uint32_t word) {
  return __fmul_rn(__fadd_rn(static_cast<float>(word), 0.5F), 0x1p-32F);
}

/// -ln(-ln(1 - w)) for w = uniform(word), kept below 1; ln(1 - w) = ln(u) * w / (1 - u) for u the rounded 1 - w.
__device__ __forceinline__ float gumbel(std::uint32_t word) {
  constexpr float kMost = 1.0F - 0x1p-24F;
  float w = uniform(word);
  w = w < kMost ? w : kMost;
  const float u = __fsub_rn(1.0F, w);
  const float step = __fsub_rn(1.0F, u);
  const float exponential = step == 0.0F ? w : __fmul_rn(-log_unfused(u), __fdiv_rn(w, step));
  return -log_unfused(exponential);
}

/// What gumbel(word) hardly exceeds: -ln w, as -ln(1 - w) >= w. In the device's quick arithmetic, for telling which
/// tokens need the exact one; noise_slack says how far off it may be.
__device__ __forceinline__ float gumbel_bound(std::uint32_t word) { return -__logf(uniform(word)); }

/// z + gumbel is at most (z + gumbel_bound) + noise_slack(z): covers the rounding of all that.
__device__ __forceinline__ float noise_slack(float z) { return 1e-4F + 1e-6F * fabsf(z); }

/// e^x for x <= 0, unfused (Cephes expf); 0 below -30, where the weight is 0, and for NaN.
__device__ __forceinline__ float exp_unfused(float x) {
  constexpr float kLow = -30.0F;
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x > kLow ? x : kLow;
  const float shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504088896341F), kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  const float r = __fadd_rn(__fsub_rn(bounded, __fmul_rn(n, 0.693359375F)), __fmul_rn(n, 2.12194440e-4F));
  float p = 1.9875691500e-4F;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3F);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3F);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2F);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1F);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1F);
  const float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0F);
  const int exponent = static_cast<int>(__float_as_uint(shifted) - __float_as_uint(kMagic));
  const float power = __uint_as_float(static_cast<std::uint32_t>(exponent + 127) << 23);
  return x >= kLow ? __fmul_rn(y, power) : 0.0F;
}

/// Softmax weight of z = top + difference, in units of 2^-40. Scaling by 2^40 is exact, and the conversion rounds.
__device__ __forceinline__ std::uint64_t weight(float difference) {
  return __float2ull_rn(__fmul_rn(exp_unfused(difference), 0x1p40F));
}

}  // namespace draftwerk::cuda
