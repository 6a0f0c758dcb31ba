#include "backend/cpu/quantized_blocks.h"

#include <bit>
#include <cstring>
#include <limits>

namespace draftwerk::cpu {

namespace {

std::uint8_t byte_at(const std::byte* p, int i) { return std::to_integer<std::uint8_t>(p[i]); }
std::int8_t signed_at(const std::byte* p, int i) { return static_cast<std::int8_t>(byte_at(p, i)); }

std::uint16_t word_at(const std::byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

float half_at(const std::byte* p) { return half_to_float(word_at(p)); }

// { f16 d; i8 q[32] }
void dequantize_q8_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(signed_at(block + 2, i));
}

// { f16 d; u8 q[16] }: low nibbles are elements 0..15, high nibbles 16..31.
void dequantize_q4_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) {
    const int q = i < 16 ? byte_at(block + 2, i) & 15 : byte_at(block + 2, i - 16) >> 4;
    out[i] = d * static_cast<float>(q - 8);
  }
}

// { f16 d; u32 fifth bits; u8 q[16] }
void dequantize_q5_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) {
    const int low = i < 16 ? byte_at(block + 6, i) & 15 : byte_at(block + 6, i - 16) >> 4;
    const int fifth = (byte_at(block + 2, i / 8) >> (i % 8)) & 1;
    out[i] = d * static_cast<float>((low | fifth << 4) - 16);
  }
}

// { f16 d; f16 dmin; u8 packed[12]; u8 q[128] }: eight blocks of 32, each with a 6-bit scale and a 6-bit min.
void dequantize_q4_k(const std::byte* block, float* out) {
  const float d = half_at(block);
  const float dmin = half_at(block + 2);
  const std::byte* packed = block + 4;
  for (int b = 0; b < 8; ++b) {
    int scale;
    int min;
    if (b < 4) {
      scale = byte_at(packed, b) & 63;
      min = byte_at(packed, b + 4) & 63;
    } else {
      scale = (byte_at(packed, b + 4) & 15) | (byte_at(packed, b - 4) >> 6) << 4;
      min = (byte_at(packed, b + 4) >> 4) | (byte_at(packed, b) >> 6) << 4;
    }
    for (int i = 0; i < 32; ++i) {
      const int both = byte_at(block + 16, b / 2 * 32 + i);
      const int q = b % 2 == 0 ? both & 15 : both >> 4;
      out[b * 32 + i] = d * static_cast<float>(scale) * static_cast<float>(q) - dmin * static_cast<float>(min);
    }
  }
}

// { u8 low[128]; u8 high[64]; i8 scales[16]; f16 d }: two halves of 128, sixteen scales of 16 elements.
void dequantize_q6_k(const std::byte* block, float* out) {
  const float d = half_at(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int low_byte = byte_at(block, half * 64 + quarter % 2 * 32 + i % 32);
    const int low = quarter < 2 ? low_byte & 15 : low_byte >> 4;
    const int high = (byte_at(block + 128, half * 32 + i % 32) >> (2 * quarter)) & 3;
    const float scale = d * static_cast<float>(signed_at(block + 192, i / 16));
    out[i] = scale * static_cast<float>((low | high << 4) - 32);
  }
}

}  // namespace

float half_to_float(std::uint16_t bits) {
  const std::uint32_t exponent = (bits >> 10) & 31U;
  const std::uint32_t mantissa = bits & 1023U;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24F;
  } else {
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;  // 112 = 127 - 15, the difference in bias
    magnitude = std::bit_cast<float>(wide << 23 | mantissa << 13);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

std::uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half;
  if (magnitude > 0x7F800000U) {
    half = 0x7E00U;  // NaN
  } else if (magnitude >= 0x477FF000U) {
    half = 0x7C00U;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000U) {
    // Subnormal half: adding 0.5 leaves the value, rounded to multiples of 2^-24, in the low mantissa bits.
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F000000U;
  } else {
    half = (magnitude + 0xFFFU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  }
  return static_cast<std::uint16_t>(half | sign);
}

float bfloat_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t float_to_bfloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);  // quiet NaN
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

float e4m3_to_float(std::uint8_t bits) {
  const std::uint32_t magnitude = bits & 0x7FU;
  float value;
  if (magnitude == 0x7F) {
    value = std::numeric_limits<float>::quiet_NaN();
  } else if (magnitude < 8) {
    value = static_cast<float>(magnitude) * 0x1p-9F;
  } else {
    value = std::bit_cast<float>((magnitude << 20) + (120U << 23));  // 120 = 127 - 7, the difference in bias
  }
  return (bits & 0x80) != 0 ? -value : value;
}

std::uint8_t float_to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto magnitude = std::bit_cast<float>(bits & 0x7FFFFFFFU);
  std::uint32_t small;
  if (!(magnitude < 448.0F)) {
    small = 0x7E;
  } else if (magnitude < 0x1p-6F) {
    // Subnormal: adding 2^14 leaves the value, rounded to multiples of 2^-9, in the low mantissa bits.
    small = std::bit_cast<std::uint32_t>(magnitude + 0x1p14F) - std::bit_cast<std::uint32_t>(0x1p14F);
  } else {
    const std::uint32_t wide = std::bit_cast<std::uint32_t>(magnitude);
    small = (wide + 0x7FFFFU + ((wide >> 20) & 1U) - (120U << 23)) >> 20;
  }
  return static_cast<std::uint8_t>(small | (bits >> 24 & 0x80U));
}

void dequantize(WeightType type, const std::byte* source, std::int64_t elements, float* out) {
  const int columns = block_columns(type);
  const std::size_t bytes = block_bytes(type);
  float row_scale = 1.0F;
  std::memcpy(&row_scale, source, row_scale_bytes(type));
  source += row_scale_bytes(type);
  for (std::int64_t first = 0; first + columns <= elements; first += columns, source += bytes, out += columns) {
    switch (type) {
      case WeightType::f32:
        std::memcpy(out, source, sizeof *out);
        break;
      case WeightType::f16:
        *out = half_at(source);
        break;
      case WeightType::bf16:
        *out = bfloat_to_float(word_at(source));
        break;
      case WeightType::q8_0:
        dequantize_q8_0(source, out);
        break;
      case WeightType::q4_0:
        dequantize_q4_0(source, out);
        break;
      case WeightType::q5_0:
        dequantize_q5_0(source, out);
        break;
      case WeightType::q4_k:
        dequantize_q4_k(source, out);
        break;
      case WeightType::q6_k:
        dequantize_q6_k(source, out);
        break;
      case WeightType::f8_e4m3:
        *out = row_scale * e4m3_to_float(byte_at(source, 0));
        break;
    }
  }
}

}  // namespace draftwerk::cpu
