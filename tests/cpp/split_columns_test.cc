#include "backend/cpu/split_columns.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

#include "backend/cpu/matmul.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/reference.h"
#include "kernel_sets.h"
#include "random_blocks.h"

namespace draftwerk::cpu {
namespace {

// A q8_0 matrix, packed, and the same in split columns, of random importance.
struct SplitMatrix {
  SplitMatrix(std::int64_t rows, std::int64_t columns, std::mt19937& random)
      : SplitMatrix(rows, columns, random_blocks(WeightType::q8_0, rows * columns, random), random) {}
  SplitMatrix(std::int64_t rows, std::int64_t columns, std::vector<std::byte> matrix, std::mt19937& random)
      : blocks(std::move(matrix)), importance(random_values(columns, random)) {
    const std::int64_t panels = panel_count(rows);
    plain = {WeightType::q8_0, rows, columns, panel_bytes(WeightType::q8_0, columns), nullptr};
    plain_panels.resize(static_cast<std::size_t>(panels) * plain.panel_bytes);
    pack_rows(WeightType::q8_0, columns, rows, WeightType::q8_0, blocks.data(), plain_panels.data());
    plain.data = plain_panels.data();

    columns_split = split_columns(importance);
    coarse.resize(static_cast<std::size_t>(panels) * columns_split.coarse_bytes);
    rest.resize(static_cast<std::size_t>(panels) * columns_split.rest_bytes);
    columns_split.rest = rest.data();
    for (std::int64_t p = 0; p < panels; ++p) {
      const auto at = static_cast<std::size_t>(p);
      const RowNorms measured =
          split_panel(columns_split, plain_panels.data() + at * plain.panel_bytes,
                      coarse.data() + at * columns_split.coarse_bytes, rest.data() + at * columns_split.rest_bytes);
      norms.push_back(measured);
    }
    packed = plain;
    packed.data = coarse.data();
    packed.panel_bytes = columns_split.coarse_bytes;
    packed.split = &columns_split;
  }

  // Whether a column of the matrix is whole in the coarse part.
  [[nodiscard]] bool is_whole(std::int64_t column) const {
    const std::int64_t block = column / kBlock;
    for (int place = 0; place < columns_split.whole[static_cast<std::size_t>(block)] * 4; ++place) {
      if (columns_split.order[static_cast<std::size_t>(block * kBlock + place)] == column % kBlock) return true;
    }
    return false;
  }

  // The blocks of what the coarse part is worth: lower halves of the other columns are 8.
  [[nodiscard]] std::vector<std::byte> coarse_blocks() const {
    std::vector<std::byte> kept = blocks;
    const std::size_t block = 2 + kBlock;
    for (std::int64_t i = 0; i < plain.rows * plain.columns; ++i) {
      if (is_whole(i % plain.columns)) continue;
      std::byte& value = kept[static_cast<std::size_t>(i / kBlock) * block + 2 + static_cast<std::size_t>(i % kBlock)];
      const unsigned raised = (std::to_integer<unsigned>(value) + 128U) & 255U;
      value = static_cast<std::byte>((((raised & 0xF0U) | 8U) + 128U) & 255U);
    }
    return kept;
  }

  std::vector<std::byte> blocks;
  std::vector<float> importance;
  PackedMatrix plain;
  std::vector<std::byte> plain_panels;
  SplitColumns columns_split;
  std::vector<std::byte> coarse;
  std::vector<std::byte> rest;
  std::vector<RowNorms> norms;
  PackedMatrix packed;
};

// Rows of quantised activations in one order or the other.
struct Quantised {
  Quantised(const MatmulKernels& kernels, const std::vector<float>& values, int rows, int columns,
            const SplitColumns* split)
      : columns(columns),
        quants(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns)),
        scales(quants.size() / kBlock),
        sums(scales.size()) {
    for (int r = 0; r < rows; ++r) {
      std::int8_t* q = &quants[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns)];
      std::int32_t* s = &sums[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns / kBlock)];
      kernels.quantize_row(&values[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns)], columns, q,
                           &scales[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns / kBlock)], s);
      if (split != nullptr) split_activations(*split, q, s);
    }
  }
  [[nodiscard]] Activations view() const {
    return {nullptr, 0, quants.data(), scales.data(), sums.data(), columns, columns / kBlock};
  }
  int columns;
  std::vector<std::int8_t> quants;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
};

