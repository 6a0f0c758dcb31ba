// The arrays that kernels know a step by, for tests: sequences whose pages lie in disorder in an arena that holds NaN
// wherever nothing was stored.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/error.h"
#include "backend/cuda/step.h"
#include "backend/cuda/step_upload.h"

namespace draftwerk::cuda {

inline std::vector<float> random_floats(std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

/// Brings to the device what an upload has not brought yet.
inline const StepView& arrived(StepUpload& upload) {
  std::vector<Copy> copies;
  upload.collect(copies);
  for (const Copy& copy : copies) {
    check(cudaMemcpy(copy.to, copy.from, copy.bytes, cudaMemcpyHostToDevice), "copying");
  }
  return upload.view();
}

/// Pages of several sequences, of one layer type.
class Pages {
 public:
  Pages(int sequences, int positions, std::size_t page_bytes, std::mt19937& random)
      : count_((positions + kPageSize - 1) / kPageSize), ids_(static_cast<std::size_t>(sequences * count_)) {
    const std::size_t bytes = (page_bytes + kPageUnit - 1) / kPageUnit * kPageUnit;
    arena_.assign(ids_.size() * bytes + kAlignment, std::byte{0xFF});
    for (std::size_t p = 0; p < ids_.size(); ++p) ids_[p] = static_cast<PageId>(p * bytes / kPageUnit);
    std::shuffle(ids_.begin(), ids_.end(), random);
  }

  [[nodiscard]] std::byte* arena() {
    const auto address = reinterpret_cast<std::uintptr_t>(arena_.data());
    return arena_.data() + (kAlignment - address % kAlignment) % kAlignment;
  }
  [[nodiscard]] std::byte* page(int sequence, int position) {
    return arena() + std::size_t{table(sequence, 0)[static_cast<std::size_t>(position / kPageSize)]} * kPageUnit;
  }
  /// A sequence's table, without the pages that lie wholly before `from`.
  [[nodiscard]] std::vector<PageId> table(int sequence, int from) const {
    const auto begin = ids_.begin() + std::ptrdiff_t{sequence} * count_;
    std::vector<PageId> ids(begin, begin + count_);
    std::fill_n(ids.begin(), std::clamp(from / kPageSize, 0, count_), kNoPage);
    return ids;
  }
  /// Where content() begins.
  [[nodiscard]] const std::byte* data() const { return arena_.data(); }
  [[nodiscard]] std::vector<std::byte> content() const { return arena_; }
  void restore(const std::vector<std::byte>& content) { std::copy(content.begin(), content.end(), arena_.begin()); }

 private:
  static constexpr std::size_t kAlignment = 256;
  int count_;
  std::vector<PageId> ids_;
  std::vector<std::byte> arena_;
};

/// Rows of one sequence from slot `first` on. Row i + 1 follows row parents[i] + 1; no parents: a chain.
struct Part {
  int sequence = 0;
  int first = 0;
  int rows = 0;
  std::vector<std::int32_t> parents = {};

  [[nodiscard]] std::vector<int> path(int row) const {
    std::vector<int> rows_on_it = {row};
    for (; row > 0; rows_on_it.push_back(row))
      row = parents.empty() ? row - 1 : parents[static_cast<std::size_t>(row) - 1] + 1;
    std::reverse(rows_on_it.begin(), rows_on_it.end());
    return rows_on_it;
  }
};

class StepArrays {
 public:
  /// The step of these parts. Page tables of layer type 0 lack what lies before the window of a part's first position,
  /// if there is one, or of one position less where rows do not see their own.
  StepArrays(Pages& pages, const std::vector<Part>& parts, int context, Visibility sees = {}, int padding_rows = 0,
             int padding_segments = 0)
      : arena_(pages.arena()), context_(context) {
    for (const Part& part : parts) {
      const int before = sees.window > 0 ? part.first + (sees.own ? 1 : 0) - sees.window : 0;
      const std::vector<PageId> table = pages.table(part.sequence, before);
      const auto begin = static_cast<std::int32_t>(pages_.size());
      pages_.insert(pages_.end(), table.begin(), table.end());
      const auto index = static_cast<std::int32_t>(segments_.size());
      segments_.push_back({static_cast<std::int32_t>(positions_.size()),
                           part.rows,
                           part.first,
                           {begin, begin},
                           part.parents.empty() ? 0 : 1});
      for (int row = 0; row < part.rows; ++row) {
        // A chain has no paths: what is there is from another step.
        std::vector<std::uint8_t> path(kMaxPath, 0xAA);
        if (!part.parents.empty()) std::ranges::copy(part.path(row), path.begin());
        paths_.insert(paths_.end(), path.begin(), path.end());
        positions_.push_back(part.first + (part.parents.empty() ? row : static_cast<int>(part.path(row).size()) - 1));
        row_segment_.push_back(index);
      }
    }
    const auto rows = static_cast<std::int32_t>(positions_.size());
    for (int i = 0; i < padding_rows; ++i) {
      positions_.push_back(0);
      row_segment_.push_back(-1);
      paths_.resize(paths_.size() + kMaxPath, 0xAA);
    }
    for (int i = 0; i < padding_segments; ++i) segments_.push_back({rows, 0, 0, {0, 0}, 0});
    tokens_.resize(positions_.size());
  }

  [[nodiscard]] StepView view() const {
    return {tokens_.data(),
            positions_.data(),
            row_segment_.data(),
            output_rows_.data(),
            segments_.data(),
            pages_.data(),
            paths_.data(),
            arena_,
            rows(),
            static_cast<std::int32_t>(output_rows_.size()),
            static_cast<std::int32_t>(segments_.size()),
            context_};
  }
  [[nodiscard]] int rows() const { return static_cast<int>(positions_.size()); }
  [[nodiscard]] int position(int row) const { return positions_[static_cast<std::size_t>(row)]; }

 private:
  std::vector<std::int32_t> tokens_;
  std::vector<std::int32_t> positions_;
  std::vector<std::int32_t> row_segment_;
  std::vector<std::int32_t> output_rows_;
  std::vector<StepSegment> segments_;
  std::vector<PageId> pages_;
  std::vector<std::uint8_t> paths_;
  std::byte* arena_;
  std::int32_t context_;
};

}  // namespace draftwerk::cuda
