// What the layer kernels mean: the plain form of each, in double precision. They are the specification that the fast
// kernels are tested against.
#pragma once

#include <cstdint>
#include <span>
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

}  // namespace draftwerk::cpu::reference
