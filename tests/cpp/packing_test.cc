#include "backend/cpu/packing.h"

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "gtest/gtest.h"
#include "random_blocks.h"

namespace draftwerk::cpu {
namespace {

std::vector<std::byte> bytes_of(std::initializer_list<int> values) {
  std::vector<std::byte> bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

std::vector<float> decoded(WeightType type, const std::vector<std::byte>& blocks) {
  std::vector<float> out(blocks.size() / block_bytes(type) * static_cast<std::size_t>(block_columns(type)));
  dequantize(type, blocks.data(), static_cast<std::int64_t>(out.size()), out.data());
  return out;
}

// Blocks written by hand from the definitions in ggml-quants.c; the whole formats are held to the gguf package by the
// Python tests. 0x3C00 is 1.0 in f16, 0x4000 is 2.0, 0xB800 is -0.5.

TEST(Dequantize, Q8) {
  auto block = bytes_of({0x00, 0x40});
  block.resize(34);
  block[2] = std::byte{1};
  block[3] = std::byte{0xFF};
  block[33] = std::byte{0x80};
  const auto values = decoded(WeightType::q8_0, block);
  EXPECT_EQ(values[0], 2.0F);
  EXPECT_EQ(values[1], -2.0F);
  EXPECT_EQ(values[2], 0.0F);
  EXPECT_EQ(values[31], -256.0F);
}

TEST(Dequantize, Q4PairsColumnsSixteenApart) {
  auto block = bytes_of({0x00, 0xB8, 0xF0, 0x19});
  block.resize(18, std::byte{0x88});
  const auto values = decoded(WeightType::q4_0, block);
  EXPECT_EQ(values[0], 4.0F);    // -0.5 * (0 - 8)
  EXPECT_EQ(values[16], -3.5F);  // -0.5 * (15 - 8)
  EXPECT_EQ(values[1], -0.5F);   // 9
  EXPECT_EQ(values[17], 3.5F);   // 1
  EXPECT_EQ(values[2], 0.0F);
}

TEST(Dequantize, Q5TakesItsFifthBitsInColumnOrder) {
  auto block = bytes_of({0x00, 0x3C, 0x01, 0x00, 0x02, 0x80, 0x3A});
  block.resize(22);
  const auto values = decoded(WeightType::q5_0, block);
  EXPECT_EQ(values[0], 10.0F);  // 0xA | 16, less 16
  EXPECT_EQ(values[1], -16.0F);
  EXPECT_EQ(values[16], -13.0F);  // 3
  EXPECT_EQ(values[17], 0.0F);    // 0 | 16
  EXPECT_EQ(values[31], 0.0F);    // 0 | 16
}

TEST(Dequantize, Q4KUnpacksSixBitScalesAndMins) {
  std::vector<std::byte> block(144);
  block[1] = std::byte{0x3C};  // d = 1
  block[3] = std::byte{0x40};  // dmin = 2
  const auto packed = bytes_of({0xC5, 0, 0, 0x3F, 0x83, 0, 0, 0x3F, 0x21, 0, 0, 0xFF});
  std::copy(packed.begin(), packed.end(), block.begin() + 4);
  block[16] = std::byte{0x72};               // column 0 of blocks 0 and 1
  block[16 + 2 * 32 + 5] = std::byte{0x4B};  // column 5 of blocks 4 and 5
  block[16 + 3 * 32 + 31] = std::byte{0xF1};
  const auto values = decoded(WeightType::q4_k, block);
  EXPECT_EQ(values[0], 5.0F * 2 - 2 * 3);                          // scale 0xC5 & 63, min 0x83 & 63
  EXPECT_EQ(values[32], 0.0F);                                     // scale and min 0
  EXPECT_EQ(values[4 * 32 + 5], (1 + 48.0F) * 11 - 2 * (2 + 32));  // 0x21 with the top bits of 0xC5 and 0x83
  EXPECT_EQ(values[7 * 32 + 31], 15.0F * 15 - 2 * 15);             // 0xFF, no top bits in 0x3F
  EXPECT_EQ(values[3 * 32], -2.0F * 63);                           // quant 0
}

TEST(Dequantize, Q6KJoinsNibblesAndBitPairs) {
  std::vector<std::byte> block(210);
  block[209] = std::byte{0x3C};
  for (int i = 0; i < 16; ++i) block[192 + i] = static_cast<std::byte>(i - 8);
  block[0] = std::byte{0xA5};  // columns 0 and 64
  block[128] = std::byte{0b11'10'01'00};
  block[32 + 31] = std::byte{0x1F};  // columns 63 and 127
  block[128 + 31] = std::byte{0xFF};
  block[64 + 16] = std::byte{0x09};  // column 128 + 16
  const auto values = decoded(WeightType::q6_k, block);
  EXPECT_EQ(values[0], -8.0F * (5 - 32));
  EXPECT_EQ(values[32], -6.0F * (16 - 32));
  EXPECT_EQ(values[64], -4.0F * (10 + 32 - 32));
  EXPECT_EQ(values[96], -2.0F * (48 - 32));
  EXPECT_EQ(values[63], -5.0F * (15 + 48 - 32));
  EXPECT_EQ(values[127], -1.0F * (1 + 48 - 32));
  EXPECT_EQ(values[144], 1.0F * (9 - 32));
}

TEST(HalfPrecision, EveryHalfSurvivesARoundTrip) {
  for (int bits = 0; bits < 65536; ++bits) {
    const float value = half_to_float(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(value))));
    } else {
      EXPECT_EQ(float_to_half(value), bits);
    }
  }
}

TEST(HalfPrecision, RoundsToNearestEven) {
  for (int bits = 0; bits < 0x7BFF; ++bits) {
    const float low = half_to_float(static_cast<std::uint16_t>(bits));
    const float high = half_to_float(static_cast<std::uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;  // exact: one more bit
    EXPECT_EQ(float_to_half(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(float_to_half(std::nextafter(middle, low)), bits);
    EXPECT_EQ(float_to_half(-std::nextafter(middle, high)), (bits + 1) | 0x8000);
  }
  EXPECT_EQ(float_to_half(65519.996F), 0x7BFF);
  EXPECT_EQ(float_to_half(65520.0F), 0x7C00);
}

TEST(Bfloat, RoundsToNearestEven) {
  EXPECT_EQ(float_to_bfloat(std::bit_cast<float>(0x3F808000U)), 0x3F80);
  EXPECT_EQ(float_to_bfloat(std::bit_cast<float>(0x3F818000U)), 0x3F82);
  EXPECT_EQ(float_to_bfloat(std::bit_cast<float>(0x3F808001U)), 0x3F81);
  EXPECT_TRUE(std::isnan(bfloat_to_float(float_to_bfloat(std::numeric_limits<float>::quiet_NaN()))));
}

// e4m3 by its definition: sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa.
float e4m3_by_definition(int bits) {
  const int exponent = bits >> 3 & 15;
  const int mantissa = bits & 7;
  const double magnitude = exponent == 0 ? mantissa * 0x1p-9 : std::ldexp(1 + mantissa / 8.0, exponent - 7);
  return static_cast<float>((bits & 128) != 0 ? -magnitude : magnitude);
}

TEST(E4m3, HasTheValuesOfItsDefinition) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = e4m3_to_float(static_cast<std::uint8_t>(bits));
    if ((bits & 127) == 127) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    EXPECT_EQ(std::bit_cast<std::uint32_t>(value), std::bit_cast<std::uint32_t>(e4m3_by_definition(bits))) << bits;
    EXPECT_EQ(float_to_e4m3(value), bits);
    EXPECT_EQ(bfloat_to_float(float_to_bfloat(value)), value) << "exact in bfloat16";
  }
  EXPECT_EQ(e4m3_to_float(0x7E), 448.0F);
}

TEST(E4m3, RoundsToNearestEvenAndSaturates) {
  for (int bits = 0; bits < 126; ++bits) {
    const float here = e4m3_by_definition(bits);
    const float next = e4m3_by_definition(bits + 1);
    const float middle = (here + next) / 2;
    EXPECT_EQ(float_to_e4m3(middle), bits % 2 == 0 ? bits : bits + 1) << middle;
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, here)), bits) << middle;
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, next)), bits + 1) << middle;
    EXPECT_EQ(float_to_e4m3(-std::nextafter(middle, next)), bits + 129) << middle;
  }
  for (const float large : {448.1F, 464.0F, 1e30F, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(float_to_e4m3(large), 0x7E);
    EXPECT_EQ(float_to_e4m3(-large), 0xFE);
  }
  EXPECT_EQ(float_to_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7F, 0x7E);
}

