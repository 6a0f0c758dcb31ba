// Logits of a step's output rows, and the tokens chosen from them.
#include <algorithm>
#include <limits>

#include "backend/backend_checks.h"
#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/sampler_kernels.h"

namespace draftwerk::cpu {
namespace {

constexpr std::int64_t kLogitChunkBytes = kLogitChunk * sizeof(float);
// A quarter of an L2 of 512 KiB.
constexpr std::int64_t kLogitBytesTogether = 128 * 1024;

}  // namespace

void CpuBackend::head(Tensor states, const Weight& weight, float softcap) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == states.columns && matrix.rows == vocabulary_, "a head of the reserved vocabulary");
  head_logits_ = LogitRows{logits_.data(), logit_stride_, vocabulary_, logit_maxima_.data(), logit_chunks_};
  const int outputs = step_outputs();
  if (outputs == 0) return;
  const bool quantized = takes_quantized(matrix.type);
  const Activations x = prepare(states, nullptr, outputs, quantized, !quantized);
  constexpr std::int64_t kPanels = kLogitChunk / kPanel;
  const std::int64_t panels = panel_count(matrix.rows);
  // Chunks that one product covers: so many that its start (nothing is prefetched before the first panel) does not
  // count, so few that their logits are still in cache when the maxima are taken.
  const std::int64_t together = std::clamp<std::int64_t>(kLogitBytesTogether / (outputs * kLogitChunkBytes), 1, 16);
  pool_.parallel_for(logit_chunks_, 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t chunk = begin; chunk < end;) {
      const std::int64_t past = std::min(chunk + together, end);
      matmul_.matmul(matrix, chunk * kPanels, std::min(past * kPanels, panels), x, outputs, logits_.data(),
                     logit_stride_);
      for (; chunk < past; ++chunk) {
        const std::int64_t first = chunk * kLogitChunk;
        const int count = static_cast<int>(std::min<std::int64_t>(kLogitChunk, vocabulary_ - first));
        for (int r = 0; r < outputs; ++r) {
          logit_maxima_[r * logit_chunks_ + chunk] =
              layer_.softcap_max(logits_.data() + r * logit_stride_ + first, count, softcap);
        }
      }
    }
  });
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
  const auto* logits = std::get_if<LogitRows>(&head_logits_);
  require(logits != nullptr, "a head of all tokens before a choice is verified");
  check_groups("cpu backend", groups);
  sampler_->verify_logits(*logits, groups, results, pool_);
}

void CpuBackend::propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) {
  require(rows.size() == static_cast<std::size_t>(step_outputs()) && count >= 1 &&
              candidates.size() >= rows.size() * static_cast<std::size_t>(count),
          "a row to propose for and room for its candidates for every output");
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
