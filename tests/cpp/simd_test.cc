// simd.h's lanes against libm in double precision. Compiled for the instruction set of this file (the portable one);
// the others differ in fma and in the half conversions, which the layer kernel tests cover for every instruction set.
#define DRAFTWERK_ISA portable
#include "backend/cpu/simd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"

namespace draftwerk::cpu::portable {
namespace {

/// The largest error of `f` over [low, high], in units of the last place of the exact result.
double worst_ulp(const std::function<f32x16(f32x16)>& f, const std::function<double(double)>& exact, float low,
                 float high) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> draw(low, high);
  double worst = 0;
  for (int round = 0; round < 20000; ++round) {
    float x[kLanes];
    float y[kLanes];
    for (float& v : x) v = draw(random);
    store(y, f(load(x)));
    for (int i = 0; i < kLanes; ++i) {
      const double want = exact(double{x[i]});
      const double ulp = std::max(std::ldexp(1.0, std::ilogb(want) - 23), 0x1p-149);
      worst = std::max(worst, std::abs(double{y[i]} - want) / ulp);
    }
  }
  return worst;
}

TEST(Simd, Exp) {
  EXPECT_LT(worst_ulp([](f32x16 x) { return exp(x); }, [](double x) { return std::exp(x); }, -87.0F, 88.0F), 2.0);
  EXPECT_EQ(exp(splat(-std::numeric_limits<float>::infinity()))[3], 0.0F);
  EXPECT_EQ(exp(splat(0.0F))[5], 1.0F);
  EXPECT_TRUE(std::isfinite(exp(splat(1000.0F))[0]));
}

TEST(Simd, Log) {
  EXPECT_LT(worst_ulp([](f32x16 x) { return log(x); }, [](double x) { return std::log(x); }, 1.5F, 1e6F), 2.0);
  EXPECT_LT(worst_ulp([](f32x16 x) { return log(x); }, [](double x) { return std::log(x); }, 1e-30F, 0.7F), 2.0);
  EXPECT_EQ(log(splat(1.0F))[0], 0.0F);
}

TEST(Simd, Tanh) {
  // 1 - e^-2|x| cancels near 0: the error is bounded in absolute terms (a few 2^-24), which is what GELU and the soft
  // cap need, since both add tanh to 1 or multiply it by the cap.
  std::mt19937 random(3);
  std::uniform_real_distribution<float> draw(-10, 10);
  for (int round = 0; round < 20000; ++round) {
    const float x = draw(random);
    EXPECT_NEAR(tanh(splat(x))[0], std::tanh(double{x}), 3e-7);
  }
  EXPECT_EQ(tanh(splat(100.0F))[0], 1.0F);
  EXPECT_EQ(tanh(splat(-100.0F))[0], -1.0F);
}

TEST(Simd, NanComesThrough) {
  const f32x16 nan = splat(std::numeric_limits<float>::quiet_NaN());
  for (const f32x16 y : {exp(nan), tanh(nan), tanh(-nan), gelu_tanh(nan)}) EXPECT_TRUE(std::isnan(y[0]));
}

TEST(Simd, Gelu) {
  std::mt19937 random(4);
  std::uniform_real_distribution<float> draw(-12, 12);
  for (int round = 0; round < 20000; ++round) {
    const float x = draw(random);
    EXPECT_NEAR(gelu_tanh(splat(x))[0], reference::gelu_tanh(double{x}), 4e-7 * (1 + std::abs(x)));
  }
}

TEST(Simd, RoundIsToNearestEven) {
  for (const float x : {0.5F, 1.5F, 2.5F, -0.5F, -1.5F, 126.5F, 3.49999F, -7.50001F}) {
    EXPECT_EQ(register_round(register_splat(x))[0], std::nearbyint(x)) << x;
  }
}

TEST(Simd, SplatKeepsEveryBit) {
  EXPECT_TRUE(std::signbit(splat(-0.0F)[2]));
  EXPECT_EQ(splat(1e-45F)[15], 1e-45F);
  EXPECT_TRUE(std::isnan(splat(std::numeric_limits<float>::quiet_NaN())[0]));
}

TEST(Simd, Reductions) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> draw(-1, 1);
  for (int round = 0; round < 1000; ++round) {
    float x[kLanes];
    double sum = 0;
    float largest = -2;
    for (float& v : x) {
      v = draw(random);
      sum += v;
      largest = std::max(largest, v);
    }
    EXPECT_NEAR(reduce_add(load(x)), sum, 2e-6);
    EXPECT_EQ(reduce_max(load(x)), largest);
  }
}

TEST(Simd, PartialLoadsAndStoresTouchNothingElse) {
  for (int count = 0; count <= kLanes; ++count) {
    float from[kLanes];
    float to[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      from[i] = static_cast<float>(i + 1);
      to[i] = -1;
    }
    const f32x16 v = load_partial(from, count);
    store_partial(to, v, count);
    for (int i = 0; i < kLanes; ++i) {
      EXPECT_EQ(v[i], i < count ? from[i] : 0.0F);
      EXPECT_EQ(to[i], i < count ? from[i] : -1.0F);
    }
  }
}

TEST(Simd, EveryHalfWidensExactlyAndComesBack) {
  for (std::uint32_t first = 0; first < 0x10000; first += kLanes) {
    std::uint16_t bits[kLanes];
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<std::uint16_t>(first + static_cast<std::uint32_t>(i));
    float wide[kLanes];
    store(wide, load_half(bits));
    std::uint16_t back[kLanes];
    store_half(back, load(wide));
    for (int i = 0; i < kLanes; ++i) {
      const float want = half_to_float(bits[i]);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(wide[i]));
        EXPECT_TRUE(std::isnan(half_to_float(back[i])));
        continue;
      }
      EXPECT_EQ(wide[i], want) << bits[i];
      EXPECT_EQ(std::signbit(wide[i]), std::signbit(want));
      const std::uint16_t expected = std::isinf(want) ? (want > 0 ? 0x7BFF : 0xFBFF) : bits[i];
      EXPECT_EQ(back[i], expected);
    }
  }
}

TEST(Simd, StoreHalfRoundsToNearestEvenAndSaturates) {
  std::mt19937 random(6);
  for (int round = 0; round < 40000; ++round) {
    float x[kLanes];
    for (float& v : x) {
      // Exponents around half's range, ties between two halves included.
      std::uint32_t bits = static_cast<std::uint32_t>(random());
      bits = (bits & 0x807FFFFFU) | ((96 + bits % 50) << 23);
      if (round % 2 == 0) bits &= 0xFFFFF000U;
      std::memcpy(&v, &bits, 4);
    }
    std::uint16_t got[kLanes];
    store_half(got, load(x));
    for (int i = 0; i < kLanes; ++i) {
      const float bounded = std::clamp(x[i], -65504.0F, 65504.0F);
      ASSERT_EQ(got[i], float_to_half(bounded)) << x[i];
    }
  }
}

TEST(Simd, BfloatWidens) {
  std::uint16_t bits[kLanes];
  for (std::uint32_t first = 0; first < 0x7F80; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<std::uint16_t>(first + static_cast<std::uint32_t>(i));
    const f32x16 wide = load_bfloat(bits);
    for (int i = 0; i < kLanes; ++i) ASSERT_EQ(wide[i], bfloat_to_float(bits[i]));
  }
}

}  // namespace
}  // namespace draftwerk::cpu::portable
