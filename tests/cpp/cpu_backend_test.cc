// The CPU backend through its interface: every operation against a plain form, and row invariance bit by bit over batch
// composition, chunking, thread counts and both attention schedules.
#include "backend/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/memory.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"
#include "cpu_backend_fixture.h"
#include "random_blocks.h"

namespace draftwerk {
namespace {

using cpu::Isa;

class CpuBackendTest : public testing::TestWithParam<Isa> {
 protected:
  std::mt19937 random_{11};
};

TEST_P(CpuBackendTest, ProjectionsOfEveryType) {
  for (const int threads : {1, 3}) {
    const std::unique_ptr<Backend> backend = make_cpu_backend(threads, GetParam());
    backend->reserve(70, 35, 512, 100);
    for (const WeightType type : cpu::kWeightTypes) {
      const int columns = 256;
      const Matrix a(*backend, type, 40, columns, random_);
      const Matrix b(*backend, WeightType::f32, 7, columns, random_);
      const Matrix c(*backend, WeightType::q8_0, 33, columns, random_);
      for (const int rows : {1, 3, 70}) {
        const PlainStep step(rows, 100);
        backend->begin(step.rows(), {});
        std::vector<float> x = cpu::random_values(std::int64_t{rows} * columns, random_);
        std::vector<float> scale = cpu::random_values(columns, random_);
        std::vector<float> ya(static_cast<std::size_t>(rows) * 40);
        std::vector<float> yb(static_cast<std::size_t>(rows) * 7);
        std::vector<float> yc(static_cast<std::size_t>(rows) * 33);
        const Norm norm{scale.data(), 1e-6F};
        const Projection outputs[] = {
            {a.weight.get(), {ya.data(), 40}}, {b.weight.get(), {yb.data(), 7}}, {c.weight.get(), {yc.data(), 33}}};
        for (const Norm* use : {static_cast<const Norm*>(nullptr), &norm}) {
          backend->project({x.data(), columns}, use, outputs);
          for (int r = 0; r < rows; ++r) {
            const std::span<const float> row(x.data() + std::ptrdiff_t{r} * columns, columns);
            const std::vector<double> input = use != nullptr ? cpu::reference::rms_norm(row, scale, 1e-6)
                                                             : std::vector<double>(row.begin(), row.end());
            expect_close(ya.data() + std::ptrdiff_t{r} * 40, a.times(input), 0.06);
            expect_close(yb.data() + std::ptrdiff_t{r} * 7, b.times(input), 1e-5);
            expect_close(yc.data() + std::ptrdiff_t{r} * 33, c.times(input), 0.06);
          }
        }
      }
    }
  }
}

TEST_P(CpuBackendTest, FeedForwardAndResidual) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(2, GetParam());
  backend->reserve(80, 40, 160, 100);
  for (const WeightType type : {WeightType::f32, WeightType::bf16, WeightType::q5_0}) {
    const Matrix gate(*backend, type, 160, 96, random_);
    const Matrix up(*backend, type == WeightType::q5_0 ? WeightType::f16 : type, 160, 96, random_);
    const Matrix down(*backend, type, 96, 160, random_);
    const double tolerance = type == WeightType::q5_0 ? 0.05 : 1e-5;
    for (const int rows : {1, 5, 80}) {
      const PlainStep step(rows, 100);
      backend->begin(step.rows(), {});
      std::vector<float> residual = cpu::random_values(std::int64_t{rows} * 96, random_);
      const std::vector<float> before = residual;
      const std::vector<float> scale = cpu::random_values(96, random_);
      std::vector<float> hidden(static_cast<std::size_t>(rows) * 160);
      const Norm norm{scale.data(), 1e-6F};
      backend->project_geglu({residual.data(), 96}, norm, *gate.weight, *up.weight, {hidden.data(), 160});
      backend->project_add({hidden.data(), 160}, *down.weight, norm, {residual.data(), 96}, 1);
      for (int r = 0; r < rows; ++r) {
        const std::span<const float> row(before.data() + std::ptrdiff_t{r} * 96, 96);
        const std::vector<double> input = cpu::reference::rms_norm(row, scale, 1e-6);
        const std::vector<double> g = gate.times(input);
        std::vector<double> h = up.times(input);
        for (std::size_t i = 0; i < h.size(); ++i) h[i] *= cpu::reference::gelu_tanh(g[i]);
        expect_close(hidden.data() + std::ptrdiff_t{r} * 160, h, tolerance);
        const float* hidden_row = hidden.data() + std::ptrdiff_t{r} * 160;
        const std::vector<double> product = down.times(std::vector<double>(hidden_row, hidden_row + 160));
        const std::vector<float> narrow(product.begin(), product.end());
        std::vector<double> want = cpu::reference::rms_norm(narrow, scale, 1e-6);
        for (std::size_t i = 0; i < want.size(); ++i) want[i] += row[i];
        expect_close(residual.data() + std::ptrdiff_t{r} * 96, want, tolerance);
      }
    }
  }
}

TEST_P(CpuBackendTest, EmbeddingHeadAndGreedyChoice) {
  for (const int vocabulary : {37, 256, 1000}) {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2, GetParam());
    backend->reserve(9, 5, 64, vocabulary);
    for (const WeightType type : {WeightType::f32, WeightType::q8_0}) {
      const Matrix table(*backend, type, vocabulary, 64, random_);
      const PlainStep step(9, vocabulary);
      backend->begin(step.rows(), {});
      std::vector<float> x(9 * 64);
      backend->embed(*table.weight, 8, {x.data(), 64});
      for (std::size_t r = 0; r < 9; ++r) {
        for (std::size_t i = 0; i < 64; ++i) {
          ASSERT_FLOAT_EQ(x[r * 64 + i], 8 * table.values[static_cast<std::size_t>(step.tokens[r]) * 64 + i]);
        }
      }
      const std::vector<float> scale = cpu::random_values(64, random_);
      for (const float softcap : {0.0F, 30.0F}) {
        std::vector<float> states(5 * 64);
        backend->gather_outputs({x.data(), 64}, {scale.data(), 1e-6F}, {states.data(), 64});
        backend->head({states.data(), 64}, *table.weight, softcap);
        const std::size_t width = static_cast<std::size_t>(vocabulary);
        std::vector<float> logits(5 * width);
        backend->read_logits(logits);
        const SamplingParams greedy;
        std::vector<VerifyGroup> groups(5);
        std::vector<VerifyResult> results(5);
        for (int o = 0; o < 5; ++o) {
          groups[static_cast<std::size_t>(o)].first_output = o;
          groups[static_cast<std::size_t>(o)].sampling = &greedy;
        }
        backend->verify(groups, results);
        for (std::size_t o = 0; o < 5; ++o) {
          const float* row = x.data() + static_cast<std::size_t>(step.outputs[o]) * 64;
          std::vector<double> want = table.times(cpu::reference::rms_norm({row, 64}, scale, 1e-6));
          if (softcap != 0) {
            for (double& v : want) v = softcap * std::tanh(v / softcap);
          }
          expect_close(logits.data() + o * width, want, type == WeightType::f32 ? 1e-5 : 0.03);
          const auto best = std::max_element(logits.data() + o * width, logits.data() + (o + 1) * width);
          ASSERT_EQ(results[o].tokens.size(), 1U);
          EXPECT_EQ(results[o].tokens[0], best - (logits.data() + o * width));
        }
      }
    }
  }
}

