// Operations of the CPU backend on rows: each against its plain form, and each row's bits the same however the rows are
// arranged.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "cpu_backend_fixture.h"

namespace draftwerk {
namespace {

using cpu::Isa;

constexpr int kRows = 37;

class CpuRowsTest : public testing::TestWithParam<Isa> {
 protected:
  /// run(backend, step, arrangement) computes the rows of the arrangement; row r of its result must be `want(r)` within
  /// `tolerance`, and the same bits in every arrangement.
  template <typename Run, typename Want>
  void check(int vocabulary, Run run, Want want, double tolerance) {
    std::map<int, std::vector<float>> seen;
    for (const Arrangement& way : arrangements(kRows)) {
      const std::unique_ptr<Backend> backend = make_cpu_backend(way.threads, GetParam());
      backend->reserve(2 * kRows, 2 * kRows, 320, vocabulary);
      PlainStep step(static_cast<int>(way.order.size()), vocabulary);
      for (std::size_t r = 0; r < way.order.size(); ++r) step.tokens[r] = way.order[r] % vocabulary;
      backend->begin(step.rows(), {});
      Rows out = run(*backend, step, way);
      out.expect_gaps_untouched();
      for (std::size_t r = 0; r < way.order.size(); ++r) {
        const std::vector<float> got = out.copy(static_cast<int>(r));
        const auto [first, is_new] = seen.try_emplace(way.order[r], got);
        ASSERT_EQ(got, first->second) << "row " << way.order[r];
        if (is_new) expect_close(got.data(), want(way.order[r]), tolerance);
      }
    }
  }

  std::vector<float> draw(std::int64_t count) { return cpu::random_values(count, random_); }
  static std::span<const float> row(const std::vector<float>& values, int columns, int r) {
    return {values.data() + std::ptrdiff_t{r} * columns, static_cast<std::size_t>(columns)};
  }
  std::mt19937 random_{12};
};

TEST_P(CpuRowsTest, TokenRowsMixIntoNormedRuns) {
  for (const WeightType type : cpu::kWeightTypes) {
    for (const int width : {256, 32, 20}) {
      const int columns = type == WeightType::q4_k || type == WeightType::q6_k ? 1280 : 320;
      const auto stored = std::make_shared<std::vector<std::byte>>(cpu::random_rows(type, kRows, columns, random_));
      if (columns % width != 0) continue;
      const std::vector<float> table = cpu::values_of_rows(type, kRows, columns, *stored);
      const std::vector<float> x = draw(kRows * columns);
      const std::vector<float> scale = draw(width);
      check(
          kRows,
          [&](Backend& backend, const PlainStep&, const Arrangement& way) {
            Rows inout(x, columns, way.order, way.gap);
            const auto mapped = backend.map_table(type, kRows, columns, stored->data(), stored);
            EXPECT_EQ(mapped->rows(), kRows);
            EXPECT_EQ(mapped->columns(), columns);
            EXPECT_EQ(mapped->type(), type);
            backend.mix_token_rows(*mapped, 16, {scale.data(), 1e-6F}, width, 0.70710678F, inout.tensor());
            return inout;
          },
          [&](int r) {
            std::vector<double> want;
            for (int first = 0; first < columns; first += width) {
              const auto run = static_cast<std::size_t>(width);
              const auto from = static_cast<std::size_t>(first);
              const auto part = cpu::reference::mix(row(x, columns, r).subspan(from, run), scale, 1e-6,
                                                    row(table, columns, r).subspan(from, run), 16, 0.70710678);
              want.insert(want.end(), part.begin(), part.end());
            }
            return want;
          },
          2e-6);
    }
  }
}

TEST_P(CpuRowsTest, TablesKeepTheirBytesAliveAndMayLieAnywhere) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, GetParam());
  backend->reserve(1, 1, 32, 4);
  auto bytes = std::make_shared<std::vector<std::byte>>(4 * 32 * 2 + 1);
  for (std::size_t i = 0; i < 128; ++i) {
    const std::uint16_t one = 0x3F80;  // bfloat16
    std::memcpy(bytes->data() + 1 + 2 * i, &one, 2);
  }
  const std::weak_ptr<std::vector<std::byte>> watched = bytes;
  std::unique_ptr<RowTable> table = backend->map_table(WeightType::bf16, 4, 32, bytes->data() + 1, bytes);
  bytes.reset();
  EXPECT_FALSE(watched.expired());
  const PlainStep step(1, 4);
  backend->begin(step.rows(), {});
  std::vector<float> x(32, 0);
  const std::vector<float> scale(32, 1);
  backend->mix_token_rows(*table, 3, {scale.data(), 1e-6F}, 32, 0.5F, {x.data(), 32});
  EXPECT_EQ(x, std::vector<float>(32, 1.5F));
  table.reset();
  EXPECT_TRUE(watched.expired());
}

