// Chooses drafts among the tokens that a sparse head has scored, exactly as cpp/backend/sampling.h defines it for a row
// in which all the others are minus infinity, without making that row.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/sampler_kernels.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

/// What a sparse head left of a step's output rows: of each the logits of `count` tokens, in any order.
struct SparseLogitRows {
  float* values = nullptr;               ///< [outputs, stride]
  std::int64_t stride = 0;               ///< >= count
  const std::int32_t* tokens = nullptr;  ///< [outputs, token_stride], distinct in a row
  std::int64_t token_stride = 0;         ///< 0: all rows have the same tokens
  int count = 0;

  // Where a token is: as in SparseHead.
  const std::int32_t* row_of = nullptr;
  int vocabulary = 0;
  const std::int32_t* chosen = nullptr;  ///< [outputs, clusters], ascending; null: every row of the head is there
  int clusters = 0;                      ///< chosen ones of a row
  int cluster_size = 0;

  [[nodiscard]] float* values_of(std::int64_t output) const { return values + output * stride; }
  [[nodiscard]] const std::int32_t* tokens_of(std::int64_t output) const { return tokens + output * token_stride; }
  /// The logit of a token in a row; null if it has none.
  [[nodiscard]] float* find(std::int64_t output, TokenId token) const;
};

/// Finds `count` candidates for each of the rows (Backend::propose), row i among the logits of output i, which are
/// overwritten.
void propose_sparse(const SamplerKernels& kernels, const SparseLogitRows& logits, std::span<const ProposeRow> rows,
                    int count, std::span<Candidate> candidates, WorkerPool& pool);

}  // namespace draftwerk::cpu
