// Random weights in checkpoint form: any bits in the values, scales of ordinary size.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/weight_type.h"

namespace draftwerk::cpu {

inline constexpr WeightType kWeightTypes[] = {WeightType::f32,  WeightType::f16,  WeightType::bf16,
                                              WeightType::q8_0, WeightType::q4_0, WeightType::q5_0,
                                              WeightType::q4_k, WeightType::q6_k, WeightType::f8_e4m3};
/// Those whose rows are blocks and nothing else, which is what panels of the CPU hold.
inline constexpr std::span<const WeightType, 8> kBlockTypes = std::span(kWeightTypes).first<8>();

inline std::vector<float> random_values(std::int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

/// `elements` weights of about unit size, of a type of blocks; every bit pattern of the quantised values occurs (-128
/// in q8_0 too).
inline std::vector<std::byte> random_blocks(WeightType type, std::int64_t elements, std::mt19937& random) {
  const std::size_t bytes = block_bytes(type);
  std::vector<std::byte> blocks(static_cast<std::size_t>(elements / block_columns(type)) * bytes);
  std::normal_distribution<float> normal;
  const auto put_half = [&](std::byte* p, float size) {
    const std::uint16_t bits = float_to_half(size * normal(random));
    std::memcpy(p, &bits, sizeof bits);
  };
  for (std::byte& byte : blocks) byte = static_cast<std::byte>(random() & 255U);
  for (std::size_t at = 0; at < blocks.size(); at += bytes) {
    std::byte* block = blocks.data() + at;
    const float value = normal(random);
    switch (type) {
      case WeightType::f32:
        std::memcpy(block, &value, sizeof value);
        break;
      case WeightType::f16:
        put_half(block, 1.0F);
        break;
      case WeightType::bf16: {
        const std::uint16_t bits = float_to_bfloat(value);
        std::memcpy(block, &bits, sizeof bits);
        break;
      }
      case WeightType::q8_0:
        put_half(block, 1.0F / 100);
        break;
      case WeightType::q4_0:
        put_half(block, 1.0F / 8);
        break;
      case WeightType::q5_0:
        put_half(block, 1.0F / 16);
        break;
      case WeightType::q4_k:
        put_half(block, 1.0F / 500);
        put_half(block + 2, 1.0F / 100);
        break;
      case WeightType::q6_k:
        put_half(block + 208, 1.0F / 2000);
        break;
      case WeightType::f8_e4m3:
        break;
    }
  }
  return blocks;
}

/// Rows of weights of about unit size or less, of any type; every number of e4m3 occurs.
inline std::vector<std::byte> random_rows(WeightType type, std::int64_t rows, std::int64_t columns,
                                          std::mt19937& random) {
  if (type != WeightType::f8_e4m3) return random_blocks(type, rows * columns, random);
  std::vector<std::byte> bytes(static_cast<std::size_t>(rows) * stored_row_bytes(type, columns));
  std::normal_distribution<float> normal;
  std::byte* to = bytes.data();
  for (std::int64_t r = 0; r < rows; ++r) {
    const float scale = std::abs(normal(random)) / 100;
    std::memcpy(to, &scale, sizeof scale);
    to += sizeof scale;
    for (std::int64_t c = 0; c < columns; ++c) {
      const auto bits = static_cast<std::uint8_t>(random());
      *to++ = static_cast<std::byte>((bits & 0x7F) == 0x7F ? 0 : bits);
    }
  }
  return bytes;
}

/// What rows of any type mean.
inline std::vector<float> values_of_rows(WeightType type, std::int64_t rows, std::int64_t columns,
                                         const std::vector<std::byte>& bytes) {
  std::vector<float> values(static_cast<std::size_t>(rows * columns));
  const std::size_t row_bytes = stored_row_bytes(type, columns);
  for (std::int64_t r = 0; r < rows; ++r) {
    dequantize(type, bytes.data() + static_cast<std::size_t>(r) * row_bytes, columns, values.data() + r * columns);
  }
  return values;
}

}  // namespace draftwerk::cpu
