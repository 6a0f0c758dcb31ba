// Products with weights, held to the plain product in double precision of the values that the device has: weights as
// they are stored there, activations rounded to bfloat16.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/reference.h"
#include "backend/cuda/devices.h"
#include "backend/cuda/projections.h"
#include "backend/cuda/rows.h"
#include "matrix_on_device.h"
#include "operand_values.h"
#include "strided_rows.h"

namespace draftwerk::cuda {
namespace {

using emulation::Order;

void run(const LaunchList& launches) {
  launches.run(nullptr);
  check(cudaDeviceSynchronize(), "waiting");
}

/// What the kernels multiply with: rows [rows, columns] after the norm and rounding.
std::vector<float> operands_of(int rows, Tensor input, const Norm* norm) {
  std::vector<std::byte> bytes(operand_bytes(rows, input.columns), std::byte{0xFF});
  LaunchList launches;
  record_operands(launches, rows, input, norm, bytes.data());
  run(launches);
  return operand_values(bytes.data(), rows, input.columns);
}

/// Products of one row, with a bound of what rounding may do to each.
struct Wanted {
  Wanted(const Matrix& matrix, const float* x) {
    const auto columns = static_cast<std::size_t>(matrix.weight.columns());
    const std::vector<double> row(x, x + columns);
    products = cpu::reference::multiply(matrix.values, row);
    for (std::size_t n = 0; n < products.size(); ++n) {
      double size = 0;
      for (std::size_t k = 0; k < columns; ++k) size += std::abs(matrix.values[n * columns + k] * row[k]);
      // Each float32 addition is off by at most 2^-24 of what it made, and no term takes part in more than these.
      bounds.push_back(size * static_cast<double>(columns + 40) * 0x1p-24);
    }
  }
  std::vector<double> products;
  std::vector<double> bounds;
};

class ProductsOfRows : public ::testing::Test {
 protected:
  ~ProductsOfRows() override { emulation::reset(); }
  Matrix matrix(WeightType type, std::int64_t rows, std::int64_t columns) {
    return {type, rows, columns, random, uploader};
  }
  int below(int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); }

