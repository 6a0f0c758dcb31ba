// Logits of a head that scores some tokens only (SparseHead), in drafting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/logits.h"
#include "backend/cuda/projections.h"

namespace draftwerk::cuda {

class SparseLogits {
 public:
  /// Rows that record() takes; memory for them is allocated when a head is met for the first time.
  void reserve(int max_outputs);
  /// Appends what computes the logits of `outputs` states, and returns where they will be.
  LogitRows record(LaunchList& launches, Projections& projections, int outputs, Tensor states, const SparseHead& head,
                   int vocabulary);
  /// The tokens of the columns of a row, once the launches are done.
  [[nodiscard]] static std::vector<std::int32_t> tokens(const LogitRows& logits, int row);

 private:
  /// Device memory that is large enough for every head so far.
  struct Scratch {
    DeviceMemory memory;
    std::size_t bytes = 0;

    void* of(std::size_t wanted);
  };

  int max_outputs_ = 0;
  Scratch logits_;
  Scratch scores_;  ///< of clusters
  Scratch chosen_;
};

}  // namespace draftwerk::cuda