class Packing : public testing::TestWithParam<WeightType> {};

TEST_P(Packing, UnpackedRowsAreTheCheckpointsBits) {
  const WeightType type = GetParam();
  std::mt19937 random(17);
  for (int round = 0; round < 12; ++round) {
    const std::int64_t columns = block_columns(type) * (1 + random() % 5);
    const std::int64_t rows = 1 + random() % 50;
    const auto blocks = random_blocks(type, rows * columns, random);
    const auto expected = decoded(type, blocks);
    const std::size_t bytes = panel_bytes(type, columns);
    std::vector<std::byte> panels(bytes * panel_count(rows), std::byte{0xA5});
    pack_rows(type, columns, rows, type, blocks.data(), panels.data());
    const PackedMatrix matrix = {type, panel_count(rows) * kPanel, columns, bytes, panels.data()};
    std::vector<float> row(columns);
    for (std::int64_t n = 0; n < matrix.rows; ++n) {
      for (const float scale : {1.0F, 25.298F}) {
        unpack_row(matrix, n, scale, row.data());
        for (std::int64_t c = 0; c < columns; ++c) {
          const float value = n < rows ? expected[n * columns + c] * scale : 0.0F;
          ASSERT_EQ(row[c], value) << "row " << n << " of " << rows << ", column " << c << " of " << columns;
        }
      }
    }
  }
}

