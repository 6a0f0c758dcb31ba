#include "backend/cpu/top_k.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backend/cpu/reference.h"

namespace draftwerk::cpu {
namespace {

TEST(TopK, IsTheHeadOfASort) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 600; ++round) {
    const int count = 1 + static_cast<int>(random() % 300U);
    const int k = 1 + static_cast<int>(random() % static_cast<unsigned>(count));
    std::vector<float> scores(static_cast<std::size_t>(count));
    for (float& score : scores) {
      score = normal(random);
      if (round % 3 == 1) score = std::round(score);  // ties
      if (round % 3 == 2 && random() % 8 == 0) score = -std::numeric_limits<float>::infinity();
    }
    const std::vector<double> wide(scores.begin(), scores.end());
    const std::vector<int> want = reference::largest(wide, k);
    if (round % 3 == 2) {  // NaN is as good as minus infinity
      for (float& score : scores) {
        if (std::isinf(score) && random() % 2 == 0) score = std::numeric_limits<float>::quiet_NaN();
      }
    }
    std::vector<std::int32_t> got(static_cast<std::size_t>(k) + 1, -7);
    choose_largest(scores.data(), count, k, got.data());
    EXPECT_EQ(got.back(), -7);
    got.pop_back();
    ASSERT_EQ(got, std::vector<std::int32_t>(want.begin(), want.end())) << round;
  }
}

}  // namespace
}  // namespace draftwerk::cpu
