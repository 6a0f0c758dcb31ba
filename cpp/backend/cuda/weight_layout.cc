#include "backend/cuda/weight_layout.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/quantized_blocks.h"

namespace draftwerk::cuda {
namespace {

/// Where a value lies among the fragments of a step of 16 columns.
struct Place {
  Place(int row, int column) : lane(row % 8 * 4 + column % 8 / 2), reg(column / 8 * 2 + row / 8), within(column % 2) {}
  int lane;
  int reg;     ///< register
  int within;  ///< the register
};

/// Rows of bfloat16, each `columns` long, to a panel that is all zeros.
void place_bf16(const std::uint16_t* values, std::int64_t columns, int row, std::byte* panel) {
  for (std::int64_t c = 0; c < columns; c += 2) {
    const Place at(row, static_cast<int>(c % 16));
    const std::size_t offset =
        static_cast<std::size_t>(c / 16) * kFragmentBytes + static_cast<std::size_t>(at.lane * 16 + at.reg * 4);
    std::memcpy(panel + offset, values + c, std::min<std::int64_t>(2, columns - c) * 2);
  }
}

void pack_bf16(std::int64_t columns, int rows, WeightType source_type, const std::byte* source, std::byte* panel) {
  const std::size_t row_bytes = stored_row_bytes(source_type, columns);
  std::vector<std::uint16_t> rounded(static_cast<std::size_t>(columns));
  std::vector<float> values(source_type == WeightType::bf16 ? 0 : static_cast<std::size_t>(columns));
  for (int row = 0; row < rows; ++row, source += row_bytes) {
    if (source_type == WeightType::bf16) {
      std::memcpy(rounded.data(), source, row_bytes);
    } else {
      cpu::dequantize(source_type, source, columns, values.data());
      std::transform(values.begin(), values.end(), rounded.begin(), cpu::float_to_bfloat);
    }
    place_bf16(rounded.data(), columns, row, panel);
  }
}

/// The CPU's panel, which is what its quantiser makes, in the device's order.
void pack_quantized(WeightType type, std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                    std::byte* panel) {
  namespace layout = cpu::layout;
  const bool int8 = type == WeightType::q8_0;
  const WeightFormat format = format_of(type);
  std::vector<std::byte> packed(cpu::panel_bytes(type, columns));
  static const cpu::Isa isa = cpu::choose_isa();
  cpu::pack_rows(type, columns, rows, source_type, source, packed.data(), isa);
  const std::byte* block = packed.data();
  for (std::int64_t b = 0; b < columns / kBlockColumns; ++b, block += int8 ? layout::kQ8Block : layout::kQ4Block) {
    std::byte* chunk = panel + b / 2 * chunk_bytes(format);
    const int half = static_cast<int>(b % 2);  // of the chunk
    std::byte* scales = chunk + chunk_bytes(format) - kChunkScaleBytes;
    for (int row = 0; row < kPanelRows; ++row) {
      std::memcpy(scales + row % 8 * 8 + half * 4 + row / 8 * 2, block + row * 2, 2);
      for (int c = 0; c < kBlockColumns; ++c) {
        const Place at(row, c % 16);
        const int step = c / 16;
        if (int8) {
          const std::byte value =
              block[layout::kHalves + static_cast<std::size_t>(c / 4) * layout::kGroupBytes + row * 4 + c % 4];
          std::byte* words = chunk + half * kFragmentBytes + at.lane * 16 + step * 8;
          words[at.reg / 2 * 4 + at.within * 2 + at.reg % 2] = value ^ std::byte{0x80};  // that has 128 added
        } else {
          const std::byte both =
              block[layout::kHalves + static_cast<std::size_t>(c / 4 % 4) * layout::kGroupBytes + row * 4 + c % 4];
          const std::byte value = c < 16 ? both & std::byte{15} : both >> 4;
          const int nibble = at.reg + at.within * 4;
          chunk[at.lane * 16 + (half * 2 + step) * 4 + nibble / 2] |= value << nibble % 2 * 4;
        }
      }
    }
  }
}

}  // namespace

WeightFormat format_of(WeightType type) {
  if (type == WeightType::q8_0) return WeightFormat::int8;
  return type == WeightType::q4_0 ? WeightFormat::int4 : WeightFormat::bf16;
}

int chunk_columns(WeightFormat format) {
  return with_format(format, []<WeightFormat kFormat>() { return Chunk<kFormat>::kColumns; });
}

int chunk_bytes(WeightFormat format) {
  return with_format(format, []<WeightFormat kFormat>() { return Chunk<kFormat>::kBytes; });
}

void pack_panel(WeightType type, std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                std::byte* panel) {
  const WeightFormat format = format_of(type);
  const std::int64_t chunks = (columns + chunk_columns(format) - 1) / chunk_columns(format);
  std::memset(panel, 0, static_cast<std::size_t>(chunks * chunk_bytes(format)));
  if (format == WeightFormat::bf16) {
    pack_bf16(columns, rows, source_type, source, panel);
  } else {
    pack_quantized(type, columns, rows, source_type, source, panel);
  }
}

}  // namespace draftwerk::cuda
