// What row invariance takes for granted of tensor cores. Emulated ones are so by construction; on a GPU (bench/gpu.sh)
// this is where it shows.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "backend/cuda/device.cuh"
#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/multiply_chunk.cuh"
#include "backend/cuda/warpgroup.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kDepth = 16;

struct Multiply {
  const std::uint16_t* a;  // [16, 16]
  const std::uint16_t* b;  // [8, 16]: a column of B after the other
  float* d;                // [16, 8], what is added to and the result
  std::int32_t half;       // float16, not bfloat16
  std::int32_t unused;
};

__device__ std::uint32_t pair_of(const std::uint16_t* values) {
  return values[0] | static_cast<std::uint32_t>(values[1]) << 16;
}

__global__ void multiply(const Multiply m) {
  follow_previous();
  const int group = lane() / 4;
  const int place = lane() % 4;
  std::uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = pair_of(m.a + (group + i % 2 * 8) * kDepth + place * 2 + i / 2 * 8);
  std::uint32_t b[2];
  for (int i = 0; i < 2; ++i) b[i] = pair_of(m.b + group * kDepth + place * 2 + i * 8);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = m.d[(group + i / 2 * 8) * kColumns + place * 2 + i % 2];
  if (m.half != 0) {
    mma_f16(d, a, b);
  } else {
    mma_bf16(d, a, b);
  }
  for (int i = 0; i < 4; ++i) m.d[(group + i / 2 * 8) * kColumns + place * 2 + i % 2] = d[i];
}

/// a [16, 16], b [8, 16] and d [16, 8] of one instruction.
struct Operands {
  std::array<std::uint16_t, kRows * kDepth> a{};
  std::array<std::uint16_t, kColumns * kDepth> b{};
  std::array<float, kRows * kColumns> d{};
};

/// Numbers of many sizes; one in eight is zero.
std::uint16_t some_number(std::mt19937& random, bool half) {
  if (random() % 8 == 0) return 0;
  // float16 has exponents up to 15; sums must stay finite.
  const std::uint32_t exponent = half ? 1 + random() % 22 : 97 + random() % 40;
  const std::uint32_t mantissa = random() % (half ? 1024 : 128);
  const std::uint32_t sign = random() % 2;
  return static_cast<std::uint16_t>(sign << 15 | exponent << (half ? 10 : 7) | mantissa);
}

class TensorCores : public ::testing::TestWithParam<bool> {
 protected:
  std::uint16_t number() { return some_number(random_, GetParam()); }
  Operands random_operands() {
    Operands operands;
    for (std::uint16_t& x : operands.a) x = number();
    for (std::uint16_t& x : operands.b) x = number();
    std::normal_distribution<float> normal;
    for (float& x : operands.d) x = normal(random_);
    return operands;
  }
  [[nodiscard]] std::array<float, kRows * kColumns> product(const Operands& operands) const {
    const DeviceMemory memory = DeviceMemory::of(sizeof operands);
    check(cudaMemcpy(memory.get(), &operands, sizeof operands, cudaMemcpyHostToDevice), "copying");
    auto* const on_device = static_cast<Operands*>(memory.get());
    LaunchList list;
    list.add(multiply, {dim3(1), dim3(kWarp)},
             {on_device->a.data(), on_device->b.data(), on_device->d.data(), GetParam() ? 1 : 0, 0});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    std::array<float, kRows * kColumns> d{};
    check(cudaMemcpy(d.data(), on_device->d.data(), sizeof d, cudaMemcpyDeviceToHost), "copying");
    return d;
  }

  std::mt19937 random_{3};
};

// A row of activations is a column of B, or, in attention, a row of A.
TEST_P(TensorCores, ElementsOfAProductAreTheirOwn) {
  for (int round = 0; round < 40; ++round) {
    const Operands all = random_operands();
    const auto together = product(all);
    const int row = static_cast<int>(random_() % kRows);
    const int column = static_cast<int>(random_() % kColumns);
    Operands others = random_operands();
    std::memcpy(&others.a[static_cast<std::size_t>(row * kDepth)], &all.a[static_cast<std::size_t>(row * kDepth)],
                kDepth * sizeof(std::uint16_t));
    std::memcpy(&others.b[static_cast<std::size_t>(column * kDepth)], &all.b[static_cast<std::size_t>(column * kDepth)],
                kDepth * sizeof(std::uint16_t));
    const auto at = static_cast<std::size_t>(row * kColumns + column);
    others.d[at] = all.d[at];
    EXPECT_EQ(product(others)[at], together[at]) << "row " << row << ", column " << column;
  }
}

// In attention, a position that a row does not see has weight 0; what its value is depends on who is computed beside
// it.
TEST_P(TensorCores, ZeroTimesAnythingIsNothing) {
  for (int round = 0; round < 40; ++round) {
    Operands zeros = random_operands();
    Operands anything = zeros;
    for (std::size_t k = 0; k < kDepth; ++k) {
      if (random_() % 2 == 0) continue;
      for (std::size_t row = 0; row < kRows; ++row) zeros.a[row * kDepth + k] = anything.a[row * kDepth + k] = 0;
      for (std::size_t column = 0; column < kColumns; ++column) {
        zeros.b[column * kDepth + k] = 0;
        // The largest of all, beside products that are small.
        anything.b[column * kDepth + k] = GetParam() ? 0x7B53 : 0x4780;
      }
    }
    for (std::uint16_t& x : zeros.a) x = x == 0 ? x : static_cast<std::uint16_t>(GetParam() ? x & 0x8FFF : x & 0x9FFF);
    anything.a = zeros.a;
    EXPECT_EQ(product(anything), product(zeros));
  }
}

