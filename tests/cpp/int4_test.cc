// Conversion of floats to q4_0, on every instruction set, against a search over all scales.
#include "backend/cpu/int4.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/packing.h"
#include "random_blocks.h"

namespace draftwerk::cpu {
namespace {

/// The values of rows [rows, columns] after conversion.
std::vector<float> converted(const std::vector<std::byte>& source, WeightType type, std::int64_t rows,
                             std::int64_t columns, Isa isa) {
  const std::size_t bytes = panel_bytes(WeightType::q4_0, columns);
  std::vector<std::byte> panels(bytes * static_cast<std::size_t>(panel_count(rows)), std::byte{0xA5});
  pack_rows(WeightType::q4_0, columns, rows, type, source.data(), panels.data(), isa);
  const PackedMatrix matrix{WeightType::q4_0, panel_count(rows) * kPanel, columns, bytes, panels.data()};
  std::vector<float> out(static_cast<std::size_t>(matrix.rows * columns));
  for (std::int64_t n = 0; n < matrix.rows; ++n) unpack_row(matrix, n, 1, out.data() + n * columns);
  return out;
}

std::vector<std::byte> bytes_of(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

double squared_error(const float* x, double scale) {
  double error = 0;
  for (int i = 0; i < kBlock; ++i) {
    const double step = std::clamp(std::nearbyint(x[i] / scale), -8.0, 7.0);
    error += (x[i] - step * scale) * (x[i] - step * scale);
  }
  return error;
}

/// The plain form: the smallest squared error over every f16 scale of either sign that could have it.
double least_squared_error(const float* x) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, std::abs(x[i]));
  double least = std::numeric_limits<double>::infinity();
  const std::uint16_t last = float_to_half(largest / 5);
  for (std::uint16_t bits = float_to_half(largest / 12); bits <= last; ++bits) {
    const double scale = half_to_float(bits);
    least = std::min({least, squared_error(x, scale), squared_error(x, -scale)});
  }
  return least;
}

class Int4Test : public testing::TestWithParam<Isa> {};

TEST_P(Int4Test, MissesTheLeastErrorByLittle) {
  std::mt19937 random(6);
  double found = 0;
  double least = 0;
  double plain = 0;
  const int rows = 40;
  const int columns = 64;
  const std::vector<float> x = random_values(rows * columns, random);
  const std::vector<float> got = converted(bytes_of(x), WeightType::f32, rows, columns, GetParam());
  for (std::size_t at = 0; at < x.size(); at += kBlock) {
    double error = 0;
    for (std::size_t i = at; i < at + kBlock; ++i) error += (double{x[i]} - got[i]) * (double{x[i]} - got[i]);
    const double best = least_squared_error(x.data() + at);
    ASSERT_GE(error, best * 0.9999);
    ASSERT_LE(error, best * 1.6);
    found += error;
    least += best;
    const float* first = x.data() + at;
    const float extreme =
        *std::max_element(first, first + kBlock, [](float a, float b) { return std::abs(a) < std::abs(b); });
    plain += squared_error(first, extreme / -8);
  }
  EXPECT_LE(found, least * 1.005);
  EXPECT_GT(plain, least * 1.08);  // what a search is worth; it also shows that the bound above can fail
}

TEST_P(Int4Test, ValuesOnAGridComeBackExactly) {
  std::mt19937 random(7);
  std::vector<float> x;
  for (int block = 0; block < 100; ++block) {
    const float scale =
        half_to_float(static_cast<std::uint16_t>(0x2000U + random() % 0x2000U)) * (block % 2 == 0 ? 1.0F : -1.0F);
    for (int i = 0; i < kBlock; ++i) x.push_back(scale * static_cast<float>(static_cast<int>(random() % 16U) - 8));
    x[x.size() - 1 - random() % kBlock] = -8 * scale;
  }
  const std::vector<float> got = converted(bytes_of(x), WeightType::f32, 20, 160, GetParam());
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(got[i], x[i]) << i;
  for (std::size_t i = x.size(); i < got.size(); ++i) ASSERT_EQ(got[i], 0) << "an absent row";
}

TEST_P(Int4Test, EveryFloatTypeAndTheSameBitsOnEveryInstructionSet) {
  std::mt19937 random(8);
  for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    for (const std::int64_t rows : {1, 16, 27}) {
      const std::int64_t columns = 96;
      const std::vector<std::byte> source = random_blocks(type, rows * columns, random);
      std::vector<float> values(static_cast<std::size_t>(rows * columns));
      dequantize(type, source.data(), rows * columns, values.data());
      const std::vector<float> got = converted(source, type, rows, columns, GetParam());
      ASSERT_EQ(got, converted(bytes_of(values), WeightType::f32, rows, columns, Isa::portable));
      std::size_t far = 0;
      for (std::size_t i = 0; i < values.size(); ++i) far += std::abs(got[i] - values[i]) > 0.5F ? 1 : 0;
      EXPECT_LE(far, values.size() / 50);  // steps are some 0.3
    }
  }
}

TEST_P(Int4Test, ZerosTinyHugeAndBrokenBlocks) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> x(7 * kBlock, 0);
  x[kBlock] = 1e-40F;  // subnormal
  x[2 * kBlock + 3] = 3e-8F;
  x[3 * kBlock + 5] = -1.0F;
  x[4 * kBlock + 5] = nan;
  x[5 * kBlock + 5] = infinity;
  for (std::size_t i = 6 * kBlock; i < x.size(); ++i) x[i] = 2.0F;
  const std::vector<float> got = converted(bytes_of(x), WeightType::f32, 1, 7 * kBlock, GetParam());
  for (std::size_t i = 0; i < 2 * kBlock; ++i) ASSERT_EQ(got[i], 0);
  for (std::size_t i = 2 * kBlock; i < 3 * kBlock; ++i) ASSERT_NEAR(got[i], x[i], 6e-8);  // f16 ends at 6e-8
  for (std::size_t i = 3 * kBlock; i < 4 * kBlock; ++i) ASSERT_NEAR(got[i], x[i], 1e-3);
  for (std::size_t i = 4 * kBlock; i < 6 * kBlock; ++i) ASSERT_TRUE(std::isnan(got[i]));
  for (std::size_t i = 6 * kBlock; i < 7 * kBlock; ++i) ASSERT_NEAR(got[i], 2, 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Isas, Int4Test, testing::ValuesIn(available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace draftwerk::cpu
