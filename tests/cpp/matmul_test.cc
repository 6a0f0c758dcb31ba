#include "backend/cpu/matmul.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <tuple>

#include "backend/cpu/reference.h"
#include "gtest/gtest.h"
#include "kernel_sets.h"
#include "random_blocks.h"

namespace draftwerk::cpu {
namespace {

// A random matrix in checkpoint form, decoded, and packed.
struct Matrix {
  Matrix(WeightType type, std::int64_t rows, std::int64_t columns, std::mt19937& random)
      : values(rows * columns), panels(cpu::panel_bytes(type, columns) * panel_count(rows)) {
    const auto blocks = random_blocks(type, rows * columns, random);
    dequantize(type, blocks.data(), rows * columns, values.data());
    pack_rows(type, columns, rows, type, blocks.data(), panels.data());
    packed = {type, rows, columns, cpu::panel_bytes(type, columns), panels.data()};
  }
  std::vector<float> values;
  std::vector<std::byte> panels;
  PackedMatrix packed;
};

// Random activations, quantised by the kernels under test, with gaps between rows.
struct Rows {
  Rows(const MatmulKernels& kernels, int rows, int columns, std::mt19937& random)
      : stride(columns + 3),
        quant_stride(columns + 32),
        block_stride(columns / 32 + 2),
        values(random_values(rows * stride, random)),
        quants(rows * quant_stride),
        scales(rows * block_stride),
        sums(rows * block_stride) {
    for (int r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; c += 40) values[r * stride + c] *= 8;  // outliers, as real ones have
      if (columns % kBlock == 0) {
        kernels.quantize_row(&values[r * stride], columns, &quants[r * quant_stride], &scales[r * block_stride],
                             &sums[r * block_stride]);
      }
    }
  }
  [[nodiscard]] Activations view(int first = 0) const {
    return {values.data() + first * stride,
            stride,
            quants.data() + first * quant_stride,
            scales.data() + first * block_stride,
            sums.data() + first * block_stride,
            quant_stride,
            block_stride};
  }
  // What the matmul multiplies with.
  [[nodiscard]] std::vector<float> effective(bool quantized, int rows, int columns) const {
    std::vector<float> x(static_cast<std::size_t>(rows) * columns);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        x[r * columns + c] =
            quantized ? scales[r * block_stride + c / kBlock] * quants[r * quant_stride + c] : values[r * stride + c];
      }
    }
    return x;
  }
  std::int64_t stride;
  std::int64_t quant_stride;
  std::int64_t block_stride;
  std::vector<float> values;
  std::vector<std::int8_t> quants;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
};

// A copy of a vector that ends where a page ends, behind which reading is fatal.
template <typename T>
class Guarded {
 public:
  explicit Guarded(const std::vector<T>& values) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = values.size() * sizeof(T);
    const std::size_t before = (bytes + page - 1) / page * page;
    mapped_ = before + page;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    std::byte* const guard = static_cast<std::byte*>(mapping_) + before;
    mprotect(guard, page, PROT_NONE);
    std::memcpy(guard - bytes, values.data(), bytes);
    data_ = reinterpret_cast<const T*>(guard - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  Guarded(Guarded&&) = delete;
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() { munmap(mapping_, mapped_); }
  [[nodiscard]] const T* data() const { return data_; }

 private:
  void* mapping_;
  std::size_t mapped_;
  const T* data_;
};

constexpr float kUntouched = -12345.0F;

class Matmul : public testing::TestWithParam<std::tuple<KernelSet, WeightType>> {
 protected:
  const MatmulKernels& kernels = *std::get<0>(GetParam()).kernels;
  const WeightType type = std::get<1>(GetParam());
  std::mt19937 random{static_cast<unsigned>(type) + 1};

