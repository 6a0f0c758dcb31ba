// Attention on the emulated device: against the plain form in double precision, and against itself: a row's bits are
// the same however its sequence was cut, whatever is computed beside it, and in whichever of its ways.
#include "backend/cuda/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"
#include "backend/cuda/kv.h"
#include "operand_values.h"
#include "step_arrays.h"

namespace draftwerk::cuda {
namespace {

constexpr std::size_t kScratch = std::size_t{8} << 20;

double rounded(float x) { return double{cpu::half_to_float(cpu::float_to_half(x))}; }

struct Shape {
  int query_heads;
  int kv_heads;
  int head_dim;
  KvType type = KvType::f16;
  Visibility sees = {};

  [[nodiscard]] int group() const { return query_heads / kv_heads; }
  [[nodiscard]] std::size_t query_width() const { return static_cast<std::size_t>(query_heads * head_dim); }
};

/// What a position of a sequence holds, or a row asks: [heads, head_dim].
using Values = std::vector<float>;

/// How attention is computed: none of it may show.
struct Way {
  int multiprocessors = 132;
  std::size_t scratch = kScratch;
  int context = 8192;
  int padding_rows = 0;
  int padding_segments = 0;
};
// All spans in one block, and each in its own.
constexpr Way kWhole{.multiprocessors = 0};
constexpr Way kSplit{.multiprocessors = 1 << 20};

/// A layer whose keys and values tests write and attention reads.
class Layer {
 public:
  Layer(const Shape& shape, int sequences, int positions, std::mt19937& random)
      : shape_(shape),
        bytes_(kv_bytes(shape.kv_heads, shape.head_dim, shape.type)),
        kv_{0, bytes_, 0, shape.kv_heads, shape.head_dim, shape.type},  // values first: offsets must count
        pages_(sequences, positions, 2 * bytes_, random) {}

  void write(int sequence, int slot, const Values& key, const Values& value) {
    std::byte* page = pages_.page(sequence, slot);
    for (int h = 0; h < shape_.kv_heads; ++h) {
      for (int d = 0; d < shape_.head_dim; ++d) {
        const auto at = static_cast<std::size_t>(h * shape_.head_dim + d);
        const int head = h * shape_.head_dim * kPageSize;
        put(page + kv_.key_offset, head + key_index(d, slot % kPageSize), key[at]);
        put(page + kv_.value_offset, head + value_index(d, slot % kPageSize), value[at]);
      }
    }
  }

  std::vector<Values> attend(const std::vector<Part>& parts, const std::vector<Values>& queries, const Way& way) {
    const Attention attention(way.multiprocessors, way.scratch);
    const StepArrays step(pages_, parts, way.context, shape_.sees, way.padding_rows, way.padding_segments);
    const int width = static_cast<int>(shape_.query_width());
    const int stride = width + 2;
    const auto rows = static_cast<std::size_t>(step.rows());
    // What padding rows ask is anything.
    std::vector<float> query(rows * static_cast<std::size_t>(stride), std::nanf(""));
    std::vector<float> output(query.size(), -1.0F);
    for (std::size_t r = 0; r < queries.size(); ++r) {
      std::ranges::copy(queries[r], query.begin() + static_cast<std::ptrdiff_t>(r) * stride);
    }
    LaunchList list;
    std::vector<std::byte> operands(operand_bytes(static_cast<int>(rows), width));
    const OperandSink sink{operands.data(), static_cast<std::int64_t>(operand_bytes(1, width))};
    attention.attend(list, step.view(), {query.data(), width, stride}, shape_.query_heads, kv_, shape_.sees, scale_,
                     {output.data(), width, stride}, sink);
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    const std::vector<float> left = operand_values(operands.data(), static_cast<int>(rows), width);
    std::vector<Values> results;
    for (std::size_t r = 0; r < rows; ++r) {
      const auto begin = output.begin() + static_cast<std::ptrdiff_t>(r) * stride;
      if (r < queries.size()) {
        results.emplace_back(begin, begin + width);
        const auto its = left.begin() + static_cast<std::ptrdiff_t>(r) * width;
        EXPECT_TRUE(std::equal(its, its + width, begin, [](float operand, float value) {
          return operand == cpu::bfloat_to_float(cpu::float_to_bfloat(value));
        })) << "left as operands";
      } else {
        EXPECT_TRUE(std::all_of(begin, begin + width, [](float x) { return x == -1.0F; })) << "a padding row";
      }
      EXPECT_TRUE(std::all_of(begin + width, begin + stride, [](float x) { return x == -1.0F; })) << "beside a row";
    }
    return results;
  }

