// Brings what a step is about to the device: the arrays of a StepView, laid out in one block, and copied in front of
// the launches that read it.
#pragma once

#include <array>
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

/// What the passes of a step have found (Backend::propose_ahead): how many there were, of how many outputs each, with
/// padding.
struct FoundDrafts {
  int passes = 0;
  int outputs = 0;
};

/// Where trees of drafts grow: the arrays of the StepView that become known then.
struct GrowthView {
  const StepGrowth* growths;
  std::int32_t* tokens;
  std::int32_t* positions;
  std::uint8_t* paths;
};

/// Owns the arrays of a StepView on both sides.
class StepUpload {
 public:
  StepUpload() = default;

  /// Makes room for steps of so many rows and outputs, padding included.
  void reserve(int max_rows, int max_outputs);
  /// Whether fill() will do with the memory that there is.
  [[nodiscard]] bool has_room(const StepRows& rows) const;
  /// Fills the arrays from a step whose segments were checked. Steps of as many rows, with padding, have the same
  /// addresses, until memory grows where page tables have: then the device must be done with the step before. Otherwise
  /// it must be done with the one before that: two take turns with the host's memory.
  void fill(const StepRows& rows, KvArena arena, FoundDrafts found = {});

  /// Adds a list of rows that an operation takes from a tensor, for this step; at most kRowLists, none longer
  /// than the step, where one that is the same as the last one is that one. Padded to `padded` with row 0.
  const std::int32_t* add_rows(std::span<const int> rows, int padded);

  [[nodiscard]] const StepView& view() const { return view_; }
  /// What launches of the step may change.
  [[nodiscard]] const GrowthView& growing() const { return growing_; }
  /// Trees that grow, with padding.
  [[nodiscard]] int growths() const { return growths_; }
  /// Appends what launches recorded so far need a copy of and has not been collected yet.
  void collect(std::vector<Copy>& in);

 private:
  template <typename T>
  T* place(std::size_t count, T*& on_host);
  [[nodiscard]] std::size_t room_for(std::size_t pages) const;
  [[nodiscard]] std::byte* host() const { return static_cast<std::byte*>(host_[turn_].get()); }

  static constexpr int kRowLists = 4;

  int max_rows_ = 0;
  int max_outputs_ = 0;
  int row_lists_ = 0;  ///< of this step
  int collected_row_lists_ = 0;
  bool collected_ = false;  ///< all but row lists
  int last_list_padded_ = 0;
  std::size_t last_list_rows_ = 0;
  std::int32_t* lists_on_host_ = nullptr;
  std::int32_t* lists_on_device_ = nullptr;
  std::size_t page_capacity_ = 0;
  GrowingMemory device_;
  std::array<PinnedMemory, 2> host_;
  std::size_t turn_ = 0;  ///< of the host's memory
  std::size_t used_ = 0;
  int growths_ = 0;
  StepView view_{};
  GrowthView growing_{};
};

}  // namespace draftwerk::cuda
