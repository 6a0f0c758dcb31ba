// Every layer kernel, for every instruction set of this machine, against its plain form in double precision.
// Tolerances: float32 has 24 bits; a sum of n products is off by at most n 2^-24 of the sum of their magnitudes, in
// practice by sqrt(n) 2^-24. Attention over f16 is compared with the reference on the same rounded keys and values.
#include "backend/cpu/layer_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"
#include "random_blocks.h"

namespace draftwerk::cpu {
namespace {

class LayerKernelsTest : public testing::TestWithParam<Isa> {
 protected:
  std::vector<float> draw(int count, float spread = 1.0F) {
    std::normal_distribution<float> normal(0, spread);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = normal(random_);
    return values;
  }
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  const LayerKernels& kernels_ = layer_kernels(GetParam());
  std::mt19937 random_{20};
};

TEST_P(LayerKernelsTest, RmsNorm) {
  for (int round = 0; round < 200; ++round) {
    const int columns = round < 60 ? round + 1 : pick(1, 700);
    const std::vector<float> x = draw(columns, round % 3 == 0 ? 1e-3F : 30.0F);
    const std::vector<float> scale = draw(columns);
    const std::vector<double> want = reference::rms_norm(x, scale, 1e-6);
    std::vector<float> y(x.size() + 1, -7);
    kernels_.rms_norm(x.data(), scale.data(), 1e-6F, columns, y.data());
    std::vector<float> residual = draw(columns + 1);
    const std::vector<float> before = residual;
    kernels_.add_rms_norm(x.data(), scale.data(), 1e-6F, columns, 0.75F, residual.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_NEAR(y[i], want[i], 2e-6 * std::abs(want[i]) + 1e-30);
      ASSERT_NEAR(residual[i], 0.75 * (before[i] + want[i]), 2e-6 * (std::abs(want[i]) + std::abs(before[i])));
    }
    EXPECT_EQ(y.back(), -7);
    EXPECT_EQ(residual.back(), before.back());
  }
}

TEST_P(LayerKernelsTest, RmsNormInPlaceIsTheSame) {
  std::vector<float> x = draw(256);
  const std::vector<float> scale = draw(256);
  std::vector<float> y(256);
  kernels_.rms_norm(x.data(), scale.data(), 1e-6F, 256, y.data());
  kernels_.rms_norm(x.data(), scale.data(), 1e-6F, 256, x.data());
  EXPECT_EQ(x, y);
}

TEST_P(LayerKernelsTest, MixRmsNorm) {
  for (int columns = 1; columns < 300; columns += columns < 40 ? 1 : 13) {
    std::vector<float> x = draw(columns + 1, 5);
    const std::vector<float> before = x;
    const std::vector<float> scale = draw(columns);
    const std::vector<float> added = draw(columns);
    const std::span<const float> row(before.data(), scale.size());
    const std::vector<double> want = reference::mix(row, scale, 1e-6, added, 16, 0.5);
    kernels_.mix_rms_norm(x.data(), scale.data(), 1e-6F, columns, added.data(), 16, 0.5F);
    for (std::size_t i = 0; i < scale.size(); ++i) ASSERT_NEAR(x[i], want[i], 2e-6 * (10 + 16 * std::abs(added[i])));
    EXPECT_EQ(x.back(), before.back());
  }
}

TEST_P(LayerKernelsTest, WidenReadsFloatsFromAnyAddress) {
  for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
    for (int count = 1; count < 70; ++count) {
      const std::vector<std::byte> values = random_blocks(type, count, random_);
      std::vector<float> want(static_cast<std::size_t>(count));
      dequantize(type, values.data(), count, want.data());
      // Exactly as many bytes as there are values, off any alignment: a read too far is the sanitizer's to find.
      const std::unique_ptr<std::byte[]> shifted = std::make_unique<std::byte[]>(values.size() + 1);
      std::memcpy(shifted.get() + 1, values.data(), values.size());
      std::vector<float> got(want.size() + 1, -7);
      kernels_.widen(type, shifted.get() + 1, count, got.data());
      EXPECT_EQ(got.back(), -7);
      got.pop_back();
      ASSERT_EQ(got, want);
    }
  }
}

TEST_P(LayerKernelsTest, WeightedSumOfRows) {
  for (int columns = 1; columns < 200; columns += columns < 40 ? 1 : 9) {
    const int stride = columns + 3;
    const std::vector<float> x = draw(5 * stride);
    for (int count = 1; count <= 4; ++count) {
      const std::int32_t rows[] = {3, 0, 4, 1};
      const std::vector<float> weights = draw(count);
      std::vector<float> y(static_cast<std::size_t>(columns) + 1, -7);
      kernels_.weighted_sum(x.data(), stride, rows, weights.data(), count, columns, y.data());
      for (int c = 0; c < columns; ++c) {
        double want = 0;
        for (int i = 0; i < count; ++i) {
          want += double{weights[static_cast<std::size_t>(i)]} * x[static_cast<std::size_t>(rows[i] * stride + c)];
        }
        ASSERT_NEAR(y[static_cast<std::size_t>(c)], want, 4e-6);
      }
      EXPECT_EQ(y.back(), -7);
    }
  }
}

TEST_P(LayerKernelsTest, GeluMultiply) {
  for (int columns = 1; columns < 80; ++columns) {
    const std::vector<float> gate = draw(columns, 4);
    const std::vector<float> up = draw(columns);
    std::vector<float> y(gate.size() + 1, -7);
    kernels_.gelu_multiply(gate.data(), up.data(), columns, y.data());
    for (std::size_t i = 0; i < gate.size(); ++i) {
      // tanh is good to about 3e-7 absolutely, which the gate and up multiply.
      ASSERT_NEAR(y[i], reference::gelu_tanh(double{gate[i]}) * up[i],
                  1e-6 * (1 + std::abs(gate[i])) * (1 + std::abs(up[i])));
    }
    EXPECT_EQ(y.back(), -7);
  }
}

TEST_P(LayerKernelsTest, SoftcapAndMaximum) {
  for (int columns = 1; columns < 300; columns += 7) {
    const std::vector<float> x = draw(columns, 40);
    std::vector<float> y = x;
    y.push_back(1e9F);
    EXPECT_EQ(kernels_.softcap_max(y.data(), columns, 0), *std::max_element(x.begin(), x.end()));
    EXPECT_TRUE(std::equal(x.begin(), x.end(), y.begin()));
    const float largest = kernels_.softcap_max(y.data(), columns, 30);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(y[i], 30 * std::tanh(x[i] / 30.0), 1e-5);
    EXPECT_EQ(largest, *std::max_element(y.begin(), y.end() - 1));
    EXPECT_EQ(y.back(), 1e9F);
  }
  std::vector<float> odd(20, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(kernels_.softcap_max(odd.data(), 20, 0), odd[0]);
  odd[3] = -5;
  odd[4] = std::numeric_limits<float>::quiet_NaN();
  odd[17] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(kernels_.softcap_max(odd.data(), 20, 0), -5.0F);
  EXPECT_NEAR(kernels_.softcap_max(odd.data(), 20, 30), 30 * std::tanh(-5 / 30.0), 1e-5);
  EXPECT_TRUE(std::isnan(odd[4]));
  EXPECT_TRUE(std::isnan(odd[17]));
  EXPECT_FLOAT_EQ(odd[0], -30);
}

// As tanh does: the quotient and the product around it cannot but do so.
TEST_P(LayerKernelsTest, SoftcapKeepsTheOrder) {
  constexpr std::uint32_t kRun = 1024;
  const auto bits_of = [](float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  };
  std::vector<float> x(kRun);
  const auto check = [&](std::uint32_t first) {
    for (std::uint32_t i = 0; i < kRun; ++i) {
      const std::uint32_t bits = first + i;
      std::memcpy(&x[i], &bits, sizeof bits);
    }
    kernels_.softcap_max(x.data(), kRun, 1.0F);
    ASSERT_TRUE(std::is_sorted(x.begin(), x.end())) << "from bits " << first;
  };
  // An eighth of the positive numbers to where it is 1 for good; all of them take seconds.
  for (std::uint32_t first = bits_of(0x1p-14F); first < bits_of(10.0F); first += 8 * kRun) check(first);
  EXPECT_EQ(x.back(), 1.0F);
  // Around (i + 1/2) ln 2 / 2, where the exponential that it is made of goes from one power of 2 to the next.
  for (int i = 0; i < 26; ++i) check(bits_of((static_cast<float>(i) + 0.5F) * 0.34657359F) - kRun / 2);
}

TEST_P(LayerKernelsTest, Rotate) {
  for (const int head_dim : {16, 32, 48, 64, 128, 256, 512}) {
    const std::vector<float> x = draw(head_dim);
    std::vector<float> frequency(x.size() / 2);
    std::vector<float> cosine(x.size() / 2);
    std::vector<float> sine(x.size() / 2);
    const std::int64_t position = pick(0, 30000);
    for (std::size_t i = 0; i < frequency.size(); ++i) {
      frequency[i] = std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(head_dim));
      cosine[i] = std::cos(static_cast<float>(position) * frequency[i]);
      sine[i] = std::sin(static_cast<float>(position) * frequency[i]);
    }
    const std::vector<double> wide(x.begin(), x.end());
    const std::vector<double> want = reference::rotate(wide, position, frequency);
    std::vector<float> y = x;
    kernels_.rotate(y.data(), cosine.data(), sine.data(), head_dim);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(y[i], want[i], 1e-6 * (1 + std::abs(want[i])));
  }
}

TEST_P(LayerKernelsTest, KeysAndValuesLieWhereTheyShould) {
  for (const KvType type : {KvType::f16, KvType::f32}) {
    for (const int head_dim : {16, 64, 256}) {
      const std::size_t size = type == KvType::f16 ? 2 : 4;
      std::vector<float> x = draw(head_dim);
      x[1] = 1e6F;  // saturates in f16
      x[2] = -1e6F;
      x[3] = std::numeric_limits<float>::quiet_NaN();
      std::vector<std::byte> keys(size * 16 * x.size(), std::byte{0x55});
      std::vector<std::byte> values = keys;
      const int slot = pick(0, 15);
      kernels_.store_key(x.data(), head_dim, type, slot, keys.data());
      kernels_.store_value(x.data(), head_dim, type, slot, values.data());
      const auto read = [&](const std::vector<std::byte>& bytes, std::size_t index) {
        if (type == KvType::f32) {
          float v;
          std::memcpy(&v, bytes.data() + index * 4, 4);
          return v;
        }
        std::uint16_t h;
        std::memcpy(&h, bytes.data() + index * 2, 2);
        return half_to_float(h);
      };
      for (std::size_t d = 0; d < x.size(); ++d) {
        if (d == 3) {
          EXPECT_TRUE(std::isnan(read(keys, d * 16 + static_cast<std::size_t>(slot))));
          EXPECT_TRUE(std::isnan(read(values, static_cast<std::size_t>(slot) * x.size() + d)));
          continue;
        }
        const float want =
            type == KvType::f32 ? x[d] : half_to_float(float_to_half(std::clamp(x[d], -65504.0F, 65504.0F)));
        ASSERT_EQ(read(keys, d * 16 + static_cast<std::size_t>(slot)), want);
        ASSERT_EQ(read(values, static_cast<std::size_t>(slot) * x.size() + d), want);
      }
      const auto touched = [](const std::vector<std::byte>& bytes) {
        return std::count_if(bytes.begin(), bytes.end(), [](std::byte b) { return b != std::byte{0x55}; });
      };
      EXPECT_LE(static_cast<std::size_t>(touched(keys)), size * x.size());
      EXPECT_LE(static_cast<std::size_t>(touched(values)), size * x.size());
    }
  }
}

/// One sequence's keys and values in pages that lie in disorder, and in the plain form that the reference reads.
struct Cache {
  Cache(const LayerKernels& kernels, std::mt19937& random, int positions, int head_dim, KvType type)
      : head_dim(head_dim), type(type) {
    const std::size_t head_bytes = static_cast<std::size_t>(16 * head_dim) * (type == KvType::f16 ? 2 : 4);
    const std::size_t count = static_cast<std::size_t>(positions / kPageSize + 1);
    // Not a number everywhere that nothing was stored.
    arena.assign(count * 2 * head_bytes, std::byte{0xFF});
    for (std::size_t p = 0; p < count; ++p) pages.push_back(static_cast<PageId>(p * 2 * head_bytes / kPageUnit));
    std::shuffle(pages.begin(), pages.end(), random);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(head_dim));
    const auto store = [&](int position, bool is_key) {
      for (float& v : x) v = normal(random);
      std::byte* page = arena.data() + std::size_t{pages[static_cast<std::size_t>(position / kPageSize)]} * kPageUnit;
      if (is_key) {
        kernels.store_key(x.data(), head_dim, type, position % kPageSize, page);
      } else {
        kernels.store_value(x.data(), head_dim, type, position % kPageSize, page + head_bytes);
      }
      std::vector<double> wide;
      for (const float v : x) wide.push_back(type == KvType::f16 ? half_to_float(float_to_half(v)) : v);
      return wide;
    };
    for (int position = 0; position < positions; ++position) {
      keys.push_back(store(position, true));
      values.push_back(store(position, false));
    }
    view = {arena.data(), pages.data(), 0, head_bytes, head_dim, type};
  }

