// AVX2: a register holds eight of a panel's sixteen rows, a half. Both halves at once share what is loaded of
// activations and what a block takes besides, which pays as long as their sums fit in registers. There is no four-way
// int8 dot product: vpmaddubsw makes int16 sums of two products, and vpmaddwd widens them. The int16 sums never
// saturate: they are widened before 2 * groups * (largest weight) * 128 could pass 32767. Bytes of q8_0 are multiplied
// as two nibbles, whose products may be summed over a whole block.
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
constexpr int kFloatRows = 4;

// What a tile keeps of its rows is mostly in 16 registers, beside weights and a product.
template <WeightType type, Form form>
constexpr RowTile tile_for_few() {
  constexpr bool two_sums_of_all = type == WeightType::q8_0 && form == Form::packed;
  return {2, two_sums_of_all ? 2 : 4};
}
template <WeightType type, Form form>
constexpr RowTile tile_for_many() {
  if (type == WeightType::q8_0 && form == Form::packed) return {1, 6};
  // Their bits are put together by so many instructions that more rows have to share them.
  if (type == WeightType::q5_0 || type == WeightType::q6_k) return {1, 8};
  return tile_for_few<type, form>();
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
template <int g>
[[gnu::always_inline]] inline __m256i nibble_group(const std::byte* nibbles, int part) {
  const __m256i both = load_32(nibbles + g % 4 * layout::kGroupBytes + part * 32);
  if constexpr (g < 4) return low_nibbles(both);
  return high_nibbles(both);
}

// The unsigned bytes of group g of a part.
template <WeightType type, int g>
[[gnu::always_inline]] inline __m256i weight_group(const std::byte* block, int part) {
  if constexpr (type == WeightType::q5_0) {
    std::uint32_t fifth;
    std::memcpy(&fifth, block + g * sizeof(std::uint64_t) + part * 4, sizeof fifth);
    // Byte i gets bit i: every byte receives the right byte of `fifth`, then its own bit is singled out.
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<std::int32_t>(fifth)),
                            _mm256_setr_epi64x(0, 0x0101010101010101LL, 0x0202020202020202LL, 0x0303030303030303LL));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_or_si256(nibble_group<g>(block + layout::kFifthBits, part),
                           _mm256_and_si256(set, _mm256_set1_epi8(16)));
  } else if constexpr (type == WeightType::q6_k) {
    constexpr int f = g % 4;
    __m256i upper = load_32(block + g / 4 * layout::kGroupBytes + part * 32);
    if constexpr (f < 2) upper = _mm256_slli_epi16(upper, 4 - 2 * f);
    if constexpr (f > 2) upper = _mm256_srli_epi16(upper, 2 * f - 4);
    return _mm256_or_si256(nibble_group<g>(block + layout::kUpperBits, part),
                           _mm256_and_si256(upper, _mm256_set1_epi8(0x30)));
  } else {
    return nibble_group<g>(block, part);
  }
}

// Groups whose int16 sums fit: 2 * groups * largest * 128 <= 32767.
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

template <WeightType type, int P, int R>
[[gnu::always_inline]] inline void start_dot(const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i start =
        kZeroPoint<type> == 0 ? _mm256_setzero_si256() : _mm256_set1_epi32(starts[r * start_stride].whole);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) dot[p][r] = start;
  }
}

[[gnu::always_inline]] inline void add_pairs(__m256i weights, __m256i four, __m256i& pairs) {
  pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights, four));
  settle(pairs);
}

// To the sums of pairs, the products of a group of P parts.
template <int P, int R>
[[gnu::always_inline]] inline void add_group(const __m256i (&weights)[P], int group, const std::int8_t* quants,
                                             std::int64_t stride, __m256i (&pairs)[P][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i four = broadcast_four(quants + r * stride + group * 4);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) add_pairs(weights[p], four, pairs[p][r]);
  }
}

// The groups from `g` to `end`, of which each sum of pairs holds as many as fit.
template <WeightType type, int first, int g, int end, int P, int R>
[[gnu::always_inline]] inline void add_groups(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                              __m256i (&pairs)[P][R], Integers (&dot)[P][R]) {
  constexpr int summed = summed_groups<type>();
  __m256i weights[P];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) weights[p] = weight_group<type, g>(block, first + p);
  add_group(weights, g, quants, stride, pairs);
  if constexpr ((g + 1) % summed == 0) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        dot[p][r] = _mm256_add_epi32(dot[p][r], widen(pairs[p][r]));
        pairs[p][r] = _mm256_setzero_si256();
      }
    }
  }
  if constexpr (g + 1 < end) add_groups<type, first, g + 1, end>(block, quants, stride, pairs, dot);
}