  std::int64_t random_columns(int most_blocks) {
    return std::max(block_columns(type), type == WeightType::f32 ? 7 : 1) * (1 + random() % most_blocks);
  }
};

TEST_P(Matmul, AgreesWithTheReference) {
  for (int round = 0; round < 16; ++round) {
    const std::int64_t columns = random_columns(6);
    const std::int64_t outputs = 1 + random() % 70;
    const int rows = 1 + static_cast<int>(random() % 20);
    const Matrix matrix(type, outputs, columns, random);
    const Rows x(kernels, rows, static_cast<int>(columns), random);
    const auto effective = x.effective(takes_quantized(type), rows, static_cast<int>(columns));
    std::vector<float> y(rows * outputs);
    kernels.matmul(matrix.packed, 0, panel_count(outputs), x.view(), rows, y.data(), outputs);
    for (int r = 0; r < rows; ++r) {
      const auto row = effective.begin() + r * columns;
      const std::vector<double> expected = reference::multiply(matrix.values, std::vector<double>(row, row + columns));
      for (std::int64_t n = 0; n < outputs; ++n) {
        double size = 0;
        for (std::int64_t k = 0; k < columns; ++k) {
          size += std::fabs(static_cast<double>(matrix.values[n * columns + k]) * effective[r * columns + k]);
        }
        // Each f32 addition, and each product of scales, is off by at most 2^-24 of what it made: fewer than
        // columns + 8 of them act on any term. q4_k subtracts products larger than the weights themselves, hence 8.
        const double bound = 8 * size * static_cast<double>(columns + 8) * 0x1p-24;
        ASSERT_NEAR(y[r * outputs + n], expected[n], bound)
            << "row " << r << " of " << rows << ", output " << n << " of " << outputs << ", columns " << columns;
      }
    }
  }
}

// The promise: bits for a row depend neither on the other rows nor on the panel range.
TEST_P(Matmul, RowsAreInvariant) {
  const std::int64_t outputs = 75;
  const std::int64_t panels = panel_count(outputs);
  for (const std::int64_t columns : {random_columns(2), random_columns(5)}) {
    const Matrix matrix(type, outputs, columns, random);
    const Rows x(kernels, 20, static_cast<int>(columns), random);
    std::vector<float> alone(20 * outputs);
    for (int r = 0; r < 20; ++r) {
      for (std::int64_t p = 0; p < panels; ++p) {
        kernels.matmul(matrix.packed, p, p + 1, x.view(r), 1, &alone[r * outputs], outputs);
      }
    }
    for (int rows = 1; rows <= 20; ++rows) {
      const int first = static_cast<int>(random() % (21 - rows));
      std::vector<float> y(rows * outputs);
      const std::int64_t cut = random() % (panels + 1);
      kernels.matmul(matrix.packed, 0, cut, x.view(first), rows, y.data(), outputs);
      kernels.matmul(matrix.packed, cut, panels, x.view(first), rows, y.data(), outputs);
      for (int i = 0; i < rows * outputs; ++i) ASSERT_EQ(y[i], alone[first * outputs + i]) << rows << " rows, " << i;
    }
  }
}

// Enough rows, or columns, that rows are taken in several chunks; and columns in several segments, the last one short.
TEST_P(Matmul, ManyRowsAreInvariant) {
  struct Shape {
    std::int64_t columns;
    std::int64_t outputs;
    int rows;
  };
  for (const Shape& shape : {Shape{2304, 20, 261}, Shape{40960, 16, 13}}) {
    const Matrix matrix(type, shape.outputs, shape.columns, random);
    const Rows x(kernels, shape.rows, static_cast<int>(shape.columns), random);
    const std::int64_t panels = panel_count(shape.outputs);
    std::vector<float> y(shape.rows * shape.outputs);
    kernels.matmul(matrix.packed, 0, panels, x.view(), shape.rows, y.data(), shape.outputs);
    for (int r = 0; r < shape.rows; ++r) {
      std::vector<float> alone(shape.outputs);
      kernels.matmul(matrix.packed, 0, panels, x.view(r), 1, alone.data(), shape.outputs);
      for (std::int64_t n = 0; n < shape.outputs; ++n) ASSERT_EQ(y[r * shape.outputs + n], alone[n]);
    }
  }
}

// The sanitizers see what is written here; what a compiler makes of it may read more, as GCC 12 did of portable
// kernels.
TEST_P(Matmul, ReadsNothingBehindItsInputs) {
  const std::int64_t columns = random_columns(4);
  const std::int64_t outputs = 48;
  const Matrix matrix(type, outputs, columns, random);
  const Guarded panels(matrix.panels);
  PackedMatrix packed = matrix.packed;
  packed.data = panels.data();
  for (int rows = 1; rows <= 20; ++rows) {
    const Rows x(kernels, rows, static_cast<int>(columns), random);
    const Guarded values(x.values);
    const Guarded quants(x.quants);
    const Guarded scales(x.scales);
    const Guarded sums(x.sums);
    const Activations view = {values.data(), x.stride,       quants.data(), scales.data(),
                              sums.data(),   x.quant_stride, x.block_stride};
    std::vector<float> want(rows * outputs);
    std::vector<float> got(rows * outputs);
    kernels.matmul(matrix.packed, 0, panel_count(outputs), x.view(), rows, want.data(), outputs);
    kernels.matmul(packed, 0, panel_count(outputs), view, rows, got.data(), outputs);
    EXPECT_EQ(got, want);
  }
}

// A row that is not finite spoils itself alone, whatever it is multiplied together with.
TEST_P(Matmul, RowsThatAreNotFiniteSpoilNoOthers) {
  const std::int64_t columns = random_columns(3);
  const Matrix matrix(type, 20, columns, random);
  Rows good(kernels, 12, static_cast<int>(columns), random);
  Rows bad = good;
  for (std::int64_t c = 0; c < columns; ++c) bad.values[5 * bad.stride + c] = std::numeric_limits<float>::quiet_NaN();
  if (columns % kBlock == 0) {
    kernels.quantize_row(&bad.values[5 * bad.stride], static_cast<int>(columns), &bad.quants[5 * bad.quant_stride],
                         &bad.scales[5 * bad.block_stride], &bad.sums[5 * bad.block_stride]);
  }
  std::vector<float> want(12 * 20);
  std::vector<float> got(12 * 20);
  kernels.matmul(matrix.packed, 0, 2, good.view(), 12, want.data(), 20);
  kernels.matmul(matrix.packed, 0, 2, bad.view(), 12, got.data(), 20);
  for (int i = 0; i < 12 * 20; ++i) {
    if (i / 20 == 5) {
      EXPECT_TRUE(std::isnan(got[i]));
    } else {
      EXPECT_EQ(got[i], want[i]);
    }
  }
}

// Of ranges of one, two and three panels, which some kernels multiply two at a time.
TEST_P(Matmul, WritesNothingButItsOutputs) {
  const std::int64_t columns = random_columns(2);
  const std::int64_t outputs = 37;
  const std::int64_t stride = 53;
  const Matrix matrix(type, outputs, columns, random);
  const Rows x(kernels, 11, static_cast<int>(columns), random);
  for (const auto& [first, end] : {std::pair(0, 1), std::pair(1, 2), std::pair(1, 3), std::pair(0, 3)}) {
    for (const int rows : {1, 8, 11}) {
      std::vector<float> y(rows * stride, kUntouched);
      kernels.matmul(matrix.packed, first, end, x.view(), rows, y.data(), stride);
      for (int i = 0; i < rows * stride; ++i) {
        const std::int64_t n = i % stride;
        const bool output = n >= first * kPanel && n < end * kPanel && n < outputs;
        EXPECT_EQ(y[i] != kUntouched, output) << rows << " rows, panels " << first << " to " << end << ", " << i;
      }
    }
  }
}

TEST_P(Matmul, ExtremesStayExact) {
  if (!takes_quantized(type)) GTEST_SKIP() << "int8 only";
  // All weights at their largest, all quants at 127 or -127: the sums that could saturate or overflow. Zero points make
  // that 0xFF of most types, and of q8_0 0x7F.
  const std::int64_t columns = 256;
  for (const int fill : {0xFF, 0x7F, 0x00, 0x80}) {
    std::vector<std::byte> blocks(16 * columns / block_columns(type) * block_bytes(type), static_cast<std::byte>(fill));
    const std::uint16_t one = float_to_half(1.0F);
    for (std::size_t at = 0; at < blocks.size(); at += block_bytes(type)) {
      std::memcpy(&blocks[at + (type == WeightType::q6_k ? 208 : 0)], &one, sizeof one);
      if (type == WeightType::q4_k) std::memcpy(&blocks[at + 2], &one, sizeof one);
    }
    std::vector<float> values(16 * columns);
    dequantize(type, blocks.data(), 16 * columns, values.data());
    std::vector<std::byte> panels(panel_bytes(type, columns));
    pack_rows(type, columns, 16, type, blocks.data(), panels.data());
    const std::vector<double> expected = reference::multiply(values, std::vector<double>(columns, 127.0));
    for (const int rows : {1, 2, 4, 6, 16}) {  // tiles of few rows and of many
      for (const float sign : {1.0F, -1.0F}) {
        std::vector<float> x(rows * columns, sign * 127);
        std::vector<std::int8_t> quants(x.size());
        std::vector<float> scales(x.size() / kBlock);
        std::vector<std::int32_t> sums(scales.size());
        kernels.quantize_row(x.data(), static_cast<int>(x.size()), quants.data(), scales.data(), sums.data());
        const Activations view = {x.data(), columns, quants.data(), scales.data(), sums.data(), columns, 8};
        std::vector<float> y(rows * 16);
        kernels.matmul({type, 16, columns, panels.size(), panels.data()}, 0, 1, view, rows, y.data(), 16);
        // Whole numbers below 2^24 times 63 (q4_k, q6_k scales up to 8 bits): exact but for the last additions.
        for (int i = 0; i < rows * 16; ++i) {
          const double want = sign * expected[i % 16];
          EXPECT_NEAR(y[i], want, std::fabs(want) * 0x1p-21) << i << " of " << rows << " rows";
        }
      }
    }
  }
}

TEST_P(Matmul, EmbeddingLookupIsTheDecodedRow) {
  const std::int64_t columns = random_columns(3);
  const Matrix matrix(type, 40, columns, random);
  std::vector<float> row(columns);
  for (const std::int64_t n : {0, 15, 16, 39}) {
    kernels.unpack_row(matrix.packed, n, 2.5F, row.data());
    for (std::int64_t c = 0; c < columns; ++c) ASSERT_EQ(row[c], matrix.values[n * columns + c] * 2.5F);
  }
}

std::string test_name(const testing::TestParamInfo<std::tuple<KernelSet, WeightType>>& info) {
  return std::get<0>(info.param).name + "_" + weight_type_name(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(Kernels, Matmul,
                         testing::Combine(testing::ValuesIn(kernel_sets()), testing::ValuesIn(kBlockTypes)), test_name);

class QuantizeRow : public testing::TestWithParam<Isa> {
 protected:
  const MatmulKernels& kernels = matmul_kernels(GetParam());
};

TEST_P(QuantizeRow, IsWithinHalfAStepAndItsSumsAreExact) {
  std::mt19937 random(9);
  for (const float size : {1.0F, 1e-20F, 1e20F, 3e-29F}) {
    const int columns = 32 * 7;
    auto x = random_values(columns, random);
    for (float& value : x) value *= size;
    std::fill_n(x.begin() + 32, 32, 0.0F);
    std::vector<std::int8_t> quants(columns);
    std::vector<float> scales(7);
    std::vector<std::int32_t> sums(7);
    kernels.quantize_row(x.data(), columns, quants.data(), scales.data(), sums.data());
    for (int block = 0; block < 7; ++block) {
      int halves[2] = {0, 0};
      float largest = 0;
      for (int i = 0; i < kBlock; ++i) {
        const int at = block * kBlock + i;
        largest = std::max(largest, std::fabs(x[at]));
        halves[i / 16] += quants[at];
        EXPECT_NEAR(scales[block] * quants[at], x[at], scales[block] * 0.5001F);
        EXPECT_GE(quants[at], -127);
      }
      EXPECT_EQ(scales[block], largest / 127.0F);
      EXPECT_EQ(static_cast<std::int16_t>(sums[block] & 0xFFFF), halves[0]);
      EXPECT_EQ(sums[block] >> 16, halves[1]);
    }
  }
}

TEST_P(QuantizeRow, TiesGoToEven) {
  std::vector<float> x(kBlock, 0.0F);
  x[0] = 127.0F;
  x[1] = 0.5F;
  x[2] = 1.5F;
  x[3] = -2.5F;
  x[17] = -126.5F;
  std::vector<std::int8_t> quants(kBlock);
  float scale;
  std::int32_t sum;
  kernels.quantize_row(x.data(), kBlock, quants.data(), &scale, &sum);
  EXPECT_EQ(quants[1], 0);
  EXPECT_EQ(quants[2], 2);
  EXPECT_EQ(quants[3], -2);
  EXPECT_EQ(quants[17], -126);
}

TEST_P(QuantizeRow, NonFiniteInputsBecomeNanProducts) {
  std::mt19937 random(2);
  const Matrix matrix(WeightType::q8_0, 16, 64, random);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Rows x(kernels, 1, 64, random);
    x.values[40] = bad;
    kernels.quantize_row(x.values.data(), 64, x.quants.data(), x.scales.data(), x.sums.data());
    std::vector<float> y(16);
    kernels.matmul(matrix.packed, 0, 1, x.view(), 1, y.data(), 16);
    for (const float value : y) EXPECT_TRUE(std::isnan(value));
  }
}

TEST_P(QuantizeRow, GivesTheSameBitsOnEveryInstructionSet) {
  std::mt19937 random(8);
  const Rows portable(matmul_kernels(Isa::portable), 3, 320, random);
  random.seed(8);
  const Rows other(kernels, 3, 320, random);
  EXPECT_EQ(portable.quants, other.quants);
  EXPECT_EQ(portable.scales, other.scales);
  EXPECT_EQ(portable.sums, other.sums);
}

INSTANTIATE_TEST_SUITE_P(Kernels, QuantizeRow, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return isa_name(info.param); });

TEST(MatmulAcrossInstructionSets, AllThatFuseGiveTheSameBits) {
  const std::vector<KernelSet> sets = kernel_sets();
  if (sets.size() < 3) GTEST_SKIP() << "needs AVX-512";
  std::mt19937 random(6);
  for (const WeightType type : kBlockTypes) {
    for (const int rows : {1, 9, 16, 17, 40}) {
      const std::int64_t outputs = 1 + random() % 60;
      const std::int64_t columns = kSuperblock * (1 + random() % 9);
      const Matrix matrix(type, outputs, columns, random);
      const Rows x(*sets[1].kernels, rows, static_cast<int>(columns), random);
      std::vector<float> want(rows * outputs);
      sets[1].kernels->matmul(matrix.packed, 0, panel_count(outputs), x.view(), rows, want.data(), outputs);
      for (std::size_t i = 2; i < sets.size(); ++i) {
        std::vector<float> got(want.size());
        sets[i].kernels->matmul(matrix.packed, 0, panel_count(outputs), x.view(), rows, got.data(), outputs);
        EXPECT_EQ(got, want) << sets[i].name << ", " << weight_type_name(type) << ", " << rows << " rows, " << columns
                             << " columns";
      }
    }
  }
}

}  // namespace
}  // namespace draftwerk::cpu
