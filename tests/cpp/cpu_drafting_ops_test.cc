// What drafters and layers with shared keys and values ask of the CPU backend: queries alone, positions that a row does
// not see itself, keys that serve as values, heads by clusters, proposals.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/reference_sampler.h"
#include "cpu_backend_fixture.h"

namespace draftwerk {
namespace {

using cpu::Isa;

/// A sequence of random keys and values, its pages in disorder, NaN wherever nothing was stored.
struct Cache {
  struct Shape {
    int query_heads, kv_heads, head_dim, length;
    KvType type;
    bool value_norm, keys_as_values;
  };

  Cache(Backend& backend, const Shape& shape, std::mt19937& random)
      : shape(shape),
        key_scale(cpu::random_values(shape.head_dim, random)),
        query_scale(cpu::random_values(shape.head_dim, random)),
        value_scale(cpu::random_values(shape.head_dim, random)) {
    const std::size_t bytes = backend.kv_bytes(shape.kv_heads, shape.head_dim, shape.type);
    kv = {1, 0, bytes, shape.kv_heads, shape.head_dim, shape.type};
    const std::size_t count = static_cast<std::size_t>(shape.length / kPageSize + 1);
    arena = backend.allocate(2 * bytes * count);
    std::memset(arena->data(), 0xFF, arena->bytes());
    for (std::size_t p = 0; p < count; ++p) pages.push_back(static_cast<PageId>(p * 2 * bytes / kPageUnit));
    std::shuffle(pages.begin(), pages.end(), random);
    for (int i = 0; i < shape.head_dim / 2; ++i) {
      frequency.push_back(i % 4 == 3 ? 0.0F : std::pow(0.97F, static_cast<float>(i)));
    }
    keys.resize(static_cast<std::size_t>(shape.kv_heads));
    values.resize(keys.size());
    for (int first = 0; first < shape.length;) {
      const int rows = std::min(1 + static_cast<int>(random() % 90U), shape.length - first);
      append(backend, first, rows, random);
      first += rows;
    }
  }

  /// Appends rows at [first, first + rows), with a gap between them in memory.
  void append(Backend& backend, int first, int rows, std::mt19937& random) {
    const int width = shape.kv_heads * shape.head_dim;
    std::vector<int> order(static_cast<std::size_t>(rows));
    std::iota(order.begin(), order.end(), 0);
    Rows q(cpu::random_values(rows * shape.query_heads * shape.head_dim, random), shape.query_heads * shape.head_dim,
           order, 16);
    Rows k(cpu::random_values(rows * width, random), width, order, 48);
    Rows v(cpu::random_values(rows * width, random), width, order);
    for (int r = 0; r < rows; ++r) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        const auto head = [&](Rows& x) {
          return std::span<const float>(x.row(r) + h * shape.head_dim, static_cast<std::size_t>(shape.head_dim));
        };
        const auto index = static_cast<std::size_t>(h);
        keys[index].push_back(
            cpu::reference::rotate(cpu::reference::rms_norm(head(k), key_scale, 1e-6), first + r, frequency));
        const std::span<const float> value = head(shape.keys_as_values ? k : v);
        values[index].push_back(shape.value_norm ? cpu::reference::rms_norm(value, value_scale, 1e-5)
                                                 : std::vector<double>(value.begin(), value.end()));
      }
    }
    const std::vector<TokenId> tokens(static_cast<std::size_t>(rows));
    std::vector<std::int64_t> positions;
    for (int r = 0; r < rows; ++r) positions.push_back(first + r);
    const Segment segment{0, rows, first, {nullptr, pages.data()}};
    backend.begin({tokens, positions, {&segment, 1}, {}}, {static_cast<std::byte*>(arena->data())});
    const Norm value_norm{value_scale.data(), 1e-5F};
    Rows queries = q;
    backend.append_kv(q.tensor(), k.tensor(), shape.keys_as_values ? k.tensor() : v.tensor(), shape.query_heads,
                      {query_scale.data(), 1e-6F}, {key_scale.data(), 1e-6F}, shape.value_norm ? &value_norm : nullptr,
                      {frequency.data()}, kv);
    q.expect_gaps_untouched();
    k.expect_gaps_untouched();
    // Queries alone come out the same.
    backend.prepare_queries(queries.tensor(), shape.query_heads, {query_scale.data(), 1e-6F}, {frequency.data()});
    ASSERT_EQ(queries.values, q.values);
  }

