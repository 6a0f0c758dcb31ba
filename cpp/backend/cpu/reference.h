// What the operations mean: the plain form of each, in double precision. They are the specification that the fast
// kernels are tested against.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace draftwerk::cpu::reference {

/// x[i] / sqrt(mean(x^2) + epsilon) * scale[i]
std::vector<double> rms_norm(std::span<const float> x, std::span<const float> scale, double epsilon);

/// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
double gelu_tanh(double x);

/// Rotates the pairs (i, i + n / 2) by position * inverse_frequency[i]; the product is taken in float32, which is how
/// the checkpoints were trained.
std::vector<double> rotate(std::span<const double> x, std::int64_t position, std::span<const float> inverse_frequency);

/// softmax(scale * q . K) V for one query over keys and values [positions, head_dim], all of which it sees.
std::vector<double> attention(std::span<const double> query, const std::vector<std::vector<double>>& keys,
                              const std::vector<std::vector<double>>& values, double scale);

/// factor * (rms_norm(x) + added_factor * added)
std::vector<double> mix(std::span<const float> x, std::span<const float> scale, double epsilon,
                        std::span<const float> added, double added_factor, double factor);

/// W x, for W [rows, x.size()].
std::vector<double> multiply(std::span<const float> w, std::span<const double> x);

/// The indices of the k largest scores, ascending; of equal ones the lower index is taken first.
std::vector<int> largest(std::span<const double> scores, int k);

/// Experts of a row, ascending, with their weights: the softmax of all scores, of which the `chosen` largest are
/// divided by their sum and multiplied by expert_scale.
std::vector<std::pair<int, double>> route(std::span<const double> scores, std::span<const float> expert_scale,
                                          int chosen);

/// Expert `expert` of x: down (gelu_tanh(gate x) * (up x)), its matrices out of gate_up [experts * 2 * mlp, hidden] and
/// down [experts * hidden, mlp].
std::vector<double> expert_output(std::span<const float> gate_up, std::span<const float> down, int expert, int mlp,
                                  std::span<const double> x);

/// Logits of a vocabulary by a sparse head (Backend::head): row i of head [tokens.size(), state.size()] is that of
/// tokens[i]; all others are minus infinity. With centroids, only those of the `chosen` clusters of the largest scores.
std::vector<double> sparse_logits(std::span<const float> centroids, std::span<const float> head,
                                  std::span<const std::int32_t> tokens, int chosen, double softcap, int vocabulary,
                                  std::span<const double> state);

}  // namespace draftwerk::cpu::reference