struct MultiplyAll {
  const std::uint16_t* a;     // [64, 32]
  const std::byte* operands;  // [192, 32], as operands.h has them
  float* of_warps;            // [warp, tile, place, lane]
  float* of_group;            // likewise
};

/// A slice of two steps by instructions of a warp, and by those of a warpgroup.
__global__ void multiply_all(const MultiplyAll m) {
#if DRAFTWERK_HAS_WARPGROUPS
  follow_previous();
  constexpr int kSteps = 2;
  const int thread = static_cast<int>(threadIdx.x);
  std::byte* const shared = dynamic_shared();
  for (int i = thread; i < kGroupTiles * kWarp; i += kGroupWarps * kWarp) {
    cp_async_16(shared + i * 16, m.operands + i * 16);
  }
  cp_async_commit();
  std::uint32_t a[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp() * 16 + lane() / 4 + i % 2 * 8;
      a[step][i] = pair_of(m.a + row * kSteps * kDepth + step * kDepth + lane() % 4 * 2 + i / 2 * 8);
    }
  }
  cp_async_wait<0>();
  share_with_warpgroups();
  __syncthreads();
  float of_group[kGroupTiles][4] = {};
  begin_warpgroup_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_by_warpgroup(of_group, a[step], shared + step * 32, kFragmentBytes);
  }
  end_warpgroup_products();
  float of_warps[kGroupTiles][4] = {};
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    std::uint32_t b[4];
    load_operands<Memory::shared>(shared + t * kFragmentBytes, b);
    for (int step = 0; step < kSteps; ++step) {
      const std::uint32_t of_step[2] = {b[2 * step], b[2 * step + 1]};
      mma_bf16(of_warps[t], a[step], of_step);
    }
  }
  await_warpgroup(of_group);
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    for (int i = 0; i < 4; ++i) {
      const int at = ((warp() * kGroupTiles + t) * 4 + i) * kWarp + lane();
      m.of_warps[at] = of_warps[t][i];
      m.of_group[at] = of_group[t][i];
    }
  }
#endif
}

class Warpgroups : public ::testing::Test {
 protected:
  struct Values {
    std::array<std::uint16_t, 64 * 32> a;
    alignas(16) std::array<std::uint16_t, kGroupRows * 32> b;
    std::array<float, 64 * kGroupRows> of_warps;
    std::array<float, 64 * kGroupRows> of_group;
  };

  void SetUp() override {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "asking for a GPU's properties");
    if (properties.major != 9 || properties.minor != 0) GTEST_SKIP() << "this device has none";
    for (std::uint16_t& x : values_.a) x = some_number(random_, false);
    for (std::uint16_t& x : values_.b) x = some_number(random_, false);
  }
  void multiply() {
    const DeviceMemory memory = DeviceMemory::of(sizeof(Values));
    auto* const on_device = static_cast<Values*>(memory.get());
    check(cudaMemcpy(on_device, &values_, sizeof(Values), cudaMemcpyHostToDevice), "copying");
    LaunchList list;
    list.add(multiply_all, {dim3(1), dim3(kGroupWarps * kWarp), kGroupTiles * kFragmentBytes},
             {on_device->a.data(), reinterpret_cast<const std::byte*>(on_device->b.data()), on_device->of_warps.data(),
              on_device->of_group.data()});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    check(cudaMemcpy(&values_, on_device, sizeof(Values), cudaMemcpyDeviceToHost), "copying");
  }
  /// What the warpgroup made of a row of b.
  [[nodiscard]] std::vector<float> of_row(int row) const {
    std::vector<float> sums;
    for (std::size_t at = 0; at < values_.of_group.size(); ++at) {
      const auto lane = static_cast<int>(at % kWarp);
      const auto place = static_cast<int>(at / kWarp % 4);
      const auto tile = static_cast<int>(at / kWarp / 4 % kGroupTiles);
      if (tile * 8 + lane % 4 * 2 + place % 2 == row) sums.push_back(values_.of_group[at]);
    }
    return sums;
  }

  std::mt19937 random_{5};
  Values values_{};
};

// A prompt's rows are multiplied by warpgroups where there are such, and a decoded token's by warps.
TEST_F(Warpgroups, AddUpAsWarpsDo) {
  for (int round = 0; round < 20; ++round) {
    for (std::uint16_t& x : values_.b) x = some_number(random_, false);
    multiply();
    ASSERT_EQ(values_.of_group, values_.of_warps);
    ASSERT_TRUE(std::ranges::any_of(values_.of_group, [](float x) { return x != 0.0F; }));
  }
}

TEST_F(Warpgroups, GiveARowTheSameWhateverLiesBesideIt) {
  multiply();
  for (int round = 0; round < 20; ++round) {
    const int row = static_cast<int>(random_() % kGroupRows);
    const std::vector<float> together = of_row(row);
    ASSERT_EQ(together.size(), 64U);
    for (int i = 0; i < kGroupRows * 32; ++i) {
      if (i / 32 != row)
        values_.b[static_cast<std::size_t>(i)] = random_() % 2 == 0 ? 0x7FC0 : some_number(random_, false);
    }
    multiply();
    ASSERT_EQ(of_row(row), together);
    for (int i = 0; i < kGroupRows * 32; ++i) {
      if (i / 32 != row) values_.b[static_cast<std::size_t>(i)] = some_number(random_, false);
    }
    multiply();
  }
}

INSTANTIATE_TEST_SUITE_P(Of, TensorCores, ::testing::Bool(),
                         [](const auto& of) { return of.param ? "float16" : "bfloat16"; });

}  // namespace
}  // namespace draftwerk::cuda
