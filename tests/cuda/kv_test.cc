// What is written to pages, and moved there, on the emulated device: against the plain form.
#include "backend/cuda/kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <span>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"
#include "step_arrays.h"

namespace draftwerk::cuda {
namespace {

TEST(KvLayout, HasAPlaceForEachComponentOfEachPosition) {
  for (const int head_dim : {32, 64, 512}) {
    std::set<int> keys;
    std::set<int> values;
    for (int d = 0; d < head_dim; ++d) {
      for (int p = 0; p < kPageSize; ++p) {
        keys.insert(key_index(d, p));
        values.insert(value_index(d, p));
      }
    }
    for (const std::set<int>& places : {keys, values}) {
      EXPECT_EQ(places.size(), static_cast<std::size_t>(head_dim * kPageSize));
      EXPECT_EQ(*places.rbegin(), head_dim * kPageSize - 1);
    }
  }
}

class KvTest : public ::testing::Test {
 protected:
  ~KvTest() override { emulation::reset(); }
  std::mt19937 random_{11};
};

/// Projected queries, keys and values of rows, with room between them.
struct Projected {
  Projected(int rows, int query_columns, int kv_columns, std::mt19937& random)
      : query_stride(query_columns + 3),
        kv_stride(kv_columns + 1),
        query(random_floats(static_cast<std::size_t>(rows * query_stride), random)),
        key(random_floats(static_cast<std::size_t>(rows * kv_stride), random)),
        value(random_floats(static_cast<std::size_t>(rows * kv_stride), random)) {}
  int query_stride, kv_stride;
  std::vector<float> query, key, value;
};

std::span<const float> head_of(const std::vector<float>& rows, int stride, int row, int head, int head_dim) {
  return std::span(rows).subspan(static_cast<std::size_t>(row * stride + head * head_dim),
                                 static_cast<std::size_t>(head_dim));
}

/// An element of a page.
double element(const std::byte* at, int index, KvType type) {
  if (type == KvType::f32) {
    float x;
    std::memcpy(&x, at + std::ptrdiff_t{index} * 4, 4);
    return double{x};
  }
  std::uint16_t half;
  std::memcpy(&half, at + std::ptrdiff_t{index} * 2, 2);
  return double{cpu::half_to_float(half)};
}

std::vector<double> normed_and_rotated(std::span<const float> x, std::span<const float> scale, int position,
                                       std::span<const float> frequency) {
  return cpu::reference::rotate(cpu::reference::rms_norm(x, scale, 1e-6), position, frequency);
}

TEST_F(KvTest, AppendsNormalisedAndRotatedRows) {
  struct Case {
    int query_heads, kv_heads, head_dim;
    KvType type;
    bool value_norm, key_is_value;
  };
  const Case cases[] = {{4, 2, 32, KvType::f16, false, false},
                        {9, 3, 64, KvType::f32, true, false},
                        {2, 1, 512, KvType::f16, true, true},
                        {5, 5, 128, KvType::f32, false, true}};
  for (const Case& c : cases) {
    const std::size_t bytes = kv_bytes(c.kv_heads, c.head_dim, c.type);
    const KvLayer kv{0, bytes + 64, 64, c.kv_heads, c.head_dim, c.type};
    Pages pages(3, 96, 2 * bytes + 64, random_);
    // A chain over pages, a tree, and a row far on; rows for padding behind them.
    const std::vector<Part> parts = {{0, 12, 9}, {2, 31, 5, {-1, -1, 0, 2}}, {1, 95, 1}};
    const StepArrays step(pages, parts, 128, {}, 2, 1);
    const Projected in(step.rows(), c.query_heads * c.head_dim, c.kv_heads * c.head_dim, random_);
    const std::vector<float> query_scale = random_floats(static_cast<std::size_t>(c.head_dim), random_);
    const std::vector<float> key_scale = random_floats(static_cast<std::size_t>(c.head_dim), random_);
    const std::vector<float> ones(static_cast<std::size_t>(c.head_dim), 1.0F);
    std::vector<float> frequency;
    for (int i = 0; i < c.head_dim / 2; ++i)
      frequency.push_back(i % 7 == 6 ? 0.0F : std::pow(0.9F, static_cast<float>(i)));
    const Norm value_norm{ones.data()};

    Projected out = in;
    std::vector<float>& value = c.key_is_value ? out.key : out.value;
    LaunchList list;
    append_kv(list, step.view(), {out.query.data(), c.query_heads * c.head_dim, out.query_stride},
              {out.key.data(), c.kv_heads * c.head_dim, out.kv_stride},
              {value.data(), c.kv_heads * c.head_dim, out.kv_stride}, c.query_heads, {query_scale.data()},
              {key_scale.data()}, c.value_norm ? &value_norm : nullptr, {frequency.data()}, kv);
    std::vector<float> queries_alone = in.query;
    prepare_queries(list, step.view(), {queries_alone.data(), c.query_heads * c.head_dim, out.query_stride},
                    c.query_heads, {query_scale.data()}, {frequency.data()});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    EXPECT_EQ(queries_alone, out.query);

    const double tolerance = c.type == KvType::f16 ? 5e-3 : 2e-5;
    int row = 0;
    std::size_t written = 0;
    for (const Part& part : parts) {
      for (int r = 0; r < part.rows; ++r, ++row) {
        for (int h = 0; h < c.query_heads; ++h) {
          const std::vector<double> want = normed_and_rotated(head_of(in.query, in.query_stride, row, h, c.head_dim),
                                                              query_scale, step.position(row), frequency);
          const std::span<const float> got = head_of(out.query, in.query_stride, row, h, c.head_dim);
          for (int d = 0; d < c.head_dim; ++d) {
            ASSERT_NEAR(double{got[static_cast<std::size_t>(d)]}, want[static_cast<std::size_t>(d)], 2e-5);
          }
        }
        const int slot = part.first + r;
        const std::byte* page = pages.page(part.sequence, slot);
        for (int h = 0; h < c.kv_heads; ++h) {
          const std::vector<double> key = normed_and_rotated(head_of(in.key, in.kv_stride, row, h, c.head_dim),
                                                             key_scale, step.position(row), frequency);
          const std::span<const float> raw =
              head_of(c.key_is_value ? in.key : in.value, in.kv_stride, row, h, c.head_dim);
          const std::vector<double> normed = cpu::reference::rms_norm(raw, ones, 1e-6);
          for (int d = 0; d < c.head_dim; ++d, written += 2) {
            const auto i = static_cast<std::size_t>(d);
            const int head = h * c.head_dim * kPageSize;
            ASSERT_NEAR(element(page + kv.key_offset, head + key_index(d, slot % kPageSize), c.type), key[i], tolerance)
                << "row " << row << " head " << h << " component " << d;
            ASSERT_NEAR(element(page + kv.value_offset, head + value_index(d, slot % kPageSize), c.type),
                        c.value_norm ? normed[i] : double{raw[i]}, tolerance)
                << "row " << row << " head " << h << " component " << d;
          }
        }
      }
    }
    // And nothing else: the rest is NaN as it was.
    const std::vector<std::byte> after = pages.content();
    const auto changed =
        static_cast<std::size_t>(std::ranges::count_if(after, [](std::byte b) { return b != std::byte{0xFF}; }));
    EXPECT_LE(changed, written * (c.type == KvType::f16 ? 2 : 4));
    for (std::size_t i = 0; i < in.query.size(); ++i) {
      if (static_cast<int>(i) % in.query_stride >= c.query_heads * c.head_dim) {
        ASSERT_EQ(out.query[i], in.query[i]) << "beside a row";
      }
    }
  }
}

TEST_F(KvTest, ARowDependsOnNothingBesideIt) {
  const int head_dim = 64;
  const std::size_t bytes = kv_bytes(2, head_dim, KvType::f16);
  const KvLayer kv{0, 0, bytes, 2, head_dim, KvType::f16};
  const std::vector<float> scale = random_floats(head_dim, random_);
  const std::vector<float> frequency = random_floats(head_dim / 2, random_);
  const Projected in(9, 4 * head_dim, 2 * head_dim, random_);
  Pages pages(2, 64, 2 * bytes, random_);
  const std::vector<std::byte> empty = pages.content();
  const auto run = [&](const std::vector<Part>& parts, int first_row, int padding) {
    pages.restore(empty);
    const StepArrays step(pages, parts, 64, {}, padding, padding);
    Projected rows(step.rows(), 4 * head_dim, 2 * head_dim, random_);
    const auto copy = [&](const std::vector<float>& from, std::vector<float>& to, int stride, int count) {
      std::copy_n(from.begin() + std::ptrdiff_t{first_row} * stride, std::ptrdiff_t{count} * stride, to.begin());
    };
    const int count = parts.front().rows;
    copy(in.query, rows.query, in.query_stride, count);
    copy(in.key, rows.key, in.kv_stride, count);
    copy(in.value, rows.value, in.kv_stride, count);
    LaunchList list;
    append_kv(list, step.view(), {rows.query.data(), 4 * head_dim, in.query_stride},
              {rows.key.data(), 2 * head_dim, in.kv_stride}, {rows.value.data(), 2 * head_dim, in.kv_stride}, 4,
              {scale.data()}, {scale.data()}, nullptr, {frequency.data()}, kv);
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    rows.query.resize(static_cast<std::size_t>(count * in.query_stride));
    return rows.query;
  };
  const std::vector<float> together = run({{0, 20, 9}}, 0, 0);
  const std::vector<std::byte> content = pages.content();
  for (const auto order : {emulation::Order::backward, emulation::Order::shuffled}) {
    emulation::set_order(order, 9);
    EXPECT_EQ(run({{0, 20, 9}}, 0, 3), together);
    EXPECT_EQ(pages.content(), content) << "padding rows store nothing";
  }
  for (int r = 0; r < 9; ++r) {
    const std::vector<float> alone = run({{0, 20 + r, 1}, {1, 3, 4}}, r, r);
    EXPECT_TRUE(
        std::equal(alone.begin(), alone.begin() + 4 * head_dim, together.begin() + std::ptrdiff_t{r} * in.query_stride))
        << r;
    const std::vector<std::byte> own = pages.content();
    for (int d = 0; d < 2 * head_dim; ++d) {
      const int head = d / head_dim * head_dim * kPageSize;
      const int slot = (20 + r) % kPageSize;
      const auto at = static_cast<std::size_t>(pages.page(0, 20 + r) - pages.data());
      for (const std::size_t place :
           {kv.key_offset + 2 * static_cast<std::size_t>(head + key_index(d % head_dim, slot)),
            kv.value_offset + 2 * static_cast<std::size_t>(head + value_index(d % head_dim, slot))}) {
        ASSERT_EQ(std::memcmp(&own[at + place], &content[at + place], 2), 0) << r;
      }
    }
  }
}

TEST_F(KvTest, KeepsNumbersThatAreFinite) {
  const std::size_t bytes = kv_bytes(1, 32, KvType::f16);
  const KvLayer kv{0, 0, bytes, 1, 32, KvType::f16};
  Pages pages(1, 16, 2 * bytes, random_);
  const StepArrays step(pages, {{0, 3, 1}}, 16);
  std::vector<float> query(32, 1.0F);
  std::vector<float> key(32, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> value(32, std::numeric_limits<float>::infinity());
  value[5] = -1e30F;
  value[6] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> ones(32, 1.0F);
  const std::vector<float> frequency(16, 0.0F);
  LaunchList list;
  append_kv(list, step.view(), {query.data(), 32}, {key.data(), 32}, {value.data(), 32}, 1, {ones.data()},
            {ones.data()}, nullptr, {frequency.data()}, kv);
  list.run(nullptr);
  check(cudaDeviceSynchronize(), "waiting");
  const std::byte* page = pages.page(0, 3);
  for (int d = 0; d < 32; ++d) {
    EXPECT_EQ(element(page + kv.key_offset, key_index(d, 3), KvType::f16), -65504.0);
    EXPECT_EQ(element(page + kv.value_offset, value_index(d, 3), KvType::f16), d == 5 || d == 6 ? -65504.0 : 65504.0);
  }
}

TEST_F(KvTest, MovesCopyOnePositionExactly) {
  for (const KvType type : {KvType::f16, KvType::f32}) {
    const int heads = 5;
    const int head_dim = 64;
    const std::size_t bytes = kv_bytes(heads, head_dim, type);
    const KvLayer kv{1, bytes, 0, heads, head_dim, type};
    Pages pages(2, 512, 2 * bytes, random_);
    std::vector<std::byte> content = pages.content();
    for (std::byte& b : content) b = static_cast<std::byte>(random_());
    pages.restore(content);
    // Within a page, across pages, onto itself, and those that take on what others have brought: in the same eight, in
    // the next, and after it was overwritten.
    const std::vector<PositionMove> moves[2] = {
        {{7, 3}, {40, 15}, {33, 33}, {15, 2}, {2, 1}, {380, 16}, {9, 2}, {2, 0}, {2, 5}, {16, 4}, {500, 16}},
        {{100, 99}}};
    std::vector<PositionMove> all;
    std::vector<SequenceMoves> sequences;
    std::vector<PageId> tables;
    for (int s = 0; s < 2; ++s) {
      sequences.push_back({static_cast<std::int32_t>(all.size()),
                           static_cast<std::int32_t>(moves[s].size()),
                           {-1, static_cast<std::int32_t>(tables.size())}});
      all.insert(all.end(), moves[s].begin(), moves[s].end());
      const std::vector<PageId> table = pages.table(s, 0);
      tables.insert(tables.end(), table.begin(), table.end());
    }
    sequences.push_back({0, 0, {0, 0}});
    const std::size_t size = type == KvType::f16 ? 2 : 4;
    for (int s = 0; s < 2; ++s) {
      for (const PositionMove& move : moves[s]) {
        for (int c = 0; c < heads * head_dim; ++c) {
          const auto copy = [&](std::size_t offset, int from_index, int to_index) {
            const int head = c / head_dim * head_dim * kPageSize;
            std::memcpy(pages.page(s, move.to) + offset + static_cast<std::size_t>(head + to_index) * size,
                        pages.page(s, move.from) + offset + static_cast<std::size_t>(head + from_index) * size, size);
          };
          copy(kv.key_offset, key_index(c % head_dim, move.from % kPageSize),
               key_index(c % head_dim, move.to % kPageSize));
          copy(kv.value_offset, value_index(c % head_dim, move.from % kPageSize),
               value_index(c % head_dim, move.to % kPageSize));
        }
      }
    }
    const std::vector<std::byte> expected = pages.content();
    pages.restore(content);
    LaunchList list;
    const std::vector<MovedLayer> layers = {moved_layer(kv)};
    move_kv(list, {layers.data(), all.data(), sequences.data(), tables.data(), pages.arena(), 1, 3,
                   layers.front().components, 0});
    list.run(nullptr);
    check(cudaDeviceSynchronize(), "waiting");
    EXPECT_EQ(pages.content(), expected);
  }
}

}  // namespace
}  // namespace draftwerk::cuda