// The nibbles of a group's bytes, of P parts.
template <int P>
struct Nibbles {
  __m256i low[P];
  __m256i high[P];
};

template <int first, int P>
[[gnu::always_inline]] inline Nibbles<P> load_nibbles(const std::byte* bytes) {
  Nibbles<P> nibbles;
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    const __m256i both = load_32(bytes + (first + p) * 32);
    nibbles.low[p] = low_nibbles(both);
    nibbles.high[p] = high_nibbles(both);
  }
  return nibbles;
}

// Sums of the products of low and of high nibbles.
template <int P, int R>
struct NibbleSums {
  __m256i low[P][R] = {};
  __m256i high[P][R] = {};
};

// Adds the products of whole bytes: 16 * high + low.
template <int first, int P, int R>
[[gnu::always_inline]] inline void add_bytes(const std::byte* bytes, int group, const std::int8_t* quants,
                                             std::int64_t stride, NibbleSums<P, R>& sums) {
  const Nibbles<P> weights = load_nibbles<first, P>(bytes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i four = broadcast_four(quants + r * stride + group * 4);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      add_pairs(weights.low[p], four, sums.low[p][r]);
      add_pairs(weights.high[p], four, sums.high[p][r]);
    }
  }
}

// Adds the products of two groups, whose halves of one kind lie together, to the sums of that kind.
template <int first, int P, int R>
[[gnu::always_inline]] inline void add_nibbles(const std::byte* nibbles, int group, int other_group,
                                               const std::int8_t* quants, std::int64_t stride, __m256i (&sums)[P][R]) {
  const Nibbles<P> weights = load_nibbles<first, P>(nibbles);
  add_group(weights.low, group, quants, stride, sums);
  add_group(weights.high, other_group, quants, stride, sums);
}

template <bool coarse, int whole, int first, int P, int R>
[[gnu::always_inline]] inline void dot_split(Place panel, Place rest, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  NibbleSums<P, R> sums;
#pragma GCC unroll 8
  for (int g = 0; g < whole; ++g) {
    add_bytes<first>(panel.at + g * layout::kGroupBytes, g, quants, stride, sums);
  }
  panel += whole * layout::kGroupBytes;
  constexpr int pairs = (layout::kGroups - whole) / 2;
#pragma GCC unroll 4
  for (int j = 0; j < pairs; ++j) {
    const std::size_t at = j * layout::kGroupBytes;
    add_nibbles<first>(panel.at + at, whole + j, whole + pairs + j, quants, stride, sums.high);
    if constexpr (!coarse) {
      add_nibbles<first>(rest.at + at, whole + j, whole + pairs + j, quants, stride, sums.low);
    }
  }
  start_dot<WeightType::q8_0>(starts, start_stride, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m256i sixteenfold = _mm256_madd_epi16(sums.high[p][r], _mm256_set1_epi16(16));
      dot[p][r] = _mm256_add_epi32(dot[p][r], sixteenfold);
      if constexpr (whole > 0 || !coarse) dot[p][r] = _mm256_add_epi32(dot[p][r], widen(sums.low[p][r]));
    }
  }
}

template <WeightType type, int first, int P, int R>
[[gnu::always_inline]] inline void dot_block(Place block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  if constexpr (type == WeightType::q8_0) {
    dot_split<true, layout::kGroups, first>(block, block, quants, stride, starts, start_stride, dot);
  } else {
    start_dot<type>(starts, start_stride, dot);
    __m256i pairs[P][R] = {};
    add_groups<type, first, 0, layout::kGroups>(block.at, quants, stride, pairs, dot);
  }
}

template <int half, int first, int P, int R>
[[gnu::always_inline]] inline void dot_half(Place block, const std::int8_t* quants, std::int64_t stride,
                                            const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  start_dot<WeightType::q6_k>(starts, start_stride, dot);
  __m256i pairs[P][R] = {};
  add_groups<WeightType::q6_k, first, half * 4, half * 4 + 4>(block.at, quants, stride, pairs, dot);
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx2

}  // namespace draftwerk::cpu

#endif
