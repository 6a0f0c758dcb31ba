// The noise that every choice of a token rests on: its generator, its logarithms, its statistics.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/sampler_kernels.h"
#include "backend/reference_sampler.h"
#include "backend/sampling.h"

namespace draftwerk {
namespace {

using Words = std::array<std::uint32_t, 4>;

Words philox(const Words& counter, std::uint32_t k0, std::uint32_t k1) {
  const PhiloxWords words = philox4x32(counter[0], counter[1], counter[2], counter[3], k0, k1);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

double exact_gumbel(std::uint32_t word) { return -std::log(-std::log1p(-(static_cast<double>(word) + 0.5) * 0x1p-32)); }

/// Words of every magnitude, both ends in full.
std::vector<std::uint32_t> sample_words() {
  std::vector<std::uint32_t> words;
  for (std::uint32_t x = 0; x < 3000; ++x) {
    words.push_back(x);
    words.push_back(~x);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 60000; ++i) words.push_back(static_cast<std::uint32_t>(random()) >> (random() % 32));
  for (int i = 0; i < 3000; ++i) words.push_back(~(static_cast<std::uint32_t>(random()) >> (random() % 32)));
  return words;
}

TEST(Philox, AgreesWithTheKnownAnswersOfRandom123) {
  EXPECT_EQ(philox({0, 0, 0, 0}, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0U, ~0U, ~0U, ~0U}, ~0U, ~0U), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, NoiseWordCountsTokensInFours) {
  const std::uint64_t seed = 0x299f31d0a4093822ULL;
  const std::int64_t position = (std::int64_t{7} << 32) + 5;
  for (const TokenId token : {0, 1, 2, 3, 4, 262143}) {
    const auto v = static_cast<std::uint32_t>(token);
    EXPECT_EQ(noise_word(seed, position, token), philox({5, 7, v / 4, 0}, 0xa4093822, 0x299f31d0)[v % 4]);
  }
}

TEST(Gumbel, IsTheDoubleLogarithmOfTheWord) {
  const cpu::SamplerKernels& kernels = cpu::sampler_kernels(cpu::Isa::portable);
  for (const std::uint32_t word : sample_words()) {
    const double exact = exact_gumbel(word);
    // Near 1, w is a multiple of 2^-24 and 1 - w has few bits: harmless, as this noise never wins.
    const double rest = (0x1p32 - static_cast<double>(word) - 0.5) * 0x1p-32;
    const double coarse = std::min(0.35, 0x1p-24 / rest / -std::log(rest));
    const double tolerance = 1e-6 + 2e-7 * std::abs(exact) + coarse;
    ASSERT_NEAR(static_cast<double>(kernels.gumbel(word)), exact, tolerance) << word;
  }
}

TEST(Gumbel, StaysBelowItsBound) {
  const cpu::SamplerKernels& kernels = cpu::sampler_kernels(cpu::Isa::portable);
  for (const std::uint32_t word : sample_words()) {
    ASSERT_LE(kernels.gumbel(word), cpu::kGumbelMax);
    ASSERT_GE(kernels.gumbel(word), -2.9F);
  }
  EXPECT_NEAR(kernels.gumbel(0), cpu::kGumbelMax, 1e-4);
}

TEST(Gumbel, SameBitsOnEveryInstructionSet) {
  const cpu::SamplerKernels& portable = cpu::sampler_kernels(cpu::Isa::portable);
  std::mt19937 random(2);
  for (const cpu::Isa isa : cpu::available_isas()) {
    const cpu::SamplerKernels& kernels = cpu::sampler_kernels(isa);
    for (const std::uint32_t word : sample_words()) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(kernels.gumbel(word)), std::bit_cast<std::uint32_t>(portable.gumbel(word)))
          << cpu::isa_name(isa) << " " << word;
    }
    for (int i = 0; i < 20000; ++i) {
      const float difference = std::uniform_real_distribution<float>(-32.0F, 0.0F)(random);
      ASSERT_EQ(kernels.weight(difference), portable.weight(difference)) << cpu::isa_name(isa) << " " << difference;
    }
  }
}

TEST(Gumbel, HasTheMomentsOfItsDistribution) {
  constexpr int kDraws = 400000;
  constexpr double kVariance = 1.6449340668482264;  // pi^2 / 6
  double sum = 0;
  double squares = 0;
  double token_products = 0;
  double position_products = 0;
  double seed_products = 0;
  for (int i = 0; i < kDraws; ++i) {
    const std::int64_t position = i / 1000;
    const TokenId token = i % 1000;
    const double g = gumbel_noise(42, position, token) - 0.5772156649015329;
    sum += g;
    squares += g * g;
    token_products += g * (gumbel_noise(42, position, token + 1) - 0.5772156649015329);
    position_products += g * (gumbel_noise(42, position + 1, token) - 0.5772156649015329);
    seed_products += g * (gumbel_noise(43, position, token) - 0.5772156649015329);
  }
  const double deviation = 1.0 / std::sqrt(static_cast<double>(kDraws));
  EXPECT_NEAR(sum / kDraws, 0.0, 5 * deviation * std::sqrt(kVariance));
  // The fourth central moment is 5.4 squared variances.
  EXPECT_NEAR(squares / kDraws, kVariance, 5 * deviation * kVariance * std::sqrt(4.4));
  EXPECT_NEAR(token_products / kDraws, 0.0, 5 * deviation * kVariance);
  EXPECT_NEAR(position_products / kDraws, 0.0, 5 * deviation * kVariance);
  EXPECT_NEAR(seed_products / kDraws, 0.0, 5 * deviation * kVariance);
}

TEST(Weight, IsTheExponentialInUnitsOfTwoToTheMinusForty) {
  const cpu::SamplerKernels& kernels = cpu::sampler_kernels(cpu::Isa::portable);
  EXPECT_EQ(kernels.weight(0.0F), std::uint64_t{1} << cpu::kWeightFractionBits);
  EXPECT_EQ(kernels.weight(-28.5F), 0U);
  EXPECT_EQ(kernels.weight(-1e30F), 0U);
  EXPECT_EQ(kernels.weight(-INFINITY), 0U);
  EXPECT_EQ(kernels.weight(NAN), 0U);
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    const float difference = std::uniform_real_distribution<float>(-29.0F, 0.0F)(random);
    const double exact = std::exp(static_cast<double>(difference)) * 0x1p40;
    ASSERT_NEAR(static_cast<double>(kernels.weight(difference)), exact, 0.51 + 2.5e-7 * exact) << difference;
  }
}

}  // namespace
}  // namespace draftwerk
