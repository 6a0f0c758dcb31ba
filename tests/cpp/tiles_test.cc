// The tiles in software against the machine's, and what kernels leave behind.
#include "backend/cpu/tiles.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/tile_instructions.h"
#include "emulated/backend/cpu/tile_instructions.h"
#include "kernel_sets.h"
#include "random_blocks.h"

#if defined(__x86_64__)

namespace draftwerk::cpu {
namespace {

TEST(Tiles, InSoftwareAreThoseOfTheMachine) {
  if (available_isas().back() != Isa::amx) GTEST_SKIP() << "needs AMX";
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    TileShapes shapes;
    const int rows = 1 + static_cast<int>(random() % kTileRows);
    const int groups = 1 + static_cast<int>(random() % kTileRows);
    const int columns = 1 + static_cast<int>(random() % kTileRows);
    shapes.set(0, rows, 4 * columns);
    shapes.set(3, rows, 4 * groups);
    shapes.set(7, groups, 4 * columns);
    const std::int64_t stride = kTileBytes + static_cast<std::int64_t>(random() % 100);
    const auto random_bytes = [&] {
      std::vector<std::int8_t> bytes(kTileRows * static_cast<std::size_t>(stride));
      for (std::int8_t& byte : bytes) byte = static_cast<std::int8_t>(random());
      return bytes;
    };
    const std::vector<std::int8_t> sums = random_bytes();
    const std::vector<std::int8_t> a = random_bytes();
    const std::vector<std::int8_t> b = random_bytes();
    std::vector<std::int8_t> machine = random_bytes();
    std::vector<std::int8_t> software = machine;
    const bool zero = random() % 2 == 0;

    amx::configure_tiles(shapes);
    amx::load_tile<0>(sums.data(), stride);
    if (zero) amx::zero_tile<0>();
    amx::load_tile<3>(a.data(), stride);
    amx::load_tile<7>(b.data(), stride);
    amx::multiply_tiles<0, 3, 7>();
    amx::store_tile<0>(machine.data(), stride);
    amx::release_tiles();

    emulated_amx::configure_tiles(shapes);
    emulated_amx::load_tile<0>(sums.data(), stride);
    if (zero) emulated_amx::zero_tile<0>();
    emulated_amx::load_tile<3>(a.data(), stride);
    emulated_amx::load_tile<7>(b.data(), stride);
    emulated_amx::multiply_tiles<0, 3, 7>();
    emulated_amx::store_tile<0>(software.data(), stride);
    emulated_amx::release_tiles();
    ASSERT_EQ(machine, software) << rows << " rows, " << groups << " groups, " << columns << " columns";
  }
}

TEST(Tiles, AreReleasedByEveryProduct) {
  if (available_isas().back() < Isa::avx512) GTEST_SKIP() << "needs AVX-512";
  std::mt19937 random(2);
  const auto blocks = random_blocks(WeightType::q4_0, 16 * 64, random);
  std::vector<std::byte> panels(panel_bytes(WeightType::q4_0, 64));
  pack_rows(WeightType::q4_0, 64, 16, WeightType::q4_0, blocks.data(), panels.data());
  const std::vector<std::int8_t> quants(40 * 64);
  const std::vector<float> scales(40 * 2);
  const std::vector<std::int32_t> sums(40 * 2);
  const Activations x = {nullptr, 0, quants.data(), scales.data(), sums.data(), 64, 2};
  std::vector<float> y(40 * 16);
  for (const std::int64_t panel_count : {0, 1}) {
    const PackedMatrix matrix = {WeightType::q4_0, 16, 64, panels.size(), panels.data()};
    emulated_amx::matmul_kernels().matmul(matrix, 0, panel_count, x, 40, y.data(), 16);
    EXPECT_FALSE(emulated_amx::registers().configured);
  }
}

}  // namespace
}  // namespace draftwerk::cpu

#endif
