// Rows of tensors as operations get them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <vector>

#include "backend/backend.h"

namespace draftwerk {

/// Rows of float32 that lie further apart than they are wide, with a value between them that nobody may touch.
struct Rows {
  Rows(int rows, int columns, int gap = 0) : columns(columns), stride(columns + gap) {
    values.assign(static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride), kUntouched);
  }
  /// The rows of `source` [rows, columns] in the order of `order`.
  Rows(const std::vector<float>& source, int columns, const std::vector<int>& order, int gap = 0)
      : Rows(static_cast<int>(order.size()), columns, gap) {
    for (std::size_t r = 0; r < order.size(); ++r) {
      std::copy_n(source.data() + std::ptrdiff_t{order[r]} * columns, columns, row(static_cast<int>(r)));
    }
  }
  /// Normally distributed values.
  Rows(int rows, int columns, int gap, std::mt19937& random) : Rows(rows, columns, gap) {
    std::normal_distribution<float> normal;
    for (int r = 0; r < rows; ++r) std::generate_n(row(r), columns, [&] { return normal(random); });
  }
  [[nodiscard]] Tensor tensor() { return {values.data(), columns, stride == columns ? 0 : stride}; }
  [[nodiscard]] float* row(int r) { return values.data() + std::ptrdiff_t{r} * stride; }
  [[nodiscard]] std::vector<float> copy(int r) { return {row(r), row(r) + columns}; }
  void expect_gaps_untouched() const {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (static_cast<int>(i) % stride < columns) continue;
      ASSERT_EQ(values[i], kUntouched) << i;
    }
  }
  static constexpr float kUntouched = -77;
  int columns;
  int stride;
  std::vector<float> values;
};

}  // namespace draftwerk
