// What the checkpoint formats mean: the obvious decoder of each, one element at a time. The fast kernels are tested
// against these, and these against the gguf package.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/weight_type.h"

namespace draftwerk::cpu {

[[nodiscard]] float half_to_float(std::uint16_t bits);
/// To nearest even; overflow becomes infinity.
[[nodiscard]] std::uint16_t float_to_half(float value);
[[nodiscard]] float bfloat_to_float(std::uint16_t bits);
/// To nearest even.
[[nodiscard]] std::uint16_t float_to_bfloat(float value);

/// e4m3 without infinities: 4 bits of exponent, of bias 7, and 3 of mantissa; NaN where all of these are set.
[[nodiscard]] float e4m3_to_float(std::uint8_t bits);
/// To nearest even; 448 where it is larger, with its sign, and for NaN.
[[nodiscard]] std::uint8_t float_to_e4m3(float value);

/// Decodes `elements` values (a multiple of block_columns; the rest of a part block is not written) as ggml defines
/// them (ggml-quants.c, dequantize_row_*), in float32; of f8_e4m3 one row of so many. `source` may be unaligned.
void dequantize(WeightType type, const std::byte* source, std::int64_t elements, float* out);

}  // namespace draftwerk::cpu
