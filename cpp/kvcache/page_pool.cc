#include "kvcache/page_pool.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>

namespace draftwerk {

PagePool::PagePool(const PerTable<std::size_t>& page_bytes, std::size_t budget_bytes) : page_bytes_(page_bytes) {
  const auto types = static_cast<std::size_t>(kPageTables - std::count(page_bytes_.begin(), page_bytes_.end(), 0U));
  const std::size_t largest = *std::max_element(page_bytes_.begin(), page_bytes_.end());
  if (types == 0) throw std::invalid_argument("KV cache: no layer type has pages");
  if (budget_bytes / types / kPageUnit * kPageUnit < largest) {
    throw std::invalid_argument("KV cache: a budget of " + std::to_string(budget_bytes) +
                                " bytes is too small, the least is " + std::to_string(types) + " pages of " +
                                std::to_string(largest) + " bytes");
  }
  if (budget_bytes / kPageUnit >= kNoPage) {
    throw std::invalid_argument("KV cache: a budget of " + std::to_string(budget_bytes) +
                                " bytes is more than page ids can address");
  }
  for (std::size_t& bytes : page_bytes_) bytes = (bytes + kPageUnit - 1) / kPageUnit * kPageUnit;
  choose_slab_size(budget_bytes);

  const std::size_t slabs = budget_bytes / slab_bytes_;
  slabs_.resize(slabs);
  free_slabs_.resize(slabs);
  for (std::size_t i = 0; i < slabs; ++i) free_slabs_[i] = static_cast<std::uint32_t>(slabs - 1 - i);
  for (int t = 0; t < kPageTables; ++t) {
    slabs_by_live_[t].assign(static_cast<std::size_t>(pages_per_slab_[t]), kNone);
    slots_per_slab_ = std::max(slots_per_slab_, static_cast<std::size_t>(pages_per_slab_[t]));
  }
  references_.resize(slabs * slots_per_slab_, 0);
  next_free_.resize(slabs * slots_per_slab_, kNone);
}

// A slab is a multiple of the larger page. The smallest one fragments least (at 1 a freed page of the larger type
// always makes a whole slab), so a larger one is taken only if it leaves clearly fewer bytes unused: at the end of its
// slabs, where the smaller page does not divide them, and at the end of the arena. Gemma 3 270M has 5 sliding layers
// per full one, so a slab is 1 sliding page or 5 full ones, without waste.
void PagePool::choose_slab_size(std::size_t budget_bytes) {
  constexpr std::size_t kLargestFactor = 16;
  const std::size_t largest = *std::max_element(page_bytes_.begin(), page_bytes_.end());
  std::size_t smallest = largest;
  std::size_t types = 0;
  for (const std::size_t bytes : page_bytes_) {
    if (bytes == 0) continue;
    smallest = std::min(smallest, bytes);
    ++types;
  }
  const auto usable = [&](std::size_t factor) {
    const std::size_t slab = factor * largest;
    const std::size_t slabs = budget_bytes / slab;
    return slabs < types ? 0 : slabs * (slab / smallest * smallest);
  };
  std::size_t best = 0;
  for (std::size_t factor = 1; factor <= kLargestFactor; ++factor) best = std::max(best, usable(factor));
  std::size_t factor = 1;
  while (usable(factor) < best - best / 32) ++factor;
  slab_bytes_ = factor * largest;
  for (int t = 0; t < kPageTables; ++t) {
    pages_per_slab_[t] = page_bytes_[t] == 0 ? 0 : static_cast<std::int64_t>(slab_bytes_ / page_bytes_[t]);
  }
}

std::optional<PageId> PagePool::allocate(int table) {
  assert(has_table(table));
  const auto capacity = static_cast<std::uint32_t>(pages_per_slab_[table]);
  std::uint32_t slab_index = kNone;
  for (std::uint32_t live = capacity - 1; live > 0 && slab_index == kNone; --live) {
    slab_index = slabs_by_live_[table][live];
  }
  if (slab_index != kNone) {
    unlink(slab_index);
  } else {
    if (free_slabs_.empty()) return std::nullopt;
    slab_index = free_slabs_.back();
    free_slabs_.pop_back();
    slabs_[slab_index] = Slab{};
    slabs_[slab_index].table = table;
    ++slabs_of_[table];
  }

  Slab& slab = slabs_[slab_index];
  Place place{slab_index, slab.first_free};
  if (place.index == kNone) {
    place.index = slab.live;  // none was given back: the pages before it are all in use
  } else {
    slab.first_free = next_free_[slot(place)];
  }
  ++slab.live;
  link(slab_index);
  references_[slot(place)] = 1;
  ++pages_in_use_[table];
  used_bytes_ += page_bytes_[table];
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  return static_cast<PageId>((slab_index * slab_bytes_ + place.index * page_bytes_[table]) / kPageUnit);
}

void PagePool::retain(PageId page) {
  std::uint32_t& references = references_[slot(place_of(page))];
  assert(references > 0);
  ++references;
}

void PagePool::release(PageId page) {
  const Place place = place_of(page);
  std::uint32_t& references = references_[slot(place)];
  assert(references > 0);
  if (--references > 0) return;

  Slab& slab = slabs_[place.slab];
  --pages_in_use_[slab.table];
  used_bytes_ -= page_bytes_[slab.table];
  unlink(place.slab);
  next_free_[slot(place)] = slab.first_free;
  slab.first_free = place.index;
  --slab.live;
  if (slab.live > 0) {
    link(place.slab);
  } else {
    --slabs_of_[slab.table];
    slab.table = -1;
    free_slabs_.push_back(place.slab);  // within the capacity of the start: no allocation
  }
}

std::uint32_t PagePool::references(PageId page) const {
  const std::size_t slab = page * kPageUnit / slab_bytes_;
  return slabs_[slab].table < 0 ? 0 : references_[slot(place_of(page))];
}

std::int64_t PagePool::available(int table) const {
  return (slabs_of_[table] + free_slabs()) * pages_per_slab_[table] - pages_in_use_[table];
}

PagePool::Place PagePool::place_of(PageId page) const {
  const std::size_t offset = page * kPageUnit;
  const std::size_t slab = offset / slab_bytes_;
  assert(slab < slabs_.size() && slabs_[slab].table >= 0);
  const std::size_t bytes = page_bytes_[slabs_[slab].table];
  assert(offset % slab_bytes_ % bytes == 0);
  return {static_cast<std::uint32_t>(slab), static_cast<std::uint32_t>(offset % slab_bytes_ / bytes)};
}

// Full slabs are on no list: there is nothing to take from them.
void PagePool::link(std::uint32_t slab_index) {
  Slab& slab = slabs_[slab_index];
  if (slab.live == pages_per_slab_[slab.table]) return;
  std::uint32_t& head = slabs_by_live_[slab.table][slab.live];
  slab.previous = kNone;
  slab.next = head;
  if (head != kNone) slabs_[head].previous = slab_index;
  head = slab_index;
}

void PagePool::unlink(std::uint32_t slab_index) {
  const Slab& slab = slabs_[slab_index];
  if (slab.live == pages_per_slab_[slab.table]) return;
  if (slab.previous != kNone) {
    slabs_[slab.previous].next = slab.next;
  } else {
    slabs_by_live_[slab.table][slab.live] = slab.next;
  }
  if (slab.next != kNone) slabs_[slab.next].previous = slab.previous;
}

}  // namespace draftwerk
