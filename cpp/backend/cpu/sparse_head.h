// Logits of some tokens on the CPU: only the rows of the head that are asked for are multiplied, and what comes of it
// stays a list, so that a call costs time for these rows and not for the vocabulary.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/sparse_sampler.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

class SparseLogits {
 public:
  /// Takes scratch for up to `max_outputs` rows and any head of up to `vocabulary` tokens; it costs nothing until it is
  /// used. The kernels and `pool` must outlive the object.
  SparseLogits(const MatmulKernels& matmul, const LayerKernels& layer, WorkerPool& pool, int max_outputs,
               int vocabulary);

  /// Logits of `outputs` rows, see Backend::head; `x` holds the states in the forms that centroids and head read. They
  /// stay until the next call.
  SparseLogitRows compute(const SparseHead& head, const Activations& x, int outputs);

 private:
  /// Cluster number `index` of those that a row has chosen.
  struct Pair {
    std::int32_t cluster = 0;
    std::int32_t row = 0;
    std::int32_t index = 0;
  };

  SparseLogitRows compute_all(const SparseHead& head, const Activations& x, int outputs);
  SparseLogitRows compute_chosen(const SparseHead& head, const Activations& x, int outputs);
  void choose_clusters(const PackedMatrix& centroids, const Activations& x, int outputs, int chosen);

  const MatmulKernels& matmul_;
  const LayerKernels& layer_;
  WorkerPool& pool_;
  int vocabulary_;
  ScratchArray<float> values_;         ///< [outputs, stride of the call] logits
  ScratchArray<std::int32_t> tokens_;  ///< the same of chosen clusters: whose they are
  ScratchArray<float> scores_;         ///< [outputs, clusters]
  ScratchArray<std::int32_t> chosen_;  ///< [outputs, chosen] clusters, ascending
  ScratchArray<Pair> pairs_;           ///< of all rows, by cluster
  std::int64_t panels_stride_;
  ScratchArray<float> panels_;  ///< [workers, panels_stride_] logits of one cluster, from its first panel on
};

}  // namespace draftwerk::cpu
