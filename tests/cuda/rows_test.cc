// Operations on rows on the emulated device: against the plain form.
#include "backend/cuda/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <vector>

#include "backend/cpu/reference.h"
#include "operand_values.h"
#include "step_arrays.h"

namespace draftwerk::cuda {
namespace {

using cpu::reference::rms_norm;

/// Rows with room between them.
struct Rows {
  Rows(int rows, int columns, std::mt19937& random)
      : columns(columns), stride(columns + 3), data(random_floats(static_cast<std::size_t>(rows * stride), random)) {}
  [[nodiscard]] Tensor tensor() { return {data.data(), columns, stride}; }
  [[nodiscard]] std::span<const float> row(int r) const {
    return std::span(data).subspan(static_cast<std::size_t>(r * stride), static_cast<std::size_t>(columns));
  }
  int columns, stride;
  std::vector<float> data;
};

void expect_near(std::span<const float> got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(double{got[i]}, want[i], 1e-5 * (1 + std::abs(want[i]))) << "column " << i;
  }
}

/// A step of so many rows and outputs, of which nothing else is looked at.
struct Step {
  Step(int rows, const std::vector<std::int32_t>& output_rows)
      : tokens(static_cast<std::size_t>(rows)), outputs(output_rows) {
    for (int r = 0; r < rows; ++r) tokens[static_cast<std::size_t>(r)] = r * 5 % 7;
  }
  [[nodiscard]] StepView view() const {
    StepView view{};
    view.tokens = tokens.data();
    view.output_rows = outputs.data();
    view.rows = static_cast<std::int32_t>(tokens.size());
    view.outputs = static_cast<std::int32_t>(outputs.size());
    return view;
  }
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> outputs;
};

class RowsTest : public ::testing::Test {
 protected:
  ~RowsTest() override { emulation::reset(); }
  static void run(const std::function<void(LaunchList&)>& record) {
    LaunchList list;
    record(list);
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
  }
  std::vector<float> scale(int columns) { return random_floats(static_cast<std::size_t>(columns), random_); }