TEST_P(CpuRowsTest, TokensThatATableLacksAreRefused) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, GetParam());
  backend->reserve(1, 1, 32, 4);
  const auto bytes = std::make_shared<std::vector<std::byte>>(4 * 32 * 2);
  const std::unique_ptr<RowTable> table = backend->map_table(WeightType::f16, 4, 32, bytes->data(), bytes);
  const std::unique_ptr<Weight> embedding = backend->create_weight(WeightType::f16, 4, 32);
  std::vector<float> x(32);
  const std::vector<float> scale(32, 1);
  for (const TokenId token : {-1, 4}) {
    PlainStep step(1, 4);
    step.tokens[0] = token;
    backend->begin(step.rows(), {});
    EXPECT_THROW(backend->mix_token_rows(*table, 1, {scale.data(), 1e-6F}, 32, 1, {x.data(), 32}), std::logic_error);
    EXPECT_THROW(backend->embed(*embedding, 1, {x.data(), 32}), std::logic_error);
  }
  EXPECT_THROW(backend->map_table(WeightType::q8_0, 4, 33, bytes->data(), bytes), std::invalid_argument);
  EXPECT_THROW(backend->map_table(WeightType::f16, 0, 32, bytes->data(), bytes), std::invalid_argument);
}

TEST_P(CpuRowsTest, EmbeddingIntoPartOfARow) {
  const std::vector<float> table = draw(kRows * 48);
  const auto* bytes = reinterpret_cast<const std::byte*>(table.data());
  check(
      kRows,
      [&](Backend& backend, const PlainStep&, const Arrangement& way) {
        const auto weight = backend.create_weight(WeightType::f32, kRows, 48);
        backend.upload_rows(*weight, 0, kRows, WeightType::f32, bytes);
        Rows out(static_cast<int>(way.order.size()), 48, way.gap);
        backend.embed(*weight, 2, out.tensor());
        return out;
      },
      [&](int r) {
        std::vector<double> want(row(table, 48, r).begin(), row(table, 48, r).end());
        for (double& v : want) v *= 2;
        return want;
      },
      0);
}

TEST_P(CpuRowsTest, GatherTakesRowsInAnyOrder) {
  const std::vector<float> x = draw(kRows * 50);
  for (const int gap : {0, 5}) {
    std::vector<int> all(kRows);
    std::iota(all.begin(), all.end(), 0);
    const std::unique_ptr<Backend> backend = make_cpu_backend(2, GetParam());
    backend->reserve(kRows, kRows, 64, 10);
    const PlainStep step(3, 10);
    backend->begin(step.rows(), {});
    const std::vector<int> wanted = {5, 5, 36, 0, 17};
    Rows source(x, 50, all, gap);
    Rows out(5, 50, 2 * gap);
    backend->gather(source.tensor(), wanted, out.tensor());
    for (int i = 0; i < 5; ++i) EXPECT_EQ(out.copy(i), source.copy(wanted[static_cast<std::size_t>(i)]));
    out.expect_gaps_untouched();
  }
}