TEST_P(Packing, PiecesOfAMatrixPackLikeTheWhole) {
  const WeightType type = GetParam();
  std::mt19937 random(5);
  const std::int64_t columns = block_columns(type) * 2;
  const std::int64_t rows = 45;
  const auto blocks = random_blocks(type, rows * columns, random);
  const std::size_t bytes = panel_bytes(type, columns);
  std::vector<std::byte> whole(bytes * panel_count(rows));
  std::vector<std::byte> pieces(whole.size(), std::byte{0xFF});
  pack_rows(type, columns, rows, type, blocks.data(), whole.data());
  const std::size_t source_row = blocks.size() / rows;
  pack_rows(type, columns, 16, type, blocks.data(), pieces.data());
  pack_rows(type, columns, 29, type, blocks.data() + 16 * source_row, pieces.data() + bytes);
  EXPECT_EQ(whole, pieces);
}

TEST_P(Packing, RefusesColumnsThatAreNoWholeBlocks) {
  const WeightType type = GetParam();
  EXPECT_THROW(static_cast<void>(panel_bytes(type, 0)), std::invalid_argument);
  if (block_columns(type) == 1) return;
  EXPECT_THROW(static_cast<void>(panel_bytes(type, block_columns(type) + 16)), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Types, Packing, testing::ValuesIn(kBlockTypes),
                         [](const auto& info) { return weight_type_name(info.param); });

TEST(PackingConversion, FloatsBecomeEachFloatTypeToNearest) {
  std::mt19937 random(3);
  const std::int64_t columns = 48;
  const std::int64_t rows = 19;
  for (const WeightType from : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    const auto source = random_blocks(from, rows * columns, random);
    const auto values = decoded(from, source);
    for (const WeightType to : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
      std::vector<std::byte> panels(panel_bytes(to, columns) * panel_count(rows));
      pack_rows(to, columns, rows, from, source.data(), panels.data());
      const PackedMatrix matrix = {to, rows, columns, panel_bytes(to, columns), panels.data()};
      std::vector<float> row(columns);
      for (std::int64_t n = 0; n < rows; ++n) {
        unpack_row(matrix, n, 1.0F, row.data());
        for (std::int64_t c = 0; c < columns; ++c) {
          float expected = values[n * columns + c];
          if (to == WeightType::f16) expected = half_to_float(float_to_half(expected));
          if (to == WeightType::bf16) expected = bfloat_to_float(float_to_bfloat(expected));
          ASSERT_EQ(row[c], expected);
        }
      }
    }
  }
}

TEST(PackingConversion, FloatsBecomeInt8WithinHalfAStep) {
  std::mt19937 random(4);
  const std::int64_t columns = 96;
  const std::int64_t rows = 21;
  for (const WeightType from : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    auto source = random_blocks(from, rows * columns, random);
    std::fill_n(source.begin(), 32 * block_bytes(from), std::byte{0});  // a block of zeros
    const auto values = decoded(from, source);
    std::vector<std::byte> panels(panel_bytes(WeightType::q8_0, columns) * panel_count(rows));
    pack_rows(WeightType::q8_0, columns, rows, from, source.data(), panels.data());
    const PackedMatrix matrix = {WeightType::q8_0, rows, columns, panel_bytes(WeightType::q8_0, columns),
                                 panels.data()};
    std::vector<float> row(columns);
    for (std::int64_t n = 0; n < rows; ++n) {
      unpack_row(matrix, n, 1.0F, row.data());
      for (std::int64_t first = 0; first < columns; first += kBlock) {
        float largest = 0;
        for (int i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(values[n * columns + first + i]));
        // Half a step, and 127 times the f16 rounding of the scale (2^-11 of it).
        const float bound = largest / 127 * (0.5F + 127.0F / 2048) * 1.0001F;
        for (int i = 0; i < kBlock; ++i) ASSERT_NEAR(row[first + i], values[n * columns + first + i], bound);
      }
    }
  }
}

// No scale is finite, and what has no int8 is -127 of it, all else 0.
TEST(PackingConversion, ABlockThatIsNotFiniteStaysSoInInt8) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> values(kBlock, 1.0F);
    values[3] = bad;
    values[4] = -bad;
    const std::size_t bytes = panel_bytes(WeightType::q8_0, kBlock);
    std::vector<std::byte> panels(bytes);
    pack_rows(WeightType::q8_0, kBlock, 1, WeightType::f32, reinterpret_cast<const std::byte*>(values.data()),
              panels.data());
    std::vector<float> row(kBlock);
    unpack_row({WeightType::q8_0, 1, kBlock, bytes, panels.data()}, 0, 1.0F, row.data());
    for (int c = 0; c < kBlock; ++c) {
      EXPECT_FALSE(std::isfinite(row[c])) << c;
      const std::byte quant = panels[layout::kHalves + c / 4 * layout::kGroupBytes + c % 4];
      EXPECT_EQ(std::to_integer<int>(quant) - 128, c == 3 || c == 4 ? -127 : 0) << c;
    }
  }
}

