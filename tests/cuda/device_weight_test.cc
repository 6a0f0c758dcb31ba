// Weights on the device: what they hold, as embed() reads it back.
#include "backend/cuda/device_weight.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "backend/cpu/packing.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cuda/embed.h"
#include "random_blocks.h"

namespace draftwerk::cuda {
namespace {

/// All rows of a weight, times `scale`.
std::vector<float> values_of(const DeviceWeight& weight, float scale) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(weight.rows()));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(tokens.size() - 1 - i);
  tokens.push_back(-5);  // padding
  StepView step{};
  step.tokens = tokens.data();
  step.rows = static_cast<std::int32_t>(tokens.size());
  const auto columns = static_cast<int>(weight.columns());
  std::vector<float> out(tokens.size() * static_cast<std::size_t>(columns + 1), -7.0F);
  LaunchList launches;
  embed(launches, step, weight, scale, {out.data(), columns, columns + 1});
  launches.run(nullptr);
  check(cudaDeviceSynchronize(), "waiting");
  std::vector<float> values;
  for (std::size_t i = tokens.size() - 1; i-- > 0;) {
    const float* row = out.data() + i * static_cast<std::size_t>(columns + 1);
    values.insert(values.end(), row, row + columns);
    EXPECT_EQ(row[columns], -7.0F) << "a gap between rows";
  }
  return values;
}

TEST(DeviceWeight, HoldsTheValuesOfEveryType) {
  std::mt19937 random(5);
  for (const WeightType type : cpu::kWeightTypes) {
    const int rows = 37;
    const int columns = block_columns(type) == 1 ? 45 : block_columns(type) == 32 ? 96 : 256;
    const std::vector<std::byte> stored = cpu::random_rows(type, rows, columns, random);
    const std::vector<float> want = cpu::values_of_rows(type, rows, columns, stored);
    Uploader uploader(2);
    DeviceWeight weight(type, rows, columns, uploader);
    const std::size_t row_bytes = stored_row_bytes(type, columns);
    weight.upload(32, 5, type, stored.data() + 32 * row_bytes, uploader);
    weight.upload(0, 32, type, stored.data(), uploader);
    uploader.wait();
    EXPECT_EQ(weight.type(), type);
    const std::vector<float> got = values_of(weight, 0.75F);
    for (std::size_t i = 0; i < want.size(); ++i) {
      const bool exact = format_of(type) != WeightFormat::bf16;
      const float held = exact ? want[i] : cpu::bfloat_to_float(cpu::float_to_bfloat(want[i]));
      ASSERT_EQ(got[i], held * 0.75F) << weight_type_name(type) << ", " << i;
    }
  }
}

TEST(DeviceWeight, QuantisesFloatsAsTheCpuDoes) {
  std::mt19937 random(6);
  for (const WeightType type : {WeightType::q8_0, WeightType::q4_0}) {
    for (const WeightType source_type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
      const int rows = 21;
      const int columns = 160;
      const std::vector<std::byte> source = cpu::random_blocks(source_type, rows * columns, random);
      Uploader uploader;
      DeviceWeight weight(type, rows, columns, uploader);
      weight.upload(0, rows, source_type, source.data(), uploader);
      uploader.wait();
      const std::size_t panel_bytes = cpu::panel_bytes(type, columns);
      std::vector<std::byte> panels(panel_bytes * static_cast<std::size_t>(cpu::panel_count(rows)));
      cpu::pack_rows(type, columns, rows, source_type, source.data(), panels.data());
      const cpu::PackedMatrix packed{type, rows, columns, panel_bytes, panels.data()};
      std::vector<float> want(static_cast<std::size_t>(rows * columns));
      for (int r = 0; r < rows; ++r) cpu::unpack_row(packed, r, 1.0F, want.data() + std::ptrdiff_t{r} * columns);
      EXPECT_EQ(values_of(weight, 1.0F), want) << weight_type_name(type) << " of " << weight_type_name(source_type);
    }
  }
}

TEST(DeviceWeight, QuantisesFloatsToFp8ByRows) {
  std::mt19937 random(7);
  for (const WeightType source_type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    const int rows = 21;
    const int columns = 131;
    std::vector<std::byte> source = cpu::random_rows(source_type, rows, columns, random);
    const std::size_t row_bytes = stored_row_bytes(source_type, columns);
    std::fill_n(source.begin() + static_cast<std::ptrdiff_t>(3 * row_bytes), row_bytes, std::byte{0});
    Uploader uploader;
    DeviceWeight weight(WeightType::f8_e4m3, rows, columns, uploader);
    weight.upload(0, rows, source_type, source.data(), uploader);
    uploader.wait();
    std::vector<float> want;
    for (int r = 0; r < rows; ++r) {
      const cpu::Float8Row row(source_type, source.data() + static_cast<std::size_t>(r) * row_bytes, columns);
      for (int c = 0; c < columns; ++c) want.push_back(row.scale() * cpu::e4m3_to_float(row[c]));
    }
    EXPECT_EQ(values_of(weight, 1.0F), want) << weight_type_name(source_type);
  }
}

TEST(DeviceWeight, LargerThanABufferOfTheWayThere) {
  const int rows = 40;
  const int columns = 128 << 10;  // 4 MB a panel
  std::vector<std::uint16_t> bits(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i % 0x7001U);
  Uploader uploader;
  DeviceWeight weight(WeightType::bf16, rows, columns, uploader);
  weight.upload(0, rows, WeightType::bf16, reinterpret_cast<const std::byte*>(bits.data()), uploader);
  std::fill(bits.begin() + 1000, bits.end(), std::uint16_t{0});
  uploader.wait();
  const MatrixView& view = weight.view();
  for (const int row : {0, 17, 39}) {
    for (const int column : {1, columns - 1}) {
      const std::size_t i =
          static_cast<std::size_t>(row) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(column);
      const std::byte* at = view.data + row / 16 * view.panel_bytes() + column / 16 * 512 +
                            (row % 8 * 4 + column % 8 / 2) * 16 + (column % 16 / 8 * 2 + row % 16 / 8) * 4 +
                            column % 2 * 2;
      std::uint16_t got = 0;
      std::memcpy(&got, at, sizeof got);
      EXPECT_EQ(got, i % 0x7001U) << row << ", " << column;
    }
  }
}

TEST(DeviceWeight, RefusesWhatDoesNotFit) {
  Uploader uploader;
  EXPECT_THROW(DeviceWeight(WeightType::q4_k, 16, 64, uploader), std::invalid_argument);
  EXPECT_THROW(DeviceWeight(WeightType::f32, 16, 0, uploader), std::invalid_argument);
  DeviceWeight weight(WeightType::q8_0, 40, 64, uploader);
  const std::vector<std::byte> source(40 * 64 * 4);
  EXPECT_THROW(weight.upload(8, 16, WeightType::q8_0, source.data(), uploader), std::invalid_argument);
  EXPECT_THROW(weight.upload(0, 20, WeightType::q8_0, source.data(), uploader), std::invalid_argument);
  EXPECT_THROW(weight.upload(32, 16, WeightType::q8_0, source.data(), uploader), std::invalid_argument);
  EXPECT_THROW(weight.upload(0, 16, WeightType::q4_0, source.data(), uploader), std::invalid_argument);
  EXPECT_NO_THROW(weight.upload(32, 8, WeightType::f32, source.data(), uploader));
}

}  // namespace
}  // namespace draftwerk::cuda
