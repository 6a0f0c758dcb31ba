// The types that weights are stored in: their names and their block layouts in a checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace draftwerk {

/// How a weight's values are stored. The types of blocks are those of GGUF and mean exactly what ggml defines. A row of
/// f8_e4m3 is its scale, a float32, and then a byte for each value: e4m3 without infinities (0x7F and 0xFF are NaN),
/// times the scale.
enum class WeightType : std::uint8_t { f32, f16, bf16, q8_0, q4_0, q5_0, q4_k, q6_k, f8_e4m3 };

/// The GGUF name in lower case ("q5_0").
[[nodiscard]] const char* weight_type_name(WeightType type);
/// The type of that name; throws std::invalid_argument for an unknown one.
[[nodiscard]] WeightType parse_weight_type(const std::string& name);

/// f32, f16 or bf16.
[[nodiscard]] bool is_float(WeightType type);
/// Columns per block as the file stores them: 256 for q4_k and q6_k, 32 for the other types of GGUF's that are
/// quantised, 1 for floats and f8_e4m3.
[[nodiscard]] int block_columns(WeightType type);
/// Bytes per such block.
[[nodiscard]] std::size_t block_bytes(WeightType type);
/// Bytes in front of the blocks of a row: the scale of f8_e4m3; 0 for all others.
[[nodiscard]] std::size_t row_scale_bytes(WeightType type);
/// Bytes of one row of `columns` values as the file stores it; throws std::invalid_argument if they do not fill whole
/// blocks, or if there are none.
[[nodiscard]] std::size_t stored_row_bytes(WeightType type, std::int64_t columns);

}  // namespace draftwerk
