// The backend's operations around products of a step's rows with weights: each rounds its input to bfloat16 once, and
// then multiplies it with everything that it meets in one launch for each format of weights.
#pragma once

#include <cstddef>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/memory.h"

namespace draftwerk::cuda {

/// Weights are DeviceWeights; tensors are float32 in device memory, of `rows` rows.
class Projections {
 public:
  /// `shared_bytes`: what a block of the device may ask for (cudaDeviceProp::sharedMemPerBlockOptin).
  explicit Projections(std::size_t shared_bytes) : shared_bytes_(shared_bytes) { allow_products(shared_bytes); }

  /// See Backend::reserve. Scratch of earlier launches moves: none may be under way, or launched again.
  void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary);

  /// outputs[i] = W_i * (norm ? norm(input) : input)
  void project(LaunchList& launches, int rows, Tensor input, const Norm* norm, std::span<const Projection> outputs);
  /// output = gelu_tanh(gate * norm(input)) * (up * norm(input)), elementwise product
  void project_geglu(LaunchList& launches, int rows, Tensor input, const Norm& norm, const Weight& gate,
                     const Weight& up, Tensor output);
  /// output = gelu_tanh(W * input) * factor, elementwise product; `factor` may be `output`.
  void project_gelu(LaunchList& launches, int rows, Tensor input, const Weight& weight, Tensor factor, Tensor output);
  /// W * input, in scratch that keeps it until the next product().
  Tensor product(LaunchList& launches, int rows, Tensor input, const Weight& weight);
  /// softcap * tanh(W * states / softcap), or W * states when softcap is 0, for `outputs` states, to logits().
  void head(LaunchList& launches, int outputs, Tensor states, const Weight& weight, float softcap);

  /// The same to any tensor.
  void scores(LaunchList& launches, int rows, Tensor states, const Weight& weight, float softcap, Tensor output);
  /// The rows as operands of products, until the next call of any of these.
  OperandView round(LaunchList& launches, int rows, Tensor input);

  /// What the last head() computed: [outputs, vocabulary] float32.
  [[nodiscard]] Tensor logits() const;

 private:
  struct Output;
  void operands(LaunchList& launches, int rows, Tensor input, const Norm* norm);
  void multiply(LaunchList& launches, int rows, std::span<const Output> outputs, float softcap = 0.0F);

  std::size_t shared_bytes_;
  int max_rows_ = 0;
  int max_outputs_ = 0;
  int max_columns_ = 0;
  int vocabulary_ = 0;
  GrowingMemory operands_;  ///< of matmul.h
  GrowingMemory partials_;
  GrowingMemory counters_;
  GrowingMemory product_;  ///< [rows, columns]
  GrowingMemory logits_;   ///< [outputs, logit_stride_]
  int logit_stride_ = 0;
};

}  // namespace draftwerk::cuda