TEST(SplitColumns, KeepAThirdWholeAndTheMostImportantOfEachBlockFirst) {
  std::mt19937 random(1);
  for (const std::size_t blocks : {1U, 2U, 3U, 20U}) {
    std::vector<float> importance = random_values(static_cast<std::int64_t>(blocks * kBlock), random);
    importance[3] = std::numeric_limits<float>::quiet_NaN();
    const SplitColumns split = split_columns(importance);
    const int whole = std::accumulate(split.whole.begin(), split.whole.end(), 0);
    EXPECT_NEAR(whole, static_cast<double>(blocks) * 8 / 3, 1.01);
    for (std::size_t b = 0; b < blocks; ++b) {
      EXPECT_EQ(split.whole[b] % 2, 0);
      EXPECT_LE(split.whole[b], 8);
      std::vector<bool> seen(kBlock);
      float before = std::numeric_limits<float>::infinity();
      for (int place = 0; place < kBlock; ++place) {
        const std::uint8_t column = split.order[b * kBlock + static_cast<std::size_t>(place)];
        ASSERT_LT(column, kBlock);
        EXPECT_FALSE(seen[column]);
        seen[column] = true;
        const float value = importance[b * kBlock + column];
        const float weight = value > 0.0F ? value : 0.0F;
        EXPECT_LE(weight, before);
        before = weight;
      }
    }
    EXPECT_EQ(split.coarse_bytes + split.rest_bytes, panel_bytes(WeightType::q8_0, importance.size()));
  }
}

TEST(SplitColumns, HoldTheSameValues) {
  std::mt19937 random(2);
  for (int round = 0; round < 10; ++round) {
    const std::int64_t columns = kBlock * (1 + random() % 8);
    const SplitMatrix matrix(1 + random() % 50, columns, random);
    std::vector<float> want(static_cast<std::size_t>(columns));
    std::vector<float> got(want.size());
    for (std::int64_t row = 0; row < matrix.plain.rows; ++row) {
      unpack_row(matrix.plain, row, 1.5F, want.data());
      unpack_row(matrix.packed, row, 1.5F, got.data());
      ASSERT_EQ(got, want) << "row " << row;
    }
  }
}

TEST(SplitColumns, MeasureRowsAndWhatTheyLose) {
  std::mt19937 random(3);
  const SplitMatrix matrix(37, 5 * kBlock, random);
  const std::vector<float> all = values_of_rows(WeightType::q8_0, 37, 5 * kBlock, matrix.blocks);
  const std::vector<float> kept = values_of_rows(WeightType::q8_0, 37, 5 * kBlock, matrix.coarse_blocks());
  for (std::size_t row = 0; row < 37; ++row) {
    double whole = 0.0;
    double lost = 0.0;
    for (std::size_t c = row * 5 * kBlock; c < (row + 1) * 5 * kBlock; ++c) {
      whole += static_cast<double>(all[c]) * all[c];
      lost += std::pow(static_cast<double>(all[c]) - static_cast<double>(kept[c]), 2);
    }
    const RowNorms& norms = matrix.norms[row / 16];
    EXPECT_NEAR(norms.row[row % 16], std::sqrt(whole), 1e-6 * std::sqrt(whole));
    EXPECT_NEAR(norms.lost[row % 16], std::sqrt(lost), 1e-5 * std::sqrt(whole));
    EXPECT_GT(norms.lost[row % 16], 0.0);
  }
}

TEST(SplitColumns, SaySoOfARowThatIsNotFinite) {
  std::mt19937 random(4);
  const SplitMatrix matrix(16, kBlock, random);
  std::vector<std::byte> panel = matrix.plain_panels;
  const std::uint16_t infinite = 0x7C00;
  std::memcpy(panel.data() + 5 * sizeof infinite, &infinite, sizeof infinite);
  std::vector<std::byte> coarse(matrix.columns_split.coarse_bytes);
  std::vector<std::byte> rest(matrix.columns_split.rest_bytes);
  const RowNorms norms = split_panel(matrix.columns_split, panel.data(), coarse.data(), rest.data());
  for (int row = 0; row < 16; ++row) EXPECT_EQ(std::isfinite(norms.row[row]), row != 5);
}

class SplitProduct : public testing::TestWithParam<KernelSet> {
 protected:
  const MatmulKernels& kernels = *GetParam().kernels;
  std::mt19937 random{5};

