// Mixture of experts on the CPU. The rows of a step are grouped by expert, so that the weights of every chosen expert
// are read once per step, and work is divided over (expert, panel).
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/activations.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

/// Takes the softmax of scores[0 .. count), whose maximum cancels, over the `chosen` largest (ties: lower index first),
/// and multiplies it by expert_scale: ids ascending, with their weights.
void route(const float* scores, int count, int chosen, const float* expert_scale, std::int32_t* ids, float* weights);

class ExpertMixture {
 public:
  /// `matmul`, `layer` and `pool` must outlive the object.
  ExpertMixture(const MatmulKernels& matmul, const LayerKernels& layer, WorkerPool& pool);

  /// Makes room for steps of up to `max_rows` rows, beside what there is room for already.
  void reserve(int max_rows, int chosen, int hidden, const Experts& experts);

  /// See Backend::experts.
  void run(Tensor input, int rows, const Router& router, const Norm& norm, const Experts& experts, Tensor output);

 private:
  /// Rows of one expert: slots [first, first + count).
  struct Group {
    int expert = 0;
    int first = 0;
    int count = 0;
  };

  void choose(Tensor input, int rows, const Router& router);
  void assign_slots(int rows, int chosen, int experts);
  template <typename Body>
  void for_each_group(std::int64_t units, std::int64_t grain, Body&& body);

  const MatmulKernels& matmul_;
  const LayerKernels& layer_;
  WorkerPool& pool_;

  std::int64_t max_rows_ = 0;
  std::int64_t max_slots_ = 0;  ///< (row, expert) pairs of a step
  std::int64_t max_experts_ = 0;
  std::int64_t max_hidden_ = 0;
  std::int64_t max_mlp_ = 0;
  ScratchArray<float> scores_;        ///< [rows, experts]
  ScratchArray<std::int32_t> ids_;    ///< [rows, chosen], ascending
  ScratchArray<float> weights_;       ///< [rows, chosen]
  ScratchArray<std::int32_t> slots_;  ///< [rows, chosen]
  std::vector<Group> groups_;         ///< of the experts that got rows, ascending
  std::vector<int> first_slot_;       ///< [experts]
  ActivationScratch inputs_;          ///< [slots, hidden]
  ScratchArray<float> gates_;         ///< [slots, mlp]
  ActivationScratch gated_;           ///< [slots, mlp]
  ScratchArray<float> outputs_;       ///< [slots, hidden]
};

}  // namespace draftwerk::cpu
