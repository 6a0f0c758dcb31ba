#include "backend/cpu/packing.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backend/cpu/int4.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/split_columns.h"
#include "backend/weight_type.h"

namespace draftwerk::cpu {

namespace {

using namespace layout;

template <typename T>
T read(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <typename T>
void write(std::byte* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

// Panels are written block by block, the 16 rows of a block together, so that the panel is written in order and each
// source row is one of 16 sequential streams. Each function stores row `row` of the block that starts at `panel`.

void pack_q8_0(const std::byte* source, int row, std::byte* panel) {
  write(panel + row * 2, read<std::uint16_t>(source));
  for (int g = 0; g < kGroups; ++g) {
    const auto signs_flipped = read<std::uint32_t>(source + 2 + g * 4) ^ 0x80808080U;  // q + 128
    write(panel + kHalves + g * kGroupBytes + row * 4, signs_flipped);
  }
}

// The file's 16 bytes pair columns c and c + 16, as the panel's nibbles do: groups are copied as they are.
void pack_paired_nibbles(const std::byte* source, int row, std::byte* nibbles) {
  for (int j = 0; j < kGroups / 2; ++j) {
    write(nibbles + j * kGroupBytes + row * 4, read<std::uint32_t>(source + j * 4));
  }
}

void pack_q4_0(const std::byte* source, int row, std::byte* panel) {
  write(panel + row * 2, read<std::uint16_t>(source));
  pack_paired_nibbles(source + 2, row, panel + kHalves);
}

void pack_q5_0(const std::byte* source, int row, std::byte* panel) {
  write(panel + row * 2, read<std::uint16_t>(source));
  const auto fifth = read<std::uint32_t>(source + 2);
  for (int g = 0; g < kGroups; ++g) {
    std::byte* plane = panel + kHalves + g * sizeof(std::uint64_t);
    const std::uint64_t bits = static_cast<std::uint64_t>(fifth >> (4 * g) & 15U) << (4 * row);
    write(plane, read<std::uint64_t>(plane) | bits);
  }
  pack_paired_nibbles(source + 6, row, panel + kHalves + kFifthBits);
}

void pack_q4_k(const std::byte* source, int row, std::byte* panel) {
  write(panel + row * 2, read<std::uint16_t>(source));
  write(panel + kHalves + row * 2, read<std::uint16_t>(source + 2));
  const std::byte* packed = source + 4;
  const auto at = [packed](int i) { return std::to_integer<unsigned>(packed[i]); };
  for (int b = 0; b < kBlocksPerSuper; ++b) {
    std::byte* block = panel + 2 * kHalves + b * kQ4KBlock;
    const unsigned scale = b < 4 ? at(b) & 63U : (at(b + 4) & 15U) | at(b - 4) >> 6 << 4;
    const unsigned min = b < 4 ? at(b + 4) & 63U : at(b + 4) >> 4 | at(b) >> 6 << 4;
    block[row] = static_cast<std::byte>(scale);
    block[kPanel + row] = static_cast<std::byte>(min);
    // The file pairs column c of one block with column c of the next.
    const std::byte* pairs = source + 16 + b / 2 * 32;
    const int shift = b % 2 * 4;
    for (int j = 0; j < kGroups / 2; ++j) {
      const std::uint32_t first = read<std::uint32_t>(pairs + j * 4) >> shift & 0x0F0F0F0FU;
      const std::uint32_t second = read<std::uint32_t>(pairs + 16 + j * 4) >> shift & 0x0F0F0F0FU;
      write(block + 2 * kPanel + j * kGroupBytes + row * 4, first | second << 4);
    }
  }
}

void pack_q6_k(const std::byte* source, int row, std::byte* panel) {
  const std::byte* scales = source + 192;
  write(panel + row * 2, read<std::uint16_t>(source + 208));
  for (int b = 0; b < kBlocksPerSuper; ++b) {
    std::byte* block = panel + kHalves + b * kQ6KBlock;
    block[row] = scales[2 * b];
    block[kPanel + row] = scales[2 * b + 1];
    const int quarter = b % 4;  // of a half of 128 columns
    const std::byte* low = source + b / 4 * 64 + quarter % 2 * 32;
    const std::byte* high = source + 128 + b / 4 * 32;
    const int low_shift = quarter < 2 ? 0 : 4;
    std::byte* upper = block + 2 * kPanel;
    std::byte* nibbles = upper + kUpperBits;
    for (int half = 0; half < 2; ++half) {
      std::uint32_t fields = 0;
      for (int f = 0; f < 4; ++f) {
        const std::uint32_t pairs = read<std::uint32_t>(high + half * 16 + f * 4) >> (2 * quarter) & 0x03030303U;
        fields |= pairs << (2 * f);
      }
      write(upper + half * kGroupBytes + row * 4, fields);
    }
    for (int j = 0; j < kGroups / 2; ++j) {
      const std::uint32_t first = read<std::uint32_t>(low + j * 4) >> low_shift & 0x0F0F0F0FU;
      const std::uint32_t second = read<std::uint32_t>(low + 16 + j * 4) >> low_shift & 0x0F0F0F0FU;
      write(nibbles + j * kGroupBytes + row * 4, first | second << 4);
    }
  }
}

// One q8_0 block from 32 floats, as ggml makes it: scale max|x| / 127, values x / scale rounded half away from zero.
void quantize_q8_0(const float* x, std::byte* block) {
  // By the bits, whose order is that of the magnitudes (NaN on top): a maximum that vectorises.
  std::int32_t largest_bits = 0;
  for (int i = 0; i < kBlock; ++i) {
    const std::int32_t magnitude = std::bit_cast<std::int32_t>(x[i]) & 0x7FFFFFFF;
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
  }
  const auto largest = std::bit_cast<float>(largest_bits);
  const float scale = largest / 127.0F;
  const float inverse = scale > 0 ? 1.0F / scale : 0.0F;
  write(block, float_to_half(scale));
  for (int i = 0; i < kBlock; ++i) {
    // Also for infinity and NaN, which have no int8.
    const float scaled = x[i] * inverse;
    const float bounded = scaled >= -127.0F ? std::min(scaled, 127.0F) : -127.0F;
    const int whole = static_cast<int>(bounded);
    const float rest = bounded - static_cast<float>(whole);
    const int q = whole + static_cast<int>(rest >= 0.5F) - static_cast<int>(rest <= -0.5F);
    block[2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(q));
  }
}

using PackRow = void (*)(const std::byte* source, int row, std::byte* panel);

struct PackedBlock {
  std::size_t bytes;
  PackRow pack;
};

PackedBlock packed_block(WeightType type) {
  switch (type) {
    case WeightType::q8_0:
      return {kQ8Block, pack_q8_0};
    case WeightType::q4_0:
      return {kQ4Block, pack_q4_0};
    case WeightType::q5_0:
      return {kQ5Block, pack_q5_0};
    case WeightType::q4_k:
      return {kQ4KSuper, pack_q4_k};
    case WeightType::q6_k:
      return {kQ6KSuper, pack_q6_k};
    default:
      return {kPanel * block_bytes(type), nullptr};
  }
}

float read_float(WeightType type, const std::byte* p) {
  switch (type) {
    case WeightType::f16:
      return half_to_float(read<std::uint16_t>(p));
    case WeightType::bf16:
      return bfloat_to_float(read<std::uint16_t>(p));
    default:
      return read<float>(p);
  }
}

// Floats to q8_0, block by block: no scratch, and the panel is still written in order.
void pack_converted_q8_0(std::int64_t columns, std::int64_t rows, WeightType source_type, const std::byte* source,
                         std::byte* panel) {
  const std::size_t element = block_bytes(source_type);
  for (std::int64_t column = 0; column < columns; column += kBlock, panel += kQ8Block) {
    for (int row = 0; row < rows; ++row) {
      float values[kBlock];
      std::byte block[2 + kBlock];
      const std::byte* from = source + (row * columns + column) * element;
      for (int i = 0; i < kBlock; ++i) values[i] = read_float(source_type, from + i * element);
      quantize_q8_0(values, block);
      pack_q8_0(block, row, panel);
    }
  }
}

// Floats to q4_0 likewise.
void pack_converted_q4_0(std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                         std::byte* panel, QuantizeInt4 quantize) {
  const std::size_t element = block_bytes(source_type);
  for (std::int64_t column = 0; column < columns; column += kBlock, panel += kQ4Block, source += kBlock * element) {
    quantize(source_type, source, static_cast<std::size_t>(columns) * element, rows, panel);
  }
}

// Floats or f8_e4m3 to bf16 panels, by way of f8_e4m3.
void pack_float8(std::int64_t columns, std::int64_t rows, WeightType source_type, const std::byte* source,
                 std::byte* panel) {
  for (std::int64_t n = 0; n < rows; ++n, source += stored_row_bytes(source_type, columns)) {
    const Float8Row row(source_type, source, columns);
    for (std::int64_t column = 0; column < columns; ++column) {
      write(panel + (column * kPanel + n) * 2, float_to_bfloat(row.scale() * e4m3_to_float(row[column])));
    }
  }
}

template <typename T, typename Convert>
void pack_floats(std::int64_t columns, std::int64_t rows, std::size_t source_element, const std::byte* source,
                 std::byte* panel, Convert convert) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::byte* from = source + row * columns * source_element;
    for (std::int64_t column = 0; column < columns; ++column) {
      write<T>(panel + (column * kPanel + row) * sizeof(T), convert(from + column * source_element));
    }
  }
}

void pack_float_panel(WeightType type, std::int64_t columns, std::int64_t rows, WeightType source_type,
                      const std::byte* source, std::byte* panel) {
  const std::size_t element = block_bytes(source_type);
  if (type == source_type && type == WeightType::f32) {
    pack_floats<std::uint32_t>(columns, rows, element, source, panel, read<std::uint32_t>);
  } else if (type == source_type) {
    pack_floats<std::uint16_t>(columns, rows, element, source, panel, read<std::uint16_t>);
  } else if (type == WeightType::f32) {
    pack_floats<float>(columns, rows, element, source, panel,
                       [source_type](const std::byte* p) { return read_float(source_type, p); });
  } else if (type == WeightType::f16) {
    pack_floats<std::uint16_t>(columns, rows, element, source, panel,
                               [source_type](const std::byte* p) { return float_to_half(read_float(source_type, p)); });
  } else {
    pack_floats<std::uint16_t>(columns, rows, element, source, panel, [source_type](const std::byte* p) {
      return float_to_bfloat(read_float(source_type, p));
    });
  }
}

}  // namespace

Float8Row::Float8Row(WeightType source_type, const std::byte* source, std::int64_t columns)
    : type_(source_type), values_(source + row_scale_bytes(source_type)) {
  if (source_type == WeightType::f8_e4m3) {
    scale_ = read<float>(source);
    return;
  }
  std::int32_t largest = 0;  // by the bits, as in quantize_q8_0
  const std::size_t element = block_bytes(source_type);
  for (std::int64_t c = 0; c < columns; ++c) {
    const float value = read_float(source_type, source + c * element);
    largest = std::max(largest, std::bit_cast<std::int32_t>(value) & 0x7FFFFFFF);
  }
  scale_ = std::bit_cast<float>(largest) / 448.0F;
}

std::uint8_t Float8Row::operator[](std::int64_t column) const {
  if (type_ == WeightType::f8_e4m3) return read<std::uint8_t>(values_ + column);
  // A row of zeros has no scale to divide by.
  return scale_ == 0.0F ? std::uint8_t{0}
                        : float_to_e4m3(read_float(type_, values_ + column * block_bytes(type_)) / scale_);
}

WeightType packed_type(WeightType type) { return type == WeightType::f8_e4m3 ? WeightType::bf16 : type; }

std::size_t panel_bytes(WeightType type, std::int64_t columns) {
  const int block = block_columns(type);
  if (columns <= 0 || columns % block != 0) {
    throw std::invalid_argument(std::string(weight_type_name(type)) + " matrix with " + std::to_string(columns) +
                                " columns: expected a positive multiple of " + std::to_string(block));
  }
  return static_cast<std::size_t>(columns / block) * packed_block(packed_type(type)).bytes;
}

void pack_rows(WeightType type, std::int64_t columns, std::int64_t count, WeightType source_type,
               const std::byte* source, std::byte* panels, Isa isa) {
  const bool to_int8 = type == WeightType::q8_0 && is_float(source_type);
  const bool to_int4 = type == WeightType::q4_0 && is_float(source_type);
  const bool to_float8 = type == WeightType::f8_e4m3 && (source_type == type || is_float(source_type));
  if (type != source_type && !to_int8 && !to_int4 && !to_float8 && !(is_float(type) && is_float(source_type))) {
    throw std::invalid_argument(std::string("cannot store ") + weight_type_name(source_type) + " values as " +
                                weight_type_name(type));
  }
  const std::size_t stride = panel_bytes(type, columns);
  const PackedBlock packed = packed_block(type);
  const std::size_t block_size = block_bytes(source_type);
  const std::size_t source_stride = stored_row_bytes(source_type, columns);
  for (std::int64_t first = 0; first < count; first += kPanel, source += kPanel * source_stride, panels += stride) {
    const std::int64_t rows = std::min<std::int64_t>(kPanel, count - first);
    if (is_float(type)) {
      if (rows < kPanel) std::memset(panels, 0, stride);
      pack_float_panel(type, columns, rows, source_type, source, panels);
      continue;
    }
    if (to_float8) {
      if (rows < kPanel) std::memset(panels, 0, stride);
      pack_float8(columns, rows, source_type, source, panels);
      continue;
    }
    // Cleared first where rows are missing and for the bits of q5_0, which are set one by one.
    if (rows < kPanel || type == WeightType::q5_0) std::memset(panels, 0, stride);
    if (to_int8) {
      pack_converted_q8_0(columns, rows, source_type, source, panels);
      continue;
    }
    if (to_int4) {
      pack_converted_q4_0(columns, static_cast<int>(rows), source_type, source, panels, int4_quantizer(isa));
      continue;
    }
    std::byte* panel = panels;
    for (std::size_t offset = 0; offset < source_stride; offset += block_size, panel += packed.bytes) {
      for (int row = 0; row < rows; ++row) packed.pack(source + row * source_stride + offset, row, panel);
    }
  }
}

namespace {

int nibble(const std::byte* nibbles, int row, int column) {
  const int group = column / 4;
  const std::byte both = nibbles[group % 4 * kGroupBytes + row * 4 + column % 4];
  return std::to_integer<int>(group < 4 ? both & std::byte{15} : both >> 4);
}

float half_of_row(const std::byte* halves, int row) { return half_to_float(read<std::uint16_t>(halves + row * 2)); }

// Each function decodes one block (of the K types one superblock) of one row.

void unpack_q8_0(const std::byte* block, int row, float scale, float* out) {
  const float d = half_of_row(block, row);
  for (int c = 0; c < kBlock; ++c) {
    const int q = std::to_integer<int>(block[kHalves + c / 4 * kGroupBytes + row * 4 + c % 4]) - 128;
    out[c] = d * static_cast<float>(q) * scale;
  }
}

void unpack_q4_0(const std::byte* block, int row, float scale, float* out) {
  const float d = half_of_row(block, row);
  for (int c = 0; c < kBlock; ++c) out[c] = d * static_cast<float>(nibble(block + kHalves, row, c) - 8) * scale;
}

void unpack_q5_0(const std::byte* block, int row, float scale, float* out) {
  const float d = half_of_row(block, row);
  for (int c = 0; c < kBlock; ++c) {
    const auto plane = read<std::uint64_t>(block + kHalves + c / 4 * sizeof(std::uint64_t));
    const int fifth = static_cast<int>(plane >> (row * 4 + c % 4) & 1U);
    const int q = (nibble(block + kHalves + kFifthBits, row, c) | fifth << 4) - 16;
    out[c] = d * static_cast<float>(q) * scale;
  }
}

void unpack_q4_k(const std::byte* super, int row, float scale, float* out) {
  const float d = half_of_row(super, row);
  const float dmin = half_of_row(super + kHalves, row);
  for (int b = 0; b < kBlocksPerSuper; ++b) {
    const std::byte* block = super + 2 * kHalves + b * kQ4KBlock;
    const float block_scale = d * static_cast<float>(std::to_integer<int>(block[row]));
    const float block_min = dmin * static_cast<float>(std::to_integer<int>(block[kPanel + row]));
    for (int c = 0; c < kBlock; ++c) {
      const auto q = static_cast<float>(nibble(block + 2 * kPanel, row, c));
      out[b * kBlock + c] = (block_scale * q - block_min) * scale;
    }
  }
}

void unpack_q6_k(const std::byte* super, int row, float scale, float* out) {
  const float d = half_of_row(super, row);
  for (int b = 0; b < kBlocksPerSuper; ++b) {
    const std::byte* block = super + kHalves + b * kQ6KBlock;
    const std::byte* upper = block + 2 * kPanel;
    for (int c = 0; c < kBlock; ++c) {
      const int half = c / 16;
      const auto half_scale = static_cast<float>(static_cast<std::int8_t>(block[half * kPanel + row]));
      const int fields = std::to_integer<int>(upper[half * kGroupBytes + row * 4 + c % 4]);
      const int q = (nibble(upper + kUpperBits, row, c) | (fields >> (c / 4 % 4 * 2) & 3) << 4) - 32;
      out[b * kBlock + c] = d * half_scale * static_cast<float>(q) * scale;
    }
  }
}

}  // namespace

void unpack_row(const PackedMatrix& matrix, std::int64_t row, float scale, float* out) {
  const std::byte* panel = matrix.data + static_cast<std::size_t>(row / kPanel) * matrix.panel_bytes;
  const int lane = static_cast<int>(row % kPanel);
  if (matrix.split != nullptr) {
    const std::byte* rest = matrix.split->rest + static_cast<std::size_t>(row / kPanel) * matrix.split->rest_bytes;
    return unpack_split_row(*matrix.split, panel, rest, lane, scale, out);
  }
  const std::size_t bytes = packed_block(matrix.type).bytes;
  const int columns = block_columns(matrix.type);
  for (std::int64_t c = 0; c < matrix.columns; c += columns, panel += bytes, out += columns) {
    switch (matrix.type) {
      case WeightType::f32:
        *out = read<float>(panel + lane * 4) * scale;
        break;
      case WeightType::f16:
      case WeightType::bf16:
        *out = read_float(matrix.type, panel + lane * 2) * scale;
        break;
      case WeightType::q8_0:
        unpack_q8_0(panel, lane, scale, out);
        break;
      case WeightType::q4_0:
        unpack_q4_0(panel, lane, scale, out);
        break;
      case WeightType::q5_0:
        unpack_q5_0(panel, lane, scale, out);
        break;
      case WeightType::q4_k:
        unpack_q4_k(panel, lane, scale, out);
        break;
      case WeightType::q6_k:
        unpack_q6_k(panel, lane, scale, out);
        break;
      case WeightType::f8_e4m3:  // no panel holds it
        break;
    }
  }
}

}  // namespace draftwerk::cpu
