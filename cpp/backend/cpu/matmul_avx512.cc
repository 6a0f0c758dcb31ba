// AVX-512 with VNNI: one register is one group of a panel, 16 rows x 4 columns, and vpdpbusd adds its products with
// four broadcast activations to 16 accumulators.
#if defined(__x86_64__)

#define DRAFTWERK_ISA avx512
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

namespace avx512 {

namespace {

#include "backend/cpu/panels_avx512.inl"

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
  each_split_group<coarse, whole>(block, rest, add);
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace avx512

}  // namespace draftwerk::cpu

#endif
