// Times the CPU matrix kernels on the shapes of gemma-3-270m and of Gemma 4 E2B, over so many matrices that they come
// from memory, next to the time in which the same threads can merely read the same bytes.
//   matmul_bench [threads (2)] [instruction set (the best one)] [repeats (7)]
// Each thread takes an equal share of the panels of every matrix; medians of the repeats.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/quantized_blocks.h"

namespace draftwerk::cpu {
namespace {

// Memory on huge pages, as the backend keeps weights.
class HugePages {
 public:
  explicit HugePages(std::size_t bytes) : bytes_((bytes + kHuge - 1) / kHuge * kHuge + kHuge) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    madvise(memory_, bytes_, MADV_HUGEPAGE);
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() { munmap(memory_, bytes_); }
  [[nodiscard]] std::byte* data() const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_);
    return static_cast<std::byte*>(memory_) + (kHuge - address % kHuge) % kHuge;
  }

 private:
  static constexpr std::size_t kHuge = std::size_t{2} << 20;
  std::size_t bytes_;
  void* memory_;
};

// Seconds that body(thread) takes on all threads, from a common start to the last end: the median.
template <typename Body>
double median_seconds(int threads, int repeats, const Body& body) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    std::atomic<int> ready = 0;
    std::vector<Clock::time_point> ends(threads);
    std::vector<Clock::time_point> starts(threads);
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        ready.fetch_add(1);
        while (ready.load() < threads) {
        }
        starts[t] = Clock::now();
        body(t);
        ends[t] = Clock::now();
      });
    }
    for (std::thread& worker : workers) worker.join();
    const auto span = *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
    if (repeat > 0) seconds.push_back(std::chrono::duration<double>(span).count());  // the first one warms up
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

struct Shape {
  WeightType type;
  std::int64_t rows;
  std::int64_t columns;
  int matrices;
};

void fill_with_random_values(const Shape& shape, std::byte* panels, std::mt19937& random) {
  const std::int64_t elements = 16 * shape.columns;
  const std::size_t bytes = panel_bytes(shape.type, shape.columns);
  if (takes_quantized(shape.type)) {
    std::vector<std::byte> panel_of_blocks(elements / block_columns(shape.type) * block_bytes(shape.type));
    for (std::byte& byte : panel_of_blocks) byte = static_cast<std::byte>(random() & 0x3FU);  // every scale is finite
    pack_rows(shape.type, shape.columns, 16, shape.type, panel_of_blocks.data(), panels);
  } else {  // random bits would be subnormal here and there, which some processors multiply a hundred times slower
    std::vector<float> values(elements);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random);
    pack_rows(shape.type, shape.columns, 16, draftwerk::WeightType::f32,
              reinterpret_cast<const std::byte*>(values.data()), panels);
  }
  const std::int64_t count = panel_count(shape.rows) * shape.matrices;
  for (std::int64_t p = 1; p < count; ++p) std::memcpy(panels + p * bytes, panels, bytes);
}

