// Keys and values of a sequence that has the arena to itself: outside of the engine there is nothing to share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "model/gemma.h"

namespace draftwerk {

/// K/V of one sequence of known length: page i of each layer type is simply the i-th of its part of the arena.
class SingleSequenceKv {
 public:
  SingleSequenceKv(Gemma& model, std::int64_t positions) {
    const auto pages = static_cast<std::size_t>((positions + kPageSize - 1) / kPageSize);
    const KvPageShape shape = model.kv_page_shape();
    std::size_t offset = 0;
    for (int t = 0; t < kPageTables; ++t) {
      const std::size_t stride = (shape.page_bytes[t] + kPageUnit - 1) / kPageUnit * kPageUnit;
      for (std::size_t i = 0; i < pages && stride > 0; ++i, offset += stride) {
        tables_[t].push_back(static_cast<PageId>(offset / kPageUnit));
      }
    }
    arena_ = model.backend().allocate(std::max(offset, kPageUnit));
  }

  [[nodiscard]] KvArena arena() const { return {static_cast<std::byte*>(arena_->data())}; }
  [[nodiscard]] Segment segment(int rows, std::int64_t first_position) const {
    return {0, rows, first_position, {tables_[0].data(), tables_[1].data()}};
  }
  [[nodiscard]] const PageId* pages(int table) const { return tables_[table].data(); }

 private:
  std::vector<PageId> tables_[kPageTables];
  std::unique_ptr<Buffer> arena_;
};

}  // namespace draftwerk
