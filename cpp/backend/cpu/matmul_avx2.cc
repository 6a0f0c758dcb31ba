// AVX2: two registers of eight lanes for a panel's sixteen rows. There is no four-way int8 dot product, so vpmaddubsw
// makes int16 sums of two products and vpmaddwd widens them. The int16 sums never saturate: they are widened before
// 2 * groups * (largest weight) * 127 could pass 32767.
#if defined(__x86_64__)

#define DRAFTWERK_ISA avx2
#include <utility>

#include "backend/cpu/matmul.h"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu {

namespace avx2 {

namespace {

struct Float {
  __m256 low;
  __m256 high;
};
struct Integers {
  __m256i low;
  __m256i high;
};

// 4 x 2 f32 accumulators and as many integer ones: the most that 16 registers bear.
constexpr int kTile = 4;

[[gnu::always_inline]] inline Float zero_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
[[gnu::always_inline]] inline Float splat_lanes(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
[[gnu::always_inline]] inline Float multiply(Float a, Float b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
[[gnu::always_inline]] inline Float multiply_add(Float a, Float b, Float c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
[[gnu::always_inline]] inline Float to_lanes(Integers v) {
  return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)};
}
[[gnu::always_inline]] inline void store_lanes(float* p, Float v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}

[[gnu::always_inline]] inline __m128i load_bytes(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

template <WeightType type>
[[gnu::always_inline]] inline Float load_lanes(const std::byte* p) {
  if constexpr (type == WeightType::f32) {
    const auto* floats = reinterpret_cast<const float*>(p);
    return {_mm256_loadu_ps(floats), _mm256_loadu_ps(floats + 8)};
  } else if constexpr (type == WeightType::f16) {
    return {_mm256_cvtph_ps(load_bytes(p)), _mm256_cvtph_ps(load_bytes(p + 16))};
  } else {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes(p + 16)), 16))};
  }
}

[[gnu::always_inline]] inline Float lanes_from_u8(const std::byte* p) {
  const __m128i bytes = load_bytes(p);
  return to_lanes({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
[[gnu::always_inline]] inline Float lanes_from_i8(const std::byte* p) {
  const __m128i bytes = load_bytes(p);
  return to_lanes({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}

[[gnu::always_inline]] inline __m256i load_32(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Half (8 rows) `side` of nibble group g.
template <int g, int side>
[[gnu::always_inline]] inline __m256i nibble_group(const std::byte* nibbles) {
  const __m256i both = load_32(nibbles + g % 4 * layout::kGroupBytes + side * 32);
  const __m256i mask = _mm256_set1_epi8(15);
  if constexpr (g < 4) return _mm256_and_si256(both, mask);
  return _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}

// The unsigned bytes of half `side` of group g; q8_0 signed, without its zero point.
template <WeightType type, int g, int side>
[[gnu::always_inline]] inline __m256i weight_group(const std::byte* block) {
  if constexpr (type == WeightType::q8_0) {
    return _mm256_xor_si256(load_32(block + g * layout::kGroupBytes + side * 32), _mm256_set1_epi8(-128));
  } else if constexpr (type == WeightType::q5_0) {
    std::uint32_t fifth;
    std::memcpy(&fifth, block + g * sizeof(std::uint64_t) + side * 4, sizeof fifth);
    // Byte i gets bit i: every byte receives the right byte of `fifth`, then its own bit is singled out.
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<std::int32_t>(fifth)),
                            _mm256_setr_epi64x(0, 0x0101010101010101LL, 0x0202020202020202LL, 0x0303030303030303LL));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_or_si256(nibble_group<g, side>(block + layout::kFifthBits),
                           _mm256_and_si256(set, _mm256_set1_epi8(16)));
  } else if constexpr (type == WeightType::q6_k) {
    constexpr int f = g % 4;
    __m256i upper = load_32(block + g / 4 * layout::kGroupBytes + side * 32);
    if constexpr (f < 2) upper = _mm256_slli_epi16(upper, 4 - 2 * f);
    if constexpr (f > 2) upper = _mm256_srli_epi16(upper, 2 * f - 4);
    return _mm256_or_si256(nibble_group<g, side>(block + layout::kUpperBits),
                           _mm256_and_si256(upper, _mm256_set1_epi8(0x30)));
  } else {
    return nibble_group<g, side>(block);
  }
}

struct TypeRange {
  int zero_point;
  int groups;  // whose int16 sums fit: 2 * groups * largest * 127 <= 32767
};

template <WeightType type>
constexpr TypeRange type_range() {
  switch (type) {
    case WeightType::q8_0:
      return {0, 1};  // |weight| <= 128
    case WeightType::q6_k:
      return {32, 2};  // weight <= 63
    case WeightType::q5_0:
      return {16, 4};  // weight <= 31
    case WeightType::q4_0:
      return {8, 8};  // weight <= 15
    default:
      return {0, 8};
  }
}

template <WeightType type>
constexpr int zero_point() {
  return type_range<type>().zero_point;
}

template <WeightType type, int g, int side, int R>
[[gnu::always_inline]] inline void add_group(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             __m256i (&pairs)[R]) {
  constexpr bool first = g % type_range<type>().groups == 0;
  const __m256i w = weight_group<type, g, side>(block);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    std::int32_t four;
    std::memcpy(&four, quants + r * stride + g * 4, sizeof four);
    const __m256i a = _mm256_set1_epi32(four);
    __m256i products;
    if constexpr (type == WeightType::q8_0) {
      products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));  // |w| is 128 at most: unsigned
    } else {
      products = _mm256_maddubs_epi16(w, a);
    }
    pairs[r] = first ? products : _mm256_add_epi16(pairs[r], products);
  }
}

template <WeightType type, int side, int R, int first_group, int... g>
[[gnu::always_inline]] inline void dot_side(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                            __m256i (&dot)[R], std::integer_sequence<int, g...>) {
  __m256i pairs[R];
  const auto add = [&]<int group>(std::integral_constant<int, group>) __attribute__((always_inline)) {
    add_group<type, group, side>(block, quants, stride, pairs);
    if constexpr (group % type_range<type>().groups == type_range<type>().groups - 1) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1)));
      }
    }
  };
  (add(std::integral_constant<int, first_group + g>()), ...);
}

template <WeightType type, int R, int first_group, int groups>
[[gnu::always_inline]] inline void dot_groups(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                              const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
  __m256i side[R];
  __m256i start[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    start[r] = zero_point<type>() == 0 ? _mm256_setzero_si256() : _mm256_set1_epi32(starts[r * start_stride].whole);
    side[r] = start[r];
  }
  constexpr auto sequence = std::make_integer_sequence<int, groups>();
  dot_side<type, 0, R, first_group>(block, quants, stride, side, sequence);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    dot[r].low = side[r];
    side[r] = start[r];
  }
  dot_side<type, 1, R, first_group>(block, quants, stride, side, sequence);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) dot[r].high = side[r];
}

template <WeightType type, int R>
[[gnu::always_inline]] inline void dot_block(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
  dot_groups<type, R, 0, layout::kGroups>(block, quants, stride, starts, start_stride, dot);
}

template <int half, int R>
[[gnu::always_inline]] inline void dot_half(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                            const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
  dot_groups<WeightType::q6_k, R, half * 4, 4>(block, quants, stride, starts, start_stride, dot);
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx2

}  // namespace draftwerk::cpu

#endif
