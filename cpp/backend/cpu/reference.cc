#include "backend/cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <numeric>

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

std::vector<double> mix(std::span<const float> x, std::span<const float> scale, double epsilon,
                        std::span<const float> added, double added_factor, double factor) {
  std::vector<double> y = rms_norm(x, scale, epsilon);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = factor * (y[i] + added_factor * added[i]);
  return y;
}

std::vector<double> multiply(std::span<const float> w, std::span<const double> x) {
  std::vector<double> y(w.size() / x.size());
  for (std::size_t n = 0; n < y.size(); ++n) {
    for (std::size_t k = 0; k < x.size(); ++k) y[n] += double{w[n * x.size() + k]} * x[k];
  }
  return y;
}

std::vector<int> largest(std::span<const double> scores, int k) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [scores](int a, int b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<std::pair<int, double>> route(std::span<const double> scores, std::span<const float> expert_scale,
                                          int chosen) {
  const double top = *std::max_element(scores.begin(), scores.end());
  std::vector<double> probability(scores.begin(), scores.end());
  for (double& p : probability) p = std::exp(p - top);
  const double all = std::accumulate(probability.begin(), probability.end(), 0.0);
  for (double& p : probability) p /= all;
  std::vector<std::pair<int, double>> experts;
  double sum = 0;
  for (const int e : largest(scores, chosen)) {
    experts.emplace_back(e, probability[static_cast<std::size_t>(e)]);
    sum += experts.back().second;
  }
  for (auto& [e, weight] : experts) weight = weight / sum * expert_scale[static_cast<std::size_t>(e)];
  return experts;
}

std::vector<double> expert_output(std::span<const float> gate_up, std::span<const float> down, int expert, int mlp,
                                  std::span<const double> x) {
  const std::size_t matrix = static_cast<std::size_t>(mlp) * x.size();
  const auto e = static_cast<std::size_t>(expert);
  const std::vector<double> gate = multiply(gate_up.subspan(2 * e * matrix, matrix), x);
  std::vector<double> h = multiply(gate_up.subspan((2 * e + 1) * matrix, matrix), x);
  for (std::size_t i = 0; i < h.size(); ++i) h[i] *= gelu_tanh(gate[i]);
  return multiply(down.subspan(e * matrix, matrix), h);
}

std::vector<double> sparse_logits(std::span<const float> centroids, std::span<const float> head,
                                  std::span<const std::int32_t> tokens, int chosen, double softcap, int vocabulary,
                                  std::span<const double> state) {
  const std::vector<double> all = multiply(head, state);
  const std::vector<double> scores = centroids.empty() ? std::vector<double>(1) : multiply(centroids, state);
  const std::size_t size = tokens.size() / scores.size();
  std::vector<double> logits(static_cast<std::size_t>(vocabulary), -std::numeric_limits<double>::infinity());
  for (const int cluster : largest(scores, centroids.empty() ? 1 : chosen)) {
    for (std::size_t i = 0; i < size; ++i) {
      const std::size_t row = static_cast<std::size_t>(cluster) * size + i;
      const double logit = softcap == 0 ? all[row] : softcap * std::tanh(all[row] / softcap);
      logits[static_cast<std::size_t>(tokens[row])] = logit;
    }
  }
  return logits;
}

}  // namespace draftwerk::cpu::reference
