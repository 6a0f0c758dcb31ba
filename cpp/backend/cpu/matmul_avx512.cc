// AVX-512 with VNNI: one register is one group of a panel, 16 rows x 4 columns, and vpdpbusd adds its products with
// four broadcast activations to 16 accumulators.
#if defined(__x86_64__)

#define DRAFTWERK_ISA avx512
#include <utility>

#include "backend/cpu/matmul.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

namespace avx512 {

namespace {

using Float = __m512;
using Part = Float;
using Integers = __m512i;

// 8 int32 and 8 f32 accumulators, a weight register and the constants fit in 32 registers.
template <WeightType type>
constexpr int tile_rows() {
  return 8;
}
constexpr int kParts = 1;

template <typename Lanes>
[[gnu::always_inline]] inline Lanes splat_lanes(float x) {
  return _mm512_set1_ps(x);
}
[[gnu::always_inline]] inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
[[gnu::always_inline]] inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline Float to_lanes(Integers v) { return _mm512_cvtepi32_ps(v); }
[[gnu::always_inline]] inline void store_lanes(float* p, Float v) { _mm512_storeu_ps(p, v); }

template <WeightType type, typename Lanes>
[[gnu::always_inline]] inline Lanes load_lanes(const std::byte* p) {
  if constexpr (type == WeightType::f32) {
    return _mm512_loadu_ps(p);
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (type == WeightType::f16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
}

[[gnu::always_inline]] inline __m128i load_bytes(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
[[gnu::always_inline]] inline Float part_from_u8(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(p)));
}
[[gnu::always_inline]] inline Float part_from_i8(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p)));
}

[[gnu::always_inline]] inline __m512i load_group(const std::byte* p) { return _mm512_loadu_si512(p); }

// Group g (0..7) from the nibbles of a block.
template <int g>
[[gnu::always_inline]] inline __m512i nibble_group(const std::byte* nibbles) {
  const __m512i both = load_group(nibbles + g % 4 * layout::kGroupBytes);
  const __m512i mask = _mm512_set1_epi8(15);
  if constexpr (g < 4) return _mm512_and_si512(both, mask);
  return _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}

// The unsigned bytes of group g; `block` points behind the block's scales.
template <WeightType type, int g>
[[gnu::always_inline]] inline __m512i weight_group(const std::byte* block) {
  if constexpr (type == WeightType::q8_0) {
    return load_group(block + g * layout::kGroupBytes);
  } else if constexpr (type == WeightType::q4_0 || type == WeightType::q4_k) {
    return nibble_group<g>(block);
  } else if constexpr (type == WeightType::q5_0) {
    std::uint64_t fifth;
    std::memcpy(&fifth, block + g * sizeof fifth, sizeof fifth);
    const __m512i upper = _mm512_maskz_mov_epi8(fifth, _mm512_set1_epi8(16));
    __m512i both = load_group(block + layout::kFifthBits + g % 4 * layout::kGroupBytes);
    if constexpr (g >= 4) both = _mm512_srli_epi16(both, 4);
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi8(15), upper, 0xEA);  // (both & 15) | upper
  } else {
    const __m512i fields = load_group(block + g / 4 * layout::kGroupBytes);
    constexpr int f = g % 4;
    __m512i upper = fields;  // bits 2f and 2f + 1 of each byte, brought to bits 4 and 5
    if constexpr (f < 2) upper = _mm512_slli_epi16(fields, 4 - 2 * f);
    if constexpr (f > 2) upper = _mm512_srli_epi16(fields, 2 * f - 4);
    // low | (upper & 0x30)
    return _mm512_ternarylogic_epi32(nibble_group<g>(block + layout::kUpperBits), upper, _mm512_set1_epi8(0x30), 0xF8);
  }
}

template <WeightType type>
constexpr int zero_point() {
  switch (type) {
    case WeightType::q8_0:
      return 128;
    case WeightType::q6_k:
      return 32;
    case WeightType::q5_0:
      return 16;
    case WeightType::q4_0:
      return 8;
    default:
      return 0;
  }
}

template <WeightType type, int g, int R>
[[gnu::always_inline]] inline void add_group(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             Integers (&dot)[R]) {
  const __m512i w = weight_group<type, g>(block);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    std::int32_t four;
    std::memcpy(&four, quants + r * stride + g * 4, sizeof four);
    dot[r] = _mm512_dpbusd_epi32(dot[r], w, _mm512_set1_epi32(four));
  }
}

template <WeightType type, int R>
[[gnu::always_inline]] inline void start_dot(const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    dot[r] = zero_point<type>() == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(starts[r * start_stride].whole);
  }
}

template <WeightType type, int part, int R>
[[gnu::always_inline]] inline void dot_block(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
  start_dot<type, R>(starts, start_stride, dot);
  add_group<type, 0>(block, quants, stride, dot);
  add_group<type, 1>(block, quants, stride, dot);
  add_group<type, 2>(block, quants, stride, dot);
  add_group<type, 3>(block, quants, stride, dot);
  add_group<type, 4>(block, quants, stride, dot);
  add_group<type, 5>(block, quants, stride, dot);
  add_group<type, 6>(block, quants, stride, dot);
  add_group<type, 7>(block, quants, stride, dot);
}

template <int half, int part, int R>
[[gnu::always_inline]] inline void dot_half(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                            const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
  constexpr auto type = WeightType::q6_k;
  start_dot<type, R>(starts, start_stride, dot);
  add_group<type, half * 4>(block, quants, stride, dot);
  add_group<type, half * 4 + 1>(block, quants, stride, dot);
  add_group<type, half * 4 + 2>(block, quants, stride, dot);
  add_group<type, half * 4 + 3>(block, quants, stride, dot);
}

// The bits of `a` where `mask` has ones, those of `b` elsewhere.
[[gnu::always_inline]] inline __m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xE4);
}

template <bool coarse, int whole, int part, int R>
[[gnu::always_inline]] inline void dot_split(const std::byte* block, const std::byte* rest, const std::int8_t* quants,
                                             std::int64_t stride, const Start* starts, std::int64_t start_stride,
                                             Integers (&dot)[R]) {
  start_dot<WeightType::q8_0>(starts, start_stride, dot);
  const auto add = [&](__m512i w, int group) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      std::int32_t four;
      std::memcpy(&four, quants + r * stride + group * 4, sizeof four);
      dot[r] = _mm512_dpbusd_epi32(dot[r], w, _mm512_set1_epi32(four));
    }
  };
#pragma GCC unroll 8
  for (int g = 0; g < whole; ++g) add(load_group(block + g * layout::kGroupBytes), g);
  block += whole * layout::kGroupBytes;
  constexpr int pairs = (layout::kGroups - whole) / 2;
  const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
#pragma GCC unroll 4
  for (int j = 0; j < pairs; ++j) {
    const __m512i upper = load_group(block + j * layout::kGroupBytes);
    const __m512i first = _mm512_slli_epi16(upper, 4);
    if constexpr (coarse) {
      add(_mm512_and_si512(first, high), whole + j);
      add(_mm512_and_si512(upper, high), whole + pairs + j);
    } else {
      const __m512i lower = load_group(rest + j * layout::kGroupBytes);
      add(select(high, first, lower), whole + j);
      add(select(high, upper, _mm512_srli_epi16(lower, 4)), whole + pairs + j);
    }
  }
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx512

}  // namespace draftwerk::cpu

#endif
