// The tiles in software against the machine's, and what the kernels do with tiles.
#if defined(__x86_64__)

#include "backend/cpu/tiles.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/tile_instructions.h"
#include "emulated/backend/cpu/tile_instructions.h"
#include "kernel_sets.h"
#include "random_blocks.h"

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

// Products of tiles in a product of that many rows with the second panel of a matrix: of two blocks, or one superblock.
std::int64_t products_of_tiles(WeightType type, int rows) {
  const std::int64_t columns = block_columns(type) == kSuperblock ? kSuperblock : 2 * kBlock;
  std::mt19937 random(2);
  const auto blocks = random_blocks(type, 2 * kPanel * columns, random);
  std::vector<std::byte> panels(2 * panel_bytes(type, columns));
  pack_rows(type, columns, 2 * kPanel, type, blocks.data(), panels.data());
  const PackedMatrix matrix = {type, 2 * kPanel, columns, panel_bytes(type, columns), panels.data()};
  const std::vector<float> values(static_cast<std::size_t>(rows * columns));
  const std::vector<std::int8_t> quants(values.size());
  const std::vector<float> scales(values.size() / kBlock);
  const std::vector<std::int32_t> sums(scales.size());
  const Activations x = {values.data(), columns, quants.data(), scales.data(), sums.data(), columns, columns / kBlock};
  std::vector<float> y(static_cast<std::size_t>(rows) * 2 * kPanel);
  const std::int64_t before = emulated_amx::registers().products;
  emulated_amx::matmul_kernels().matmul(matrix, 1, 2, x, rows, y.data(), 2 * kPanel);
  EXPECT_FALSE(emulated_amx::registers().configured);
  emulated_amx::matmul_kernels().matmul(matrix, 1, 1, x, rows, y.data(), 2 * kPanel);
  EXPECT_FALSE(emulated_amx::registers().configured);
  return emulated_amx::registers().products - before;
}

TEST(Tiles, MultiplyMoreThanEightRowsOfMostTypesAndAreReleased) {
  if (available_isas().back() < Isa::avx512) GTEST_SKIP() << "needs AVX-512";
  for (const WeightType type : {WeightType::q8_0, WeightType::q4_0, WeightType::q5_0, WeightType::q4_k}) {
    const std::int64_t blocks = type == WeightType::q4_k ? layout::kBlocksPerSuper : 2;
    EXPECT_EQ(products_of_tiles(type, 8), 0) << weight_type_name(type);
    EXPECT_EQ(products_of_tiles(type, 9), blocks) << weight_type_name(type);
    EXPECT_EQ(products_of_tiles(type, 16), blocks) << weight_type_name(type);
    EXPECT_EQ(products_of_tiles(type, 33), 3 * blocks) << weight_type_name(type);
  }
  for (const WeightType type : {WeightType::q6_k, WeightType::bf16}) EXPECT_EQ(products_of_tiles(type, 33), 0);
}

}  // namespace
}  // namespace draftwerk::cpu

#endif
