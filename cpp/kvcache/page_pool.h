// The KV arena as bookkeeping: which pages are free, in use and by how many holders. It hands out page ids; the
// backend owns the bytes.
//
// Pages of the sliding and of the full layers differ in size. The arena is cut into equal slabs; a slab holds pages of
// one type while any of them lives and returns to the common stock with its last one, so that the split between the
// types follows the workload (Bonwick, "The Slab Allocator", USENIX Summer 1994, with the types in place of the object
// caches).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "backend/backend.h"

namespace draftwerk {

/// One number per layer type.
template <typename T>
using PerTable = std::array<T, kPageTables>;

/// Reference-counted pages out of one arena. Single-threaded; allocation and release take constant time and no memory.
class PagePool {
 public:
  /// `page_bytes`: bytes of a page of each layer type (0: no such layers), rounded up to kPageUnit. `budget_bytes`
  /// bounds the arena. Throws std::invalid_argument if all sizes are 0, if the budget does not hold a slab for each
  /// type (at least a page of the larger type for each), or if it is more than page ids can address (1 TiB).
  PagePool(const PerTable<std::size_t>& page_bytes, std::size_t budget_bytes);

  /// A page of layer type `table` with one reference, or nothing if no memory is left for that type. Takes it from
  /// the fullest slab that has room, so that the others may become empty.
  std::optional<PageId> allocate(int table);
  /// One more holder of a page in use.
  void retain(PageId page);
  /// One holder less; the last one frees the page.
  void release(PageId page);
  /// Holders of a page that allocate() gave; 0 if it is free.
  [[nodiscard]] std::uint32_t references(PageId page) const;

  /// Bytes of all slabs, which page ids address; at most the budget.
  [[nodiscard]] std::size_t arena_bytes() const { return slabs_.size() * slab_bytes_; }
  /// Bytes of a page, as rounded; 0 if the type is unused.
  [[nodiscard]] std::size_t page_bytes(int table) const { return page_bytes_[table]; }
  [[nodiscard]] bool has_table(int table) const { return page_bytes_[table] != 0; }
  [[nodiscard]] std::size_t slab_bytes() const { return slab_bytes_; }
  [[nodiscard]] std::int64_t slabs() const { return static_cast<std::int64_t>(slabs_.size()); }
  /// Slabs that hold no page at all.
  [[nodiscard]] std::int64_t free_slabs() const { return static_cast<std::int64_t>(free_slabs_.size()); }
  /// Pages of a type that one slab holds; 0 if the type is unused.
  [[nodiscard]] std::int64_t pages_per_slab(int table) const { return pages_per_slab_[table]; }

  [[nodiscard]] std::int64_t pages_in_use(int table) const { return pages_in_use_[table]; }
  [[nodiscard]] std::size_t used_bytes() const { return used_bytes_; }
  /// The most that used_bytes() ever was.
  [[nodiscard]] std::size_t peak_bytes() const { return peak_bytes_; }
  /// Pages of a type that allocate() could hand out in a row now if no other type took any.
  [[nodiscard]] std::int64_t available(int table) const;

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFFU;

  struct Slab {
    int table = -1;                    // -1: in the common stock
    std::uint32_t live = 0;            // pages in use
    std::uint32_t first_free = kNone;  // list of pages given back, linked through next_free_
    std::uint32_t previous = kNone;    // neighbours among the slabs of this type that are as full
    std::uint32_t next = kNone;
  };
  struct Place {
    std::uint32_t slab;
    std::uint32_t index;  // of the page in its slab
  };

  void choose_slab_size(std::size_t budget_bytes);
  [[nodiscard]] Place place_of(PageId page) const;
  [[nodiscard]] std::size_t slot(Place place) const { return place.slab * slots_per_slab_ + place.index; }
  void link(std::uint32_t slab);
  void unlink(std::uint32_t slab);

  PerTable<std::size_t> page_bytes_;
  PerTable<std::int64_t> pages_per_slab_{};
  std::size_t slab_bytes_ = 0;
  std::size_t slots_per_slab_ = 0;
  std::vector<Slab> slabs_;
  std::vector<std::uint32_t> free_slabs_;               // the last one is used next
  PerTable<std::vector<std::uint32_t>> slabs_by_live_;  // first slab with so many pages in use, kNone if none
  std::vector<std::uint32_t> references_;               // by slot
  std::vector<std::uint32_t> next_free_;                // by slot
  PerTable<std::int64_t> pages_in_use_{};
  PerTable<std::int64_t> slabs_of_{};
  std::size_t used_bytes_ = 0;
  std::size_t peak_bytes_ = 0;
};

}  // namespace draftwerk