// --- attention through pages, and row invariance ---------------------------------------------------------------------

struct Shape {
  int query_heads;
  int kv_heads;
  int head_dim;
  KvType kv;
  WeightType weights;
};

/// Two layers, the first sliding and the second full, with everything that a Gemma layer has.
class TinyModel {
 public:
  static constexpr int kHidden = 256;
  static constexpr int kFeedForward = 256;
  static constexpr int kVocabulary = 90;
  static constexpr int kWindow = 40;
  static constexpr int kMaxRows = 330;
  static constexpr int kMaxPositions = 640;

  TinyModel(int threads, Isa isa, const Shape& shape) : shape_(shape), backend_(make_cpu_backend(threads, isa)) {
    std::mt19937 random(99);
    Backend& backend = *backend_;
    const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
      return Matrix(backend, shape.weights, rows, columns, random).weight;
    };
    const int query_width = shape.query_heads * shape.head_dim;
    const int kv_width = shape.kv_heads * shape.head_dim;
    backend.reserve(kMaxRows, kMaxRows, std::max({query_width, kHidden, kFeedForward}), kVocabulary);
    table_ = matrix(kVocabulary, kHidden);
    const std::size_t bytes = backend.kv_bytes(shape.kv_heads, shape.head_dim, shape.kv);
    for (int l = 0; l < 2; ++l) {
      layers_.push_back({matrix(query_width, kHidden),
                         matrix(kv_width, kHidden),
                         matrix(kv_width, kHidden),
                         matrix(kHidden, query_width),
                         matrix(kFeedForward, kHidden),
                         matrix(kFeedForward, kHidden),
                         matrix(kHidden, kFeedForward),
                         {l, 0, bytes, shape.kv_heads, shape.head_dim, shape.kv}});
    }
    scale_ = cpu::random_values(std::max(kHidden, shape.head_dim), random);
    for (int i = 0; i < shape.head_dim / 2; ++i) {
      frequency_.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(shape.head_dim)));
    }
    page_bytes_ = 2 * bytes;
    arena_ = backend.allocate(page_bytes_ * kMaxPages);
    // Whatever was never written must not matter.
    std::memset(arena_->data(), 0xFF, arena_->bytes());
    hidden_.resize(std::size_t{kMaxRows} * kHidden);
    states_ = hidden_;
    query_.resize(static_cast<std::size_t>(kMaxRows * query_width));
    attended_ = query_;
    key_.resize(static_cast<std::size_t>(kMaxRows * kv_width));
    value_ = key_;
    feed_.resize(std::size_t{kMaxRows} * kFeedForward);
  }

  struct Part {
    int sequence;
    int first;
    int rows;
  };
  static TokenId token(int sequence, int position) { return (sequence * 131 + position * 17 + 3) % kVocabulary; }

  /// One step; keeps the logits of every row by (sequence, position).
  void step(const std::vector<Part>& parts) {
    std::vector<TokenId> tokens;
    std::vector<std::int64_t> positions;
    std::vector<Segment> segments;
    std::vector<int> outputs;
    for (const Part& part : parts) {
      Segment segment{static_cast<int>(tokens.size()), part.rows, part.first, {}};
      for (int t = 0; t < kPageTables; ++t) segment.pages[t] = pages(part, t).data();
      segments.push_back(segment);
      for (int p = part.first; p < part.first + part.rows; ++p) {
        outputs.push_back(static_cast<int>(tokens.size()));
        tokens.push_back(token(part.sequence, p));
        positions.push_back(p);
      }
    }
    Backend& backend = *backend_;
    backend.begin({tokens, positions, segments, outputs}, {static_cast<std::byte*>(arena_->data())});
    const int query_width = shape_.query_heads * shape_.head_dim;
    const int kv_width = shape_.kv_heads * shape_.head_dim;
    const Tensor hidden{hidden_.data(), kHidden};
    const Tensor query{query_.data(), query_width};
    const Tensor key{key_.data(), kv_width};
    const Tensor value{value_.data(), kv_width};
    const Tensor attended{attended_.data(), query_width};
    const Tensor feed{feed_.data(), kFeedForward};
    const Norm norm{scale_.data(), 1e-6F};
    backend.embed(*table_, 16, hidden);
    for (std::size_t l = 0; l < 2; ++l) {
      const Layer& layer = layers_[l];
      const Projection outputs_qkv[] = {{layer.q.get(), query}, {layer.k.get(), key}, {layer.v.get(), value}};
      backend.project(hidden, &norm, outputs_qkv);
      backend.append_kv(query, key, value, shape_.query_heads, norm, norm, nullptr, {frequency_.data()}, layer.kv);
      backend.attend(query, shape_.query_heads, layer.kv, {l == 0 ? kWindow : 0}, 0.1F, attended);
      backend.project_add(attended, *layer.o, norm, hidden, 1);
      backend.project_geglu(hidden, norm, *layer.gate, *layer.up, feed);
      backend.project_add(feed, *layer.down, norm, hidden, 1);
    }
    backend.gather_outputs(hidden, norm, {states_.data(), kHidden});
    backend.head({states_.data(), kHidden}, *table_, 30);
    std::vector<float> logits(outputs.size() * kVocabulary);
    backend.read_logits(logits);
    std::size_t row = 0;
    for (const Part& part : parts) {
      for (int p = part.first; p < part.first + part.rows; ++p, ++row) {
        logits_[{part.sequence, p}].assign(logits.begin() + static_cast<std::ptrdiff_t>(row * kVocabulary),
                                           logits.begin() + static_cast<std::ptrdiff_t>((row + 1) * kVocabulary));
      }
    }
  }

  [[nodiscard]] const std::map<std::pair<int, int>, std::vector<float>>& logits() const { return logits_; }

 private:
  static constexpr std::size_t kMaxPages = 400;

  struct Layer {
    std::unique_ptr<Weight> q, k, v, o, gate, up, down;
    KvLayer kv;
  };

  /// The sequence's page table: pages handed out as they are needed, those before a sliding window taken away.
  std::vector<PageId>& pages(const Part& part, int table) {
    std::vector<PageId>& list = pages_[{part.sequence, table}];
    list.resize(kMaxPositions / kPageSize, kNoPage);
    const int oldest = table == 0 ? std::max(part.first - kWindow + 1, 0) / kPageSize : 0;
    for (int p = 0; p < oldest; ++p) list[static_cast<std::size_t>(p)] = kNoPage;
    for (int p = part.first / kPageSize; p <= (part.first + part.rows - 1) / kPageSize; ++p) {
      PageId& page = list[static_cast<std::size_t>(p)];
      if (page == kNoPage) page = static_cast<PageId>(pages_used_++ * page_bytes_ / kPageUnit);
    }
    EXPECT_LE(pages_used_, kMaxPages);
    return list;
  }

  Shape shape_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> table_;
  std::vector<Layer> layers_;
  std::vector<float> scale_;
  std::vector<float> frequency_;
  std::size_t page_bytes_ = 0;
  std::unique_ptr<Buffer> arena_;
  std::size_t pages_used_ = 0;
  std::map<std::pair<int, int>, std::vector<PageId>> pages_;
  std::vector<float> hidden_, states_, query_, attended_, key_, value_, feed_;
  std::map<std::pair<int, int>, std::vector<float>> logits_;
};