  [[nodiscard]] const Shape& shape() const { return shape_; }
  [[nodiscard]] const KvLayer& kv() const { return kv_; }
  [[nodiscard]] Pages& pages() { return pages_; }
  [[nodiscard]] float scale() const { return scale_; }
  Values random_query(std::mt19937& random) const { return random_floats(shape_.query_width(), random); }
  Values random_kv(std::mt19937& random) const {
    return random_floats(static_cast<std::size_t>(shape_.kv_heads * shape_.head_dim), random);
  }

 private:
  void put(std::byte* at, int index, float x) const {
    if (shape_.type == KvType::f32) {
      std::memcpy(at + std::ptrdiff_t{index} * 4, &x, 4);
    } else {
      const std::uint16_t half = cpu::float_to_half(x);
      std::memcpy(at + std::ptrdiff_t{index} * 2, &half, 2);
    }
  }

  Shape shape_;
  std::size_t bytes_;
  KvLayer kv_;
  Pages pages_;
  float scale_ = 0.3F;
};

/// Keys and values of a sequence.
struct Context {
  std::vector<Values> keys;
  std::vector<Values> values;

  void add(Layer& layer, int sequence, int positions, std::mt19937& random) {
    for (int p = 0; p < positions; ++p) {
      keys.push_back(layer.random_kv(random));
      values.push_back(layer.random_kv(random));
      layer.write(sequence, static_cast<int>(keys.size()) - 1, keys.back(), values.back());
    }
  }
};

/// What a query at `position` takes from those slots, by the plain form.
std::vector<double> plain(const Layer& layer, const Context& context, const std::vector<int>& slots,
                          const Values& query) {
  const Shape& shape = layer.shape();
  std::vector<double> output;
  for (int h = 0; h < shape.query_heads; ++h) {
    const auto head = [&](const Values& values, int number) {
      std::vector<double> of_head;
      for (int d = 0; d < shape.head_dim; ++d) {
        of_head.push_back(rounded(values[static_cast<std::size_t>(number * shape.head_dim + d)]));
      }
      return of_head;
    };
    std::vector<std::vector<double>> keys;
    std::vector<std::vector<double>> values;
    for (const int slot : slots) {
      keys.push_back(head(context.keys[static_cast<std::size_t>(slot)], h / shape.group()));
      values.push_back(head(context.values[static_cast<std::size_t>(slot)], h / shape.group()));
    }
    const std::vector<double> of_head =
        cpu::reference::attention(head(query, h), keys, values, static_cast<double>(layer.scale()));
    output.insert(output.end(), of_head.begin(), of_head.end());
  }
  return output;
}

/// The slots that row `row` of a part sees.
std::vector<int> seen_slots(const Part& part, int row, const Visibility& sees) {
  std::vector<int> slots(static_cast<std::size_t>(part.first));
  std::iota(slots.begin(), slots.end(), 0);
  for (const int r : part.path(row)) slots.push_back(part.first + r);
  if (!sees.own) slots.pop_back();
  if (sees.window > 0 && slots.size() > static_cast<std::size_t>(sees.window)) {
    slots.erase(slots.begin(), slots.end() - sees.window);
  }
  return slots;
}

Part random_tree(int sequence, int first, int rows, std::mt19937& random) {
  Part part{sequence, first, rows, {}};
  const unsigned bushy = 1 + random() % 4U;
  for (int i = 0; i < rows - 1; ++i) {
    const bool deeper = random() % 4U >= bushy;
    part.parents.push_back(deeper ? i - 1 : static_cast<std::int32_t>(random() % static_cast<unsigned>(i + 1)) - 1);
    if (part.path(i + 1).size() > static_cast<std::size_t>(kMaxPath)) part.parents.back() = -1;
  }
  return part;
}

class AttentionTest : public ::testing::Test {
 protected:
  ~AttentionTest() override { emulation::reset(); }
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  std::mt19937 random_{7};
};

TEST(AttentionSpans, HoldEachChunkOnce) {
  for (const bool windowed : {false, true}) {
    for (int chunk = 0; chunk < 10000; ++chunk) {
      const int span = span_of_chunk(chunk, windowed);
      ASSERT_LE(first_chunk_of_span(span, windowed), chunk);
      ASSERT_GT(first_chunk_of_span(span + 1, windowed), chunk);
    }
  }
  EXPECT_EQ(span_of_chunk(131072 / kAttentionChunk, false), 136);
}

// Weights are rounded to float16, by 2^-12 of each at most, and divided by the sum of what they are rounded to; all
// else is float32.
TEST_F(AttentionTest, IsThatOfThePlainForm) {
  const Shape shapes[] = {
      {4, 2, 32}, {3, 3, 32, KvType::f32},  {16, 1, 64}, {8, 1, 256}, {6, 2, 32}, {2, 1, 512},
      {5, 1, 64}, {4, 4, 128, KvType::f32},
  };
  for (int round = 0; round < 16; ++round) {
    Shape shape = shapes[round % 8];
    if (round >= 8) shape.sees.window = std::vector<int>{0, 1, 17, 128, 200}[static_cast<std::size_t>(pick(0, 4))];
    shape.sees.own = round % 3 != 2;
    const int sequences = 3;
    Layer layer(shape, sequences, 512, random_);
    std::vector<Part> parts;
    std::vector<Context> contexts(sequences);
    std::vector<Values> queries;
    for (int s = 0; s < sequences; ++s) {
      const int first = pick(shape.sees.own ? 0 : 1, shape.head_dim <= 64 ? 300 : 150);
      const int rows = s == 1 ? 1 : pick(1, shape.head_dim == 32 ? 40 : 10);
      Part part{s, first, rows};
      if (s == 2) part = random_tree(s, first, rows, random_);
      contexts[static_cast<std::size_t>(s)].add(layer, s, first + rows, random_);
      for (int r = 0; r < rows; ++r) queries.push_back(layer.random_query(random_));
      parts.push_back(part);
    }
    const std::vector<Values> outputs = layer.attend(parts, queries, round % 2 == 0 ? kWhole : kSplit);
    std::size_t row = 0;
    for (const Part& part : parts) {
      for (int r = 0; r < part.rows; ++r, ++row) {
        const std::vector<int> slots = seen_slots(part, r, shape.sees);
        const Context& context = contexts[static_cast<std::size_t>(part.sequence)];
        const std::vector<double> want = plain(layer, context, slots, queries[row]);
        for (std::size_t i = 0; i < want.size(); ++i) {
          ASSERT_NEAR(static_cast<double>(outputs[row][i]), want[i], 1e-3)
              << "round " << round << " sequence " << part.sequence << " row " << r << " component " << i;
        }
      }
    }
  }
}

/// Rows of one sequence alone, each a step of its own: what all others are held to.
std::vector<Values> one_by_one(Layer& layer, int sequence, int first, const std::vector<Values>& queries,
                               const Way& way) {
  std::vector<Values> outputs;
  for (std::size_t r = 0; r < queries.size(); ++r) {
    outputs.push_back(layer.attend({{sequence, first + static_cast<int>(r), 1}}, {queries[r]}, way).front());
  }
  return outputs;
}

TEST_F(AttentionTest, ARowDependsOnNothingBesideIt) {
  const Shape shapes[] = {{4, 1, 32}, {6, 2, 32}, {2, 2, 64}, {16, 1, 32}};
  for (int round = 0; round < 4; ++round) {
    Shape shape = shapes[round % 4];
    shape.sees.window = std::vector<int>{0, 50, 200}[static_cast<std::size_t>(round % 3)];
    Layer layer(shape, 3, 512, random_);
    std::vector<Context> contexts(3);
    for (int s = 0; s < 3; ++s) contexts[static_cast<std::size_t>(s)].add(layer, s, 400, random_);
    // Some rows around the end of a chunk, or of a page.
    const int first = round % 2 == 0 ? pick(100, 128) : pick(200, 300);
    const int rows = pick(8, 20);
    std::vector<Values> queries;
    for (int r = 0; r < rows; ++r) queries.push_back(layer.random_query(random_));
    const std::vector<Values> expected = one_by_one(layer, 1, first, queries, kSplit);
    const auto expect_rows = [&](const std::vector<Values>& outputs, int offset, const char* what) {
      for (int r = 0; r < rows; ++r) {
        ASSERT_EQ(outputs[static_cast<std::size_t>(offset + r)], expected[static_cast<std::size_t>(r)])
            << what << ", round " << round << " row " << r;
      }
    };
    expect_rows(one_by_one(layer, 1, first, queries, kWhole), 0, "one by one in one block");
    for (const Way& way : {kWhole, kSplit}) {
      expect_rows(layer.attend({{1, first, rows}}, queries, way), 0, "together");
      // In chunks, of which others know nothing.
      std::vector<Values> outputs;
      for (int r = 0; r < rows;) {
        const int count = std::min(pick(1, 12), rows - r);
        const std::vector<Values> some(queries.begin() + r, queries.begin() + r + count);
        for (Values& output : layer.attend({{1, first + r, count}}, some, way)) outputs.push_back(std::move(output));
        r += count;
      }
      expect_rows(outputs, 0, "in chunks");
      // Among others and padding, with another bucket of the context.
      std::vector<Values> all;
      const int before = pick(1, 30);
      for (int r = 0; r < before; ++r) all.push_back(layer.random_query(random_));
      all.insert(all.end(), queries.begin(), queries.end());
      all.push_back(layer.random_query(random_));
      Way among = way;
      among.context = round % 2 == 0 ? 512 : 65536;
      among.padding_rows = pick(0, 20);
      among.padding_segments = pick(0, 10);
      expect_rows(layer.attend({{0, pick(0, 300), before}, {1, first, rows}, {2, 17, 1}}, all, among), before,
                  "among others");
    }
  }
}

TEST_F(AttentionTest, EveryOrderOfThreadsGivesTheSame) {
  const Shape shape{6, 2, 64, KvType::f16, {150, true}};
  Layer layer(shape, 2, 512, random_);
  std::vector<Context> contexts(2);
  for (int s = 0; s < 2; ++s) contexts[static_cast<std::size_t>(s)].add(layer, s, 420, random_);
  const std::vector<Part> parts = {{0, 390, 20}, random_tree(1, 380, 12, random_)};
  std::vector<Values> queries;
  for (int r = 0; r < 32; ++r) queries.push_back(layer.random_query(random_));
  const std::vector<Values> expected = layer.attend(parts, queries, kWhole);
  for (const auto order : {emulation::Order::backward, emulation::Order::shuffled}) {
    emulation::set_order(order, 3);
    EXPECT_EQ(layer.attend(parts, queries, kWhole), expected);
    EXPECT_EQ(layer.attend(parts, queries, kSplit), expected);
  }
}

// Past the spans of single chunks, and of four.
TEST_F(AttentionTest, LongContextsTakeLongerSpans) {
  Layer layer({2, 1, 32}, 1, 37000, random_);
  Context context;
  context.add(layer, 0, 36900, random_);
  for (const int first : {4100, 5117, 36890}) {
    std::vector<Values> queries;
    for (int r = 0; r < 4; ++r) queries.push_back(layer.random_query(random_));
    Way split = kSplit;
    split.context = 65536;
    Way whole = kWhole;
    whole.context = 65536;
    const std::vector<Values> outputs = layer.attend({{0, first, 4}}, queries, whole);
    EXPECT_EQ(layer.attend({{0, first, 4}}, queries, split), outputs) << first;
    const Values& last = outputs[3];
    if (first < 10000) {
      EXPECT_EQ(layer.attend({{0, first + 3, 1}}, {queries[3]}, split).front(), last) << first;
    }
    const std::vector<double> want = plain(layer, context, seen_slots({0, first, 4}, 3, {}), queries[3]);
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(static_cast<double>(last[i]), want[i], 1e-3);
  }
}

TEST_F(AttentionTest, GoesThroughAllSpansInOneBlockWhereScratchIsShort) {
  Layer layer({4, 1, 32}, 1, 512, random_);
  Context context;
  context.add(layer, 0, 500, random_);
  const Values query = layer.random_query(random_);
  Way way = kSplit;
  way.scratch = 64;
  EXPECT_EQ(layer.attend({{0, 480, 1}}, {query}, way), layer.attend({{0, 480, 1}}, {query}, kSplit));
  const StepArrays step(layer.pages(), {{0, 480, 1}}, 512);
  for (const auto& [scratch, launches] : {std::pair{std::size_t{64}, 1U}, std::pair{kScratch, 2U}}) {
    LaunchList list;
    Attention(1 << 20, scratch).attend(list, step.view(), {nullptr, 128}, 4, layer.kv(), {}, 1.0F, {nullptr, 128});
    EXPECT_EQ(list.size(), launches);
  }
}

TEST_F(AttentionTest, PagesOfFloatsGiveWhatPagesOfHalvesDo) {
  const auto run = [&](KvType type) {
    std::mt19937 random(5);
    Layer layer({4, 2, 64, type}, 1, 256, random);
    std::mt19937 values(6);
    Context context;
    context.add(layer, 0, 200, values);
    // Round numbers are kept alike.
    for (int p = 0; p < 200; ++p) {
      Values& key = context.keys[static_cast<std::size_t>(p)];
      Values& value = context.values[static_cast<std::size_t>(p)];
      for (float& x : key) x = static_cast<float>(rounded(x));
      for (float& x : value) x = static_cast<float>(rounded(x));
      layer.write(0, p, key, value);
    }
    std::vector<Values> queries;
    for (int r = 0; r < 3; ++r) queries.push_back(layer.random_query(values));
    return layer.attend({random_tree(0, 190, 3, values)}, queries, kSplit);
  };
  EXPECT_EQ(run(KvType::f16), run(KvType::f32));
}

// --- trees -----------------------------------------------------------------------------------------------------------

struct RowInput {
  Values query, key, value;
};

// The last token's position: at the ends of pages and chunks, and between them.
TEST_F(AttentionTest, RowsOfATreeAttendAsInAChainOfTheirPath) {
  const Shape shapes[] = {{4, 1, 32}, {3, 1, 64}, {2, 2, 32, KvType::f32}, {16, 1, 32}, {8, 1, 256}};
  const int firsts[] = {0, 1, 9, 15, 16, 60, 118, 124, 126, 127, 128, 143, 200, 252, 255};
  for (int round = 0; round < 12; ++round) {
    Shape shape = shapes[round % 5];
    shape.sees.window = std::vector<int>{0, 1, 3, 17, 128, 200}[static_cast<std::size_t>(pick(0, 5))];
    Layer layer(shape, 2, 512, random_);
    Context context;
    const int first = firsts[pick(0, 14)];
    context.add(layer, 0, first, random_);
    const int rows = round == 3 ? 60 : pick(2, 13);
    const Part tree = random_tree(0, first, rows, random_);
    std::vector<RowInput> inputs;
    std::vector<Values> queries;
    for (int r = 0; r < rows; ++r) {
      inputs.push_back({layer.random_query(random_), layer.random_kv(random_), layer.random_kv(random_)});
      queries.push_back(inputs.back().query);
    }
    const auto write = [&](int slot, int row) {
      const RowInput& input = inputs[static_cast<std::size_t>(row)];
      layer.write(0, first + slot, input.key, input.value);
    };
    const std::vector<std::byte> before = layer.pages().content();
    for (int r = 0; r < rows; ++r) write(r, r);
    const std::vector<std::byte> after = layer.pages().content();
    const std::vector<Values> outputs = layer.attend({tree}, queries, kWhole);
    EXPECT_EQ(layer.attend({tree}, queries, kSplit), outputs);
    // Of so many rows, some.
    for (int row = rows > 20 ? pick(0, 5) : 0; row < rows; row += rows > 20 ? 6 : 1) {
      const std::vector<int> path = tree.path(row);
      layer.pages().restore(before);
      std::vector<Values> chain;
      for (std::size_t i = 0; i < path.size(); ++i) {
        write(static_cast<int>(i), path[i]);
        chain.push_back(queries[static_cast<std::size_t>(path[i])]);
      }
      const Part part{0, first, static_cast<int>(path.size())};
      ASSERT_EQ(outputs[static_cast<std::size_t>(row)], layer.attend({part}, chain, kWhole).back())
          << "round " << round << " row " << row << " of " << rows << " at " << first << " window "
          << shape.sees.window;
    }
    layer.pages().restore(after);
  }
}

TEST_F(AttentionTest, TakesOnlyHeadsThatItKnows) {
  const Attention attention(1, 64);
  Pages pages(1, 16, 256, random_);
  const StepArrays step(pages, {{0, 0, 1}}, 16);
  LaunchList list;
  EXPECT_THROW(attention.attend(list, step.view(), {nullptr, 48}, 1, {0, 0, 0, 1, 48}, {}, 1.0F, {nullptr, 48}),
               std::logic_error);
  EXPECT_THROW(attention.attend(list, step.view(), {nullptr, 96}, 3, {0, 0, 0, 2, 32}, {}, 1.0F, {nullptr, 96}),
               std::logic_error);
}

}  // namespace
}  // namespace draftwerk::cuda