TEST(PackingFloat8, RowsBecomeBfloat16) {
  std::mt19937 random(8);
  const std::int64_t columns = 45;
  const std::int64_t rows = 21;
  const auto stored = random_rows(WeightType::f8_e4m3, rows, columns, random);
  const auto values = values_of_rows(WeightType::f8_e4m3, rows, columns, stored);
  const std::size_t bytes = panel_bytes(WeightType::f8_e4m3, columns);
  std::vector<std::byte> panels(bytes * panel_count(rows), std::byte{0xA5});
  pack_rows(WeightType::f8_e4m3, columns, rows, WeightType::f8_e4m3, stored.data(), panels.data());
  const PackedMatrix matrix = {packed_type(WeightType::f8_e4m3), panel_count(rows) * kPanel, columns, bytes,
                               panels.data()};
  ASSERT_EQ(matrix.type, WeightType::bf16);
  std::vector<float> row(columns);
  for (std::int64_t n = 0; n < matrix.rows; ++n) {
    unpack_row(matrix, n, 1.0F, row.data());
    for (std::int64_t c = 0; c < columns; ++c) {
      ASSERT_EQ(row[c], n < rows ? bfloat_to_float(float_to_bfloat(values[n * columns + c])) : 0.0F);
    }
  }
}

TEST(PackingFloat8, AScaleMakesTheLargestOfARow448) {
  std::mt19937 random(9);
  const std::int64_t columns = 70;
  const std::int64_t rows = 18;
  for (const WeightType from : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    auto source = random_rows(from, rows, columns, random);
    const std::size_t row_bytes = stored_row_bytes(from, columns);
    std::fill_n(source.begin(), row_bytes, std::byte{0});  // a row of zeros
    const auto values = values_of_rows(from, rows, columns, source);
    const std::size_t bytes = panel_bytes(WeightType::f8_e4m3, columns);
    std::vector<std::byte> panels(bytes * panel_count(rows));
    pack_rows(WeightType::f8_e4m3, columns, rows, from, source.data(), panels.data());
    const PackedMatrix matrix = {WeightType::bf16, rows, columns, bytes, panels.data()};
    std::vector<float> packed(columns);
    for (std::int64_t n = 0; n < rows; ++n) {
      float largest = 0;
      for (std::int64_t c = 0; c < columns; ++c) largest = std::max(largest, std::fabs(values[n * columns + c]));
      const float scale = largest / 448;
      const Float8Row row(from, source.data() + n * row_bytes, columns);
      EXPECT_EQ(row.scale(), scale);
      unpack_row(matrix, n, 1.0F, packed.data());
      for (std::int64_t c = 0; c < columns; ++c) {
        const float value = values[n * columns + c];
        EXPECT_EQ(row[c], scale == 0 ? 0 : float_to_e4m3(value / scale));
        const float held = scale * e4m3_to_float(row[c]);
        // Half a step of 3 bits of mantissa, or of the subnormal numbers.
        EXPECT_NEAR(held, value, std::max(std::fabs(value) * 0x1p-4F, scale * 0x1p-10F) * 1.0001F);
        ASSERT_EQ(packed[c], bfloat_to_float(float_to_bfloat(held)));
      }
    }
  }
}