/// Three sequences of these lengths, cut into parts of random size and mixed at random.
std::vector<std::vector<TinyModel::Part>> random_schedule(const std::vector<int>& lengths, int largest,
                                                          std::mt19937& random) {
  std::vector<int> done(lengths.size());
  std::vector<std::vector<TinyModel::Part>> steps;
  while (done != lengths) {
    std::vector<TinyModel::Part> parts;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      const int left = lengths[s] - done[s];
      if (left == 0 || random() % 3 == 0) continue;
      const int rows = std::min(left, 1 + static_cast<int>(random() % static_cast<unsigned>(largest)));
      parts.push_back({static_cast<int>(s), done[s], rows});
      done[s] += rows;
    }
    if (!parts.empty()) steps.push_back(parts);
  }
  return steps;
}

TEST_P(CpuBackendTest, RowsDoNotDependOnBatchChunksOrThreads) {
  const std::vector<int> lengths = {190, 45, 90};
  for (const Shape& shape :
       {Shape{4, 1, 64, KvType::f16, WeightType::q8_0}, Shape{4, 2, 128, KvType::f32, WeightType::f32},
        Shape{8, 1, 64, KvType::f16, WeightType::q4_k}, Shape{3, 3, 32, KvType::f16, WeightType::q5_0}}) {
    TinyModel alone(1, GetParam(), shape);
    for (std::size_t s = 0; s < lengths.size(); ++s) alone.step({{static_cast<int>(s), 0, lengths[s]}});
    for (const auto& [threads, largest] :
         std::vector<std::pair<int, int>>{{1, 3}, {2, 200}, {2, 1}, {3, 9}, {5, 200}}) {
      TinyModel mixed(threads, GetParam(), shape);
      for (const auto& parts : random_schedule(lengths, largest, random_)) mixed.step(parts);
      ASSERT_EQ(mixed.logits().size(), alone.logits().size());
      for (const auto& [key, logits] : alone.logits()) {
        ASSERT_TRUE(std::all_of(logits.begin(), logits.end(), [](float v) { return std::isfinite(v); }));
        ASSERT_EQ(mixed.logits().at(key), logits) << "sequence " << key.first << " position " << key.second << ", "
                                                  << threads << " threads, parts of up to " << largest;
      }
    }
  }
}