  std::mt19937 random_{13};
};

constexpr int kColumns[] = {1, 17, 640, 1500};

TEST_F(RowsTest, GathersRows) {
  for (const int columns : kColumns) {
    Rows source(5, columns, random_);
    Rows out(4, columns, random_);
    const Rows before = out;
    const std::vector<std::int32_t> rows = {4, 0, 4, 2};
    run([&](LaunchList& list) { gather(list, source.tensor(), rows.data(), 4, out.tensor()); });
    for (int i = 0; i < 4; ++i) {
      EXPECT_TRUE(std::ranges::equal(out.row(i), source.row(rows[static_cast<std::size_t>(i)])));
      EXPECT_EQ(out.data[static_cast<std::size_t>(i * out.stride + columns)],
                before.data[static_cast<std::size_t>(i * out.stride + columns)]);
    }
  }
}

TEST_F(RowsTest, GathersNormalisedOutputs) {
  for (const int columns : kColumns) {
    Rows hidden(5, columns, random_);
    Rows states(3, columns, random_);
    const std::vector<float> w = scale(columns);
    const Step step(5, {1, 3, 0});
    run([&](LaunchList& list) {
      gather_outputs(list, step.view(), hidden.tensor(), {w.data(), 1e-3F}, states.tensor());
    });
    for (int i = 0; i < 3; ++i) {
      expect_near(states.row(i), rms_norm(hidden.row(step.outputs[static_cast<std::size_t>(i)]), w, double{1e-3F}));
    }
  }
}

TEST_F(RowsTest, AddsNormalisedRows) {
  for (const int columns : kColumns) {
    Rows x(3, columns, random_);
    Rows residual(3, columns, random_);
    const Rows before = residual;
    const std::vector<float> w = scale(columns);
    const std::vector<float> of_next = scale(columns);
    const Norm next{of_next.data(), 1e-4F};
    for (const Norm* norm : {static_cast<const Norm*>(nullptr), &next}) {
      residual = before;
      std::vector<std::byte> operands(operand_bytes(3, columns), std::byte{0xFF});
      const OperandSink sink{operands.data(), static_cast<std::int64_t>(operand_bytes(1, columns))};
      run([&](LaunchList& list) {
        add_norm(list, 3, x.tensor(), {w.data(), 1e-3F}, residual.tensor(), 0.7F, sink, norm);
      });
      const std::vector<float> left = operand_values(operands.data(), 3, columns);
      for (int r = 0; r < 3; ++r) {
        std::vector<double> want = rms_norm(x.row(r), w, double{1e-3F});
        for (std::size_t i = 0; i < want.size(); ++i) want[i] = (double{before.row(r)[i]} + want[i]) * double{0.7F};
        expect_near(residual.row(r), want);
        const std::vector<double> normed = rms_norm(residual.row(r), of_next, double{1e-4F});
        for (std::size_t i = 0; i < want.size(); ++i) {
          const double value = norm == nullptr ? double{residual.row(r)[i]} : normed[i];
          // Half of a step of bfloat16, and some of float32.
          const float got = left[static_cast<std::size_t>(r * columns) + i];
          ASSERT_NEAR(got, value, std::abs(value) * (0x1p-8 + 0x1p-19)) << "column " << i;
        }
      }
    }
  }
}

TEST_F(RowsTest, AddsTheNormOfASumOfNorms) {
  for (const int columns : kColumns) {
    Rows a(3, columns, random_);
    Rows b(3, columns, random_);
    Rows residual(3, columns, random_);
    const Rows before = residual;
    const std::vector<float> of_a = scale(columns);
    const std::vector<float> of_b = scale(columns);
    const std::vector<float> w = scale(columns);
    const Step step(3, {});
    run([&](LaunchList& list) {
      add_normed(list, step.view(), a.tensor(), {of_a.data(), 1e-3F}, b.tensor(), {of_b.data(), 1e-4F},
                 {w.data(), 1e-2F}, residual.tensor(), 1.5F);
    });
    for (int r = 0; r < 3; ++r) {
      const std::vector<double> normed_a = rms_norm(a.row(r), of_a, double{1e-3F});
      const std::vector<double> normed_b = rms_norm(b.row(r), of_b, double{1e-4F});
      double squares = 0;
      for (std::size_t i = 0; i < normed_a.size(); ++i) squares += std::pow(normed_a[i] + normed_b[i], 2);
      const double rms = std::sqrt(squares / columns + double{1e-2F});
      std::vector<double> want;
      for (std::size_t i = 0; i < normed_a.size(); ++i) {
        want.push_back((double{before.row(r)[i]} + (normed_a[i] + normed_b[i]) / rms * double{w[i]}) * 1.5);
      }
      expect_near(residual.row(r), want);
    }
  }
}

TEST_F(RowsTest, MixesRowsOfTokens) {
  for (const int width : {8, 40, 256}) {
    const int runs = 6;
    const int columns = runs * width;
    Rows inout(4, columns, random_);
    const Rows before = inout;
    const std::vector<float> w = scale(width);
    const std::vector<float> values = random_floats(static_cast<std::size_t>(7 * columns), random_);
    const TableView table{reinterpret_cast<const std::byte*>(values.data()), columns * 4, 7, columns,
                          static_cast<std::int32_t>(WeightType::f32)};
    const Step step(4, {});
    run([&](LaunchList& list) {
      mix_token_rows(list, step.view(), table, 16.0F, {w.data(), 1e-3F}, width, 0.7F, inout.tensor());
    });
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < runs; ++i) {
        const auto at = static_cast<std::size_t>(i * width);
        const auto length = static_cast<std::size_t>(width);
        const auto token = static_cast<std::size_t>(step.tokens[static_cast<std::size_t>(r)]);
        expect_near(
            inout.row(r).subspan(at, length),
            cpu::reference::mix(before.row(r).subspan(at, length), w, double{1e-3F},
                                std::span(values).subspan(token * static_cast<std::size_t>(columns) + at, length), 16.0,
                                double{0.7F}));
      }
    }
  }
}

TEST_F(RowsTest, ARowDependsOnNothingBesideIt) {
  const int columns = 700;
  const int rows = 5;
  Rows x(rows, columns, random_);
  Rows b(rows, columns, random_);
  const Rows residual(rows, columns, random_);
  const std::vector<float> w = scale(columns);
  const Norm norm{w.data(), 1e-6F};
  const auto all = [&](int first, int count) {
    const Step step(count, std::vector<std::int32_t>(1, 0));
    Rows out = residual;
    Rows sum = residual;
    Rows states(1, columns, random_);
    const auto from = [first](Rows& of) {
      return Tensor{of.data.data() + std::ptrdiff_t{first} * of.stride, of.columns, of.stride};
    };
    run([&](LaunchList& list) {
      add_norm(list, count, from(x), norm, from(out), 0.3F);
      add_normed(list, step.view(), from(x), norm, from(b), norm, norm, from(sum), 0.3F);
      gather_outputs(list, step.view(), from(x), norm, states.tensor());
    });
    std::vector<float> of_first(out.row(first).begin(), out.row(first).end());
    of_first.insert(of_first.end(), sum.row(first).begin(), sum.row(first).end());
    of_first.insert(of_first.end(), states.row(0).begin(), states.row(0).end());
    return of_first;
  };
  for (int r = 0; r < rows; ++r) {
    emulation::set_order(emulation::Order::forward);
    const std::vector<float> alone = all(r, 1);
    for (const auto order : {emulation::Order::backward, emulation::Order::shuffled}) {
      emulation::set_order(order, 4);
      EXPECT_EQ(all(r, rows - r), alone);
    }
  }
}

}  // namespace
}  // namespace draftwerk::cuda