  std::mt19937 random{11};
  Uploader uploader;
  Projections projections{{std::size_t{227} << 10, 132, false}};
  std::vector<float> norm_scale = cpu::random_values(4096, random);
  Norm norm{norm_scale.data(), 1e-5F};
};

TEST_F(ProductsOfRows, RoundNormedRowsToOperands) {
  for (const int columns : {1, 7, 32, 96, 300}) {
    const int rows = 1 + below(20);
    Rows x(rows, columns, below(4), random);
    const std::vector<float> plain = operands_of(rows, x.tensor(), nullptr);
    const std::vector<float> normed = operands_of(rows, x.tensor(), &norm);
    for (int r = 0; r < rows; ++r) {
      const std::vector<double> want = cpu::reference::rms_norm(
          {x.row(r), static_cast<std::size_t>(columns)}, {norm_scale.data(), static_cast<std::size_t>(columns)}, 1e-5);
      for (int c = 0; c < columns; ++c) {
        const auto i = static_cast<std::size_t>(r * columns + c);
        ASSERT_EQ(plain[i], rounded(x.row(r)[c]));
        // Half of a step of bfloat16, and some of float32.
        ASSERT_NEAR(normed[i], want[static_cast<std::size_t>(c)],
                    std::abs(want[static_cast<std::size_t>(c)]) * (0x1p-8 + 0x1p-20));
      }
    }
  }
}

TEST_F(ProductsOfRows, AgreeWithThePlainProduct) {
  projections.reserve(48, 8, 1600, 10);
  for (int round = 0; round < 12; ++round) {
    const int rows = 1 + below(round % 3 == 0 ? 44 : 12);
    // Three matrices of one input, of any types; one has several splits, the last no whole panel.
    const int columns = round % 2 == 0 ? 256 * (1 + below(2)) : 1024 + 256 * below(3);
    std::deque<Matrix> matrices;
    std::vector<Rows> outputs;
    std::vector<Projection> parts;
    for (const int outputs_of : {1 + below(150), 16 * (1 + below(5)), 1 + below(20)}) {
      matrices.emplace_back(cpu::kWeightTypes[below(9)], outputs_of, columns, random, uploader);
      outputs.emplace_back(rows, outputs_of, below(3));
    }
    for (std::size_t i = 0; i < 3; ++i) parts.push_back({&matrices[i].weight, outputs[i].tensor()});
    Rows x(rows, columns, below(5), random);
    const Norm* with = round % 2 == 0 ? &norm : nullptr;
    LaunchList launches;
    projections.project(launches, rows, x.tensor(), with, parts);
    run(launches);
    const std::vector<float> operands = operands_of(rows, x.tensor(), with);
    for (std::size_t i = 0; i < 3; ++i) {
      outputs[i].expect_gaps_untouched();
      for (int r = 0; r < rows; ++r) {
        const Wanted want(matrices[i], operands.data() + std::ptrdiff_t{r} * columns);
        for (int n = 0; n < outputs[i].columns; ++n) {
          ASSERT_NEAR(outputs[i].row(r)[n], want.products[static_cast<std::size_t>(n)],
                      want.bounds[static_cast<std::size_t>(n)])
              << weight_type_name(matrices[i].weight.type()) << " [" << outputs[i].columns << ", " << columns
              << "], row " << r << " of " << rows << ", output " << n;
        }
      }
    }
  }
}

TEST_F(ProductsOfRows, OfAnyColumns) {
  projections.reserve(8, 8, 200, 10);
  for (const int columns : {1, 5, 31, 33, 70, 200}) {
    for (const WeightType type : {WeightType::f32, WeightType::f8_e4m3}) {
      const Matrix m = matrix(type, 19, columns);
      Rows x(3, columns, 0, random);
      Rows y(3, 19);
      const Projection part[] = {{&m.weight, y.tensor()}};
      LaunchList launches;
      projections.project(launches, 3, x.tensor(), nullptr, part);
      run(launches);
      const std::vector<float> operands = operands_of(3, x.tensor(), nullptr);
      for (int r = 0; r < 3; ++r) {
        const Wanted want(m, operands.data() + std::ptrdiff_t{r} * columns);
        for (std::size_t n = 0; n < 19; ++n) ASSERT_NEAR(y.row(r)[n], want.products[n], want.bounds[n]);
      }
    }
  }
}

TEST_F(ProductsOfRows, AreGated) {
  projections.reserve(20, 8, 1100, 10);
  struct Case {
    WeightType gate;
    WeightType up;
    int outputs;
    int columns;
    int rows;
  };
  for (const Case c : {Case{WeightType::bf16, WeightType::bf16, 90, 64, 3},
                       {WeightType::q4_0, WeightType::q4_0, 40, 1024, 17},
                       {WeightType::q8_0, WeightType::q8_0, 100, 96, 9},
                       {WeightType::q4_k, WeightType::q6_k, 33, 256, 2},
                       {WeightType::f8_e4m3, WeightType::f8_e4m3, 90, 1000, 3},
                       {WeightType::f8_e4m3, WeightType::f8_e4m3, 55, 96, 20},
                       {WeightType::f8_e4m3, WeightType::bf16, 40, 70, 4},
                       {WeightType::q4_0, WeightType::bf16, 70, 96, 5}}) {
    const Matrix gate = matrix(c.gate, c.outputs, c.columns);
    const Matrix up = matrix(c.up, c.outputs, c.columns);
    Rows x(c.rows, c.columns, 1, random);
    Rows y(c.rows, c.outputs, 2);
    LaunchList launches;
    projections.project_geglu(launches, c.rows, x.tensor(), norm, gate.weight, up.weight, y.tensor());
    run(launches);
    y.expect_gaps_untouched();
    const std::vector<float> operands = operands_of(c.rows, x.tensor(), &norm);
    for (int r = 0; r < c.rows; ++r) {
      const Wanted of_gate(gate, operands.data() + std::ptrdiff_t{r} * c.columns);
      const Wanted of_up(up, operands.data() + std::ptrdiff_t{r} * c.columns);
      for (std::size_t n = 0; n < of_gate.products.size(); ++n) {
        const double gelu = cpu::reference::gelu_tanh(of_gate.products[n]);
        // The slope of gelu_tanh is below 1.13.
        const double bound = 1.13 * of_gate.bounds[n] * std::abs(of_up.products[n]) + std::abs(gelu) * of_up.bounds[n] +
                             std::abs(of_gate.products[n] * of_up.products[n]) * 0x1p-20 + 1e-12;
        ASSERT_NEAR(y.row(r)[n], gelu * of_up.products[n], bound) << "row " << r << ", output " << n;
      }
    }
  }
}

TEST_F(ProductsOfRows, TakeAFactor) {
  projections.reserve(16, 8, 1100, 10);
  const Matrix m = matrix(WeightType::bf16, 70, 1056);  // two splits
  ASSERT_GT(split_count(m.weight.view()), 1);
  Rows x(11, 1056, 0, random);
  Rows factor(11, 70, 9, random);
  Rows y(11, 70, 1);
  LaunchList launches;
  projections.project_gelu(launches, 11, x.tensor(), m.weight, factor.tensor(), y.tensor());
  run(launches);
  const std::vector<float> operands = operands_of(11, x.tensor(), nullptr);
  for (int r = 0; r < 11; ++r) {
    const Wanted want(m, operands.data() + std::ptrdiff_t{r} * 1056);
    for (std::size_t n = 0; n < 70; ++n) {
      const double f = factor.row(r)[n];
      ASSERT_NEAR(y.row(r)[n], cpu::reference::gelu_tanh(want.products[n]) * f,
                  std::abs(f) * (1.13 * want.bounds[n] + std::abs(want.products[n]) * 0x1p-20) + 1e-12);
    }
  }
}

TEST_F(ProductsOfRows, BecomeLogits) {
  projections.reserve(2, 12, 64, 150);
  const Matrix heads[] = {matrix(WeightType::q8_0, 150, 64), matrix(WeightType::f8_e4m3, 150, 64)};
  Rows states(12, 64, 0, random);
  for (const auto& [head, cap] :
       {std::pair(&heads[0], 0.0F), {&heads[0], 3.0F}, {&heads[1], 0.0F}, {&heads[1], 3.0F}}) {
    LaunchList launches;
    projections.head(launches, 12, states.tensor(), head->weight, cap);
    run(launches);
    const Tensor logits = projections.logits();
    ASSERT_EQ(logits.columns, 150);
    const std::vector<float> operands = operands_of(12, states.tensor(), nullptr);
    for (int r = 0; r < 12; ++r) {
      const Wanted want(*head, operands.data() + std::ptrdiff_t{r} * 64);
      const float* got = static_cast<const float*>(logits.data) + std::ptrdiff_t{r} * logits.row_stride();
      for (std::size_t n = 0; n < 150; ++n) {
        const double logit = cap == 0.0F ? want.products[n] : cap * std::tanh(want.products[n] / cap);
        ASSERT_NEAR(got[n], logit, want.bounds[n] + 1e-6);
      }
    }
  }
}

TEST_F(ProductsOfRows, AreAddedToTheResidual) {
  projections.reserve(4, 2, 64, 10);
  const Matrix m = matrix(WeightType::bf16, 48, 64);
  Rows x(4, 64, 0, random);
  Rows y(4, 48);
  Rows residual(4, 48, 2, random);
  const Rows before = residual;
  LaunchList launches;
  const Projection part[] = {{&m.weight, y.tensor()}};
  projections.project(launches, 4, x.tensor(), nullptr, part);
  projections.project_add(launches, 4, x.tensor(), m.weight, norm, residual.tensor(), 0.5F);
  projections.settle(launches);
  run(launches);
  residual.expect_gaps_untouched();
  for (int r = 0; r < 4; ++r) {
    const std::vector<double> normed =
        cpu::reference::rms_norm({y.row(r), 48}, {norm_scale.data(), 48}, double{norm.epsilon});
    for (int c = 0; c < 48; ++c) {
      const double want =
          (before.values[static_cast<std::size_t>(r * residual.stride + c)] + normed[static_cast<std::size_t>(c)]) *
          0.5;
      ASSERT_NEAR(residual.row(r)[c], want, 1e-5 * (1 + std::abs(want)));
    }
  }
}

// What a launch leaves as operands for the next is what a launch of its own would make of it.
TEST_F(ProductsOfRows, AreLeftForTheProductBehind) {
  constexpr int kRows = 11;
  projections.reserve(16, 8, 256, 10);
  const Matrix gate = matrix(WeightType::bf16, 128, 192);
  const Matrix up = matrix(WeightType::bf16, 128, 192);
  const Matrix down = matrix(WeightType::q8_0, 192, 128);
  const Matrix narrow = matrix(WeightType::bf16, 64, 192);
  const Matrix wide = matrix(WeightType::bf16, 192, 64);
  const Rows x(kRows, 192, 3, random);
  const Rows factor(kRows, 64, 1, random);
  struct Result {
    Rows gated{kRows, 128};
    Rows residual;
    Rows mixed{kRows, 64};
    Rows last{kRows, 64};
    std::size_t launches = 0;
  };
  // As a layer does it: with a sum that nothing but a rounding follows, and one that a norm does.
  const auto compute = [&](bool apart) {
    Result result{.residual = x};
    Rows other = factor;
    const auto step = [&](LaunchList& list, int number) {
      const Projection last[] = {{&narrow.weight, result.last.tensor()}};
      switch (number) {
        case 0:
          return projections.project_geglu(list, kRows, result.residual.tensor(), norm, gate.weight, up.weight,
                                           result.gated.tensor());
        case 1:
          return projections.project_add(list, kRows, result.gated.tensor(), down.weight, norm,
                                         result.residual.tensor(), 0.5F);
        case 2:
          return projections.project_gelu(list, kRows, result.residual.tensor(), narrow.weight, other.tensor(),
                                          result.mixed.tensor());
        case 3:
          return projections.project_add(list, kRows, result.mixed.tensor(), wide.weight, norm,
                                         result.residual.tensor(), 2.0F);
        default:
          return projections.project(list, kRows, result.residual.tensor(), &norm, last);
      }
    };
    LaunchList together;
    for (int number = 0; number < 5; ++number) {
      LaunchList alone;
      LaunchList& list = apart ? alone : together;
      step(list, number);
      if (!apart) continue;
      projections.settle(alone);
      run(alone);
      result.launches += alone.size();
    }
    if (apart) return result;
    run(together);
    result.launches = together.size();
    return result;
  };
  const Result apart = compute(true);
  const Result together = compute(false);
  EXPECT_EQ(apart.launches, 12U);
  EXPECT_EQ(together.launches, 8U) << "the first operands, five products, two sums";
  EXPECT_EQ(together.gated.values, apart.gated.values);
  EXPECT_EQ(together.residual.values, apart.residual.values);
  EXPECT_EQ(together.mixed.values, apart.mixed.values);
  // Threads share the norm of a row otherwise.
  for (std::size_t i = 0; i < apart.last.values.size(); ++i) {
    EXPECT_NEAR(together.last.values[i], apart.last.values[i], 0.02 * (1 + std::abs(apart.last.values[i])));
  }
}

TEST_F(ProductsOfRows, OfAStepLikeAnEarlierOneAreTheSameLaunches) {
  projections.reserve(4, 8, 128, 10);
  const Matrix gate = matrix(WeightType::bf16, 64, 64);
  const Matrix down = matrix(WeightType::bf16, 64, 64);
  Rows x(4, 64, 0, random);
  Rows gated(4, 64);
  const auto record = [&] {
    LaunchList launches;
    projections.begin();
    projections.project_geglu(launches, 4, x.tensor(), norm, gate.weight, gate.weight, gated.tensor());
    projections.project_add(launches, 4, gated.tensor(), down.weight, norm, x.tensor(), 1.0F);
    projections.settle(launches);
    return std::vector<std::byte>(launches.bytes().begin(), launches.bytes().end());
  };
  const std::vector<std::byte> first = record();
  EXPECT_EQ(record(), first);
}

TEST_F(ProductsOfRows, AreNotTakenForWhatHasChangedSince) {
  projections.reserve(4, 8, 128, 10);
  const Matrix gate = matrix(WeightType::bf16, 64, 64);
  const Matrix m = matrix(WeightType::bf16, 32, 64);
  Rows x(4, 64, 0, random);
  Rows gated(4, 64);
  Rows y(4, 32);
  Rows want(4, 32);
  LaunchList launches;
  projections.project_geglu(launches, 4, x.tensor(), norm, gate.weight, gate.weight, gated.tensor());
  add_norm(launches, 4, x.tensor(), norm, gated.tensor(), 1.0F);
  const Projection part[] = {{&m.weight, y.tensor()}};
  projections.project(launches, 4, gated.tensor(), nullptr, part);
  run(launches);
  LaunchList alone;
  const Projection same[] = {{&m.weight, want.tensor()}};
  projections.project(alone, 4, gated.tensor(), nullptr, same);
  run(alone);
  EXPECT_EQ(y.values, want.values);
}

// The promise: the bits of a row depend neither on the other rows, nor on their number and order, nor on which thread
// or block comes first.
TEST_F(ProductsOfRows, OfARowAreItsOwn) {
  projections.reserve(40, 8, 1100, 10);
  struct Case {
    WeightType type;
    int outputs;
    int columns;
  };
  for (const Case c : {Case{WeightType::bf16, 70, 1056},
                       {WeightType::q8_0, 40, 1088},
                       {WeightType::q4_0, 100, 1024},
                       {WeightType::q4_0, 300, 224},
                       {WeightType::f8_e4m3, 70, 1100},
                       {WeightType::f8_e4m3, 300, 130},
                       {WeightType::bf16, 64, 192}}) {  // slices of one and two chunks
    const Matrix gate = matrix(c.type, c.outputs, c.columns);
    const Matrix up = matrix(c.type, c.outputs, c.columns);
    const int rows = 40;
    Rows x(rows, c.columns, 0, random);
    const auto result = [&](const std::vector<int>& order, int gap) {
      Rows chosen(static_cast<int>(order.size()), c.columns, gap);
      for (std::size_t i = 0; i < order.size(); ++i) {
        if (order[i] < 0) {
          std::fill_n(chosen.row(static_cast<int>(i)), c.columns, std::numeric_limits<float>::quiet_NaN());
        } else {
          std::copy_n(x.row(order[i]), c.columns, chosen.row(static_cast<int>(i)));
        }
      }
      Rows y(static_cast<int>(order.size()), c.outputs, gap);
      Rows z(static_cast<int>(order.size()), c.outputs, gap);
      LaunchList launches;
      const Projection part[] = {{&gate.weight, y.tensor()}};
      projections.project(launches, static_cast<int>(order.size()), chosen.tensor(), &norm, part);
      projections.project_geglu(launches, static_cast<int>(order.size()), chosen.tensor(), norm, gate.weight, up.weight,
                                z.tensor());
      run(launches);
      std::vector<std::vector<float>> both(order.size());
      for (std::size_t i = 0; i < order.size(); ++i) {
        both[i].assign(y.row(static_cast<int>(i)), y.row(static_cast<int>(i)) + c.outputs);
        both[i].insert(both[i].end(), z.row(static_cast<int>(i)), z.row(static_cast<int>(i)) + c.outputs);
      }
      return both;
    };
    std::vector<int> all(rows);
    std::iota(all.begin(), all.end(), 0);
    const std::vector<std::vector<float>> want = result(all, 0);
    emulation::set_order(Order::backward);
    for (const std::vector<int>& order :
         {std::vector<int>{0}, {39}, {8, 7, 6, 5, 4, 3, 2, 1}, {20, -1, 3, 3, -1, 9, 30, 31, 1, -1, 12}}) {
      const std::vector<std::vector<float>> got = result(order, 3);
      for (std::size_t i = 0; i < order.size(); ++i) {
        if (order[i] < 0) continue;
        ASSERT_EQ(got[i], want[static_cast<std::size_t>(order[i])]) << i << " of " << order.size();
      }
      emulation::set_order(Order::shuffled, static_cast<unsigned>(order.size()));
    }
    emulation::set_order(Order::forward);
  }
}

// Prompts are multiplied by another kernel, where they make work enough for the device by a third, and with bf16
// weights on a Hopper by a fourth: all to the same bits.
TEST_F(ProductsOfRows, OfAPromptAreThoseOfFewRows) {
  projections.reserve(300, 300, 1600, 70);
  Projections wide({std::size_t{227} << 10, 1, false});
  wide.reserve(300, 300, 1600, 70);
  Projections grouped({std::size_t{227} << 10, 1, use_device(0).warpgroups});
  grouped.reserve(300, 300, 1600, 70);
  struct Case {
    WeightType type;
    int outputs;
    int columns;
    int rows;
  };
  for (const Case c :
       {Case{WeightType::bf16, 40, 1568, 65},
        {WeightType::q8_0, 150, 192, 70},
        {WeightType::q4_0, 30, 1024, 133},
        {WeightType::f8_e4m3, 150, 190, 70},
        {WeightType::f8_e4m3, 30, 1100, 133},
        {WeightType::bf16, 150, 1568, 140},  // the last block lacks six of eight panels, of a pair two of four
        {WeightType::bf16, 70, 1056, 300},
        {WeightType::f32, 5, 21, 170}}) {
    const Matrix gate = matrix(c.type, c.outputs, c.columns);
    const Matrix up = matrix(c.type, c.outputs, c.columns);
    Rows x(c.rows, c.columns, 3, random);
    const auto result = [&](Projections& by, int first, int rows) {
      Rows y(rows, 2 * c.outputs, 1);
      const Tensor input{x.row(first), c.columns, x.stride};
      const Tensor plain{y.row(0), c.outputs, y.stride};
      const Tensor gated{y.row(0) + c.outputs, c.outputs, y.stride};
      LaunchList launches;
      const Projection part[] = {{&gate.weight, plain}};
      by.project(launches, rows, input, &norm, part);
      by.project_geglu(launches, rows, input, norm, gate.weight, up.weight, gated);
      run(launches);
      y.expect_gaps_untouched();
      return y.values;
    };
    const std::vector<float> few = result(projections, 0, 40);
    const std::vector<float> many = result(projections, 0, c.rows);
    for (const Order order : {Order::backward, Order::shuffled}) {
      emulation::set_order(order, 4);
      EXPECT_EQ(result(wide, 0, c.rows), many);
      EXPECT_EQ(result(grouped, 0, c.rows), many);
    }
    const std::vector<float> late = result(projections, c.rows - 9, 9);
    emulation::set_order(Order::forward);
    EXPECT_TRUE(std::equal(few.begin(), few.end(), many.begin()));
    EXPECT_TRUE(std::equal(late.rbegin(), late.rend(), many.rbegin()));
  }
}

TEST_F(ProductsOfRows, AreTheSameEachTimeAGraphRuns) {
  projections.reserve(9, 2, 1100, 10);
  const Matrix m = matrix(WeightType::q4_0, 100, 1024);
  ASSERT_GT(split_count(m.weight.view()), 1);
  Rows x(9, 1024, 0, random);
  Rows y(9, 100);
  const Projection part[] = {{&m.weight, y.tensor()}};
  LaunchList launches;
  projections.project(launches, 9, x.tensor(), nullptr, part);
  const GraphExec graph = launches.instantiate(true);
  std::vector<float> first;
  for (int time = 0; time < 3; ++time) {
    y.values.assign(y.values.size(), 0.0F);
    check(cudaGraphLaunch(graph.get(), nullptr), "launching a graph");
    check(cudaDeviceSynchronize(), "waiting");
    if (time == 0) first = y.values;
    EXPECT_EQ(y.values, first);
  }
  LaunchList again;
  projections.project(again, 9, x.tensor(), nullptr, part);
  EXPECT_TRUE(std::ranges::equal(again.bytes(), launches.bytes()));
}

// The wide tile reads weights half as often; the narrow one makes more blocks, and needs less shared memory; that of
// warpgroups takes a quarter longer for half as many rows again.
TEST(TilesOfRows, FillTheDevice) {
  const ProductDevice hopper{std::size_t{227} << 10, 132, true};
  const ProductDevice ampere{std::size_t{163} << 10, 108, false};
  const ProductDevice small{std::size_t{99} << 10, 132, false};
  const auto rows_of = [](int rows, int outputs, const ProductDevice& device,
                          WeightFormat format = WeightFormat::int8) {
    return tile_rows(rows, (outputs + 127) / 128, format, device);
  };
  for (const auto& [rows, tile] : {std::pair(128, 128),
                                   {129, 192},
                                   {192, 192},
                                   {193, 128},
                                   {256, 128},
                                   {257, 192},
                                   {384, 192},
                                   {400, 192},
                                   {2048, 192}}) {
    EXPECT_EQ(rows_of(rows, 2 * 21504, hopper, WeightFormat::bf16), tile) << rows;
    EXPECT_EQ(rows_of(rows, 2 * 21504, hopper), 128) << rows;
    EXPECT_EQ(rows_of(rows, 2 * 21504, ampere, WeightFormat::bf16), 128) << rows;
  }
  EXPECT_EQ(rows_of(192, 5376, hopper, WeightFormat::bf16), 64);
  EXPECT_EQ(rows_of(64, 5376, hopper), 32);
  for (const int rows : {96, 128, 192}) {
    EXPECT_EQ(rows_of(rows, 5376, hopper), 64);
    EXPECT_EQ(rows_of(rows, 2 * 21504, hopper), 128);
  }
  for (const int rows : {256, 512}) EXPECT_EQ(rows_of(rows, 5376, hopper), 128);
  EXPECT_EQ(rows_of(512, 5376, small), 64);
}

// Shapes of real models fill an H200, by slices that are worth starting.
TEST(Splits, FollowTheShapeAlone) {
  const auto splits = [](int rows, int columns, WeightFormat format) {
    return split_count({nullptr, rows, columns, columns / chunk_columns(format), format});
  };
  EXPECT_EQ(splits(21504, 5376, WeightFormat::bf16), 1);
  EXPECT_EQ(splits(5376, 21504, WeightFormat::bf16), 4);
  EXPECT_EQ(splits(5376, 21504, WeightFormat::int4), 4);
  EXPECT_EQ(splits(8192, 5376, WeightFormat::bf16), 3);
  EXPECT_EQ(splits(1536, 6144, WeightFormat::bf16), 12);
  EXPECT_EQ(splits(262144, 1536, WeightFormat::int8), 1);
  EXPECT_EQ(splits(1536, 6144, WeightFormat::fp8), 12);
  EXPECT_EQ(splits(16, 32, WeightFormat::bf16), 1);
}

}  // namespace
}  // namespace draftwerk::cuda