/// Keys and values of one head as the reference wants them.
struct PlainHead {
  std::vector<std::vector<double>> keys;
  std::vector<std::vector<double>> values;
};

TEST_P(CpuBackendTest, AttentionOverPagesIsTheReference) {
  struct Case {
    int query_heads, kv_heads, head_dim, window;
    KvType type;
  };
  for (const Case& c : {Case{4, 1, 256, 0, KvType::f16}, Case{4, 2, 64, 50, KvType::f32},
                        Case{8, 1, 128, 128, KvType::f16}, Case{2, 2, 512, 7, KvType::f32}}) {
    const std::unique_ptr<Backend> backend = make_cpu_backend(2, GetParam());
    backend->reserve(512, 1, c.query_heads * c.head_dim, 16);
    const std::size_t bytes = backend->kv_bytes(c.kv_heads, c.head_dim, c.type);
    const KvLayer kv{1, bytes, 0, c.kv_heads, c.head_dim, c.type};  // values first: offsets must count
    const int length = 260;
    const std::unique_ptr<Buffer> arena = backend->allocate(2 * bytes * (length / kPageSize + 1));
    std::vector<PageId> pages;
    for (std::size_t p = 0; p <= length / kPageSize; ++p) {
      pages.push_back(static_cast<PageId>(p * 2 * bytes / kPageUnit));
    }
    std::shuffle(pages.begin(), pages.end(), random_);
    const int query_width = c.query_heads * c.head_dim;
    const int kv_width = c.kv_heads * c.head_dim;
    const std::vector<float> query_scale = cpu::random_values(c.head_dim, random_);
    const std::vector<float> key_scale = cpu::random_values(c.head_dim, random_);
    std::vector<float> frequency;
    for (int i = 0; i < c.head_dim / 2; ++i) frequency.push_back(std::pow(0.98F, static_cast<float>(i)));
    std::vector<PlainHead> heads(static_cast<std::size_t>(c.kv_heads));
    for (int first = 0; first < length;) {
      const int rows = first == 0 ? 101 : std::min(1 + static_cast<int>(random_() % 40), length - first);
      std::vector<TokenId> tokens(static_cast<std::size_t>(rows));
      std::vector<std::int64_t> positions;
      for (int r = 0; r < rows; ++r) positions.push_back(first + r);
      const Segment segment{0, rows, first, {nullptr, pages.data()}};
      backend->begin({tokens, positions, {&segment, 1}, {}}, {static_cast<std::byte*>(arena->data())});
      std::vector<float> q = cpu::random_values(std::int64_t{rows} * query_width, random_);
      std::vector<float> k = cpu::random_values(std::int64_t{rows} * kv_width, random_);
      std::vector<float> v = cpu::random_values(std::int64_t{rows} * kv_width, random_);
      std::vector<float> out(q.size());
      const std::vector<float> q_before = q;
      const std::vector<float> k_before = k;
      backend->append_kv({q.data(), query_width}, {k.data(), kv_width}, {v.data(), kv_width}, c.query_heads,
                         {query_scale.data(), 1e-6F}, {key_scale.data(), 1e-6F}, nullptr, {frequency.data()}, kv);
      backend->attend({q.data(), query_width}, c.query_heads, kv, {c.window}, 0.25F, {out.data(), query_width});
      const auto normed = [&](const std::vector<float>& x, int row, int width, int head,
                              const std::vector<float>& scale) {
        const std::span<const float> part(x.data() + row * width + head * c.head_dim,
                                          static_cast<std::size_t>(c.head_dim));
        return cpu::reference::rotate(cpu::reference::rms_norm(part, scale, 1e-6), first + row, frequency);
      };
      for (int r = 0; r < rows; ++r) {
        for (int h = 0; h < c.kv_heads; ++h) {
          heads[static_cast<std::size_t>(h)].keys.push_back(normed(k_before, r, kv_width, h, key_scale));
          const float* value = v.data() + r * kv_width + h * c.head_dim;
          heads[static_cast<std::size_t>(h)].values.emplace_back(value, value + c.head_dim);
        }
        for (int h = 0; h < c.query_heads; ++h) {
          const PlainHead& head = heads[static_cast<std::size_t>(h / (c.query_heads / c.kv_heads))];
          const std::ptrdiff_t past = first + r + 1;
          const std::ptrdiff_t oldest = c.window == 0 ? 0 : std::max<std::ptrdiff_t>(past - c.window, 0);
          const std::vector<double> want = cpu::reference::attention(
              normed(q_before, r, query_width, h, query_scale), {head.keys.begin() + oldest, head.keys.begin() + past},
              {head.values.begin() + oldest, head.values.begin() + past}, 0.25);
          const float* got = out.data() + r * query_width + h * c.head_dim;
          // f16 keys (relative error 2^-11) shift scores of size ~4 by ~2e-3 and so the weights; f32 has only rounding.
          for (std::size_t d = 0; d < want.size(); ++d) {
            ASSERT_NEAR(got[d], want[d], c.type == KvType::f16 ? 1e-2 : 3e-5) << "row " << first + r << " head " << h;
          }
        }
      }
      first += rows;
    }
  }
}