  struct Product {
    int rows;
    std::vector<float> got;
    std::vector<float> want;
  };
  // By split columns in two ranges of panels, and of the same matrix, or that of its coarse part, as it was.
  Product multiply(bool coarse) {
    const int columns = kBlock * static_cast<int>(1 + random() % 40);
    const std::int64_t outputs = 1 + random() % 100;
    const int rows = 1 + static_cast<int>(random() % 20);
    const SplitMatrix matrix(outputs, columns, random);
    std::vector<float> values = random_values(std::int64_t{rows} * columns, random);
    for (std::size_t i = 0; i < values.size(); i += 37) values[i] *= 30;
    const Quantised plain(kernels, values, rows, columns, nullptr);
    const Quantised ordered(kernels, values, rows, columns, &matrix.columns_split);

    PackedMatrix expected = matrix.plain;
    std::vector<std::byte> panels(matrix.plain_panels.size());
    if (coarse) {
      pack_rows(WeightType::q8_0, columns, outputs, WeightType::q8_0, matrix.coarse_blocks().data(), panels.data());
      expected.data = panels.data();
    }
    Product product{rows, std::vector<float>(static_cast<std::size_t>(rows * outputs), -1.0F), {}};
    product.want = product.got;
    const std::int64_t last = panel_count(outputs);
    kernels.matmul(expected, 0, last, plain.view(), rows, product.want.data(), outputs);
    const auto multiply = coarse ? kernels.matmul_coarse : kernels.matmul;
    const std::int64_t cut = random() % (last + 1);
    multiply(matrix.packed, 0, cut, ordered.view(), rows, product.got.data(), outputs);
    multiply(matrix.packed, cut, last, ordered.view(), rows, product.got.data(), outputs);
    return product;
  }
};

TEST_P(SplitProduct, OfAllHasTheBitsOfTheMatrixAsItWas) {
  for (int round = 0; round < 40; ++round) {
    const Product product = multiply(false);
    ASSERT_EQ(product.got, product.want) << product.rows << " rows, round " << round;
  }
}

TEST_P(SplitProduct, OfTheCoarsePartHasTheBitsOfAMatrixOfItsValues) {
  for (int round = 0; round < 40; ++round) {
    const Product product = multiply(true);
    ASSERT_EQ(product.got, product.want) << product.rows << " rows, round " << round;
  }
}

TEST_P(SplitProduct, ExtremesStayExact) {
  // All weights alike, all quants at 127 or -127: the sums that could saturate, exact as sums below 2^24.
  constexpr int kColumns = 20 * kBlock;
  for (const int value : {127, -1, 0, -128}) {
    std::vector<std::byte> blocks(kPanel * (kColumns / kBlock) * (2 + kBlock), static_cast<std::byte>(value));
    const std::uint16_t one = float_to_half(1.0F);
    for (std::size_t at = 0; at < blocks.size(); at += 2 + kBlock) std::memcpy(&blocks[at], &one, sizeof one);
    const SplitMatrix matrix(kPanel, kColumns, blocks, random);
    int whole = 0;
    for (const std::uint8_t groups : matrix.columns_split.whole) whole += groups * kGroupColumns;
    const int coarse_value = ((value + 128) & 0xF0) + 8 - 128;
    const int sum = kColumns * value;
    const int coarse_sum = whole * value + (kColumns - whole) * coarse_value;
    for (int rows = 1; rows <= 17; ++rows) {
      for (const int quant : {127, -127}) {
        const std::vector<float> values(static_cast<std::size_t>(rows * kColumns), static_cast<float>(quant));
        const Quantised x(kernels, values, rows, kColumns, &matrix.columns_split);
        std::vector<float> y(static_cast<std::size_t>(rows * kPanel));
        kernels.matmul(matrix.packed, 0, 1, x.view(), rows, y.data(), kPanel);
        for (const float got : y) ASSERT_EQ(got, static_cast<float>(sum * quant)) << value << ", " << rows << " rows";
        kernels.matmul_coarse(matrix.packed, 0, 1, x.view(), rows, y.data(), kPanel);
        for (const float got : y) ASSERT_EQ(got, static_cast<float>(coarse_sum * quant)) << value;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SplitProduct, testing::ValuesIn(kernel_sets()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace draftwerk::cpu
