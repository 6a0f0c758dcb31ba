// Logits of a head that scores some tokens only (SparseHead), in drafting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/logits.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/projections.h"

namespace draftwerk::cuda {

class SparseLogits {
 public:
  /// Makes room for so many rows of a head.
  void reserve(int max_outputs, const SparseHead& head);
  /// Appends what computes the logits of `outputs` states, and returns where they will be.
  LogitRows record(LaunchList& launches, Projections& projections, int outputs, Tensor states, const SparseHead& head,
                   int vocabulary);
  /// The tokens of the columns of a row, once the launches are done.
  [[nodiscard]] static std::vector<std::int32_t> tokens(const LogitRows& logits, int row);

 private:
  GrowingMemory logits_;
  GrowingMemory scores_;  ///< of clusters
  GrowingMemory chosen_;
};

}  // namespace draftwerk::cuda