TEST_P(CpuBackendTest, LongContextsAreTheSameInEverySchedule) {
  // More chunks than one wave of partial results holds for one thread (64), and for 8 rows at once the other schedule.
  constexpr int kHeadDim = 16;
  constexpr int kLength = 70 * 128 + 5;
  std::vector<float> expected;
  for (const auto& [threads, rows] : std::vector<std::pair<int, int>>{{1, 1}, {3, 1}, {1, 2}, {2, 16}, {1, 64}}) {
    const std::unique_ptr<Backend> backend = make_cpu_backend(threads, GetParam());
    backend->reserve(512, 1, 64, 16);
    const std::size_t bytes = backend->kv_bytes(1, kHeadDim, KvType::f16);
    const KvLayer kv{0, 0, bytes, 1, kHeadDim, KvType::f16};
    const std::unique_ptr<Buffer> arena = backend->allocate(2 * bytes * (kLength / kPageSize + 1));
    std::vector<PageId> pages;
    for (std::size_t p = 0; p <= kLength / kPageSize; ++p) {
      pages.push_back(static_cast<PageId>(p * 2 * bytes / kPageUnit));
    }
    const std::vector<float> scale(kHeadDim, 1);
    const std::vector<float> frequency(kHeadDim / 2, 0.01F);
    std::mt19937 random(8);  // the same keys and values every time
    std::vector<float> last;
    for (int first = 0; first < kLength;) {
      const bool at_end = first >= kLength - 64;
      const int count = at_end ? std::min(rows, kLength - first) : std::min(512, kLength - 64 - first);
      std::vector<TokenId> tokens(static_cast<std::size_t>(count));
      std::vector<std::int64_t> positions;
      for (int r = 0; r < count; ++r) positions.push_back(first + r);
      const Segment segment{0, count, first, {pages.data(), nullptr}};
      backend->begin({tokens, positions, {&segment, 1}, {}}, {static_cast<std::byte*>(arena->data())});
      std::vector<float> q, k, v;
      for (int r = 0; r < count; ++r) {
        for (std::vector<float>* x : {&q, &k, &v}) {
          const std::vector<float> row = cpu::random_values(kHeadDim, random);
          x->insert(x->end(), row.begin(), row.end());
        }
      }
      std::vector<float> out(q.size());
      const Norm norm{scale.data(), 1e-6F};
      backend->append_kv({q.data(), kHeadDim}, {k.data(), kHeadDim}, {v.data(), kHeadDim}, 1, norm, norm, nullptr,
                         {frequency.data()}, kv);
      if (at_end) {
        backend->attend({q.data(), kHeadDim}, 1, kv, {}, 0.3F, {out.data(), kHeadDim});
        last.insert(last.end(), out.begin(), out.end());
      }
      first += count;
    }
    if (expected.empty()) expected = last;
    EXPECT_TRUE(std::all_of(last.begin(), last.end(), [](float x) { return std::isfinite(x); }));
    EXPECT_EQ(last, expected) << threads << " threads, " << rows << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, CpuBackendTest, testing::ValuesIn(cpu::available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

// --- memory and errors -----------------------------------------------------------------------------------------------

TEST(CpuBackend, DescribesItself) {
  EXPECT_EQ(make_cpu_backend(1, Isa::portable)->description(), "cpu portable, 1 thread");
  EXPECT_EQ(make_cpu_backend(3, Isa::portable)->description(), "cpu portable, 3 threads");
  EXPECT_NE(make_cpu_backend(0)->description().find("cpu "), std::string::npos);
  if (cpu::available_isas().back() >= Isa::avx512) {  // what names the rounding is that of avx512
    EXPECT_EQ(make_cpu_backend(2, Isa::amx)->description(), "cpu avx512, amx, 2 threads");
  }
  EXPECT_THROW(make_cpu_backend(-1), std::invalid_argument);
}

TEST(CpuBackend, RefusesWeightsOfImpossibleShape) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  EXPECT_THROW(backend->create_weight(WeightType::q8_0, 16, 33), std::invalid_argument);
  EXPECT_THROW(backend->create_weight(WeightType::q4_k, 16, 128), std::invalid_argument);
  for (const WeightType type : {WeightType::q8_0, WeightType::q6_k}) {
    EXPECT_THROW(backend->create_weight(type, 16, (std::int64_t{1} << 18) + 256), std::invalid_argument);
  }
  EXPECT_THROW(backend->create_weight(WeightType::f32, 0, 32), std::invalid_argument);
  EXPECT_THROW(backend->create_weight(WeightType::f32, 16, -1), std::invalid_argument);
  EXPECT_THROW(backend->create_weight(WeightType::f32, std::int64_t{1} << 40, 32), std::invalid_argument);
  const std::unique_ptr<Weight> weight = backend->create_weight(WeightType::q4_0, 40, 32);
  const std::vector<std::byte> source(40 * 18);
  EXPECT_NO_THROW(backend->upload_rows(*weight, 32, 8, WeightType::q4_0, source.data()));
  EXPECT_THROW(backend->upload_rows(*weight, 8, 16, WeightType::q4_0, source.data()), std::invalid_argument);
  EXPECT_THROW(backend->upload_rows(*weight, 0, 8, WeightType::q4_0, source.data()), std::invalid_argument);
  EXPECT_THROW(backend->upload_rows(*weight, 32, 16, WeightType::q4_0, source.data()), std::invalid_argument);
  EXPECT_THROW(backend->upload_rows(*weight, 0, 16, WeightType::q5_0, source.data()), std::invalid_argument);
  EXPECT_THROW(backend->upload_rows(*weight, 0, 16, WeightType::q8_0, source.data()), std::invalid_argument);
}

TEST(CpuBackend, RefusesStepsBeyondItsReserve) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  EXPECT_THROW(backend->reserve(0, 1, 32, 16), std::invalid_argument);
  backend->reserve(4, 2, 32, 16);
  EXPECT_THROW(backend->begin(PlainStep(5, 16).rows(), {}), std::logic_error);
  PlainStep gap(4, 16);
  gap.segments[0].rows = 3;
  EXPECT_THROW(backend->begin(gap.rows(), {}), std::logic_error);
  EXPECT_NO_THROW(backend->begin(PlainStep(4, 16).rows(), {}));
  const std::unique_ptr<Weight> wide = backend->create_weight(WeightType::f32, 16, 100);
  std::vector<float> x(400);
  std::vector<float> y(64);
  const Projection output{wide.get(), {y.data(), 16}};
  EXPECT_THROW(backend->project({x.data(), 100}, nullptr, {&output, 1}), std::logic_error);
}

TEST(CpuBackend, FloatsConvertOnTheWay) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(2, Isa::portable);
  backend->reserve(1, 1, 32, 16);
  std::mt19937 random(1);
  const std::vector<float> values = cpu::random_values(std::int64_t{32} * 32, random);
  for (const WeightType type :
       {WeightType::f32, WeightType::f16, WeightType::bf16, WeightType::q8_0, WeightType::q4_0, WeightType::f8_e4m3}) {
    const std::unique_ptr<Weight> weight = backend->create_weight(type, 32, 32);
    backend->upload_rows(*weight, 0, 32, WeightType::f32, reinterpret_cast<const std::byte*>(values.data()));
    PlainStep step(1, 32);
    step.tokens[0] = 21;
    backend->begin(step.rows(), {});
    float row[32];
    backend->embed(*weight, 1, {row, 32});
    // Of f8_e4m3 half a step is 2^-4 of a value, and none is larger than 3.2.
    const double tolerance = type == WeightType::q4_0 ? 0.4 : type == WeightType::f8_e4m3 ? 0.2 : 0.02;
    EXPECT_EQ(weight->type(), type);
    for (std::size_t i = 0; i < 32; ++i) ASSERT_NEAR(row[i], values[std::size_t{21} * 32 + i], tolerance);
  }
}

