#include "backend/cpu/experts.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/operands.h"
#include "backend/cpu/pieces.h"
#include "backend/cpu/top_k.h"

namespace draftwerk::cpu {
namespace {

// Outputs of gate and up that are computed together: a whole block of what `down` reads quantised.
constexpr int kUnit = kBlock;

}  // namespace

void route(const float* scores, int count, int chosen, const float* expert_scale, std::int32_t* ids, float* weights) {
  choose_largest(scores, count, chosen, ids);
  float largest = scores[ids[0]];
  for (int i = 1; i < chosen; ++i) largest = std::max(largest, scores[ids[i]]);
  float sum = 0;
  for (int i = 0; i < chosen; ++i) {
    weights[i] = std::exp(scores[ids[i]] - largest);
    sum += weights[i];
  }
  for (int i = 0; i < chosen; ++i) weights[i] = weights[i] / sum * expert_scale[ids[i]];
}

ExpertMixture::ExpertMixture(const MatmulKernels& matmul, const LayerKernels& layer, WorkerPool& pool)
    : matmul_(matmul), layer_(layer), pool_(pool) {}

void ExpertMixture::reserve(int max_rows, int chosen, int hidden, const Experts& experts) {
  max_rows_ = std::max<std::int64_t>(max_rows_, max_rows);
  max_slots_ = std::max(max_slots_, std::int64_t{max_rows} * chosen);
  max_experts_ = std::max<std::int64_t>(max_experts_, experts.count);
  max_hidden_ = std::max<std::int64_t>(max_hidden_, hidden);
  max_mlp_ = std::max<std::int64_t>(max_mlp_, experts.mlp);
  scores_.resize(max_rows_ * max_experts_);
  ids_.resize(max_slots_);
  weights_.resize(max_slots_);
  slots_.resize(max_slots_);
  groups_.reserve(static_cast<std::size_t>(max_experts_));
  first_slot_.resize(static_cast<std::size_t>(max_experts_));
  inputs_.resize(std::max(max_slots_, max_rows_), max_hidden_);
  gates_.resize(max_slots_ * max_mlp_);
  gated_.resize(max_slots_, max_mlp_);
  outputs_.resize(max_slots_ * max_hidden_);
}

/// The experts of every row, with their weights.
void ExpertMixture::choose(Tensor input, int rows, const Router& router) {
  const PackedMatrix& matrix = packed(*router.weight);
  const int hidden = input.columns;
  const int experts = static_cast<int>(matrix.rows);
  const bool quantized = takes_quantized(matrix.type);
  pool_.parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      float* x = inputs_.values(r, hidden);
      layer_.rms_norm(row_of(input, r), router.norm.scale, router.norm.epsilon, hidden, x);
      if (quantized) inputs_.quantize(matmul_, r, hidden, 0, hidden, x);
    }
  });
  const Activations x = inputs_.view(hidden, quantized, !quantized);
  pool_.parallel_for(panel_count(experts), 1, [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(matrix, begin, end, x, rows, scores_.data(), experts);
  });
  constexpr std::int64_t kRowsPerPiece = 4;  // a row takes a microsecond or less
  pool_.parallel_for(rows, kRowsPerPiece, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      route(scores_.data() + r * experts, experts, router.chosen, router.expert_scale, ids_.data() + r * router.chosen,
            weights_.data() + r * router.chosen);
    }
  });
}

/// Sorts the pairs of row and expert by expert, then row.
void ExpertMixture::assign_slots(int rows, int chosen, int experts) {
  const std::int64_t pairs = std::int64_t{rows} * chosen;
  std::fill_n(first_slot_.begin(), experts, 0);
  for (std::int64_t i = 0; i < pairs; ++i) ++first_slot_[static_cast<std::size_t>(ids_[i])];
  groups_.clear();
  int slot = 0;
  for (int e = 0; e < experts; ++e) {
    int& first = first_slot_[static_cast<std::size_t>(e)];
    const int count = first;
    first = slot;
    if (count > 0) groups_.push_back({e, slot, count});
    slot += count;
  }
  for (std::int64_t i = 0; i < pairs; ++i) slots_[i] = first_slot_[static_cast<std::size_t>(ids_[i])]++;
}

/// body(group, begin, end) for pieces of the `units` of work of every group.
template <typename Body>
void ExpertMixture::for_each_group(std::int64_t units, std::int64_t grain, Body&& body) {
  const auto groups = static_cast<std::int64_t>(groups_.size());
  pool_.parallel_for(groups * units, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t at = begin; at < end;) {
      const std::int64_t group = at / units;
      const std::int64_t stop = std::min(end, (group + 1) * units);
      body(groups_[static_cast<std::size_t>(group)], at - group * units, stop - group * units);
      at = stop;
    }
  });
}