  /// What a prepared query of head h at `position` attends to.
  [[nodiscard]] std::vector<double> expected(std::span<const float> query, int h, std::int64_t position,
                                             const Visibility& sees) const {
    const auto head = static_cast<std::size_t>(h / (shape.query_heads / shape.kv_heads));
    const auto past = static_cast<std::ptrdiff_t>(position + (sees.own ? 1 : 0));
    const std::ptrdiff_t first = sees.window == 0 ? 0 : std::max<std::ptrdiff_t>(past - sees.window, 0);
    const auto prepared =
        cpu::reference::rotate(cpu::reference::rms_norm(query, query_scale, 1e-6), position, frequency);
    return cpu::reference::attention(prepared, {keys[head].begin() + first, keys[head].begin() + past},
                                     {values[head].begin() + first, values[head].begin() + past}, 0.3);
  }

  Shape shape;
  KvLayer kv;
  std::unique_ptr<Buffer> arena;
  std::vector<PageId> pages;
  std::vector<float> key_scale, query_scale, value_scale, frequency;
  std::vector<std::vector<std::vector<double>>> keys, values;  // by head and position
};

class CpuDraftingTest : public testing::TestWithParam<Isa> {
 protected:
  std::mt19937 random_{14};
};

TEST_P(CpuDraftingTest, RowsSeeThePositionsBeforeTheirsAndPossiblyTheirOwn) {
  const Cache::Shape shapes[] = {{4, 1, 64, 300, KvType::f32, true, true},
                                 {4, 2, 32, 290, KvType::f32, false, true},
                                 {2, 2, 512, 150, KvType::f32, true, false},
                                 {8, 1, 128, 260, KvType::f16, true, true}};
  for (const Cache::Shape& shape : shapes) {
    std::map<std::pair<bool, int>, std::map<int, std::vector<float>>> seen;
    const int width = shape.query_heads * shape.head_dim;
    const std::vector<std::int64_t> positions = {1, 2, 15, 16, 17, 127, 128, 129, 140, shape.length - 1};
    const auto rows = static_cast<int>(positions.size());
    const std::vector<float> queries = cpu::random_values(rows * width, random_);
    const unsigned cache_seed = random_();
    for (const Arrangement& way : arrangements(rows)) {
      const std::unique_ptr<Backend> backend = make_cpu_backend(way.threads, GetParam());
      backend->reserve(100, 1, width, 16);
      std::mt19937 same(cache_seed);
      Cache cache(*backend, shape, same);
      for (const Visibility& sees : {Visibility{0, false}, Visibility{7, false}, Visibility{128, false},
                                     Visibility{1, false}, Visibility{0, true}, Visibility{16, true}}) {
        // Each row a sequence of its own, over the same pages less those that nobody sees.
        std::vector<TokenId> tokens(way.order.size());
        std::vector<std::int64_t> at;
        std::vector<Segment> segments;
        std::vector<std::vector<PageId>> tables;
        for (std::size_t r = 0; r < way.order.size(); ++r) {
          const std::int64_t position = positions[static_cast<std::size_t>(way.order[r])];
          const std::int64_t past = position + (sees.own ? 1 : 0);
          const std::int64_t first = sees.window == 0 ? 0 : std::max<std::int64_t>(past - sees.window, 0);
          tables.push_back(cache.pages);
          for (std::size_t p = 0; p < tables.back().size(); ++p) {
            const auto start = static_cast<std::int64_t>(p) * kPageSize;
            if (start + kPageSize <= first || start >= past) tables.back()[p] = kNoPage;
          }
          at.push_back(position);
          segments.push_back({static_cast<int>(r), 1, position, {nullptr, tables.back().data()}});
        }
        backend->begin({tokens, at, segments, {}}, {static_cast<std::byte*>(cache.arena->data())});
        Rows query(queries, width, way.order, way.gap * 16);
        Rows output(static_cast<int>(way.order.size()), width, way.gap);
        backend->prepare_queries(query.tensor(), shape.query_heads, {cache.query_scale.data(), 1e-6F},
                                 {cache.frequency.data()});
        backend->attend(query.tensor(), shape.query_heads, cache.kv, sees, 0.3F, output.tensor());
        output.expect_gaps_untouched();
        for (std::size_t r = 0; r < way.order.size(); ++r) {
          const std::vector<float> got = output.copy(static_cast<int>(r));
          auto& known = seen[{sees.own, sees.window}];
          const auto [first, is_new] = known.try_emplace(way.order[r], got);
          ASSERT_EQ(got, first->second) << "position " << at[r];
          if (!is_new) continue;
          for (int h = 0; h < shape.query_heads; ++h) {
            const std::span<const float> raw(queries.data() + std::ptrdiff_t{way.order[r]} * width + h * shape.head_dim,
                                             static_cast<std::size_t>(shape.head_dim));
            const std::vector<double> want = cache.expected(raw, h, at[r], sees);
            for (std::size_t d = 0; d < want.size(); ++d) {
              ASSERT_NEAR(got[static_cast<std::size_t>(h * shape.head_dim) + d], want[d],
                          shape.type == KvType::f16 ? 3e-2 : 1e-4)
                  << "position " << at[r] << " window " << sees.window << " own " << sees.own;
            }
          }
        }
      }
    }
  }
}

