// Logits of a step's output rows, and the tokens chosen from them.
#include <algorithm>

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/sampler_kernels.h"

namespace draftwerk::cpu {

void CpuBackend::head(Tensor states, const Weight& weight, float softcap) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == states.columns && matrix.rows == vocabulary_, "a head of the reserved vocabulary");
  head_logits_ = {logits_.data(), logit_stride_, vocabulary_, logit_maxima_.data(), logit_chunks_};
  const int outputs = step_outputs();
  if (outputs == 0) return;
  const bool quantized = takes_quantized(matrix.type);
  const Activations x = prepare(states, nullptr, outputs, quantized, !quantized);
  constexpr std::int64_t kPanels = kLogitChunk / kPanel;
  const std::int64_t panels = panel_count(matrix.rows);
  // A piece is a chunk of logits: its maxima are taken while it is in cache.
  pool_.parallel_for(logit_chunks_, 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      matmul_.matmul(matrix, chunk * kPanels, std::min((chunk + 1) * kPanels, panels), x, outputs, logits_.data(),
                     logit_stride_);
      const std::int64_t first = chunk * kLogitChunk;
      const int count = static_cast<int>(std::min<std::int64_t>(kLogitChunk, vocabulary_ - first));
      for (int r = 0; r < outputs; ++r) {
        logit_maxima_[r * logit_chunks_ + chunk] =
            layer_.softcap_max(logits_.data() + r * logit_stride_ + first, count, softcap);
      }
    }
  });
}

void CpuBackend::head(Tensor states, const ClusteredHead& head) {
  const WeightType centroids = head.centroids->type();
  const WeightType rows = head.head->type();
  require(head.head->columns() == states.columns, "a head as wide as the states");
  const int outputs = step_outputs();
  const bool quantized = takes_quantized(centroids) || takes_quantized(rows);
  const bool floats = !takes_quantized(centroids) || !takes_quantized(rows);
  clustered_->compute(head, prepare(states, nullptr, outputs, quantized, floats), outputs);
  head_logits_ = clustered_->rows();
}

void CpuBackend::verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) {
  require(head_logits_.values != nullptr, "a head before its logits are read");
  sampler_->verify_logits(head_logits_, groups, results, pool_);
}

void CpuBackend::propose(std::span<const ProposeRow> rows, std::span<TokenId> tokens) {
  require(rows.size() == static_cast<std::size_t>(step_outputs()) && tokens.size() >= rows.size(),
          "a row to propose for and room for a token for every output");
  require(head_logits_.values != nullptr, "a head before its logits are read");
  sampler_->propose(head_logits_, rows, tokens, pool_);
}

void CpuBackend::read_logits(std::span<float> out) {
  const auto columns = static_cast<std::size_t>(vocabulary_);
  const auto outputs = static_cast<std::size_t>(step_outputs());
  require(head_logits_.values != nullptr, "a head before its logits are read");
  require(out.size() >= outputs * columns, "room for the logits of every output");
  for (std::size_t r = 0; r < outputs; ++r) {
    std::copy_n(head_logits_.values + static_cast<std::int64_t>(r) * head_logits_.stride, columns,
                out.data() + r * columns);
  }
}

}  // namespace draftwerk::cpu