TEST_P(CpuRowsTest, GatherOutputsNormalisesTheOutputRows) {
  const std::vector<float> x = draw(kRows * 40);
  const std::vector<float> scale = draw(40);
  check(
      10,
      [&](Backend& backend, const PlainStep& step, const Arrangement& way) {
        Rows hidden(x, 40, way.order, way.gap);
        Rows states(static_cast<int>(step.outputs.size()), 40, way.gap);
        backend.gather_outputs(hidden.tensor(), {scale.data(), 1e-6F}, states.tensor());
        states.expect_gaps_untouched();
        Rows out(static_cast<int>(way.order.size()), 40);  // rows that are no outputs, computed here
        for (std::size_t r = 0; r < way.order.size(); ++r) {
          const int at = static_cast<int>(r);
          PlainStep one(1, 10);
          one.outputs[0] = 0;
          if (r % 2 == 0) {
            std::copy_n(states.row(at / 2), 40, out.row(at));
          } else {
            backend.begin(one.rows(), {});
            backend.gather_outputs({hidden.row(at), 40}, {scale.data(), 1e-6F}, {out.row(at), 40});
          }
        }
        return out;
      },
      [&](int r) { return cpu::reference::rms_norm(row(x, 40, r), scale, 1e-6); }, 2e-6);
}

TEST_P(CpuRowsTest, SumsOfNormsAreAdded) {
  for (const int columns : {256, 75}) {
    const std::vector<float> a = draw(kRows * columns);
    const std::vector<float> b = draw(kRows * columns);
    const std::vector<float> x = draw(kRows * columns);
    const std::vector<float> scale_a = draw(columns);
    const std::vector<float> scale_b = draw(columns);
    const std::vector<float> scale = draw(columns);
    check(
        10,
        [&](Backend& backend, const PlainStep&, const Arrangement& way) {
          Rows first(a, columns, way.order, way.gap);
          Rows second(b, columns, way.order, 2 * way.gap);
          Rows residual(x, columns, way.order, way.gap);
          backend.add_normed(first.tensor(), {scale_a.data(), 1e-6F}, second.tensor(), {scale_b.data(), 1e-5F},
                             {scale.data(), 1e-6F}, residual.tensor(), 0.3F);
          return residual;
        },
        [&](int r) {
          const std::vector<double> na = cpu::reference::rms_norm(row(a, columns, r), scale_a, 1e-6);
          const std::vector<double> nb = cpu::reference::rms_norm(row(b, columns, r), scale_b, 1e-5);
          std::vector<float> sum(na.size());
          for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<float>(na[i] + nb[i]);
          std::vector<double> want = cpu::reference::rms_norm(sum, scale, 1e-6);
          for (std::size_t i = 0; i < want.size(); ++i) want[i] = 0.3 * (want[i] + row(x, columns, r)[i]);
          return want;
        },
        1e-5);
  }
}

TEST_P(CpuRowsTest, GeluOfAProductTimesAFactor) {
  for (const WeightType type : {WeightType::f32, WeightType::bf16, WeightType::q8_0}) {
    const std::vector<std::byte> blocks = cpu::random_blocks(type, 72 * 128, random_);
    std::vector<float> w(72 * 128);
    cpu::dequantize(type, blocks.data(), 72 * 128, w.data());
    const std::vector<float> x = draw(kRows * 128);
    const std::vector<float> factor = draw(kRows * 72);
    for (const bool in_place : {false, true}) {
      check(
          10,
          [&](Backend& backend, const PlainStep&, const Arrangement& way) {
            const std::unique_ptr<Weight> weight = upload(backend, type, 72, 128, blocks);
            Rows input(x, 128, way.order, way.gap);
            Rows factors(factor, 72, way.order, way.gap);
            Rows out(static_cast<int>(way.order.size()), 72, 2 * way.gap);
            Rows& target = in_place ? factors : out;
            backend.project_gelu(input.tensor(), *weight, factors.tensor(), target.tensor());
            return target;
          },
          [&](int r) {
            const std::vector<double> wide(row(x, 128, r).begin(), row(x, 128, r).end());
            std::vector<double> want = cpu::reference::multiply(w, wide);
            for (std::size_t i = 0; i < want.size(); ++i) {
              want[i] = cpu::reference::gelu_tanh(want[i]) * row(factor, 72, r)[i];
            }
            return want;
          },
          type == WeightType::q8_0 ? 0.03 : 1e-5);
    }
  }
}

