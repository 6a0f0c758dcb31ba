#include "backend/cuda/weight_layout.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/isa.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/quantized_blocks.h"

namespace draftwerk::cuda {
namespace {

// Of a step of 16 columns, the two columns of pair j (0 .. 7) are in lane j % 4 of the row's group, and in a register
// of the left or right half.
constexpr int kPairs = 8;

/// Rows of a float type, or decoded ones, as bfloat16. `bits` gives that of the value of a column.
template <typename Bits>
void place_bf16(std::int64_t columns, int row, std::byte* panel, Bits bits) {
  std::byte* to = panel + row % 8 * 64 + row / 8 * 4;
  for (std::int64_t first = 0; first < columns; first += 2 * kPairs, to += kFragmentBytes) {
    const int pairs = static_cast<int>(std::min<std::int64_t>(kPairs, (columns - first + 1) / 2));
    for (int j = 0; j < pairs; ++j) {
      const std::int64_t c = first + 2 * j;
      const std::uint16_t pair[2] = {bits(c), c + 1 < columns ? bits(c + 1) : std::uint16_t{0}};
      std::memcpy(to + j % 4 * 16 + j / 4 * 8, pair, sizeof pair);
    }
  }
}

void pack_bf16(std::int64_t columns, int rows, WeightType source_type, const std::byte* source, std::byte* panel,
               std::byte* scratch) {
  const std::size_t row_bytes = stored_row_bytes(source_type, columns);
  auto* const values = reinterpret_cast<float*>(scratch);
  for (int row = 0; row < rows; ++row, source += row_bytes) {
    if (source_type == WeightType::bf16) {
      place_bf16(columns, row, panel, [source](std::int64_t c) {
        std::uint16_t bits;
        std::memcpy(&bits, source + c * 2, sizeof bits);
        return bits;
      });
    } else {
      cpu::dequantize(source_type, source, columns, values);
      place_bf16(columns, row, panel, [values](std::int64_t c) { return cpu::float_to_bfloat(values[c]); });
    }
  }
}

// A block of 32 columns of the CPU's panels holds the scales of its 16 rows, then groups of four columns of each: of
// int8 with 128 added, of int4 group j in the low and group j + 4 in the high halves.

void place_int8(const std::byte* groups, std::byte* fragments) {
  for (int row = 0; row < kPanelRows; ++row) {
    std::byte* const to = fragments + row % 8 * 64 + row / 8;
    for (int j = 0; j < 2 * kPairs; ++j) {
      const std::byte* pair = groups + j / 2 * cpu::layout::kGroupBytes + row * 4 + j % 2 * 2;
      std::byte* const words = to + j % 4 * 16 + j / kPairs * 8 + j % kPairs / 4 * 4;
      words[0] = pair[0] ^ std::byte{0x80};
      words[2] = pair[1] ^ std::byte{0x80};
    }
  }
}

void place_int4(const std::byte* nibbles, std::byte* fragments) {
  for (int row = 0; row < kPanelRows; ++row) {
    std::byte* const to = fragments + row % 8 * 64;
    for (int j = 0; j < kPairs; ++j) {
      const std::byte* pair = nibbles + j / 2 * cpu::layout::kGroupBytes + row * 4 + j % 2 * 2;
      // Nibble r of a word is that of register r = j / 4 * 2 + row / 8 in the first of the columns, r + 4 in the
      // second.
      std::byte* const words = to + j % 4 * 16 + j / 4;
      const int shift = row / 8 * 4;
      const auto low = [](std::byte b) { return b & std::byte{15}; };
      words[0] |= low(pair[0]) << shift;
      words[2] |= low(pair[1]) << shift;
      words[4] |= pair[0] >> 4 << shift;  // the second step of the block
      words[6] |= pair[1] >> 4 << shift;
    }
  }
}

/// Bytes go where those of int8 go.
void pack_fp8(std::int64_t columns, int rows, WeightType source_type, const std::byte* source, std::byte* panel) {
  constexpr int kColumns = Chunk<WeightFormat::fp8>::kColumns;
  const std::int64_t chunks = (columns + kColumns - 1) / kColumns;
  std::byte* const scales = panel + panel_bytes(WeightFormat::fp8, chunks) - kRowScaleBytes;
  for (int n = 0; n < rows; ++n, source += stored_row_bytes(source_type, columns)) {
    const cpu::Float8Row row(source_type, source, columns);
    const float scale = row.scale();
    std::memcpy(scales + n * sizeof scale, &scale, sizeof scale);
    std::byte* const to = panel + n % 8 * 64 + n / 8;
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t in_lane = c % 32 / 16 * 8 + c % 16 / 8 * 4 + c % 2 * 2;
      to[c / 32 * kFragmentBytes + c % 8 / 2 * 16 + in_lane] = static_cast<std::byte>(row[c]);
    }
  }
}

/// By way of the CPU's panel, which is what its quantiser makes.
void pack_quantized(WeightType type, std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                    std::byte* panel, std::byte* scratch) {
  static const cpu::Isa isa = cpu::choose_isa();
  cpu::pack_rows(type, columns, rows, source_type, source, scratch, isa);
  const bool int8 = type == WeightType::q8_0;
  const std::int64_t bytes = int8 ? Chunk<WeightFormat::int8>::kBytes : Chunk<WeightFormat::int4>::kBytes;
  const std::byte* block = scratch;
  for (std::int64_t b = 0; b < columns / kBlockColumns; ++b) {
    std::byte* const chunk = panel + b / 2 * bytes;
    const int half = static_cast<int>(b % 2);  // of the chunk
    std::byte* const scales = chunk + bytes - kChunkScaleBytes + half * 4;
    for (int row = 0; row < kPanelRows; ++row) std::memcpy(scales + row % 8 * 8 + row / 8 * 2, block + row * 2, 2);
    block += cpu::layout::kHalves;
    if (int8) {
      place_int8(block, chunk + half * kFragmentBytes);
      block += cpu::layout::kGroups * cpu::layout::kGroupBytes;
    } else {
      place_int4(block, chunk + half * 8);
      block += cpu::layout::kNibbles;
    }
  }
}

}  // namespace

