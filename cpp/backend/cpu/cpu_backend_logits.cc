// Logits of a step's output rows, and the tokens chosen from them.
#include <algorithm>
#include <limits>

#include "backend/backend_checks.h"
#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/head_product.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/sampler_kernels.h"

namespace draftwerk::cpu {

LogitRows CpuBackend::logit_rows() const {
  return {logits_.data(), logit_stride_, vocabulary_, logit_maxima_.data(), logit_chunks_};
}

void CpuBackend::head(Tensor states, const Weight& weight, float softcap) {
  const PackedMatrix& matrix = packed_or_split(weight);
  require(matrix.columns == states.columns && matrix.rows == vocabulary_, "a head of the reserved vocabulary");
  if (matrix.split != nullptr) {
    require(split_head_ != nullptr && &split_head_->weight() == &weight, "the head that was split");
    head_logits_ = PendingHead{states, softcap};
    return;
  }
  head_logits_ = logit_rows();
  const int outputs = step_outputs();
  if (outputs == 0) return;
  const bool quantized = takes_quantized(matrix.type);
  compute_logits(pool_, matmul_, layer_, matrix, prepare(states, nullptr, outputs, quantized, !quantized), outputs,
                 softcap, logit_rows());
}

/// The states of the output rows in the order of the split head's columns.
Activations CpuBackend::prepare_split(Tensor states) {
  const int outputs = step_outputs();
  const Activations x = prepare(states, nullptr, outputs, true, false);
  for (int row = 0; row < outputs; ++row) inputs_.split(split_head_->columns(), row, states.columns);
  return x;
}

/// All logits of a split head, if it has been left pending.
void CpuBackend::compute_pending() {
  const auto* pending = std::get_if<PendingHead>(&head_logits_);
  if (pending == nullptr) return;
  if (step_outputs() > 0) {
    compute_logits(pool_, matmul_, layer_, split_head_->matrix(), prepare_split(pending->states), step_outputs(),
                   pending->softcap, logit_rows());
  }
  head_logits_ = logit_rows();
}

void CpuBackend::head(Tensor states, const SparseHead& head) {
  require(head.weight->columns() == states.columns, "a head as wide as the states");
  bool quantized = false;
  bool floats = false;
  for (const Weight* weight : {head.weight, head.centroids}) {
    if (weight != nullptr) (takes_quantized(weight->type()) ? quantized : floats) = true;
  }
  const int outputs = step_outputs();
  head_logits_ = sparse_->compute(head, prepare(states, nullptr, outputs, quantized, floats), outputs);
}

void CpuBackend::verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) {
  check_groups("cpu backend", groups);
  const auto* pending = std::get_if<PendingHead>(&head_logits_);
  RowScreen* screen = nullptr;
  if (pending != nullptr && screened_->takes(groups, step_outputs())) {
    screened_->bound(prepare_split(pending->states), step_outputs(), pending->softcap, logit_rows());
    screen = screened_.get();
  } else {
    compute_pending();
    require(std::holds_alternative<LogitRows>(head_logits_), "a head of all tokens before a choice is verified");
  }
  sampler_->verify_logits(logit_rows(), groups, results, pool_, screen);
  head_logits_ = {};
}

void CpuBackend::propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) {
  require(rows.size() == static_cast<std::size_t>(step_outputs()) && count >= 1 &&
              candidates.size() >= rows.size() * static_cast<std::size_t>(count),
          "a row to propose for and room for its candidates for every output");
  compute_pending();
  if (const auto* sparse = std::get_if<SparseLogitRows>(&head_logits_)) {
    propose_sparse(sampler_kernels(isa_), *sparse, rows, count, candidates, pool_);
    return;
  }
  const auto* logits = std::get_if<LogitRows>(&head_logits_);
  require(logits != nullptr, "a head before a draft is proposed");
  sampler_->propose(*logits, rows, count, candidates, pool_);
}

void CpuBackend::read_logits(std::span<float> out) {
  const std::int64_t columns = vocabulary_;
  const std::int64_t outputs = step_outputs();
  compute_pending();
  require(head_logits_.index() != 0, "a head before its logits are read");
  require(out.size() >= static_cast<std::size_t>(outputs * columns), "room for the logits of every output");
  for (std::int64_t r = 0; r < outputs; ++r) {
    float* row = out.data() + r * columns;
    if (const auto* sparse = std::get_if<SparseLogitRows>(&head_logits_)) {
      std::fill_n(row, columns, -std::numeric_limits<float>::infinity());
      for (int i = 0; i < sparse->count; ++i) row[sparse->tokens_of(r)[i]] = sparse->values_of(r)[i];
    } else {
      const LogitRows& logits = std::get<LogitRows>(head_logits_);
      std::copy_n(logits.values + r * logits.stride, columns, row);
    }
  }
}

}  // namespace draftwerk::cpu
