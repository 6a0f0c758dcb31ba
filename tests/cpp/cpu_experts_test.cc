// Mixture of experts on the CPU: against the plain form, with every row's bits its own.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/experts.h"
#include "cpu_backend_fixture.h"

namespace draftwerk {
namespace {

using cpu::Isa;

TEST(Route, IsTheReference) {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    const int count = 1 + static_cast<int>(random() % 130U);
    const int chosen = 1 + static_cast<int>(random() % static_cast<unsigned>(count));
    std::vector<float> scores = cpu::random_values(count, random);
    if (round % 2 == 0) {
      for (float& score : scores) score = std::round(2 * score);  // ties
    }
    const std::vector<float> scale = cpu::random_values(count, random);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(chosen));
    std::vector<float> weights(ids.size());
    cpu::route(scores.data(), count, chosen, scale.data(), ids.data(), weights.data());
    const std::vector<double> wide(scores.begin(), scores.end());
    const auto want = cpu::reference::route(wide, scale, chosen);
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(ids[i], want[i].first);
      ASSERT_NEAR(weights[i], want[i].second, 2e-6 * std::abs(want[i].second) + 1e-9);
    }
  }
}

TEST(Route, ScoresOfAnySizeGiveFiniteWeights) {
  const float scores[] = {-3e38F, 3e38F, 0, 2e38F};
  const float scale[] = {1, 1, 1, 1};
  std::int32_t ids[2];
  float weights[2];
  cpu::route(scores, 4, 2, scale, ids, weights);
  EXPECT_EQ(ids[0], 1);
  EXPECT_EQ(ids[1], 3);
  EXPECT_EQ(weights[0], 1);
  EXPECT_EQ(weights[1], 0);
}

TEST(Route, IdsStayInRangeWithoutNumbers) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float scores[] = {nan, nan, nan};
  const float scale[] = {1, 1, 1};
  std::int32_t ids[2];
  float weights[2];
  cpu::route(scores, 3, 2, scale, ids, weights);
  EXPECT_EQ(ids[0], 0);
  EXPECT_EQ(ids[1], 1);
}

struct Shape {
  int hidden, mlp, experts, chosen;
  WeightType router, gate_up, down;
};

/// One layer's experts, with everything in plain form too.
struct Layer {
  Layer(const Shape& shape, std::mt19937& random) : shape(shape) {
    const auto blocks = [&](WeightType type, std::int64_t rows, std::int64_t columns, std::vector<float>& values) {
      std::vector<std::byte> bytes = cpu::random_blocks(type, rows * columns, random);
      values.resize(static_cast<std::size_t>(rows * columns));
      cpu::dequantize(type, bytes.data(), rows * columns, values.data());
      return bytes;
    };
    router_blocks = blocks(shape.router, shape.experts, shape.hidden, router);
    gate_up_blocks = blocks(shape.gate_up, shape.experts * 2 * shape.mlp, shape.hidden, gate_up);
    down_blocks = blocks(shape.down, shape.experts * shape.hidden, shape.mlp, down);
    router_scale = cpu::random_values(shape.hidden, random);
    // Scores a few apart, so that no expert decides alone.
    for (float& s : router_scale) s *= 2 / std::sqrt(static_cast<float>(shape.hidden));
    input_scale = cpu::random_values(shape.hidden, random);
    expert_scale = cpu::random_values(shape.experts, random);
  }

  /// Whether quantised activations could order the experts of this row differently.
  [[nodiscard]] bool close_call(std::span<const float> x, double margin) const {
    std::vector<double> scores = cpu::reference::multiply(router, cpu::reference::rms_norm(x, router_scale, 1e-6));
    std::sort(scores.rbegin(), scores.rend());
    const auto k = static_cast<std::size_t>(shape.chosen);
    return k < scores.size() && scores[k - 1] - scores[k] < margin;
  }

  [[nodiscard]] std::vector<double> output(std::span<const float> x) const {
    const std::vector<double> scores =
        cpu::reference::multiply(router, cpu::reference::rms_norm(x, router_scale, 1e-6));
    const std::vector<double> input = cpu::reference::rms_norm(x, input_scale, 1e-6);
    std::vector<double> sum(x.size());
    for (const auto& [expert, weight] : cpu::reference::route(scores, expert_scale, shape.chosen)) {
      const std::vector<double> y = cpu::reference::expert_output(gate_up, down, expert, shape.mlp, input);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * y[i];
    }
    return sum;
  }

  Shape shape;
  std::vector<std::byte> router_blocks, gate_up_blocks, down_blocks;
  std::vector<float> router, gate_up, down, router_scale, input_scale, expert_scale;
};