TEST_P(CpuDraftingTest, ARowThatSeesNothingIsRefused) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, GetParam());
  backend->reserve(4, 1, 32, 16);
  const PlainStep step(1, 16);
  StepRows rows = step.rows();
  rows.output_rows = {};
  backend->begin(rows, {});
  std::vector<float> q(32);
  EXPECT_THROW(backend->attend({q.data(), 32}, 1, {0, 0, 2048, 1, 32, KvType::f32}, {0, false}, 1, {q.data(), 32}),
               std::logic_error);
}

// --- heads by clusters, and proposals --------------------------------------------------------------------------------

struct HeadShape {
  int vocabulary, tokens, clusters, chosen, columns;  ///< no clusters: 0
  WeightType centroids, head;
  float softcap = 0.0F;

  [[nodiscard]] int scored() const { return clusters == 0 ? tokens : chosen * (tokens / clusters); }
};

/// A sparse head with its plain form.
struct Head {
  Head(const HeadShape& shape, std::mt19937& random)
      : shape(shape),
        tokens(static_cast<std::size_t>(shape.vocabulary)),
        row_of(static_cast<std::size_t>(shape.vocabulary), -1) {
    const auto blocks = [&](WeightType type, int rows, std::vector<float>& values) {
      std::vector<std::byte> bytes = cpu::random_blocks(type, std::int64_t{rows} * shape.columns, random);
      values.resize(static_cast<std::size_t>(rows * shape.columns));
      cpu::dequantize(type, bytes.data(), std::int64_t{rows} * shape.columns, values.data());
      return bytes;
    };
    if (shape.clusters > 0) centroid_blocks = blocks(shape.centroids, shape.clusters, centroids);
    head_blocks = blocks(shape.head, shape.tokens, head);
    std::iota(tokens.begin(), tokens.end(), 0);
    std::shuffle(tokens.begin(), tokens.end(), random);
    tokens.resize(static_cast<std::size_t>(shape.tokens));
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      row_of[static_cast<std::size_t>(tokens[i])] = static_cast<std::int32_t>(i);
    }
  }
  HeadShape shape;
  std::vector<std::int32_t> tokens, row_of;
  std::vector<std::byte> centroid_blocks, head_blocks;
  std::vector<float> centroids, head;
};

struct UploadedHead {
  UploadedHead(Backend& backend, const Head& plain)
      : weight(upload(backend, plain.shape.head, plain.shape.tokens, plain.shape.columns, plain.head_blocks)) {
    const HeadShape& shape = plain.shape;
    if (shape.clusters > 0) {
      centroids = upload(backend, shape.centroids, shape.clusters, shape.columns, plain.centroid_blocks);
    }
    sparse = {weight.get(), plain.tokens.data(), plain.row_of.data(), centroids.get(), shape.chosen, shape.softcap};
  }
  std::unique_ptr<Weight> centroids, weight;
  SparseHead sparse;
};

