// The layout of weight_layout.h, read: by fragments for tensor cores, and a value at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device.cuh"
#include "backend/cuda/weight_layout.h"

namespace draftwerk::cuda {

// Integers of up to 8 bits are exact in bfloat16. 128 + i has i in the low 7 bits of its pattern, so that an integer
// becomes a float by a mask, the bits of 128 and one subtraction.
inline constexpr std::uint32_t kBf16Of128 = 0x43004300U;

/// Bytes 0 and 2 of a word, signed.
__device__ __forceinline__ std::uint32_t int8_pair(std::uint32_t word) {
  // 128 + the low 7 bits, less 256 where the sign bit is set and 128 where it is not.
  return subtract_bf16x2((word & 0x007F007FU) | kBf16Of128, (word & 0x00800080U) | kBf16Of128);
}
/// Nibbles 0 and 4 of a word, less 8.
__device__ __forceinline__ std::uint32_t int4_pair(std::uint32_t word) {
  constexpr std::uint32_t kBf16Of136 = 0x43084308U;
  return subtract_bf16x2((word & 0x000F000FU) | kBf16Of128, kBf16Of136);
}

/// Bytes 1 and 3 of a word, of e4m3 that is not NaN. Its exponent and mantissa become the low ones of a bfloat16, which
/// is the number divided by 2^120, the difference in bias, subnormal or not: multiplying takes that back exactly.
__device__ __forceinline__ std::uint32_t fp8_pair(std::uint32_t word) {
  constexpr std::uint32_t kBf16Of2To120 = 0x7B807B80U;
  return multiply_bf16x2((word & 0x80008000U) | (word >> 4 & 0x07F007F0U), kBf16Of2To120);
}

/// The A operand of a step of 16 columns as integers: from the two words of an int8 weight,
__device__ __forceinline__ void unpack_int8(std::uint32_t first, std::uint32_t second, std::uint32_t (&a)[4]) {
  a[0] = int8_pair(first);
  a[1] = int8_pair(first >> 8);
  a[2] = int8_pair(second);
  a[3] = int8_pair(second >> 8);
}
/// and from the word of an int4 weight.
__device__ __forceinline__ void unpack_int4(std::uint32_t word, std::uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = int4_pair(word >> 4 * i);
}

/// As what their bits mean: from the two words of an fp8 weight.
__device__ __forceinline__ void unpack_fp8(std::uint32_t first, std::uint32_t second, std::uint32_t (&a)[4]) {
  a[0] = fp8_pair(first << 8);
  a[1] = fp8_pair(first);
  a[2] = fp8_pair(second << 8);
  a[3] = fp8_pair(second);
}

/// Bytes of a panel of fp8 weights.
__device__ __forceinline__ std::int64_t fp8_panel_bytes(const MatrixView& matrix) {
  return static_cast<std::int64_t>(matrix.chunks) * Chunk<WeightFormat::fp8>::kBytes + kRowScaleBytes;
}
/// The scale of a row of one.
__device__ __forceinline__ float row_scale(const std::byte* panel, std::int64_t panel_bytes, int row_of_panel) {
  return reinterpret_cast<const float*>(panel + panel_bytes - kRowScaleBytes)[row_of_panel];
}
/// A finished sum of products, times the scale of the row where the format has one: one multiplication, after all
/// additions, whatever kernel it is.
template <WeightFormat kFormat>
__device__ __forceinline__ float times_row_scale(float sum, const std::byte* panel, std::int64_t panel_bytes,
                                                 int row_of_panel) {
  if constexpr (Chunk<kFormat>::kRowScales) return __fmul_rn(sum, row_scale(panel, panel_bytes, row_of_panel));
  return sum;
}
/// The same of a row of any matrix.
__device__ __forceinline__ float times_row_scale(float sum, const MatrixView& matrix, int row) {
  if (matrix.format != WeightFormat::fp8) return sum;
  const std::int64_t panel_bytes = fp8_panel_bytes(matrix);
  const std::byte* panel = matrix.data + row / kPanelRows * panel_bytes;
  return times_row_scale<WeightFormat::fp8>(sum, panel, panel_bytes, row % kPanelRows);
}

/// This lane's part of a step of 16 columns of a panel, from global memory: two bfloat16 in each register, which are
/// the values, or times the scales of the upper (g) and lower row (g + 8) are. The scales of whole rows are left out.
__device__ __forceinline__ void step_fragment(const MatrixView& matrix, int panel, int step, std::uint32_t (&a)[4],
                                              float& upper_scale, float& lower_scale) {
  upper_scale = lower_scale = 1.0F;
  if (matrix.format == WeightFormat::bf16) {
    using C = Chunk<WeightFormat::bf16>;
    const std::byte* steps = matrix.data + static_cast<std::int64_t>(panel) * matrix.chunks * C::kBytes;
    const uint4 words = *reinterpret_cast<const uint4*>(steps + step * kFragmentBytes + lane() * 16);
    a[0] = words.x;
    a[1] = words.y;
    a[2] = words.z;
    a[3] = words.w;
    return;
  }
  const int block = step % 4 / 2;
  if (matrix.format == WeightFormat::fp8) {
    const std::byte* own = matrix.data + panel * fp8_panel_bytes(matrix) + step / 2 * kFragmentBytes;
    const uint2 words = *reinterpret_cast<const uint2*>(own + lane() * 16 + step % 2 * 8);
    unpack_fp8(words.x, words.y, a);
    return;
  }
  const std::int64_t chunk = static_cast<std::int64_t>(panel) * matrix.chunks + step / 4;
  const std::byte* scales;
  if (matrix.format == WeightFormat::int8) {
    using C = Chunk<WeightFormat::int8>;
    const std::byte* own = matrix.data + chunk * C::kBytes + block * kFragmentBytes + lane() * 16;
    const uint2 words = *reinterpret_cast<const uint2*>(own + step % 2 * 8);
    unpack_int8(words.x, words.y, a);
    scales = matrix.data + chunk * C::kBytes + C::kFragments * kFragmentBytes;
  } else {
    using C = Chunk<WeightFormat::int4>;
    const std::byte* own = matrix.data + chunk * C::kBytes + lane() * 16;
    unpack_int4(*reinterpret_cast<const std::uint32_t*>(own + step % 4 * 4), a);
    scales = matrix.data + chunk * C::kBytes + C::kFragments * kFragmentBytes;
  }
  const auto both = *reinterpret_cast<const std::uint32_t*>(scales + lane() / 4 * 8 + block * 4);
  upper_scale = f16_to_float(static_cast<std::uint16_t>(both & 0xFFFFU));
  lower_scale = f16_to_float(static_cast<std::uint16_t>(both >> 16));
}

/// The value at (row, column).
__device__ __forceinline__ float weight_value(const MatrixView& matrix, int row, int column) {
  const int in_panel = row % kPanelRows;
  const int of_lane = (in_panel % 8 * 4 + column % 8 / 2) * 16;
  const int reg = column % 16 / 8 * 2 + in_panel / 8;
  const int within = column % 2;
  const auto panel = static_cast<std::int64_t>(row / kPanelRows) * matrix.chunks;
  if (matrix.format == WeightFormat::bf16) {
    const std::byte* steps = matrix.data + panel * Chunk<WeightFormat::bf16>::kBytes;
    const std::byte* at = steps + column / 16 * kFragmentBytes + of_lane + reg * 4 + within * 2;
    return bf16_to_float(*reinterpret_cast<const std::uint16_t*>(at));
  }
  const int block = column % 64 / kBlockColumns;
  const int step = column % kBlockColumns / 16;
  const int of_word = step * 8 + reg / 2 * 4 + within * 2 + reg % 2;  // of int8 and fp8
  if (matrix.format == WeightFormat::fp8) {
    const std::byte* own = matrix.data + row / kPanelRows * fp8_panel_bytes(matrix);
    const std::byte* at = own + column / kBlockColumns * kFragmentBytes + of_lane + of_word;
    const std::uint32_t value = fp8_pair(std::uint32_t{*reinterpret_cast<const std::uint8_t*>(at)} << 8);
    return times_row_scale(bf16_to_float(static_cast<std::uint16_t>(value)), matrix, row);
  }
  const int of_scale = in_panel % 8 * 8 + block * 4 + in_panel / 8 * 2;
  const std::byte* scales;
  int q;
  if (matrix.format == WeightFormat::int8) {
    const std::byte* chunk = matrix.data + (panel + column / 64) * Chunk<WeightFormat::int8>::kBytes;
    scales = chunk + Chunk<WeightFormat::int8>::kFragments * kFragmentBytes;
    q = *reinterpret_cast<const std::int8_t*>(chunk + block * kFragmentBytes + of_lane + of_word);
  } else {
    const std::byte* chunk = matrix.data + (panel + column / 64) * Chunk<WeightFormat::int4>::kBytes;
    scales = chunk + Chunk<WeightFormat::int4>::kFragments * kFragmentBytes;
    const auto word = *reinterpret_cast<const std::uint32_t*>(chunk + of_lane + (block * 2 + step) * 4);
    q = static_cast<int>(word >> 4 * (reg + within * 4) & 15U) - 8;
  }
  return __fmul_rn(f16_to_float(*reinterpret_cast<const std::uint16_t*>(scales + of_scale)), static_cast<float>(q));
}

}  // namespace draftwerk::cuda
