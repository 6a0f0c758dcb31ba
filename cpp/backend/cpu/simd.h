// Sixteen float32 lanes, the unit in which every reduction on the CPU is defined. Written with compiler vector
// extensions, so one source serves every instruction set: AVX-512 takes one register, AVX2 two, portable code four.
// Included only by the kernel files; each defines DRAFTWERK_ISA (portable, avx2 or avx512) first, and everything
// lies in a namespace of that name, so that no function compiled for one instruction set is linked into another's.
// For the same reason kernel files must leave no function of std:: behind: what they use of it has to be inlined.
#pragma once

#ifndef DRAFTWERK_ISA
#error "define DRAFTWERK_ISA to portable, avx2 or avx512 before including simd.h"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "backend/weight_type.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = std::int32_t __attribute__((vector_size(64)));
using u32x16 = std::uint32_t __attribute__((vector_size(64)));
inline constexpr int kLanes = 16;

inline f32x16 splat(float x) { return x - f32x16{}; }  // not 0 + x, which turns -0 into 0 and costs an addition

inline f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

/// The first `count` (0 .. 16) elements at p, zero in the other lanes.
inline f32x16 load_partial(const float* p, int count) {
  f32x16 v = {};
  std::memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
  return v;
}

inline void store_partial(float* p, f32x16 v, int count) {
  std::memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
}

/// a * b + c, fused where the instruction set has it.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  f32x16 r;
  const char* pa = reinterpret_cast<const char*>(&a);
  const char* pb = reinterpret_cast<const char*>(&b);
  const char* pc = reinterpret_cast<const char*>(&c);
  char* pr = reinterpret_cast<char*>(&r);
  for (int half = 0; half < 2; ++half) {
    __m256 x;
    __m256 y;
    __m256 z;
    std::memcpy(&x, pa + half * 32, 32);
    std::memcpy(&y, pb + half * 32, 32);
    std::memcpy(&z, pc + half * 32, 32);
    x = _mm256_fmadd_ps(x, y, z);
    std::memcpy(pr + half * 32, &x, 32);
  }
  return r;
#else
  return a * b + c;
#endif
}

/// The second where one of them is NaN.
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }

inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