  int head_dim;
  KvType type;
  std::vector<std::byte> arena;
  std::vector<PageId> pages;
  std::vector<std::vector<double>> keys;
  std::vector<std::vector<double>> values;
  KvHeadView view;
};

/// All chunks of a tile, merged and divided.
std::vector<std::vector<float>> attend(const LayerKernels& kernels, const QueryTile& tile, const Cache& cache,
                                       float scale) {
  auto total = std::make_unique<AttentionState>();
  auto part = std::make_unique<AttentionState>();
  const std::int64_t last = tile.last[tile.count - 1] / kAttentionChunk;
  for (std::int64_t chunk = tile.first[0] / kAttentionChunk; chunk <= last; ++chunk) {
    kernels.attend_chunk(tile, cache.view, chunk, scale, *part);
    kernels.merge_chunk(tile, chunk, cache.head_dim, *part, *total);
  }
  std::vector<std::vector<float>> outputs(static_cast<std::size_t>(tile.count));
  float* pointers[kQueryTile];
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    outputs[i].resize(static_cast<std::size_t>(cache.head_dim));
    pointers[i] = outputs[i].data();
  }
  kernels.finish_attention(tile, cache.head_dim, *total, pointers);
  return outputs;
}

TEST_P(LayerKernelsTest, AttentionIsTheReferenceAndEachQueryItsOwn) {
  for (int round = 0; round < 60; ++round) {
    const int head_dim = std::vector<int>{16, 64, 128, 256, 512}[static_cast<std::size_t>(round % 5)];
    const KvType type = round % 2 == 0 ? KvType::f16 : KvType::f32;
    const int count = pick(1, kQueryTile);
    const int rows_per_position = std::vector<int>{1, 2, 4, 8}[static_cast<std::size_t>(pick(0, 3))];
    const int start = pick(0, 420);
    const int window = round % 3 == 0 ? 0 : pick(1, 300);
    const int positions = start + (count - 1) / rows_per_position + 1;
    Cache cache(kernels_, random_, positions, head_dim, type);
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));

    QueryTile tile;
    tile.count = count;
    std::vector<std::vector<float>> queries;
    for (int i = 0; i < count; ++i) queries.push_back(draw(head_dim));
    for (int i = 0; i < count; ++i) {
      tile.query[i] = queries[static_cast<std::size_t>(i)].data();
      tile.last[i] = start + i / rows_per_position;
      tile.first[i] = window == 0 ? 0 : std::max<std::int64_t>(tile.last[i] - window + 1, 0);
    }
    for (std::int64_t p = 0; p < tile.first[0] / kPageSize; ++p) cache.pages[static_cast<std::size_t>(p)] = kNoPage;
    const auto together = attend(kernels_, tile, cache, scale);
    for (int i = 0; i < count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      const std::vector<double> query(queries[index].begin(), queries[index].end());
      const auto first = static_cast<std::ptrdiff_t>(tile.first[i]);
      const auto past = static_cast<std::ptrdiff_t>(tile.last[i] + 1);
      const std::vector<double> want =
          reference::attention(query, {cache.keys.begin() + first, cache.keys.begin() + past},
                               {cache.values.begin() + first, cache.values.begin() + past}, double{scale});
      for (std::size_t d = 0; d < want.size(); ++d) ASSERT_NEAR(together[index][d], want[d], 5e-6) << round;
      QueryTile alone;
      alone.count = 1;
      alone.query[0] = tile.query[i];
      alone.first[0] = tile.first[i];
      alone.last[0] = tile.last[i];
      ASSERT_EQ(attend(kernels_, alone, cache, scale)[0], together[index]) << "round " << round << " query " << i;
    }
  }
}