std::vector<int> every(int rows) {
  std::vector<int> all(static_cast<std::size_t>(rows));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

TEST_P(CpuDraftingTest, SparseLogitsAreTheReference) {
  constexpr int kRows = 9;
  const HeadShape shapes[] = {{96, 96, 12, 3, 32, WeightType::f32, WeightType::f32},
                              {1000, 1000, 50, 7, 64, WeightType::f32, WeightType::bf16},
                              {2048, 2048, 64, 8, 32, WeightType::f32, WeightType::q8_0},
                              {520, 520, 13, 13, 32, WeightType::bf16, WeightType::f16},
                              {300, 300, 300, 20, 32, WeightType::f32, WeightType::f32},
                              {640, 640, 1, 1, 32, WeightType::f32, WeightType::f32},
                              {512, 512, 16, 4, 64, WeightType::q8_0, WeightType::q4_0},
                              // of a part of the vocabulary, with clusters and without
                              {1000, 240, 24, 5, 64, WeightType::f32, WeightType::bf16, 30.0F},
                              {1000, 33, 11, 4, 32, WeightType::f32, WeightType::f32, 3.0F},
                              {1000, 240, 0, 0, 64, WeightType::f32, WeightType::bf16},
                              {1000, 77, 0, 0, 32, WeightType::f32, WeightType::f32, 3.0F},
                              {2000, 1, 0, 0, 32, WeightType::f32, WeightType::q8_0},
                              {500, 500, 0, 0, 32, WeightType::f32, WeightType::f32, 30.0F}};
  for (const HeadShape& shape : shapes) {
    const Head plain(shape, random_);
    const std::vector<float> states = cpu::random_values(kRows * shape.columns, random_);
    std::map<int, std::vector<float>> seen;
    for (const Arrangement& way : arrangements(kRows)) {
      const std::unique_ptr<Backend> backend = make_cpu_backend(way.threads, GetParam());
      backend->reserve(2 * kRows, 2 * kRows, 64, shape.vocabulary);
      const UploadedHead head(*backend, plain);
      PlainStep step(static_cast<int>(way.order.size()), shape.vocabulary);
      step.outputs = every(static_cast<int>(way.order.size()));
      backend->begin(step.rows(), {});
      const auto width = static_cast<std::size_t>(shape.vocabulary);
      std::vector<float> logits(way.order.size() * width);
      // First with other states: nothing of them may be left.
      std::vector<float> others = cpu::random_values(static_cast<int>(way.order.size()) * shape.columns, random_);
      backend->head({others.data(), shape.columns}, head.sparse);
      Rows input(states, shape.columns, way.order, way.gap);
      backend->head(input.tensor(), head.sparse);
      backend->read_logits(logits);
      for (std::size_t r = 0; r < way.order.size(); ++r) {
        const std::vector<float> got(logits.begin() + static_cast<std::ptrdiff_t>(r * width),
                                     logits.begin() + static_cast<std::ptrdiff_t>((r + 1) * width));
        const auto [first, is_new] = seen.try_emplace(way.order[r], got);
        ASSERT_EQ(got, first->second);
        const auto finite = std::count_if(got.begin(), got.end(), [](float v) { return std::isfinite(v); });
        ASSERT_EQ(finite, shape.scored());
        if (!is_new || shape.centroids == WeightType::q8_0) continue;  // int8 may choose other clusters
        const float* state = states.data() + std::ptrdiff_t{way.order[r]} * shape.columns;
        const std::vector<double> wide(state, state + shape.columns);
        const std::vector<double> want = cpu::reference::sparse_logits(
            plain.centroids, plain.head, plain.tokens, shape.chosen, double{shape.softcap}, shape.vocabulary, wide);
        for (std::size_t i = 0; i < width; ++i) {
          if (std::isinf(want[i])) {
            ASSERT_EQ(got[i], -std::numeric_limits<float>::infinity()) << i;
          } else {
            ASSERT_NEAR(got[i], want[i], shape.head == WeightType::q8_0 ? 1.0 : 1e-4) << i;
          }
        }
      }
    }
  }
}

TEST_P(CpuDraftingTest, ProposalsAreTheSamplersChoiceFromEveryHead) {
  const HeadShape shape{1500, 900, 50, 6, 32, WeightType::f32, WeightType::f32};
  const Head plain(shape, random_);
  const Head unclustered({1500, 900, 0, 0, 32, WeightType::f32, WeightType::f32}, random_);
  constexpr int kRows = 5;
  const std::unique_ptr<Backend> backend = make_cpu_backend(2, GetParam());
  backend->reserve(kRows, kRows, 32, shape.vocabulary);
  const Matrix dense(*backend, WeightType::f32, shape.vocabulary, shape.columns, random_);
  const UploadedHead head(*backend, plain);
  const UploadedHead whole(*backend, unclustered);
  PlainStep step(kRows, shape.vocabulary);
  step.outputs = every(kRows);
  const auto width = static_cast<std::size_t>(shape.vocabulary);
  int verified = 0;
  for (int round = 0; round < 60; ++round) {
    backend->begin(step.rows(), {});
    std::vector<float> states = cpu::random_values(kRows * shape.columns, random_);
    const auto compute = [&] {
      if (round % 3 == 0) {
        backend->head({states.data(), shape.columns}, *dense.weight, round % 2 == 0 ? 5.0F : 0.0F);
      } else {
        backend->head({states.data(), shape.columns}, round % 3 == 1 ? head.sparse : whole.sparse);
      }
    };
    compute();
    std::vector<float> logits(kRows * width);
    backend->read_logits(logits);
    std::vector<SamplingParams> sampling(kRows);
    std::vector<TokenHistory> histories(kRows);
    std::vector<std::vector<TokenId>> drafts(kRows);
    std::vector<std::vector<TokenId>> banned(kRows);
    std::vector<ProposeRow> rows;
    const auto token = [&] { return static_cast<TokenId>(random_() % 1500U); };
    for (std::size_t r = 0; r < kRows; ++r) {
      SamplingParams& s = sampling[r];
      if (random_() % 3 != 0) s.temperature = 0.5F + static_cast<float>(random_() % 3U);
      if (random_() % 2 != 0) s.top_k = 1 + static_cast<int>(random_() % 300U);
      if (random_() % 2 != 0) s.top_p = 0.9F;
      if (random_() % 2 != 0) s.frequency_penalty = 4;
      if (random_() % 2 != 0) s.repetition_penalty = 1.5F;
      s.logit_bias.emplace_back(token(), 6.0F);
      s.logprobs = static_cast<int>(random_() % 3U) - 1;
      s.seed = random_();
      for (int i = 0; i < 200; ++i) histories[r][token()] = {i % 2 == 0, i % 3};
      for (unsigned i = random_() % 4U; i > 0; --i) drafts[r].push_back(token());
      for (int i = 0; i < 20; ++i) banned[r].push_back(token());
      banned[r].push_back(
          static_cast<TokenId>(std::max_element(logits.begin() + static_cast<std::ptrdiff_t>(r * width),
                                                logits.begin() + static_cast<std::ptrdiff_t>((r + 1) * width)) -
                               (logits.begin() + static_cast<std::ptrdiff_t>(r * width))));
      rows.push_back(
          {drafts[r], round * 100, &sampling[r], &histories[r], banned[r], static_cast<int>(random_() % 4U)});
    }
    const int count = 1 + round % 4;
    std::vector<Candidate> candidates(kRows * static_cast<std::size_t>(count));
    backend->propose(rows, count, candidates);
    for (std::size_t r = 0; r < kRows; ++r) {
      const std::vector<Candidate> want = reference_propose({logits.data() + r * width, width}, rows[r], count);
      for (std::size_t i = 0; i < want.size(); ++i) {
        ASSERT_EQ(candidates[r * want.size() + i].token, want[i].token) << "round " << round << " row " << r;
        ASSERT_EQ(candidates[r * want.size() + i].value, want[i].value) << "round " << round << " row " << r;
      }
    }
    if (round % 3 != 0) continue;
    // The target, choosing from the same logits at the same place, accepts.
    compute();
    std::vector<VerifyGroup> groups;
    std::vector<std::size_t> row_of_group;
    for (std::size_t r = 0; r < kRows; ++r) {
      if (!drafts[r].empty()) continue;
      groups.push_back({static_cast<int>(r),
                        {},
                        {},
                        rows[r].position,
                        &sampling[r],
                        &histories[r],
                        banned[r],
                        rows[r].banned_tokens});
      row_of_group.push_back(r);
    }
    std::vector<VerifyResult> results(groups.size());
    backend->verify(groups, results);
    for (std::size_t g = 0; g < groups.size(); ++g, ++verified) {
      ASSERT_EQ(results[g].tokens[0], candidates[row_of_group[g] * static_cast<std::size_t>(count)].token);
    }
  }
  EXPECT_GT(verified, 10);
}

TEST_P(CpuDraftingTest, EachHeadKeepsItsOwnLogits) {
  // A target and its drafter take turns: what one of them computed must not show in what the other does.
  const HeadShape shape{256, 256, 16, 2, 32, WeightType::f32, WeightType::f32};
  const Head plain(shape, random_);
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, GetParam());
  backend->reserve(2, 2, 32, shape.vocabulary);
  const UploadedHead head(*backend, plain);
  SparseHead all = head.sparse;
  all.centroids = nullptr;
  PlainStep step(2, shape.vocabulary);
  step.outputs = every(2);
  backend->begin(step.rows(), {});
  std::vector<float> states = cpu::random_values(2 * shape.columns, random_);
  const auto read = [&] {
    std::vector<float> logits(512);
    backend->read_logits(logits);
    return logits;
  };
  backend->head({states.data(), 32}, head.sparse);
  const std::vector<float> clustered = read();
  backend->head({states.data(), 32}, *head.weight, 0);
  const std::vector<float> dense = read();
  EXPECT_TRUE(std::all_of(dense.begin(), dense.end(), [](float v) { return std::isfinite(v); }));
  backend->head({states.data(), 32}, all);
  const std::vector<float> whole = read();
  backend->head({states.data(), 32}, head.sparse);
  EXPECT_EQ(clustered, read());
  for (std::size_t i = 0; i < dense.size(); ++i) {
    const std::size_t at = i / 256 * 256 + static_cast<std::size_t>(plain.tokens[i % 256]);
    EXPECT_EQ(whole[at], dense[i]) << i;
    EXPECT_TRUE(std::isinf(clustered[at]) || clustered[at] == dense[i]) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, CpuDraftingTest, testing::ValuesIn(cpu::available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

TEST(CpuDrafting, RefusesHeadsThatDoNotMatch) {
  std::mt19937 random(1);
  const Head plain({96, 96, 12, 3, 32, WeightType::f32, WeightType::f32}, random);
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  backend->reserve(1, 1, 32, 96);
  const UploadedHead head(*backend, plain);
  const PlainStep step(1, 96);
  backend->begin(step.rows(), {});
  std::vector<float> state(32, 1);
  SparseHead wrong = head.sparse;
  wrong.chosen = 13;
  EXPECT_THROW(backend->head({state.data(), 32}, wrong), std::logic_error);
  wrong = head.sparse;
  const std::unique_ptr<Weight> seven = backend->create_weight(WeightType::f32, 7, 32);
  wrong.centroids = seven.get();
  EXPECT_THROW(backend->head({state.data(), 32}, wrong), std::logic_error);
  EXPECT_THROW(backend->head({state.data(), 16}, head.sparse), std::logic_error);
  EXPECT_NO_THROW(backend->head({state.data(), 32}, head.sparse));
  std::vector<Candidate> candidates(1);
  EXPECT_THROW(backend->propose({}, 1, candidates), std::logic_error);
  std::vector<VerifyResult> results;
  EXPECT_THROW(backend->verify({}, results), std::logic_error) << "what a sparse head scored is for drafts alone";
  const std::unique_ptr<Weight> longer = backend->create_weight(WeightType::f32, 97, 32);
  wrong = head.sparse;
  wrong.weight = longer.get();
  wrong.centroids = nullptr;
  EXPECT_THROW(backend->head({state.data(), 32}, wrong), std::logic_error);
}

}  // namespace
}  // namespace draftwerk
