// The backend's operations around products of a step's rows with weights: each multiplies its input, rounded to
// bfloat16, with everything that it meets in one launch for each format of weights.
//
// What is rounded, mostly, is what the launch before has just computed, and then that launch leaves it so
// (OperandSink): the products of project_geglu and project_gelu, attention, and sums of project_add, whose norm for the
// next product is computed with them. For that a sum is not recorded before it is known what comes next.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/memory.h"

namespace draftwerk::cuda {

/// Weights are DeviceWeights; tensors are float32 in device memory, of `rows` rows.
class Projections {
 public:
  explicit Projections(const ProductDevice& device) : device_(device) { allow_products(device); }

  /// See Backend::reserve. Scratch of earlier launches moves: none may be under way, or launched again.
  void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary);

  /// A step begins: as it is the same launches as an earlier one, it uses the same scratch. Nothing is left of the last
  /// one that was not recorded.
  void begin();

  /// outputs[i] = W_i * (norm ? norm(input) : input)
  void project(LaunchList& launches, int rows, Tensor input, const Norm* norm, std::span<const Projection> outputs);
  /// output = gelu_tanh(gate * norm(input)) * (up * norm(input)), elementwise product
  void project_geglu(LaunchList& launches, int rows, Tensor input, const Norm& norm, const Weight& gate,
                     const Weight& up, Tensor output);
  /// output = gelu_tanh(W * input) * factor, elementwise product; `factor` may be `output`.
  void project_gelu(LaunchList& launches, int rows, Tensor input, const Weight& weight, Tensor factor, Tensor output);
  /// residual = (residual + norm(W * input)) * scale
  void project_add(LaunchList& launches, int rows, Tensor input, const Weight& weight, const Norm& norm,
                   Tensor residual, float scale);
  /// softcap * tanh(W * states / softcap), or W * states when softcap is 0, for `outputs` states, to logits().
  void head(LaunchList& launches, int outputs, Tensor states, const Weight& weight, float softcap);

  /// The same to any tensor.
  void scores(LaunchList& launches, int rows, Tensor states, const Weight& weight, float softcap, Tensor output);
  /// The rows as operands of products, until the next call of any of these.
  OperandView round(LaunchList& launches, int rows, Tensor input);

  /// Records the sum that the last project_add() left to its successor: before anything that is not of this class.
  void settle(LaunchList& launches);
  /// Where the next launch may leave `output` as operands.
  [[nodiscard]] OperandSink sink(Tensor output) const;
  /// Says that it was recorded, and does so if there was a place.
  void left(const LaunchList& launches, Tensor output);

  /// What the last head() computed: [outputs, vocabulary] float32.
  [[nodiscard]] Tensor logits() const;

 private:
  struct Output;
  struct Sum {
    int rows;
    Tensor product;
    Norm norm;
    Tensor residual;
    float scale;
  };
  /// What has been left as the next operands, while nothing else has been recorded.
  struct LeftOperands {
    const void* data = nullptr;
    int columns = 0;
    std::size_t recorded = 0;
  };
  void operands(LaunchList& launches, int rows, Tensor input, const Norm* norm);
  [[nodiscard]] OperandView read_operands(int columns) const;
  [[nodiscard]] OperandSink sink_of(std::size_t turn, int columns) const;
  void multiply(LaunchList& launches, int rows, std::span<const Output> outputs, float softcap = 0.0F);

  ProductDevice device_;
  int max_rows_ = 0;
  int max_outputs_ = 0;
  int max_columns_ = 0;
  int vocabulary_ = 0;
  std::array<GrowingMemory, 2> operands_;  ///< of matmul.h: of the last product, and those that it leaves
  std::size_t turn_ = 0;
  std::optional<Sum> sum_;  ///< to be recorded
  LeftOperands left_operands_;
  GrowingMemory partials_;
  GrowingMemory counters_;
  GrowingMemory product_;  ///< [rows, columns]
  GrowingMemory logits_;   ///< [outputs, logit_stride_]
  int logit_stride_ = 0;
};

}  // namespace draftwerk::cuda