TEST_P(LayerKernelsTest, AnotherRowsInfinityStaysThere) {
  Cache cache(kernels_, random_, 41, 64, KvType::f32);
  std::vector<float> broken(64, std::numeric_limits<float>::infinity());
  std::byte* page = cache.arena.data() + std::size_t{cache.pages[2]} * kPageUnit;
  kernels_.store_value(broken.data(), 64, KvType::f32, 40 % kPageSize, page + cache.view.value_offset);
  kernels_.store_key(broken.data(), 64, KvType::f32, 40 % kPageSize, page);
  const std::vector<float> q = draw(64);
  QueryTile tile;
  tile.count = 2;
  tile.query[0] = tile.query[1] = q.data();
  tile.last[0] = 39;
  tile.last[1] = 40;
  const auto outputs = attend(kernels_, tile, cache, 0.1F);
  for (const float v : outputs[0]) EXPECT_TRUE(std::isfinite(v));
}

// As in the reference: a row that sees a key of NaN is NaN all over, and one that sees a value of NaN in its
// components.
TEST_P(LayerKernelsTest, AttentionToNanIsNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const KvType type : {KvType::f16, KvType::f32}) {
    if (type == KvType::f16 && GetParam() == Isa::portable) continue;  // it does not tell NaN from a large number
    for (const int position : {3, 140, 299}) {                         // chunks before and behind it
      for (const bool is_key : {true, false}) {
        Cache cache(kernels_, random_, 300, 64, type);
        std::vector<float> x = draw(64);
        x[5] = nan;
        std::byte* page =
            cache.arena.data() + std::size_t{cache.pages[static_cast<std::size_t>(position / kPageSize)]} * kPageUnit;
        std::vector<double>& plain = (is_key ? cache.keys : cache.values)[static_cast<std::size_t>(position)];
        plain.assign(x.begin(), x.end());
        if (is_key) {
          kernels_.store_key(x.data(), 64, type, position % kPageSize, page);
        } else {
          kernels_.store_value(x.data(), 64, type, position % kPageSize, page + cache.view.value_offset);
        }
        const std::vector<float> q = draw(64);
        QueryTile tile;
        tile.count = 2;  // of which one does not see it
        tile.query[0] = tile.query[1] = q.data();
        tile.last[0] = position - 1;
        tile.last[1] = 299;
        const auto got = attend(kernels_, tile, cache, 0.1F);
        const std::vector<double> wide(q.begin(), q.end());
        const std::vector<double> want = reference::attention(wide, cache.keys, cache.values, 0.1);
        for (std::size_t d = 0; d < 64; ++d) {
          EXPECT_FALSE(std::isnan(got[0][d]));
          EXPECT_EQ(std::isnan(got[1][d]), std::isnan(want[d])) << position << " " << is_key << " " << d;
        }
      }
    }
  }
  Cache cache(kernels_, random_, 300, 64, KvType::f32);
  std::vector<float> q = draw(64);
  q[7] = nan;
  QueryTile tile;
  tile.count = 1;
  tile.query[0] = q.data();
  tile.last[0] = 299;
  const auto got = attend(kernels_, tile, cache, 0.1F);
  for (const float v : got[0]) EXPECT_TRUE(std::isnan(v));
}

TEST_P(LayerKernelsTest, LargeScoresDoNotOverflow) {
  Cache cache(kernels_, random_, 300, 64, KvType::f16);
  const std::vector<float> q = draw(64, 1000);
  QueryTile tile;
  tile.count = 1;
  tile.query[0] = q.data();
  tile.last[0] = 299;
  const std::vector<double> wide(q.begin(), q.end());
  const std::vector<double> want = reference::attention(wide, cache.keys, cache.values, 1.0);
  const std::vector<float> got = attend(kernels_, tile, cache, 1.0F)[0];
  // Scores of several thousand carry an error of about 1e-3, and so do the weights.
  for (std::size_t d = 0; d < want.size(); ++d) EXPECT_NEAR(got[d], want[d], 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Isas, LayerKernelsTest, testing::ValuesIn(available_isas()),
                         [](const testing::TestParamInfo<Isa>& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace draftwerk::cpu
