// What the tests of the CPU backend share: matrices with their plain values, steps, and comparisons.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/reference.h"
#include "random_blocks.h"
#include "strided_rows.h"

namespace draftwerk {

inline std::unique_ptr<Weight> upload(Backend& backend, WeightType type, std::int64_t rows, std::int64_t columns,
                                      const std::vector<std::byte>& blocks) {
  std::unique_ptr<Weight> weight = backend.create_weight(type, rows, columns);
  // In two parts, as a loader does.
  const std::int64_t first = rows > 16 ? rows / 32 * 16 : 0;
  const std::size_t row_bytes = blocks.size() / static_cast<std::size_t>(rows);
  if (first > 0) backend.upload_rows(*weight, 0, first, type, blocks.data());
  backend.upload_rows(*weight, first, rows - first, type, blocks.data() + static_cast<std::size_t>(first) * row_bytes);
  return weight;
}

struct Matrix {
  Matrix(Backend& backend, WeightType type, std::int64_t rows, std::int64_t columns, std::mt19937& random)
      : rows(rows), columns(columns) {
    const std::vector<std::byte> stored = cpu::random_rows(type, rows, columns, random);
    values = cpu::values_of_rows(type, rows, columns, stored);
    if (type == WeightType::f8_e4m3) {
      for (float& value : values) value = cpu::bfloat_to_float(cpu::float_to_bfloat(value));
    }
    weight = upload(backend, type, rows, columns, stored);
  }
  [[nodiscard]] std::vector<double> times(const std::vector<double>& x) const {
    return cpu::reference::multiply(values, x);
  }
  std::int64_t rows;
  std::int64_t columns;
  std::vector<float> values;
  std::unique_ptr<Weight> weight;
};

/// A step of plain rows: one segment from position 0.
struct PlainStep {
  explicit PlainStep(int rows, int vocabulary) {
    for (int r = 0; r < rows; ++r) {
      tokens.push_back((r * 37 + 5) % vocabulary);
      positions.push_back(r);
      if (r % 2 == 0) outputs.push_back(r);
    }
    segments.push_back({0, rows, 0, {nullptr, nullptr}});
  }
  [[nodiscard]] StepRows rows() const { return {tokens, positions, segments, outputs}; }
  std::vector<TokenId> tokens;
  std::vector<std::int64_t> positions;
  std::vector<Segment> segments;
  std::vector<int> outputs;
};

/// One way to run the same rows: on so many threads, in this order, so far apart.
struct Arrangement {
  int threads;
  std::vector<int> order;
  int gap;
};

/// `rows` rows alone, together, backwards, twice over, strided, and on several threads.
inline std::vector<Arrangement> arrangements(int rows) {
  std::vector<int> all(static_cast<std::size_t>(rows));
  std::iota(all.begin(), all.end(), 0);
  const std::vector<int> backwards(all.rbegin(), all.rend());
  std::vector<int> twice = backwards;
  twice.insert(twice.end(), all.begin(), all.end());
  std::vector<Arrangement> ways = {{1, all, 0}, {1, backwards, 16}, {2, all, 3}, {2, twice, 0}, {5, backwards, 0}};
  for (const int r : {0, rows / 2, rows - 1}) ways.push_back({r % 2 + 1, {r}, 7});
  return ways;
}

/// |got - want| relative to the largest |want|: int8 activations are off by up to 1/254 of their block's largest, which
/// is some 3% of a sum that cancels.
inline void expect_close(const float* got, const std::vector<double>& want, double tolerance) {
  double largest = 1e-6;
  for (const double w : want) largest = std::max(largest, std::abs(w));
  for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], tolerance * largest) << i;
}

}  // namespace draftwerk
