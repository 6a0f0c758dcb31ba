// Where a head leaves logits for the sampler.
#pragma once

#include <cstdint>

namespace draftwerk::cuda {

/// Logits of a step's output rows, in device memory: of the whole vocabulary, or of the tokens that a sparse head has
/// scored. The sampler overwrites some of them.
struct LogitRows {
  float* values = nullptr;               ///< [outputs, stride] float32, aligned to 16 bytes
  const std::int32_t* tokens = nullptr;  ///< of a sparse head, as in SparseHead; null: column i is token i
  const std::int32_t* row_of = nullptr;  ///< likewise
  /// [outputs, clusters], of each row ascending: column i is that of row (i % cluster_size) of cluster chosen[i /
  /// cluster_size] of the head; null: column i is that of its row i.
  const std::int32_t* chosen = nullptr;
  std::int64_t stride = 0;      ///< floats from row to row: a multiple of 4, >= columns
  std::int32_t columns = 0;     ///< logits of a row; what lies behind them up to `stride` may be anything
  std::int32_t vocabulary = 0;  ///< == columns of a dense head
  std::int32_t clusters = 0;    ///< chosen ones of a row
  std::int32_t cluster_size = 0;
};

}  // namespace draftwerk::cuda
