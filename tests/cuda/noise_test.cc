// The device's noise and weights have the CPU's bits.
#include "backend/cuda/noise.cuh"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "backend/cpu/sampler_kernels.h"
#include "backend/cuda/rank.cuh"
#include "backend/sampling.h"

namespace draftwerk::cuda {
namespace {

const cpu::SamplerKernels& cpu_kernels() { return cpu::portable::kSamplerKernels; }

/// Words at both ends, around powers of two, and anywhere.
template <typename Visit>
void for_words(Visit&& visit) {
  for (std::uint32_t i = 0; i < 5000; ++i) {
    visit(i);
    visit(~i);
  }
  for (int bit = 8; bit < 32; ++bit) {
    for (std::uint32_t i = 0; i < 64; ++i) visit((1U << bit) + i - 32);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 300000; ++i) visit(random());
}

TEST(CudaNoise, GumbelHasTheBitsOfTheCpu) {
  for_words([](std::uint32_t word) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(gumbel(word)), std::bit_cast<std::uint32_t>(cpu_kernels().gumbel(word)))
        << word;
  });
}

TEST(CudaNoise, GumbelKeepsToItsBound) {
  for_words([](std::uint32_t word) { ASSERT_LE(gumbel(word), gumbel_bound(word) + 0.5F * noise_slack(0.0F)) << word; });
}

TEST(CudaNoise, WordsAreThoseOfTheDefinition) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t seed = random();
    const auto position = static_cast<std::int64_t>(random() >> (i % 40));
    const auto token = static_cast<TokenId>(random() % 262144);
    const uint4 words = noise_words(seed, position, static_cast<std::uint32_t>(token) / 4);
    const std::uint32_t four[4] = {words.x, words.y, words.z, words.w};
    ASSERT_EQ(four[token % 4], noise_word(seed, position, token));
    ASSERT_EQ(word_of_token(seed, position, token), noise_word(seed, position, token));
  }
}

TEST(CudaNoise, WeightsAreThoseOfTheCpu) {
  std::mt19937 random(3);
  const auto check = [](float difference) {
    ASSERT_EQ(weight(difference), cpu_kernels().weight(difference)) << difference;
  };
  for (int i = 0; i < 300000; ++i) {
    check(-std::ldexp(std::uniform_real_distribution<float>(0.0F, 1.0F)(random), i % 12 - 5));
  }
  for (const float x : {0.0F, -0.0F, -1e-30F, -28.4F, -28.5F, -30.0F, -30.000002F, -1e38F,
                        -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    check(x);
  }
}

TEST(CudaRank, OrdersAsFloatsDo) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float ascending[] = {-std::numeric_limits<float>::max(), -1.0F, -1e-45F, 0.0F, 1e-45F, 1.0F, kInfinity};
  for (std::size_t i = 0; i + 1 < std::size(ascending); ++i) {
    EXPECT_LT(rank_of(ascending[i], 3), rank_of(ascending[i + 1], 7));
    EXPECT_GT(rank_of(ascending[i], 3), rank_of(ascending[i], 7));
    EXPECT_GE(rank_of(ascending[i], 262143), rank_from(ascending[i]));
    EXPECT_LT(rank_of(ascending[i], 0), rank_from(ascending[i + 1]));
    EXPECT_EQ(value_of(rank_of(ascending[i], 5)), ascending[i]);
    EXPECT_EQ(token_of(rank_of(ascending[i], 5)), 5);
  }
  EXPECT_EQ(rank_of(-0.0F, 5), rank_of(0.0F, 5));
  EXPECT_EQ(rank_of(-kInfinity, 0), kNowhere);
  EXPECT_EQ(rank_of(std::numeric_limits<float>::quiet_NaN(), 0), kNowhere);
  EXPECT_EQ(value_of(kNowhere), -kInfinity);
}

}  // namespace
}  // namespace draftwerk::cuda
