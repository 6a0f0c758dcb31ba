// Tables on the device, held to the plain decoder of each format.
#include "backend/cuda/device_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cuda/device_table.cuh"
#include "backend/cuda/launch.h"
#include "random_blocks.h"

namespace draftwerk::cuda {
namespace {

struct ReadTable {
  TableView table;
  float* out;
};
__global__ void read_table(const ReadTable r) {
  follow_previous();
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  for (int c = static_cast<int>(threadIdx.x); c < r.table.columns; c += static_cast<int>(blockDim.x)) {
    r.out[row * r.table.columns + c] = table_value(r.table, row, c);
  }
}

TEST(DeviceTable, HoldsTheValuesOfEveryType) {
  std::mt19937 random(3);
  for (const WeightType type : cpu::kWeightTypes) {
    const int rows = 5;
    const int columns = block_columns(type) == 1 ? 37 : 512;
    std::vector<std::byte> source = cpu::random_rows(type, rows, columns, random);
    const std::vector<float> want = cpu::values_of_rows(type, rows, columns, source);
    Uploader uploader;
    const DeviceTable table(type, rows, columns, source.data(), uploader);
    source.assign(source.size(), std::byte{0xFF});
    uploader.wait();
    EXPECT_EQ(table.type(), type);
    EXPECT_EQ(table.rows(), rows);
    EXPECT_EQ(table.columns(), columns);
    std::vector<float> got(want.size());
    LaunchList list;
    list.add(read_table, {dim3(rows), dim3(64)}, {table.view(), got.data()});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_EQ(got[i], want[i]) << weight_type_name(type) << ", " << i;
  }
}

TEST(DeviceTable, LargerThanABufferOfTheWayThere) {
  const std::int64_t columns = 1 << 20;
  std::vector<float> values(static_cast<std::size_t>(columns) * 5);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 65537);
  Uploader uploader;
  const DeviceTable table(WeightType::f32, 5, columns, reinterpret_cast<const std::byte*>(values.data()), uploader);
  uploader.wait();
  std::vector<float> got(values.size());
  check(cudaMemcpy(got.data(), table.view().data, got.size() * sizeof(float), cudaMemcpyDeviceToHost), "copying");
  EXPECT_EQ(got, values);
}

TEST(DeviceTable, RefusesPartsOfBlocks) {
  Uploader uploader;
  EXPECT_THROW(DeviceTable(WeightType::q8_0, 2, 40, nullptr, uploader), std::invalid_argument);
  EXPECT_THROW(DeviceTable(WeightType::f32, 0, 4, nullptr, uploader), std::invalid_argument);
}

}  // namespace
}  // namespace draftwerk::cuda