TEST(PackingFloat8, ARowThatIsNotFiniteStaysSo) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> values(8, 1.0F);
    values[3] = bad;
    const Float8Row row(WeightType::f32, reinterpret_cast<const std::byte*>(values.data()), 8);
    EXPECT_FALSE(std::isfinite(row.scale()));
    EXPECT_FALSE(std::isnan(e4m3_to_float(row[3])));
  }
}

TEST(PackingConversion, OtherConversionsAreRefused) {
  std::vector<std::byte> source(4096);
  std::vector<std::byte> panels(65536);
  EXPECT_THROW(pack_rows(WeightType::q5_0, 256, 1, WeightType::f32, source.data(), panels.data()),
               std::invalid_argument);
  EXPECT_THROW(pack_rows(WeightType::q4_0, 256, 1, WeightType::q8_0, source.data(), panels.data()),
               std::invalid_argument);
  EXPECT_THROW(pack_rows(WeightType::f32, 256, 1, WeightType::q8_0, source.data(), panels.data()),
               std::invalid_argument);
  EXPECT_THROW(pack_rows(WeightType::q8_0, 256, 1, WeightType::q4_0, source.data(), panels.data()),
               std::invalid_argument);
  EXPECT_THROW(pack_rows(WeightType::f8_e4m3, 256, 1, WeightType::q8_0, source.data(), panels.data()),
               std::invalid_argument);
  EXPECT_THROW(pack_rows(WeightType::bf16, 256, 1, WeightType::f8_e4m3, source.data(), panels.data()),
               std::invalid_argument);
}

}  // namespace
}  // namespace draftwerk::cpu
