// Mixture of experts, held to the plain form in double precision of what the device has: weights as they are stored
// there, inputs of the experts rounded to bfloat16.
#include "backend/cuda/experts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/reference.h"
#include "matrix_on_device.h"

namespace draftwerk::cuda {
namespace {

using emulation::Order;
namespace reference = cpu::reference;

/// Experts of a layer with their router.
struct Layer {
  Layer(WeightType type, int count, int chosen, int hidden, int mlp, std::mt19937& random, Uploader& uploader,
        WeightType router_type = WeightType::bf16)
      : hidden(hidden),
        gate_up(type, std::int64_t{count} * 2 * mlp, hidden, random, uploader),
        down(type, std::int64_t{count} * hidden, mlp, random, uploader),
        scores(router_type, count, hidden, random, uploader),
        router_scale(cpu::random_values(hidden, random)),
        scale(cpu::random_values(hidden, random)),
        expert_scale(cpu::random_values(count, random)),
        router{&scores.weight, {router_scale.data(), 1e-5F}, expert_scale.data(), chosen},
        norm{scale.data(), 1e-6F},
        experts{&gate_up.weight, &down.weight, count, mlp} {}

  /// What a row becomes, and how far rounding what goes into the experts may take that.
  void expect(const float* x, const float* got) const {
    const std::span<const float> row(x, static_cast<std::size_t>(hidden));
    const std::vector<double> of_router =
        reference::multiply(scores.values, reference::rms_norm(row, router_scale, router.norm.epsilon));
    std::vector<double> input = reference::rms_norm(row, scale, norm.epsilon);
    for (double& value : input) value = rounded(static_cast<float>(value));
    std::vector<double> want(row.size());
    std::vector<double> bound(row.size());
    for (const auto& [e, weight] : reference::route(of_router, expert_scale, router.chosen)) {
      const std::vector<double> out = reference::expert_output(gate_up.values, down.values, e, experts.mlp, input);
      const std::size_t matrix = row.size() * static_cast<std::size_t>(experts.mlp);
      const std::span<const float> all(gate_up.values);
      const std::vector<double> gate =
          reference::multiply(all.subspan(2 * static_cast<std::size_t>(e) * matrix, matrix), input);
      const std::vector<double> up =
          reference::multiply(all.subspan((2 * static_cast<std::size_t>(e) + 1) * matrix, matrix), input);
      for (std::size_t n = 0; n < row.size(); ++n) {
        want[n] += weight * out[n];
        double size = 0;
        for (std::size_t k = 0; k < gate.size(); ++k) {
          const double d = down.values[static_cast<std::size_t>(e) * matrix + n * gate.size() + k];
          size += std::abs(d * reference::gelu_tanh(gate[k]) * up[k]);
        }
        // What is between gate_up and down is rounded to bfloat16, half a step of 2^-8; inputs hardly ever fall to
        // another side than those of double precision.
        bound[n] += std::abs(weight) * size * 0x1p-8;
      }
    }
    for (std::size_t n = 0; n < row.size(); ++n) ASSERT_NEAR(got[n], want[n], bound[n] + 1e-5) << "column " << n;
  }

  int hidden;
  Matrix gate_up;
  Matrix down;
  Matrix scores;
  std::vector<float> router_scale;
  std::vector<float> scale;
  std::vector<float> expert_scale;
  Router router;
  Norm norm;
  Experts experts;
};

class ExpertsOfRows : public ::testing::Test {
 protected:
  ~ExpertsOfRows() override { emulation::reset(); }

  /// Outputs [rows, hidden] for rows of x by their numbers; -1: a row of padding, of NaN.
  std::vector<std::vector<float>> run(const Layer& layer, const std::vector<float>& x, const std::vector<int>& order) {
    const auto rows = static_cast<int>(order.size());
    const int stride = layer.hidden + 3;
    std::vector<float> input(static_cast<std::size_t>(rows * stride), std::numeric_limits<float>::quiet_NaN());
    std::vector<float> output(input.size(), -7.0F);
    std::vector<std::int32_t> segments;
    for (int r = 0; r < rows; ++r) {
      segments.push_back(order[static_cast<std::size_t>(r)] < 0 ? -1 : 0);
      if (segments.back() < 0) continue;
      std::copy_n(x.data() + std::ptrdiff_t{order[static_cast<std::size_t>(r)]} * layer.hidden, layer.hidden,
                  input.data() + std::ptrdiff_t{r} * stride);
    }
    StepView step{};
    step.row_segment = segments.data();
    step.rows = rows;
    LaunchList launches;
    mixture.run(launches, step, {input.data(), layer.hidden, stride}, layer.router, layer.norm, layer.experts,
                {output.data(), layer.hidden, stride});
    launches.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    std::vector<std::vector<float>> results;
    for (int r = 0; r < rows; ++r) {
      const float* row = output.data() + std::ptrdiff_t{r} * stride;
      results.emplace_back(row, row + layer.hidden);
      EXPECT_EQ(row[layer.hidden], -7.0F) << "a gap between rows";
    }
    return results;
  }