/// The sum of the lanes, folded in halves: a fixed order.
inline float reduce_add(f32x16 v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

inline float reduce_max(f32x16 v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// --- one register -------------------------------------------------------------------------------------------------
// GCC keeps vectors wider than a register in memory, which costs long chains of operations most of their speed. Work
// without a reduction across lanes is done on these instead; each lane computes the same.

#if defined(__AVX512F__)
inline constexpr int kRegisterLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kRegisterLanes = 8;
#else
inline constexpr int kRegisterLanes = 4;
#endif
using Register = float __attribute__((vector_size(kRegisterLanes * sizeof(float))));
using RegisterInt = std::int32_t __attribute__((vector_size(kRegisterLanes * sizeof(std::int32_t))));

inline Register register_splat(float x) { return x - Register{}; }

inline Register register_load(const float* p) {
  Register v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void register_store(float* p, Register v) { std::memcpy(p, &v, sizeof v); }

inline Register register_fma(Register a, Register b, Register c) {
#if defined(__AVX512F__)
  return fma(a, b, c);
#elif defined(__FMA__)
  return reinterpret_cast<Register>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline RegisterInt register_truncate(Register v) { return __builtin_convertvector(v, RegisterInt); }

/// Nearest integer, ties to even, for |v| < 2^22.
inline Register register_round(Register v) {
  const Register magic = register_splat(12582912.0F);  // 1.5 * 2^23
  return (v + magic) - magic;
}

/// function(x) for all lanes, register by register.
template <typename Function>
f32x16 by_register(f32x16 x, Function function) {
  float lane[kLanes];
  store(lane, x);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += kRegisterLanes) register_store(lane + i, function(register_load(lane + i)));
  return load(lane);
}

/// e^x to about 1 ulp of float32; 0 below -87.3, clamped above 88, NaN of NaN. Range reduction by ln 2 in two parts,
/// then a degree-6 polynomial (Cephes expf).
inline Register register_exp(Register x) {
  const Register low = register_splat(-87.3F);
  const Register high = register_splat(88.0F);
  const Register magic = register_splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const Register raised = low > x ? low : x;
  const Register bounded = high < raised ? high : raised;
  const Register n = (bounded * 1.44269504088896341F + magic) - magic;
  Register r = register_fma(n, register_splat(-0.693359375F), bounded);
  r = register_fma(n, register_splat(2.12194440e-4F), r);
  Register p = register_splat(1.9875691500e-4F);
  p = register_fma(p, r, register_splat(1.3981999507e-3F));
  p = register_fma(p, r, register_splat(8.3334519073e-3F));
  p = register_fma(p, r, register_splat(4.1665795894e-2F));
  p = register_fma(p, r, register_splat(1.6666665459e-1F));
  p = register_fma(p, r, register_splat(5.0000001201e-1F));
  const Register y = register_fma(p, r * r, r) + 1.0F;
  const RegisterInt scale = (__builtin_convertvector(n, RegisterInt) + 127) << 23;
  const Register result = y * reinterpret_cast<Register>(scale);
  return x < low ? Register{} : result;
}

/// ln x for positive normal x, to about 1 ulp (Cephes logf).
inline Register register_log(Register x) {
  const RegisterInt bits = reinterpret_cast<RegisterInt>(x);
  RegisterInt exponent = (bits >> 23) - 126;
  Register m = reinterpret_cast<Register>((bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
  const RegisterInt small = m < register_splat(0.707106781186547524F);        // all ones where true
  exponent += small;
  m = (small ? m + m : m) - 1.0F;
  const Register e = __builtin_convertvector(exponent, Register);
  const Register z = m * m;
  Register p = register_splat(7.0376836292e-2F);
  p = register_fma(p, m, register_splat(-1.1514610310e-1F));
  p = register_fma(p, m, register_splat(1.1676998740e-1F));
  p = register_fma(p, m, register_splat(-1.2420140846e-1F));
  p = register_fma(p, m, register_splat(1.4249322787e-1F));
  p = register_fma(p, m, register_splat(-1.6668057665e-1F));
  p = register_fma(p, m, register_splat(2.0000714765e-1F));
  p = register_fma(p, m, register_splat(-2.4999993993e-1F));
  p = register_fma(p, m, register_splat(3.3333331174e-1F));
  Register y = p * m * z;
  y = register_fma(e, register_splat(-2.12194440e-4F), y);
  y = register_fma(z, register_splat(-0.5F), y);
  return register_fma(e, register_splat(0.693359375F), m + y);
}

/// tanh by exp; the error is below 3e-7, absolute.
inline Register register_tanh(Register x) {
  const RegisterInt magnitude = reinterpret_cast<RegisterInt>(x) & 0x7FFFFFFF;
  const RegisterInt sign = reinterpret_cast<RegisterInt>(x) & static_cast<std::int32_t>(0x80000000);
  const Register e = register_exp(-2.0F * reinterpret_cast<Register>(magnitude));
  const Register t = (1.0F - e) / (1.0F + e);
  return reinterpret_cast<Register>(reinterpret_cast<RegisterInt>(t) | sign);
}

/// GELU with the tanh approximation, as Gemma uses it.
inline Register register_gelu_tanh(Register x) {
  const Register inner = 0.797884560802865356F * register_fma(0.044715F * x * x, x, x);
  return 0.5F * x * (1.0F + register_tanh(inner));
}

inline f32x16 exp(f32x16 x) { return by_register(x, register_exp); }
inline f32x16 log(f32x16 x) { return by_register(x, register_log); }
inline f32x16 tanh(f32x16 x) { return by_register(x, register_tanh); }
inline f32x16 gelu_tanh(f32x16 x) { return by_register(x, register_gelu_tanh); }

/// Sixteen IEEE half-precision values, widened.
inline f32x16 load_half(const std::uint16_t* p) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<f32x16>(_mm512_cvtph_ps(h));
#elif defined(__F16C__)
  f32x16 r;
  char* pr = reinterpret_cast<char*>(&r);
  for (int half = 0; half < 2; ++half) {
    __m128i h;
    std::memcpy(&h, p + half * 8, sizeof h);
    const __m256 x = _mm256_cvtph_ps(h);
    std::memcpy(pr + half * 32, &x, 32);
  }
  return r;
#else
  using u16x16 = std::uint16_t __attribute__((vector_size(32)));
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  const u32x16 w = __builtin_convertvector(h, u32x16);
  const u32x16 sign = (w & 0x8000U) << 16;
  const u32x16 magnitude = (w & 0x7FFFU) << 13;
  // Scaling by 2^112 moves the exponent from half's bias to float's and makes subnormals normal.
  const f32x16 scaled = reinterpret_cast<f32x16>(magnitude) * 5.192296858534828e33F;
  const i32x16 special = (w & 0x7C00U) == (u32x16{} + 0x7C00U);
  const u32x16 infinite = magnitude | 0x7F800000U;
  const u32x16 bits = special ? infinite : reinterpret_cast<u32x16>(scaled);
  return reinterpret_cast<f32x16>(bits | sign);
#endif
}

/// Rounds sixteen values to half precision, to nearest even, saturating at the largest finite half (65504). NaN stays
/// NaN.
inline void store_half(std::uint16_t* p, f32x16 v) {
  v = min(splat(65504.0F), max(splat(-65504.0F), v));
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const char* pv = reinterpret_cast<const char*>(&v);
  for (int half = 0; half < 2; ++half) {
    __m256 x;
    std::memcpy(&x, pv + half * 32, 32);
    const __m128i h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p + half * 8, &h, sizeof h);
  }
#else
  const u32x16 bits = reinterpret_cast<u32x16>(v);
  const u32x16 sign = (bits >> 16) & 0x8000U;
  const u32x16 magnitude = bits & 0x7FFFFFFFU;
  // Normal halves: round the 13 dropped bits to nearest even, rebias the exponent by 112.
  const u32x16 normal = (magnitude + 0xFFFU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  // Subnormal halves: adding 0.5 leaves the rounded value in the low mantissa bits.
  const f32x16 shifted = reinterpret_cast<f32x16>(magnitude) + 0.5F;
  const u32x16 subnormal = reinterpret_cast<u32x16>(shifted) - 0x3F000000U;
  const i32x16 is_small = magnitude < (u32x16{} + (113U << 23));
  const i32x16 is_nan = magnitude > (u32x16{} + 0x7F800000U);
  const u32x16 number = is_small ? subnormal : normal;
  const u32x16 half = (is_nan ? u32x16{} + 0x7E00U : number) | sign;
  using u16x16 = std::uint16_t __attribute__((vector_size(32)));
  const u16x16 narrow = __builtin_convertvector(half, u16x16);
  std::memcpy(p, &narrow, sizeof narrow);
#endif
}

/// Sixteen bfloat16 values, widened.
inline f32x16 load_bfloat(const std::uint16_t* p) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<f32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#else
  using u16x16 = std::uint16_t __attribute__((vector_size(32)));
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<f32x16>(__builtin_convertvector(h, u32x16) << 16);
#endif
}

/// Sixteen values of a float type, from an address of any alignment.
inline f32x16 load_float(WeightType type, const std::byte* p) {
  if (type == WeightType::f32) {
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  std::uint16_t words[kLanes];
  std::memcpy(words, p, sizeof words);
  return type == WeightType::f16 ? load_half(words) : load_bfloat(words);
}

/// One register of half-precision values, widened.
inline Register register_load(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return load_half(p);
#elif defined(__F16C__)
  __m128i h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Register>(_mm256_cvtph_ps(h));
#else
  using Narrow = std::uint16_t __attribute__((vector_size(kRegisterLanes * 2)));
  using Wide = std::uint32_t __attribute__((vector_size(kRegisterLanes * 4)));
  Narrow h;
  std::memcpy(&h, p, sizeof h);
  const Wide w = __builtin_convertvector(h, Wide);
  // As in load_half, less infinity, which store_half does not write, and NaN, which becomes 98304 or more: to keep it,
  // attention would take a sixth longer.
  const Register scaled = reinterpret_cast<Register>((w & 0x7FFFU) << 13) * 5.192296858534828e33F;
  return reinterpret_cast<Register>(reinterpret_cast<Wide>(scaled) | ((w & 0x8000U) << 16));
#endif
}

}  // namespace draftwerk::cpu::DRAFTWERK_ISA
