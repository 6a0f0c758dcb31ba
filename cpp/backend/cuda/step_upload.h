// Brings what a step is about to the device: the arrays of a StepView, laid out in one block, copied at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

/// `count`, rounded up to one of a few counts, so that steps of about as many rows are the same launches.
[[nodiscard]] int padded_count(int count);

/// Owns the arrays of a StepView on both sides.
class StepUpload {
 public:
  StepUpload() = default;

  /// Makes room for steps of so many rows and outputs, padding included.
  void reserve(int max_rows, int max_outputs);
  /// Fills the arrays from a step whose segments were checked. Memory grows where page tables have grown; addresses are
  /// others then. The device must be done with the step before.
  void fill(const StepRows& rows, KvArena arena);

  /// Adds a list of rows that an operation takes from a tensor, for this step; at most kRowLists of max_rows each,
  /// where one that is the same as the last one is that one. Padded to `padded` with row 0.
  const std::int32_t* add_rows(std::span<const int> rows, int padded);

  [[nodiscard]] const StepView& view() const { return view_; }
  /// The tokens of the rows, which launches of the step may change.
  [[nodiscard]] std::int32_t* tokens() const { return const_cast<std::int32_t*>(view_.tokens); }
  /// What to copy in front of the step's launches.
  [[nodiscard]] Copy copy() const { return memory_.to_device(used_); }

 private:
  template <typename T>
  const T* place(std::size_t count, T*& on_host);

  static constexpr int kRowLists = 4;

  int max_rows_ = 0;
  int max_outputs_ = 0;
  int row_lists_ = 0;  ///< of this step
  int last_list_padded_ = 0;
  std::size_t last_list_rows_ = 0;
  std::int32_t* lists_on_host_ = nullptr;
  const std::int32_t* lists_on_device_ = nullptr;
  std::size_t page_capacity_ = 0;
  MirroredMemory memory_;
  std::size_t used_ = 0;
  StepView view_{};
};

}  // namespace draftwerk::cuda