TEST(Memory, IsZeroedAlignedAndLazy) {
  const cpu::MappedMemory memory(std::size_t{1} << 40);  // more than any machine of ours has
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % 4096, 0U);
  EXPECT_EQ(memory.bytes(), std::size_t{1} << 40);
  EXPECT_EQ(static_cast<const char*>(memory.data())[std::size_t{1} << 39], 0);
  EXPECT_NE(cpu::MappedMemory(0).data(), nullptr);
}

TEST(Memory, WeightsShareMappingsAndOutliveEachOther) {
  cpu::WeightArena arena;
  std::vector<cpu::MemorySlice> slices;
  for (int i = 0; i < 200; ++i) {
    slices.push_back(arena.take(700'001));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slices.back().data) % 64, 0U);
    std::memset(slices.back().data, i, 700'001);
  }
  // Neighbours lie close together: 140 MB in three mappings.
  EXPECT_EQ(slices[0].mapping, slices[90].mapping);
  EXPECT_LT(slices[1].data - slices[0].data, 700'001 + 128);
  for (std::size_t i = 0; i < slices.size(); i += 2) slices[i] = {};
  for (std::size_t i = 1; i < slices.size(); i += 2) {
    EXPECT_EQ(slices[i].data[0], static_cast<std::byte>(i));
    EXPECT_EQ(slices[i].data[700'000], static_cast<std::byte>(i));
  }
  const cpu::MemorySlice large = arena.take(std::size_t{20} << 20);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large.data) % (std::size_t{2} << 20), 0U);
}

}  // namespace
}  // namespace draftwerk