WeightFormat format_of(WeightType type) {
  if (type == WeightType::q8_0) return WeightFormat::int8;
  if (type == WeightType::q4_0) return WeightFormat::int4;
  return type == WeightType::f8_e4m3 ? WeightFormat::fp8 : WeightFormat::bf16;
}

int chunk_columns(WeightFormat format) {
  return with_format(format, []<WeightFormat kFormat>() { return Chunk<kFormat>::kColumns; });
}

std::int64_t panel_bytes(WeightFormat format, std::int64_t chunks) {
  return with_format(format, [chunks]<WeightFormat kFormat>() {
    return chunks * Chunk<kFormat>::kBytes + (Chunk<kFormat>::kRowScales ? kRowScaleBytes : 0);
  });
}

std::size_t pack_scratch_bytes(WeightType type, std::int64_t columns) {
  switch (format_of(type)) {
    case WeightFormat::bf16:
      return static_cast<std::size_t>(columns) * sizeof(float);
    case WeightFormat::fp8:
      return 0;
    default:
      return cpu::panel_bytes(type, columns);
  }
}

void pack_panel(WeightType type, std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                std::byte* panel, std::byte* scratch) {
  const WeightFormat format = format_of(type);
  const std::int64_t chunks = (columns + chunk_columns(format) - 1) / chunk_columns(format);
  std::memset(panel, 0, static_cast<std::size_t>(panel_bytes(format, chunks)));
  if (format == WeightFormat::bf16) {
    pack_bf16(columns, rows, source_type, source, panel, scratch);
  } else if (format == WeightFormat::fp8) {
    pack_fp8(columns, rows, source_type, source, panel);
  } else {
    pack_quantized(type, columns, rows, source_type, source, panel, scratch);
  }
}

}  // namespace draftwerk::cuda
