// Operands of products (operands.h), read back.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cuda/operands.h"

namespace draftwerk::cuda {

/// The values of [rows, columns]; behind the last column there have to be zeros.
inline std::vector<float> operand_values(const std::byte* operands, int rows, int columns) {
  const std::size_t tile_bytes = operand_bytes(1, columns);
  const auto padded = static_cast<int>(tile_bytes / 16);
  std::vector<float> values;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < padded; ++c) {
      // The swizzle of 64 bytes: bits 7 and 8 of where a value would lie are added to bits 4 and 5.
      const int plain = r % 8 * 64 + c % 32 * 2;
      const std::size_t offset = static_cast<std::size_t>(r / 8) * tile_bytes + static_cast<std::size_t>(c / 32) * 512 +
                                 static_cast<std::size_t>(plain ^ (plain >> 7 & 3) << 4);
      std::uint16_t bits = 0;
      std::memcpy(&bits, operands + offset, sizeof bits);
      if (c < columns) {
        values.push_back(cpu::bfloat_to_float(bits));
      } else {
        EXPECT_EQ(bits, 0) << "padding";
      }
    }
  }
  return values;
}

}  // namespace draftwerk::cuda
