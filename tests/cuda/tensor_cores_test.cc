// What row invariance takes for granted of tensor cores. Emulated ones are so by construction; on a GPU (bench/gpu.sh)
// this is where it shows.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "backend/cuda/device.cuh"
#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"

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

class TensorCores : public ::testing::TestWithParam<bool> {
 protected:
  /// Numbers of many sizes; one in eight is zero.
  std::uint16_t number() {
    if (random_() % 8 == 0) return 0;
    // float16 has exponents up to 15; sums must stay finite.
    const std::uint32_t exponent = GetParam() ? 1 + random_() % 22 : 97 + random_() % 40;
    const std::uint32_t mantissa = random_() % (GetParam() ? 1024 : 128);
    const std::uint32_t sign = random_() % 2;
    return static_cast<std::uint16_t>(sign << 15 | exponent << (GetParam() ? 10 : 7) | mantissa);
  }
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

INSTANTIATE_TEST_SUITE_P(Of, TensorCores, ::testing::Bool(),
                         [](const auto& of) { return of.param ? "float16" : "bfloat16"; });

}  // namespace
}  // namespace draftwerk::cuda
