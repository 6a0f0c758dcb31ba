// AVX2: a register holds eight of a panel's sixteen rows, so a quantised panel is passed over twice, which leaves room
// for up to eight rows of activations (with both halves at once, all of it would lie on the stack). There is no
// four-way int8 dot product: vpmaddubsw makes int16 sums of two products, and vpmaddwd widens them. The int16 sums
// never saturate: they are widened before 2 * groups * (largest weight) * 127 could pass 32767. Bytes of q8_0 are
// multiplied as two nibbles, whose products may be summed over a whole block.
#if defined(__x86_64__)

#define DRAFTWERK_ISA avx2
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/places.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

namespace avx2 {

namespace {

using Part = __m256;
using Integers = __m256i;
struct Float {
  Part low;
  Part high;
};

constexpr int kParts = 2;
constexpr int kPanels = 1;

// Their integer accumulators fit in 16 registers, beside a weight and a product; what is needed once in a block may lie
// on the stack.
template <WeightType type, int P>
constexpr int tile_rows() {
  switch (type) {
    case WeightType::f32:
    case WeightType::f16:
    case WeightType::bf16:
      return 4;
    case WeightType::q8_0:
      return 6;  // two accumulators each
    default:
      return 8;
  }
}

template <typename Lanes>
[[gnu::always_inline]] inline Lanes splat_lanes(float x) {
  if constexpr (sizeof(Lanes) == sizeof(Part)) {
    return _mm256_set1_ps(x);
  } else {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
  }
}
[[gnu::always_inline]] inline Part multiply(Part a, Part b) { return _mm256_mul_ps(a, b); }
[[gnu::always_inline]] inline Part multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline Float multiply_add(const Float& a, const Float& b, const Float& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
[[gnu::always_inline]] inline Part to_lanes(Integers v) { return _mm256_cvtepi32_ps(v); }
[[gnu::always_inline]] inline void store_lanes(float* p, Part v) { _mm256_storeu_ps(p, v); }
[[gnu::always_inline]] inline void store_lanes(float* p, const Float& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}

[[gnu::always_inline]] inline __m128i load_bytes(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

template <WeightType type, typename Lanes>
[[gnu::always_inline]] inline Lanes load_lanes(const std::byte* p) {
  if constexpr (sizeof(Lanes) == sizeof(Float)) {
    constexpr std::size_t part = sizeof(Part) / (type == WeightType::f32 ? 1 : 2);
    return {load_lanes<type, Part>(p), load_lanes<type, Part>(p + part)};
  } else if constexpr (type == WeightType::f32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  } else if constexpr (type == WeightType::f16) {
    return _mm256_cvtph_ps(load_bytes(p));
  } else {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes(p)), 16));
  }
}

[[gnu::always_inline]] inline __m128i load_8_bytes(const std::byte* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
[[gnu::always_inline]] inline Part part_from_u8(const std::byte* p) {
  return to_lanes(_mm256_cvtepu8_epi32(load_8_bytes(p)));
}
[[gnu::always_inline]] inline Part part_from_i8(const std::byte* p) {
  return to_lanes(_mm256_cvtepi8_epi32(load_8_bytes(p)));
}

[[gnu::always_inline]] inline __m256i load_32(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

[[gnu::always_inline]] inline __m256i low_nibbles(__m256i bytes) {
  return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}
[[gnu::always_inline]] inline __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

// Group g of a part, of nibbles.
template <int g, int part>
[[gnu::always_inline]] inline __m256i nibble_group(const std::byte* nibbles) {
  const __m256i both = load_32(nibbles + g % 4 * layout::kGroupBytes + part * 32);
  if constexpr (g < 4) return low_nibbles(both);
  return high_nibbles(both);
}

// The unsigned bytes of group g of a part.
template <WeightType type, int g, int part>
[[gnu::always_inline]] inline __m256i weight_group(const std::byte* block) {
  if constexpr (type == WeightType::q5_0) {
    std::uint32_t fifth;
    std::memcpy(&fifth, block + g * sizeof(std::uint64_t) + part * 4, sizeof fifth);
    // Byte i gets bit i: every byte receives the right byte of `fifth`, then its own bit is singled out.
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<std::int32_t>(fifth)),
                            _mm256_setr_epi64x(0, 0x0101010101010101LL, 0x0202020202020202LL, 0x0303030303030303LL));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_or_si256(nibble_group<g, part>(block + layout::kFifthBits),
                           _mm256_and_si256(set, _mm256_set1_epi8(16)));
  } else if constexpr (type == WeightType::q6_k) {
    constexpr int f = g % 4;
    __m256i upper = load_32(block + g / 4 * layout::kGroupBytes + part * 32);
    if constexpr (f < 2) upper = _mm256_slli_epi16(upper, 4 - 2 * f);
    if constexpr (f > 2) upper = _mm256_srli_epi16(upper, 2 * f - 4);
    return _mm256_or_si256(nibble_group<g, part>(block + layout::kUpperBits),
                           _mm256_and_si256(upper, _mm256_set1_epi8(0x30)));
  } else {
    return nibble_group<g, part>(block);
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

// Groups whose int16 sums fit: 2 * groups * largest * 127 <= 32767.
template <WeightType type>
constexpr int summed_groups() {
  if (type == WeightType::q6_k) return 2;  // weight <= 63
  if (type == WeightType::q5_0) return 4;  // weight <= 31
  return 8;                                // nibble <= 15
}

[[gnu::always_inline]] inline __m256i broadcast_four(const std::int8_t* quants) {
  std::int32_t four;
  std::memcpy(&four, quants, sizeof four);
  return _mm256_set1_epi32(four);
}

// A sum that has to be there before what comes next: GCC would compute the products of a whole block before it adds
// them, and keep them on the stack.
[[gnu::always_inline]] inline void settle(__m256i& sum) { asm("" : "+x"(sum)); }

[[gnu::always_inline]] inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

template <WeightType type, int R>
[[gnu::always_inline]] inline void start_dot(const Start* starts, std::int64_t start_stride, Integers (&dot)[R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    dot[r] = zero_point<type>() == 0 ? _mm256_setzero_si256() : _mm256_set1_epi32(starts[r * start_stride].whole);
  }
}

template <WeightType type, int part, int R, int first_group, int... g>
[[gnu::always_inline]] inline void dot_groups(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                              const Start* starts, std::int64_t start_stride, Integers (&dot)[R],
                                              std::integer_sequence<int, g...>) {
  constexpr int summed = summed_groups<type>();
  start_dot<type>(starts, start_stride, dot);
  __m256i pairs[R];
  const auto add = [&]<int group>(std::integral_constant<int, group>) __attribute__((always_inline)) {
    const __m256i w = weight_group<type, group, part>(block);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i products = _mm256_maddubs_epi16(w, broadcast_four(quants + r * stride + group * 4));
      pairs[r] = group % summed == 0 ? products : _mm256_add_epi16(pairs[r], products);
      settle(pairs[r]);
      if constexpr (group % summed == summed - 1) dot[r] = _mm256_add_epi32(dot[r], widen(pairs[r]));
    }
  };
  (add(std::integral_constant<int, first_group + g>()), ...);
}

// q8_0: bytes are 16 * high + low.
template <int part, int R, int... g>
[[gnu::always_inline]] inline void dot_bytes(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[R],
                                             std::integer_sequence<int, g...>) {
  __m256i low[R];
  __m256i high[R];
  const auto add = [&]<int group>(std::integral_constant<int, group>) __attribute__((always_inline)) {
    const __m256i bytes = load_32(block + group * layout::kGroupBytes + part * 32);
    const __m256i low_weights = low_nibbles(bytes);
    const __m256i high_weights = high_nibbles(bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i four = broadcast_four(quants + r * stride + group * 4);
      const __m256i low_products = _mm256_maddubs_epi16(low_weights, four);
      const __m256i high_products = _mm256_maddubs_epi16(high_weights, four);
      low[r] = group == 0 ? low_products : _mm256_add_epi16(low[r], low_products);
      high[r] = group == 0 ? high_products : _mm256_add_epi16(high[r], high_products);
      settle(low[r]);
      settle(high[r]);
    }
  };
  (add(std::integral_constant<int, g>()), ...);
  start_dot<WeightType::q8_0>(starts, start_stride, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i sixteenfold = _mm256_madd_epi16(high[r], _mm256_set1_epi16(16));
    dot[r] = _mm256_add_epi32(dot[r], _mm256_add_epi32(sixteenfold, widen(low[r])));
  }
}

template <WeightType type, int part, int R>
[[gnu::always_inline]] inline void dot_block(Place block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[1][R]) {
  constexpr auto groups = std::make_integer_sequence<int, layout::kGroups>();
  if constexpr (type == WeightType::q8_0) {
    dot_bytes<part>(block.at, quants, stride, starts, start_stride, dot[0], groups);
  } else {
    dot_groups<type, part, R, 0>(block.at, quants, stride, starts, start_stride, dot[0], groups);
  }
}

template <int half, int part, int R>
[[gnu::always_inline]] inline void dot_half(Place block, const std::int8_t* quants, std::int64_t stride,
                                            const Start* starts, std::int64_t start_stride, Integers (&dot)[1][R]) {
  constexpr auto groups = std::make_integer_sequence<int, layout::kGroups / 2>();
  dot_groups<WeightType::q6_k, part, R, half * 4>(block.at, quants, stride, starts, start_stride, dot[0], groups);
}

template <bool coarse, int whole, int part, int R>
[[gnu::always_inline]] inline void dot_split(Place panel, Place rest_of_panel, const std::int8_t* quants,
                                             std::int64_t stride, const Start* starts, std::int64_t start_stride,
                                             Integers (&dots)[1][R]) {
  Integers(&dot)[R] = dots[0];
  __m256i low[R];
  __m256i high[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
  const auto add = [&](__m256i nibbles, int group, __m256i(&sum)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i four = broadcast_four(quants + r * stride + group * 4);
      sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(nibbles, four));
      settle(sum[r]);
    }
  };
  const std::byte* block = panel.at + part * 32;
  const std::byte* rest = rest_of_panel.at + part * 32;
#pragma GCC unroll 8
  for (int g = 0; g < whole; ++g) {
    const __m256i bytes = load_32(block + g * layout::kGroupBytes);
    add(low_nibbles(bytes), g, low);
    add(high_nibbles(bytes), g, high);
  }
  block += whole * layout::kGroupBytes;
  constexpr int pairs = (layout::kGroups - whole) / 2;
#pragma GCC unroll 4
  for (int j = 0; j < pairs; ++j) {
    const __m256i upper = load_32(block + j * layout::kGroupBytes);
    add(low_nibbles(upper), whole + j, high);
    add(high_nibbles(upper), whole + pairs + j, high);
    if constexpr (!coarse) {
      const __m256i lower = load_32(rest + j * layout::kGroupBytes);
      add(low_nibbles(lower), whole + j, low);
      add(high_nibbles(lower), whole + pairs + j, low);
    }
  }
  start_dot<WeightType::q8_0>(starts, start_stride, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i sixteenfold = _mm256_madd_epi16(high[r], _mm256_set1_epi16(16));
    dot[r] = _mm256_add_epi32(dot[r], sixteenfold);
    if constexpr (whole > 0 || !coarse) dot[r] = _mm256_add_epi32(dot[r], widen(low[r]));
  }
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx2

}  // namespace draftwerk::cpu

#endif
