// AVX-512 with VNNI: one register is one group of a panel, 16 rows x 4 columns, and vpdpbusd adds its products with
// four broadcast activations to 16 accumulators.
#if defined(__x86_64__)

#define DRAFTWERK_ISA avx512
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/places.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

namespace avx512 {

namespace {

#include "backend/cpu/panels_avx512.inl"

using Part = Float;
using Integers = __m512i;

constexpr int kParts = 1;

// 8 int32 and 8 f32 accumulators, or 12 of each, fit in 32 registers, beside weights, activations and the constants.
constexpr int kFloatRows = 8;
template <WeightType type, Form form>
constexpr RowTile tile_for_few() {
  return {1, 8};
}
// Two panels share every broadcast of activations. With one, loads take longer than products where two of either are
// done in a cycle. Few rows wait for memory, and it streams one panel after the other faster than two at a time.
template <WeightType type, Form form>
constexpr RowTile tile_for_many() {
  return {2, 6};
}

template <typename Lanes>
[[gnu::always_inline]] inline Lanes splat_lanes(float x) {
  return _mm512_set1_ps(x);
}
[[gnu::always_inline]] inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
[[gnu::always_inline]] inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline Float to_lanes(Integers v) { return _mm512_cvtepi32_ps(v); }
[[gnu::always_inline]] inline void store_lanes(float* p, Float v) { _mm512_storeu_ps(p, v); }

// To `dot`, the products of group g of P panels.
template <int P, int R>
[[gnu::always_inline]] inline void add_group(const __m512i (&weights)[P], int g, const std::int8_t* quants,
                                             std::int64_t stride, Integers (&dot)[P][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    std::int32_t four;
    std::memcpy(&four, quants + r * stride + g * 4, sizeof four);
    const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) dot[p][r] = _mm512_dpbusd_epi32(dot[p][r], weights[p], activations);
  }
}

template <WeightType type, int P, int R>
[[gnu::always_inline]] inline void start_dot(const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512i start =
        kZeroPoint<type> == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(starts[r * start_stride].whole);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) dot[p][r] = start;
  }
}

// The groups from `g` to `end`.
template <WeightType type, int g, int end, int P, int R>
[[gnu::always_inline]] inline void add_groups(Place block, const std::int8_t* quants, std::int64_t stride,
                                              Integers (&dot)[P][R]) {
  __m512i weights[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) weights[p] = weight_group<type, g>(block.in(p));
  add_group(weights, g, quants, stride, dot);
  if constexpr (g + 1 < end) add_groups<type, g + 1, end>(block, quants, stride, dot);
}

template <WeightType type, int first, int P, int R>
[[gnu::always_inline]] inline void dot_block(Place block, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  start_dot<type>(starts, start_stride, dot);
  add_groups<type, 0, layout::kGroups>(block, quants, stride, dot);
}

template <int half, int first, int P, int R>
[[gnu::always_inline]] inline void dot_half(Place block, const std::int8_t* quants, std::int64_t stride,
                                            const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  constexpr auto type = WeightType::q6_k;
  start_dot<type>(starts, start_stride, dot);
  add_groups<type, half * 4, half * 4 + 4>(block, quants, stride, dot);
}

template <bool coarse, int whole, int first, int P, int R>
[[gnu::always_inline]] inline void dot_split(Place block, Place rest, const std::int8_t* quants, std::int64_t stride,
                                             const Start* starts, std::int64_t start_stride, Integers (&dot)[P][R]) {
  start_dot<WeightType::q8_0>(starts, start_stride, dot);
  each_split_group<coarse, whole, P>(block, rest,
                                     [&](const __m512i(&weights)[P], int group) __attribute__((always_inline)) {
                                       add_group(weights, group, quants, stride, dot);
                                     });
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx512

}  // namespace draftwerk::cpu

#endif