void run(const Shape& shape, const MatmulKernels& kernels, int threads, int repeats) {
  std::mt19937 random(1);
  const std::size_t bytes = panel_bytes(shape.type, shape.columns);
  const std::int64_t panels = panel_count(shape.rows);
  const std::size_t matrix_bytes = bytes * static_cast<std::size_t>(panels);
  const HugePages memory(matrix_bytes * shape.matrices);
  fill_with_random_values(shape, memory.data(), random);

  std::vector<std::uint64_t> sums(threads * 64);
  const double reading = median_seconds(threads, repeats, [&](int t) {
    std::uint64_t sum = 0;
    for (int m = 0; m < shape.matrices; ++m) {
      const std::byte* begin = memory.data() + m * matrix_bytes + bytes * (panels * t / threads);
      const std::byte* end = memory.data() + m * matrix_bytes + bytes * (panels * (t + 1) / threads);
      for (; begin + 64 <= end; begin += 64) {
        std::uint64_t words[8];
        std::memcpy(words, begin, sizeof words);
        for (const std::uint64_t word : words) sum += word;
      }
    }
    sums[t * 64] = sum;
  });
  std::printf("%s %ldx%ld, %d matrices, %.1f MB: reading %.3f ms (%.1f GB/s)\n", weight_type_name(shape.type),
              shape.rows, shape.columns, shape.matrices, matrix_bytes * shape.matrices / 1e6,
              reading * 1e3 / shape.matrices, matrix_bytes * shape.matrices / reading / 1e9);

  double one = 0;
  for (const int rows : {1, 2, 4, 5, 8, 16, 512}) {
    // Hundreds of rows are bound by arithmetic, and a large matrix would take seconds: a part of it tells as much.
    const int matrices = rows > 16 ? std::min(shape.matrices, 4) : shape.matrices;
    const std::int64_t used = rows > 16 ? std::min<std::int64_t>(panels, 128) : panels;
    std::vector<float> values(rows * shape.columns);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random);
    std::vector<std::int8_t> quants(values.size());
    const std::int64_t blocks = (shape.columns + kBlock - 1) / kBlock;
    std::vector<float> scales(rows * blocks);
    std::vector<std::int32_t> block_sums(rows * blocks);
    for (int r = 0; r < rows; ++r) {
      kernels.quantize_row(&values[r * shape.columns], static_cast<int>(shape.columns), &quants[r * shape.columns],
                           &scales[r * blocks], &block_sums[r * blocks]);
    }
    const Activations x = {values.data(),     shape.columns, quants.data(), scales.data(),
                           block_sums.data(), shape.columns, blocks};
    std::vector<float> y(rows * panels * kPanel);
    const double seconds = median_seconds(threads, repeats, [&](int t) {
      for (int m = 0; m < matrices; ++m) {
        const PackedMatrix w = {shape.type, shape.rows, shape.columns, bytes, memory.data() + m * matrix_bytes};
        // Pieces of 8 panels, as the backend hands them out.
        const std::int64_t end = used * (t + 1) / threads;
        for (std::int64_t p = used * t / threads; p < end; p += 8) {
          kernels.matmul(w, p, std::min(p + 8, end), x, rows, y.data(), panels * kPanel);
        }
      }
    });
    if (rows == 1) one = seconds;
    const double products = static_cast<double>(rows) * used * kPanel * shape.columns * matrices;
    std::printf("  %3d rows %9.4f ms  %5.1f GB/s  %6.1f G MAC/s per thread", rows, seconds * 1e3 / matrices,
                bytes * used * matrices / seconds / 1e9, products / seconds / 1e9 / threads);
    std::printf(rows <= 16 ? "  %.2f x one row\n" : "\n", seconds / one);
  }
}

}  // namespace
}  // namespace draftwerk::cpu

int main(int argc, char** argv) {
  using namespace draftwerk::cpu;
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 2;
  if (argc > 2) setenv("DRAFTWERK_CPU_ISA", argv[2], 1);
  const int repeats = argc > 3 ? std::max(1, std::atoi(argv[3])) : 7;
  const Isa isa = choose_isa();
  std::printf("%s, %d threads, medians of %d\n", isa_name(isa), threads, repeats);
  const Shape shapes[] = {
      {draftwerk::WeightType::q8_0, 262144, 640, 1},
      {draftwerk::WeightType::q5_0, 2048, 640, 128},
      {draftwerk::WeightType::q5_0, 640, 1024, 256},
      {draftwerk::WeightType::q4_k, 640, 2048, 128},
      {draftwerk::WeightType::q6_k, 640, 2048, 96},
      {draftwerk::WeightType::q8_0, 2048, 640, 96},
      {draftwerk::WeightType::q4_0, 2048, 640, 128},
      {draftwerk::WeightType::bf16, 2048, 640, 48},
      {draftwerk::WeightType::f32, 2048, 640, 32},
      // An MLP of Gemma 4 E2B.
      {draftwerk::WeightType::bf16, 12288, 1536, 10},
      {draftwerk::WeightType::q8_0, 12288, 1536, 10},
      {draftwerk::WeightType::q4_0, 12288, 1536, 16},
  };
  for (const Shape& shape : shapes) run(shape, matmul_kernels(isa), threads, repeats);
  return 0;
}
