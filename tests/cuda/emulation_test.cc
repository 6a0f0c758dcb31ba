// The emulated device, by kernels whose results are known.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "backend/cuda/device.cuh"
#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"

namespace draftwerk::cuda {
namespace {

struct Sum {
  const float* values;
  float* sums;
  int count;
};

/// Each block sums a row, warp by warp.
__global__ void sum_rows(const Sum a) {
  follow_previous();
  __shared__ float partial[kWarp];
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < a.count; i += static_cast<int>(blockDim.x)) {
    sum += a.values[static_cast<int>(blockIdx.x) * a.count + i];
  }
  sum = warp_sum(sum);
  if (lane() == 0) partial[warp()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) all += partial[w];
    a.sums[blockIdx.x] = all;
  }
}

struct Tile {
  const std::uint16_t* a;  // [16, 16]
  const std::uint16_t* b;  // [8, 16], a column of B after the other
  float* d;                // [16, 8]
};

__global__ void multiply_tile(const Tile t) {
  follow_previous();
  alignas(16) __shared__ std::uint16_t a[16][16];
  const int group = lane() / 4;
  const int place = lane() % 4;
  cp_async_16(&a[lane() / 2][lane() % 2 * 8], t.a + lane() * 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  std::uint32_t of_a[4];
  ldmatrix_x4(of_a, &a[lane() % 16][lane() / 16 * 8]);
  std::uint32_t of_b[2];
  for (int h = 0; h < 2; ++h) {
    const std::uint16_t* pair = t.b + group * 16 + h * 8 + place * 2;
    of_b[h] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
  float d[4] = {};
  mma_bf16(d, of_a, of_b);
  for (int i = 0; i < 4; ++i) t.d[(group + i / 2 * 8) * 8 + place * 2 + i % 2] = d[i];
}

struct Hang {
  int who;
};
__global__ void hang(const Hang h) {
  follow_previous();
  if (static_cast<int>(threadIdx.x) == h.who) __syncwarp();
}

struct Read {
  const float* device;
  float* out;
  int index;
};
[[maybe_unused]] __global__ void read_device(const Read r) {
  follow_previous();
  *r.out = r.device[r.index];
}
[[maybe_unused]] __global__ void read_shared(const Read r) {
  follow_previous();
  *r.out = reinterpret_cast<const float*>(dynamic_shared())[r.index];
}

struct AddOne {
  const float* from;
  float* to;
};
__global__ void add_one(const AddOne a) {
  follow_previous();
  *a.to = *a.from + 1;
}
__global__ void add_one_too_early(const AddOne a) {
  let_next_start();
  const float x = *a.from;
  await_previous();
  *a.to = x + 1;
}
__global__ void add_one_never_awaiting(const AddOne a) { *a.to = *a.from + 1; }

/// What a thread finds in shared memory between asking for a copy and waiting for it.
__global__ void look_before_waiting(const AddOne a) {
  follow_previous();
  auto* const shared = reinterpret_cast<float*>(dynamic_shared());
  shared[0] = -1;
  cp_async_16(shared, a.from);
  cp_async_commit();
  a.to[0] = shared[0];
  cp_async_wait<0>();
  a.to[1] = shared[0];
}

class Emulation : public ::testing::Test {
 protected:
  ~Emulation() override { emulation::reset(); }
};

TEST_F(Emulation, SumsRowsInEveryOrderOfThreads) {
  std::vector<float> values(3 * 100);
  std::iota(values.begin(), values.end(), 1.0F);
  for (const auto order : {emulation::Order::forward, emulation::Order::backward, emulation::Order::shuffled}) {
    emulation::set_order(order, 5);
    std::vector<float> sums(3);
    LaunchList list;
    list.add(sum_rows, {dim3(3), dim3(96)}, {values.data(), sums.data(), 100});
    const Stream stream = Stream::create();
    list.run(stream.get());
    EXPECT_EQ(sums[0], 0.0F) << "ran before anybody waited";
    stream.wait();
    EXPECT_EQ(sums, (std::vector<float>{5050, 15050, 25050}));
  }
}

TEST_F(Emulation, CopiesLateOrAtOnceByTheOrder) {
  const std::vector<float> from(4, 7.0F);
  for (const auto& [order, before] :
       {std::pair(emulation::Order::forward, -1.0F), {emulation::Order::backward, 7.0F}}) {
    emulation::set_order(order);
    std::vector<float> found(2);
    LaunchList list;
    list.add(look_before_waiting, {dim3(1), dim3(1), 16}, {from.data(), found.data()});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    EXPECT_EQ(found, (std::vector<float>{before, 7.0F}));
  }
}

TEST_F(Emulation, RefusesAnAddressOnTheStack) {
  std::vector<float> on_heap(2);
  float on_stack[2] = {};
  for (float* to : {on_heap.data(), on_stack}) {
    LaunchList list;
    list.add(add_one, {dim3(1), dim3(1)}, {on_heap.data(), to});
    if (to == on_stack) {
      EXPECT_THROW(list.run(nullptr), CudaError);
      EXPECT_THROW(static_cast<void>(list.instantiate(true)), CudaError);
    } else {
      EXPECT_NO_THROW(list.run(nullptr));
    }
  }
  check(cudaDeviceSynchronize(), "waiting");
}

TEST_F(Emulation, RunsAGraphAsOftenAsItIsLaunched) {
  std::vector<float> values(64, 1.0F);
  std::vector<float> sums(1);
  LaunchList list;
  list.add(sum_rows, {dim3(1), dim3(64)}, {values.data(), sums.data(), 64});
  list.add(sum_rows, {dim3(1), dim3(32)}, {values.data(), values.data(), 64});
  const GraphExec graph = list.instantiate(true);
  const Stream stream = Stream::create();
  for (const float want : {64.0F, 127.0F}) {
    check(cudaGraphLaunch(graph.get(), stream.get()), "launching a graph");
    stream.wait();
    EXPECT_EQ(sums[0], want);
  }
}

TEST_F(Emulation, BlocksOfAGraphStartBeforeTheLaunchAheadFromHopperOn) {
  const auto run = [](void (*kernel)(AddOne)) {
    std::vector<float> x{1.0F, 0.0F, 0.0F, 0.0F};
    LaunchList list;
    list.add(add_one, {dim3(1), dim3(1)}, {&x[0], &x[1]});
    list.add(kernel, {dim3(1), dim3(1)}, {&x[1], &x[2]});
    list.add(add_one, {dim3(1), dim3(1)}, {&x[2], &x[3]});
    const GraphExec graph = list.instantiate(true);
    const Stream stream = Stream::create();
    check(cudaGraphLaunch(graph.get(), stream.get()), "launching a graph");
    stream.wait();
    return x;
  };
  EXPECT_EQ(run(add_one), (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(run(add_one_too_early), (std::vector<float>{1, 2, 1, 2})) << "what was there before is what it reads";
  EXPECT_DEATH(run(add_one_never_awaiting), "has not awaited");
  emulation::set_device(1, 8, 0, 13000);
  EXPECT_EQ(run(add_one_too_early), (std::vector<float>{1, 2, 3, 4}));
}

TEST_F(Emulation, MultipliesTilesAsTensorCoresDo) {
  std::vector<std::uint16_t> a(16 * 16);
  std::vector<std::uint16_t> b(8 * 16);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = emulation::float_to_bf16(static_cast<float>(i % 7) - 3);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = emulation::float_to_bf16(static_cast<float>(i % 5) - 2);
  std::vector<float> d(16 * 8);
  void* on_device = nullptr;
  check(cudaMalloc(&on_device, a.size() * 2), "allocating");
  const DeviceMemory copy(on_device);
  check(cudaMemcpy(on_device, a.data(), a.size() * 2, cudaMemcpyHostToDevice), "copying");
  LaunchList list;
  list.add(multiply_tile, {dim3(1), dim3(32)}, {static_cast<std::uint16_t*>(on_device), b.data(), d.data()});
  list.run(nullptr);
  check(cudaDeviceSynchronize(), "waiting");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float want = 0;
      for (int k = 0; k < 16; ++k) {
        want += (static_cast<float>((row * 16 + k) % 7) - 3) * (static_cast<float>((column * 16 + k) % 5) - 2);
      }
      EXPECT_EQ(d[static_cast<std::size_t>(row * 8 + column)], want) << row << ", " << column;
    }
  }
}

TEST_F(Emulation, ThreadsThatWaitForeverAreNamed) {
  LaunchList list;
  list.add(hang, {dim3(1), dim3(32)}, {3});
  list.run(nullptr);
  EXPECT_THROW(cudaDeviceSynchronize(), std::logic_error);
}

#if defined(__SANITIZE_ADDRESS__)
TEST_F(Emulation, TheSanitizerSeesWhatIsReadBeyondMemory) {
  constexpr int kFloats = 100;
  const DeviceMemory memory = DeviceMemory::of(kFloats * sizeof(float));
  std::vector<float> out(1);
  const auto run = [&](void (*kernel)(Read), int index) {
    LaunchList list;
    list.add(kernel, {dim3(1), dim3(1), kFloats * sizeof(float)},
             {static_cast<const float*>(memory.get()), out.data(), index});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
  };
  run(read_device, kFloats - 1);
  run(read_shared, kFloats - 1);
  EXPECT_DEATH(run(read_device, kFloats), "heap-buffer-overflow");
  EXPECT_DEATH(run(read_shared, kFloats), "heap-buffer-overflow");
  EXPECT_DEATH(run(read_shared, -1), "heap-buffer-overflow");
}
#endif

TEST_F(Emulation, RoundsToHalfPrecision) {
  EXPECT_EQ(emulation::float_to_f16(1.0F), 0x3C00);
  EXPECT_EQ(emulation::float_to_f16(-65519.0F), 0xFBFF);
  EXPECT_EQ(emulation::float_to_f16(65520.0F), 0x7C00);
  EXPECT_EQ(emulation::float_to_f16(0x1p-24F), 1);
  for (unsigned bits = 0; bits < 0x7C00; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    ASSERT_EQ(emulation::float_to_f16(emulation::f16_to_float(half)), half);
  }
}

TEST_F(Emulation, FailsAsADeviceDoes) {
  emulation::set_device_memory(1000);
  void* pointer = nullptr;
  EXPECT_EQ(cudaMalloc(&pointer, 1001), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  emulation::fail_launch(0, cudaErrorIllegalAddress);
  std::vector<float> values(32);
  LaunchList list;
  list.add(sum_rows, {dim3(1), dim3(32)}, {values.data(), values.data(), 32});
  list.run(nullptr);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaMalloc(&pointer, 1), cudaErrorIllegalAddress);
}

}  // namespace
}  // namespace draftwerk::cuda
