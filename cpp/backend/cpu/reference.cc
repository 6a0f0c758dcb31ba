#include "backend/cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>

namespace draftwerk::cpu::reference {

std::vector<double> rms_norm(std::span<const float> x, std::span<const float> scale, double epsilon) {
  double squares = 0;
  for (const float v : x) squares += double{v} * v;
  const double rms = std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
  std::vector<double> y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] / rms * scale[i];
  return y;
}

double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}

std::vector<double> rotate(std::span<const double> x, std::int64_t position, std::span<const float> inverse_frequency) {
  const std::size_t half = x.size() / 2;
  std::vector<double> y(x.size());
  for (std::size_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * inverse_frequency[i];
    const double c = std::cos(double{angle});
    const double s = std::sin(double{angle});
    y[i] = x[i] * c - x[half + i] * s;
    y[half + i] = x[half + i] * c + x[i] * s;
  }
  return y;
}

std::vector<double> attention(std::span<const double> query, const std::vector<std::vector<double>>& keys,
                              const std::vector<std::vector<double>>& values, double scale) {
  std::vector<double> weights(keys.size());
  double largest = -HUGE_VAL;
  for (std::size_t p = 0; p < keys.size(); ++p) {
    for (std::size_t d = 0; d < query.size(); ++d) weights[p] += query[d] * keys[p][d];
    weights[p] *= scale;
    largest = std::max(largest, weights[p]);
  }
  double sum = 0;
  for (double& weight : weights) {
    weight = std::exp(weight - largest);
    sum += weight;
  }
  std::vector<double> output(query.size());
  for (std::size_t p = 0; p < keys.size(); ++p) {
    for (std::size_t d = 0; d < query.size(); ++d) output[d] += weights[p] / sum * values[p][d];
  }
  return output;
}

}  // namespace draftwerk::cpu::reference