TEST_P(CpuRowsTest, ProjectionsReadAndWriteStridedRows) {
  for (const WeightType type : {WeightType::f32, WeightType::q4_0}) {
    const std::vector<std::byte> blocks = cpu::random_blocks(type, 64 * 64, random_);
    const std::vector<std::byte> more = cpu::random_blocks(type, 64 * 64, random_);
    std::vector<float> w(64 * 64);
    std::vector<float> u(64 * 64);
    cpu::dequantize(type, blocks.data(), 64 * 64, w.data());
    cpu::dequantize(type, more.data(), 64 * 64, u.data());
    const std::vector<float> x = draw(kRows * 64);
    const std::vector<float> before = draw(kRows * 64);
    const std::vector<float> scale = draw(64);
    const Norm norm{scale.data(), 1e-6F};
    const double tolerance = type == WeightType::f32 ? 1e-5 : 0.06;
    const auto wide = [&](int r) { return std::vector<double>(row(x, 64, r).begin(), row(x, 64, r).end()); };
    check(
        10,
        [&](Backend& backend, const PlainStep&, const Arrangement& way) {
          const std::unique_ptr<Weight> weight = upload(backend, type, 64, 64, blocks);
          Rows input(x, 64, way.order, way.gap);
          Rows out(static_cast<int>(way.order.size()), 64, 2 * way.gap);
          const Projection projection{weight.get(), out.tensor()};
          backend.project(input.tensor(), nullptr, {&projection, 1});
          return out;
        },
        [&](int r) { return cpu::reference::multiply(w, wide(r)); }, tolerance);
    check(
        10,
        [&](Backend& backend, const PlainStep&, const Arrangement& way) {
          const std::unique_ptr<Weight> gate = upload(backend, type, 64, 64, blocks);
          const std::unique_ptr<Weight> up = upload(backend, type, 64, 64, more);
          Rows input(x, 64, way.order, way.gap);
          Rows out(static_cast<int>(way.order.size()), 64, 2 * way.gap);
          backend.project_geglu(input.tensor(), norm, *gate, *up, out.tensor());
          return out;
        },
        [&](int r) {
          const std::vector<double> input = cpu::reference::rms_norm(row(x, 64, r), scale, 1e-6);
          const std::vector<double> gate = cpu::reference::multiply(w, input);
          std::vector<double> want = cpu::reference::multiply(u, input);
          for (std::size_t i = 0; i < want.size(); ++i) want[i] *= cpu::reference::gelu_tanh(gate[i]);
          return want;
        },
        tolerance);
    check(
        10,
        [&](Backend& backend, const PlainStep&, const Arrangement& way) {
          const std::unique_ptr<Weight> weight = upload(backend, type, 64, 64, blocks);
          Rows input(x, 64, way.order, way.gap);
          Rows residual(before, 64, way.order, 2 * way.gap);
          backend.project_add(input.tensor(), *weight, norm, residual.tensor(), 0.5F);
          return residual;
        },
        [&](int r) {
          const std::vector<double> product = cpu::reference::multiply(w, wide(r));
          const std::vector<float> narrow(product.begin(), product.end());
          std::vector<double> want = cpu::reference::rms_norm(narrow, scale, 1e-6);
          for (std::size_t i = 0; i < want.size(); ++i) want[i] = 0.5 * (want[i] + row(before, 64, r)[i]);
          return want;
        },
        tolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, CpuRowsTest, testing::ValuesIn(cpu::available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

TEST(CpuReserve, MakesRoomForTheLargestOfSeveralCalls) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  backend->reserve(4, 1, 32, 16);
  EXPECT_THROW(backend->read_logits({}), std::logic_error);
  backend->reserve(2, 6, 96, 16);
  EXPECT_NO_THROW(backend->begin(PlainStep(4, 16).rows(), {}));
  PlainStep many(2, 16);
  many.outputs = {0, 0, 0, 1, 1, 1};
  EXPECT_NO_THROW(backend->begin(many.rows(), {}));
  const std::unique_ptr<Weight> wide = backend->create_weight(WeightType::f32, 16, 96);
  std::vector<float> x(6 * 96);
  std::vector<float> y(64);
  const Projection output{wide.get(), {y.data(), 16}};
  EXPECT_NO_THROW(backend->project({x.data(), 96}, nullptr, {&output, 1}));
  EXPECT_NO_THROW(backend->head({x.data(), 96}, *wide, 0));
  EXPECT_THROW(backend->reserve(1, 1, 1, 17), std::invalid_argument);
}

}  // namespace
}  // namespace draftwerk
