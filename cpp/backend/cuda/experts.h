// Mixture of experts on the device (Backend::experts). Rows are sorted by expert there, so that a step reads the
// weights of every chosen expert once and its launches do not depend on what was chosen.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

class ExpertMixture {
 public:
  explicit ExpertMixture(const ProductDevice& device);

  /// Makes room for steps of up to `max_rows` rows, beside what there is room for already. Scratch of earlier launches
  /// moves: none may be under way, or launched again.
  void reserve(int max_rows, int chosen, const Experts& experts);

  /// See Backend::experts. Weights are DeviceWeights; all that the router points to is readable by the device. The
  /// scores are products of float32 rows, which are not rounded, with the router's weights. Rows of padding
  /// (StepView::row_segment) go to no expert and become zero.
  void run(LaunchList& launches, const StepView& step, Tensor input, const Router& router, const Norm& norm,
           const Experts& experts, Tensor output);

 private:
  void score(LaunchList& launches, int rows, Tensor input, const Router& router);
  void choose(LaunchList& launches, const StepView& step, const Router& router, int experts);
  /// Fills in the tiles, of which there are at most the number that it returns.
  int sort(LaunchList& launches, int rows, int chosen, int experts, int tile_rows);

  ProductDevice device_;
  std::int64_t max_rows_ = 0;
  std::int64_t max_pairs_ = 0;  ///< of a row and an expert that it goes to
  std::int64_t max_slots_ = 0;  ///< places for pairs in tiles of one expert
  int max_experts_ = 0;
  int max_hidden_ = 0;
  int max_mlp_ = 0;
  GrowingMemory scores_;    ///< [rows, experts]
  GrowingMemory ids_;       ///< [rows, chosen], ascending; -1: a row of padding
  GrowingMemory weights_;   ///< [rows, chosen]
  GrowingMemory tiles_;     ///< ExpertTile
  GrowingMemory slots_;     ///< [tiles, rows of a tile]: index of a pair
  GrowingMemory operands_;  ///< of rows [rows, hidden], then of pairs [pairs, mlp]
  GrowingMemory gated_;     ///< [pairs, mlp]
  GrowingMemory outputs_;   ///< [pairs, hidden]
};

}  // namespace draftwerk::cuda