/// The layer's weights on a backend.
struct Uploaded {
  Uploaded(Backend& backend, const Layer& layer)
      : router(upload(backend, layer.shape.router, layer.shape.experts, layer.shape.hidden, layer.router_blocks)),
        gate_up(upload(backend, layer.shape.gate_up, std::int64_t{layer.shape.experts} * 2 * layer.shape.mlp,
                       layer.shape.hidden, layer.gate_up_blocks)),
        down(upload(backend, layer.shape.down, std::int64_t{layer.shape.experts} * layer.shape.hidden, layer.shape.mlp,
                    layer.down_blocks)) {}
  [[nodiscard]] Experts experts(const Layer& layer) const {
    return {gate_up.get(), down.get(), layer.shape.experts, layer.shape.mlp};
  }
  void run(Backend& backend, const Layer& layer, Tensor input, Tensor output) const {
    const Router route{router.get(), {layer.router_scale.data(), 1e-6F}, layer.expert_scale.data(), layer.shape.chosen};
    backend.experts(input, route, {layer.input_scale.data(), 1e-6F}, experts(layer), output);
  }
  std::unique_ptr<Weight> router, gate_up, down;
};

class CpuExpertsTest : public testing::TestWithParam<Isa> {
 protected:
  std::mt19937 random_{13};
};

TEST_P(CpuExpertsTest, AreTheReferenceAndRowsDoNotDependOnEachOther) {
  constexpr int kRows = 33;
  const Shape shapes[] = {
      {64, 48, 6, 2, WeightType::f32, WeightType::f32, WeightType::f32},
      {64, 16, 5, 5, WeightType::bf16, WeightType::f16, WeightType::bf16},
      {96, 32, 16, 4, WeightType::f32, WeightType::q8_0, WeightType::q4_0},
      {256, 96, 7, 3, WeightType::q8_0, WeightType::q4_k, WeightType::q8_0},
      {64, 80, 3, 1, WeightType::f32, WeightType::q8_0, WeightType::bf16},
      {32, 256, 9, 2, WeightType::f32, WeightType::f32, WeightType::q6_k},
  };
  for (const Shape& shape : shapes) {
    const Layer layer(shape, random_);
    const std::vector<float> x = cpu::random_values(kRows * shape.hidden, random_);
    const auto row = [&](int r) {
      return std::span<const float>(x.data() + std::ptrdiff_t{r} * shape.hidden,
                                    static_cast<std::size_t>(shape.hidden));
    };
    const auto is_float = [](WeightType type) { return block_columns(type) == 1; };
    const double tolerance = is_float(shape.gate_up) && is_float(shape.down) ? 2e-5 : 0.08;
    std::map<int, std::vector<float>> seen;
    int compared = 0;
    for (const Arrangement& way : arrangements(kRows)) {
      const std::unique_ptr<Backend> backend = make_cpu_backend(way.threads, GetParam());
      backend->reserve(2 * kRows, 1, 256, 10);
      const Uploaded weights(*backend, layer);
      backend->reserve_experts(2 * kRows, shape.chosen, weights.experts(layer));
      const PlainStep step(static_cast<int>(way.order.size()), 10);
      StepRows rows = step.rows();
      rows.output_rows = {};
      backend->begin(rows, {});
      Rows input(x, shape.hidden, way.order, way.gap);
      Rows output(static_cast<int>(way.order.size()), shape.hidden, 2 * way.gap);
      // Twice: what a step leaves in scratch must not matter to the next.
      for (int time = 0; time < 2; ++time) weights.run(*backend, layer, input.tensor(), output.tensor());
      output.expect_gaps_untouched();
      for (std::size_t r = 0; r < way.order.size(); ++r) {
        const std::vector<float> got = output.copy(static_cast<int>(r));
        const auto [first, is_new] = seen.try_emplace(way.order[r], got);
        ASSERT_EQ(got, first->second) << "row " << way.order[r] << " of " << way.order.size();
        if (!is_new || layer.close_call(row(way.order[r]), is_float(shape.router) ? 1e-5 : 0.1)) continue;
        ++compared;
        expect_close(got.data(), layer.output(row(way.order[r])), tolerance);
      }
    }
    EXPECT_GT(compared, kRows / 2);
  }
}