void ExpertMixture::run(Tensor input, int rows, const Router& router, const Norm& norm, const Experts& experts,
                        Tensor output) {
  const PackedMatrix& gate_up = packed(*experts.gate_up);
  const PackedMatrix& down = packed(*experts.down);
  const PackedMatrix& scores = packed(*router.weight);
  const int hidden = input.columns;
  const int mlp = experts.mlp;
  const int chosen = router.chosen;
  require(hidden % kPanel == 0 && mlp % kPanel == 0, "experts of whole panels");
  require(scores.rows == experts.count && scores.columns == hidden && chosen > 0 && chosen <= experts.count,
          "a router for these experts");
  require(gate_up.rows == std::int64_t{experts.count} * 2 * mlp && gate_up.columns == hidden &&
              down.rows == std::int64_t{experts.count} * hidden && down.columns == mlp && output.columns == hidden,
          "matching shapes of experts");
  require(rows <= max_rows_ && std::int64_t{rows} * chosen <= max_slots_ && experts.count <= max_experts_ &&
              hidden <= max_hidden_ && mlp <= max_mlp_,
          "experts within what is reserved");
  choose(input, rows, router);
  assign_slots(rows, chosen, experts.count);

  const bool input_quantized = takes_quantized(gate_up.type);
  pool_.parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int32_t* slots = slots_.data() + r * chosen;
      float* first = inputs_.values(slots[0], hidden);
      layer_.rms_norm(row_of(input, r), norm.scale, norm.epsilon, hidden, first);
      if (input_quantized) inputs_.quantize(matmul_, slots[0], hidden, 0, hidden, first);
      for (int i = 1; i < chosen; ++i) {
        if (input_quantized) {
          inputs_.copy_quantized(slots[0], slots[i], hidden);
        } else {
          std::copy_n(first, hidden, inputs_.values(slots[i], hidden));
        }
      }
    }
  });

  const bool gated_quantized = takes_quantized(down.type);
  const Activations x = inputs_.view(hidden, input_quantized, !input_quantized);
  const std::int64_t unit_bytes = 2 * static_cast<std::int64_t>(gate_up.panel_bytes) * (kUnit / kPanel);
  for_each_group((mlp + kUnit - 1) / kUnit, grain_of_bytes(unit_bytes),
                 [&](const Group& group, std::int64_t begin, std::int64_t end) {
                   const std::int64_t first_row = std::int64_t{group.expert} * 2 * mlp;
                   const PackedMatrix gate = panels_of(gate_up, first_row, mlp);
                   const PackedMatrix up = panels_of(gate_up, first_row + mlp, mlp);
                   const std::int64_t first_panel = begin * (kUnit / kPanel);
                   const std::int64_t last_panel = std::min<std::int64_t>(end * (kUnit / kPanel), mlp / kPanel);
                   const int first = static_cast<int>(begin * kUnit);
                   const int count = static_cast<int>(last_panel * kPanel) - first;
                   const Activations rows_of_group = x.from(group.first);
                   float* gates = gates_.data() + std::int64_t{group.first} * mlp;
                   float* ups = gated_.values(group.first, mlp);
                   matmul_.matmul(gate, first_panel, last_panel, rows_of_group, group.count, gates, mlp);
                   matmul_.matmul(up, first_panel, last_panel, rows_of_group, group.count, ups, mlp);
                   for (int r = 0; r < group.count; ++r, gates += mlp, ups += mlp) {
                     layer_.gelu_multiply(gates + first, ups + first, count, ups + first);
                     if (gated_quantized) gated_.quantize(matmul_, group.first + r, mlp, first, count, ups + first);
                   }
                 });

  const Activations h = gated_.view(mlp, gated_quantized, !gated_quantized);
  for_each_group(hidden / kPanel, grain_of_bytes(static_cast<std::int64_t>(down.panel_bytes)),
                 [&](const Group& group, std::int64_t begin, std::int64_t end) {
                   const PackedMatrix matrix = panels_of(down, std::int64_t{group.expert} * hidden, hidden);
                   matmul_.matmul(matrix, begin, end, h.from(group.first), group.count,
                                  outputs_.data() + std::int64_t{group.first} * hidden, hidden);
                 });

  pool_.parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      layer_.weighted_sum(outputs_.data(), hidden, slots_.data() + r * chosen, weights_.data() + r * chosen, chosen,
                          hidden, row_of(output, r));
    }
  });
}

}  // namespace draftwerk::cpu