  static std::vector<int> first(int rows) {
    std::vector<int> order(static_cast<std::size_t>(rows));
    std::iota(order.begin(), order.end(), 0);
    return order;
  }

  std::mt19937 random{21};
  Uploader uploader;
  ExpertMixture mixture{{std::size_t{227} << 10, 132, false}};
};

TEST_F(ExpertsOfRows, AgreeWithThePlainForm) {
  struct Case {
    WeightType type;
    WeightType router;
    int count;
    int chosen;
    int hidden;
    int mlp;
    int rows;
  };
  for (const Case c : {Case{WeightType::bf16, WeightType::bf16, 5, 2, 48, 16, 1},
                       {WeightType::q8_0, WeightType::q8_0, 40, 8, 64, 96, 7},
                       {WeightType::q4_0, WeightType::q4_0, 7, 1, 96, 32, 30},
                       {WeightType::f8_e4m3, WeightType::f8_e4m3, 20, 4, 80, 48, 9},
                       {WeightType::f32, WeightType::f32, 3, 3, 32, 48, 12}}) {
    const Layer layer(c.type, c.count, c.chosen, c.hidden, c.mlp, random, uploader, c.router);
    mixture.reserve(c.rows, c.chosen, layer.experts);
    const std::vector<float> x = cpu::random_values(std::int64_t{c.rows} * c.hidden, random);
    const auto got = run(layer, x, first(c.rows));
    for (int r = 0; r < c.rows; ++r) {
      layer.expect(x.data() + std::ptrdiff_t{r} * c.hidden, got[static_cast<std::size_t>(r)].data());
    }
  }
}

// The promise, across all sizes of tiles: of prompts too, and beside rows of padding.
TEST_F(ExpertsOfRows, OfARowAreItsOwn) {
  const int rows = 150;
  for (const WeightType type : {WeightType::bf16, WeightType::q4_0, WeightType::f8_e4m3}) {
    const Layer layer(type, 4, 2, 64, 32, random, uploader);
    mixture.reserve(rows, 2, layer.experts);
    const std::vector<float> x = cpu::random_values(rows * 64, random);
    const auto want = run(layer, x, first(rows));
    layer.expect(x.data(), want[0].data());
    layer.expect(x.data() + 149 * 64, want[149].data());
    std::vector<int> mixed = {7, -1, 149, 3, -1};
    for (int r = 40; r > 10; --r) mixed.push_back(r);
    emulation::set_order(Order::backward);
    for (const std::vector<int>& order : {std::vector<int>{0}, {149, 3}, mixed, first(20)}) {
      const auto got = run(layer, x, order);
      for (std::size_t i = 0; i < order.size(); ++i) {
        if (order[i] >= 0) {
          ASSERT_EQ(got[i], want[static_cast<std::size_t>(order[i])]) << i << " of " << order.size();
        } else {
          ASSERT_EQ(got[i], std::vector<float>(64, 0.0F));
        }
      }
      emulation::set_order(Order::shuffled, static_cast<unsigned>(order.size()));
    }
    emulation::set_order(Order::forward);
  }
}

TEST_F(ExpertsOfRows, OfEqualScoresTheFirstAreChosen) {
  Layer layer(WeightType::bf16, 6, 2, 32, 16, random, uploader);
  DeviceWeight zeros(WeightType::bf16, 6, 32, uploader);
  uploader.wait();
  layer.router.weight = &zeros;
  layer.scores.values.assign(layer.scores.values.size(), 0.0F);
  mixture.reserve(3, 2, layer.experts);
  const std::vector<float> x = cpu::random_values(3 * 32, random);
  const auto got = run(layer, x, first(3));
  for (int r = 0; r < 3; ++r) layer.expect(x.data() + std::ptrdiff_t{r} * 32, got[static_cast<std::size_t>(r)].data());
}

TEST_F(ExpertsOfRows, SurviveWhatIsNotANumber) {
  const Layer layer(WeightType::bf16, 6, 3, 32, 16, random, uploader);
  mixture.reserve(2, 3, layer.experts);
  std::vector<float> x = cpu::random_values(2 * 32, random);
  const auto want = run(layer, x, {1});
  x[5] = std::numeric_limits<float>::quiet_NaN();
  const auto got = run(layer, x, {0, 1});
  EXPECT_TRUE(std::isnan(got[0][0]));
  EXPECT_EQ(got[1], want[0]);
}

}  // namespace
}  // namespace draftwerk::cuda