TEST_P(CpuExpertsTest, TiesGoToTheLowerExpert) {
  // A router of zeros: all experts are equal, so the first two are taken, half each.
  const Shape shape{32, 16, 4, 2, WeightType::f32, WeightType::f32, WeightType::f32};
  Layer layer(shape, random_);
  std::fill(layer.router_blocks.begin(), layer.router_blocks.end(), std::byte{0});
  std::fill(layer.router.begin(), layer.router.end(), 0.0F);
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, GetParam());
  backend->reserve(1, 1, 32, 10);
  const Uploaded weights(*backend, layer);
  backend->reserve_experts(1, 2, weights.experts(layer));
  const PlainStep step(1, 10);
  backend->begin(step.rows(), {});
  std::vector<float> x = cpu::random_values(32, random_);
  std::vector<float> y(32);
  weights.run(*backend, layer, {x.data(), 32}, {y.data(), 32});
  const std::vector<double> input = cpu::reference::rms_norm(x, layer.input_scale, 1e-6);
  std::vector<double> want(32);
  for (int e = 0; e < 2; ++e) {
    const std::vector<double> part = cpu::reference::expert_output(layer.gate_up, layer.down, e, 16, input);
    for (std::size_t i = 0; i < 32; ++i) want[i] += 0.5 * layer.expert_scale[static_cast<std::size_t>(e)] * part[i];
  }
  expect_close(y.data(), want, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Isas, CpuExpertsTest, testing::ValuesIn(cpu::available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

TEST(CpuExperts, ReserveMakesRoomForTheLargestOfEachAndNoMore) {
  std::mt19937 random(1);
  const Layer wide({64, 32, 4, 2, WeightType::f32, WeightType::f32, WeightType::f32}, random);
  const Layer many({32, 16, 8, 3, WeightType::f32, WeightType::f32, WeightType::f32}, random);
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  backend->reserve(8, 1, 64, 10);
  const Uploaded wide_weights(*backend, wide);
  const Uploaded many_weights(*backend, many);
  std::vector<float> x(8 * 64, 1);
  std::vector<float> y(8 * 64);
  const PlainStep step(4, 10);
  StepRows rows = step.rows();
  rows.output_rows = {};
  backend->begin(rows, {});
  EXPECT_THROW(wide_weights.run(*backend, wide, {x.data(), 64}, {y.data(), 64}), std::logic_error);
  backend->reserve_experts(4, 2, wide_weights.experts(wide));
  EXPECT_NO_THROW(wide_weights.run(*backend, wide, {x.data(), 64}, {y.data(), 64}));
  EXPECT_THROW(many_weights.run(*backend, many, {x.data(), 32}, {y.data(), 32}), std::logic_error);
  backend->reserve_experts(2, 3, many_weights.experts(many));
  EXPECT_NO_THROW(wide_weights.run(*backend, wide, {x.data(), 64}, {y.data(), 64}));
  EXPECT_THROW(many_weights.run(*backend, many, {x.data(), 32}, {y.data(), 32}), std::logic_error);  // 12 > 8 pairs
  backend->reserve_experts(4, 3, many_weights.experts(many));
  EXPECT_NO_THROW(many_weights.run(*backend, many, {x.data(), 32}, {y.data(), 32}));
  EXPECT_THROW(backend->reserve_experts(4, 9, many_weights.experts(many)), std::invalid_argument);
  EXPECT_THROW(backend->reserve_experts(0, 3, many_weights.experts(many)), std::invalid_argument);
}

TEST(CpuExperts, RefusesShapesThatDoNotMatch) {
  std::mt19937 random(1);
  const Layer layer({32, 16, 4, 2, WeightType::f32, WeightType::f32, WeightType::f32}, random);
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  backend->reserve(1, 1, 64, 10);
  const Uploaded weights(*backend, layer);
  Experts experts = weights.experts(layer);
  backend->reserve_experts(1, 2, experts);
  const PlainStep step(1, 10);
  backend->begin(step.rows(), {});
  std::vector<float> x(64, 1);
  std::vector<float> y(64);
  const Norm norm{layer.input_scale.data(), 1e-6F};
  Router router{weights.router.get(), norm, layer.expert_scale.data(), 2};
  EXPECT_NO_THROW(backend->experts({x.data(), 32}, router, norm, experts, {y.data(), 32}));
  EXPECT_THROW(backend->experts({x.data(), 32}, router, norm, experts, {y.data(), 16}), std::logic_error);
  router.chosen = 5;
  EXPECT_THROW(backend->experts({x.data(), 32}, router, norm, experts, {y.data(), 32}), std::logic_error);
  router.chosen = 2;
  experts.mlp = 8;
  EXPECT_THROW(backend->experts({x.data(), 32}, router, norm, experts, {y.data(), 32}), std::logic_error);
  experts.mlp = 16;
  experts.count = 3;
  EXPECT_THROW(backend->experts({x.data(), 32}, router, norm, experts, {y.data(), 32}), std::logic_error);
}

}  // namespace
}  // namespace draftwerk
