// Logits by clusters on the CPU: only the rows of the clusters that look best are multiplied, and of a dense row of
// logits only what the call before wrote is taken back, so that a call costs time for the chosen rows and not for the
// vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

class ClusteredLogits {
 public:
  /// Takes scratch for up to `max_outputs` rows of `vocabulary` logits; it costs nothing until it is used. `matmul` and
  /// `pool` must outlive the object.
  ClusteredLogits(const MatmulKernels& matmul, WorkerPool& pool, int max_outputs, int vocabulary);

  /// Logits of `outputs` rows, see Backend::head; `x` holds the states in the forms that centroids and head read.
  void compute(const ClusteredHead& head, const Activations& x, int outputs);

  /// The logits of the last compute().
  [[nodiscard]] LogitRows rows() const;

 private:
  /// Cluster number `index` of those that a row has chosen.
  struct Pair {
    std::int32_t cluster = 0;
    std::int32_t row = 0;
    std::int32_t index = 0;
  };

  void choose_clusters(const PackedMatrix& centroids, const Activations& x, int outputs, int chosen);
  void clear_row(std::int64_t row);
  void scatter_row(const ClusteredHead& head, std::int64_t row, int size);

  const MatmulKernels& matmul_;
  WorkerPool& pool_;
  std::int64_t vocabulary_;
  std::int64_t stride_;
  std::int64_t chunks_;
  ScratchArray<float> logits_;         ///< [outputs, stride_], minus infinity where nothing is written
  ScratchArray<float> maxima_;         ///< [outputs, chunks_]
  std::vector<std::int64_t> written_;  ///< [outputs] how many tokens are; -1 while the row has not been used
  ScratchArray<std::int32_t> tokens_;  ///< [outputs, vocabulary] which they are
  ScratchArray<float> scores_;         ///< [outputs, clusters]
  ScratchArray<std::int32_t> chosen_;  ///< [outputs, chosen] clusters, ascending
  ScratchArray<Pair> pairs_;           ///< of all rows, by cluster
  ScratchArray<float> values_;         ///< [outputs, vocabulary] logits of the chosen clusters, one after the other
  ScratchArray<float> panels_;         ///< [workers, stride_] logits of one cluster, from its first panel on
};

}  // namespace draftwerk::cpu
