#include "kvcache/kv_cache.h"

#include <algorithm>
#include <cassert>
#include <climits>
#include <stdexcept>
#include <string>
#include <utility>

namespace draftwerk {

namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

PerTable<std::size_t> checked_page_bytes(const KvShape& shape) {
  if (shape.window < 0) {
    throw std::invalid_argument("KV cache: window is " + std::to_string(shape.window) + ", it must not be negative");
  }
  return {shape.page_bytes[0], shape.page_bytes[1]};
}

}  // namespace

SequenceKv::SequenceKv(SequenceKv&& other) noexcept { *this = std::move(other); }

SequenceKv& SequenceKv::operator=(SequenceKv&& other) noexcept {
  if (this == &other) return *this;
  assert(!open_);
  tables_ = std::exchange(other.tables_, {});
  nodes_ = std::exchange(other.nodes_, {});
  root_ = std::exchange(other.root_, nullptr);
  positions_ = std::exchange(other.positions_, 0);
  prefix_positions_ = std::exchange(other.prefix_positions_, 0);
  blocks_ = std::exchange(other.blocks_, 0);
  first_live_ = std::exchange(other.first_live_, 0);
  open_ = std::exchange(other.open_, false);
  return *this;
}

SequenceKv::~SequenceKv() { assert(!open_); }

KvCache::KvCache(const KvShape& shape, std::size_t budget_bytes, bool prefix_cache)
    : budget_bytes_(budget_bytes), window_(shape.window), pool_(checked_page_bytes(shape), budget_bytes) {
  if (prefix_cache) prefixes_ = std::make_unique<PrefixCache>(pool_, window_);
}

KvCache::~KvCache() { assert(sequences_ == 0); }

SequenceKv KvCache::open(std::string_view salt, std::span<const TokenId> tokens, std::int64_t limit) {
  SequenceKv sequence;
  sequence.open_ = true;
  ++sequences_;
  if (prefixes_ == nullptr || std::exchange(skip_registration_, false)) return sequence;

  PrefixCache::Prefix prefix = prefixes_->open(salt, tokens, limit);
  sequence.root_ = prefix.root;
  sequence.nodes_ = std::move(prefix.nodes);
  sequence.blocks_ = static_cast<std::int64_t>(sequence.nodes_.size());
  sequence.positions_ = sequence.blocks_ * kPageSize;
  sequence.prefix_positions_ = sequence.positions_;
  sequence.first_live_ = std::min(first_visible_page(sequence.positions_, window_), sequence.blocks_);
  for (int t = 0; t < kPageTables; ++t) {
    if (!pool_.has_table(t)) continue;
    sequence.tables_[t].resize(sequence.blocks_, kNoPage);
    for (std::int64_t b = t == 0 ? sequence.first_live_ : 0; b < sequence.blocks_; ++b) {
      sequence.tables_[t][b] = prefixes_->hold(sequence.nodes_[b], t);
    }
  }
  if (sequence.blocks_ > 0) ++holders_;
  return sequence;
}

void KvCache::count_lookup(const SequenceKv& sequence, std::int64_t limit) {
  if (prefixes_ == nullptr) return;
  prefix_lookup_tokens_ += limit;
  prefix_hit_tokens_ += sequence.prefix_positions_;
}

bool KvCache::reserve(SequenceKv& sequence, std::int64_t positions) {
  assert(sequence.open_);
  const std::int64_t before = sequence.blocks_;
  const std::int64_t blocks = ceil_div(positions, kPageSize);
  if (blocks <= before) return true;

  bool enough = may_reserve(sequence, positions, 0);  // else cached prefixes would be evicted in vain
  for (int t = 0; t < kPageTables && enough; ++t) {
    if (!pool_.has_table(t)) continue;
    for (std::int64_t b = before; b < blocks && enough; ++b) {
      std::optional<PageId> page = pool_.allocate(t);
      while (!page && prefixes_ != nullptr && prefixes_->evict_one()) page = pool_.allocate(t);
      enough = page.has_value();
      if (enough) sequence.tables_[t].push_back(*page);
    }
  }
  const bool alone = holders_ == (before > 0 ? 1 : 0);
  if (!enough) {
    for (auto& table : sequence.tables_) {
      while (static_cast<std::int64_t>(table.size()) > before) {
        pool_.release(table.back());
        table.pop_back();
      }
    }
    const auto rows = static_cast<int>(std::min<std::int64_t>(positions - sequence.positions_, INT_MAX));
    scattered_ = scattered_ || (alone && fits(positions, rows));
    return false;
  }
  if (before == 0) ++holders_;
  sequence.blocks_ = blocks;
  return true;
}

bool KvCache::may_reserve(const SequenceKv& sequence, std::int64_t positions, std::size_t freed) const {
  const std::int64_t blocks = ceil_div(positions, kPageSize) - sequence.blocks_;
  if (blocks <= 0) return true;
  std::size_t wanted = 0;
  std::size_t there = pool_.arena_bytes() - pool_.used_bytes() + freed;
  for (int t = 0; t < kPageTables; ++t) {
    wanted += pool_.page_bytes(t);
    if (prefixes_ != nullptr) there += static_cast<std::size_t>(prefixes_->cached_pages(t)) * pool_.page_bytes(t);
  }
  return static_cast<std::size_t>(blocks) <= there / wanted;
}

void KvCache::commit(SequenceKv& sequence, std::span<const TokenId> tokens) {
  const auto positions = static_cast<std::int64_t>(tokens.size());
  assert(sequence.open_ && positions >= sequence.positions_ && positions <= sequence.reserved());
  sequence.positions_ = positions;
  // Before pages slide out: a chunk longer than the window leaves all of its blocks to the prefix cache.
  if (sequence.root_ != nullptr) register_blocks(sequence, tokens);

  const std::int64_t visible = std::min(first_visible_page(positions, window_), sequence.blocks_);
  if (pool_.has_table(0)) {
    for (std::int64_t b = sequence.first_live_; b < visible; ++b) let_go(sequence, b, 0);
  }
  sequence.first_live_ = visible;

  const std::int64_t keep = positions / kPageSize + 1;
  while (sequence.blocks_ > keep) {
    --sequence.blocks_;
    for (int t = 0; t < kPageTables; ++t) {
      if (!pool_.has_table(t)) continue;
      let_go(sequence, sequence.blocks_, t);
      sequence.tables_[t].pop_back();
    }
  }
}

void KvCache::register_blocks(SequenceKv& sequence, std::span<const TokenId> tokens) {
  const auto complete = tokens.size() / kPageSize;
  for (std::size_t b = sequence.nodes_.size(); b < complete; ++b) {
    PerTable<PageId> pages{kNoPage, kNoPage};
    for (int t = 0; t < kPageTables; ++t) {
      if (pool_.has_table(t)) pages[t] = sequence.tables_[t][b];
    }
    PrefixCache::Node* parent = b == 0 ? sequence.root_ : sequence.nodes_.back();
    sequence.nodes_.push_back(prefixes_->extend(parent, tokens.subspan(b * kPageSize).first<kPageSize>(), pages));
    for (int t = 0; t < kPageTables; ++t) {
      if (pool_.has_table(t)) sequence.tables_[t][b] = pages[t];
    }
  }
}

void KvCache::let_go(SequenceKv& sequence, std::int64_t block, int table) {
  PageId& page = sequence.tables_[table][block];
  if (page == kNoPage) return;
  if (block < static_cast<std::int64_t>(sequence.nodes_.size())) {
    prefixes_->let_go(sequence.nodes_[block], table);
  } else {
    pool_.release(page);
  }
  page = kNoPage;
}

void KvCache::close(SequenceKv& sequence) {
  if (!sequence.open_) return;
  // From the end, so that under pressure the prefix gets shorter block by block: a sliding page is newer than its node,
  // which makes the node go as a whole.
  for (std::int64_t b = sequence.blocks_ - 1; b >= 0; --b) {
    if (b < static_cast<std::int64_t>(sequence.nodes_.size())) prefixes_->touch(sequence.nodes_[b]);
    for (int t = 0; t < kPageTables; ++t) {
      if (pool_.has_table(t)) let_go(sequence, b, t);
    }
  }
  if (sequence.root_ != nullptr) {
    prefixes_->close(sequence.nodes_.empty() ? sequence.root_ : sequence.nodes_.back());
  }
  if (sequence.blocks_ > 0) --holders_;
  --sequences_;
  sequence.open_ = false;
  sequence = SequenceKv();

  if (scattered_ && holders_ == 0) {
    drop_prefixes();
    scattered_ = false;
    skip_registration_ = true;
  }
}

bool KvCache::fits(std::int64_t positions, int max_step_rows) const {
  if (positions <= 0) return true;
  // What the last step needs, for each place in a page where it may end: a step that ends whole pages earlier needs
  // no more pages of either type.
  std::int64_t slabs = 0;
  for (std::int64_t end = positions; end > std::max<std::int64_t>(0, positions - kPageSize); --end) {
    const std::int64_t begin = std::max<std::int64_t>(0, end - std::max(max_step_rows, 1));
    const std::int64_t full = ceil_div(end, kPageSize);
    const std::int64_t sliding = full - first_visible_page(begin, window_);
    std::int64_t wanted = 0;
    if (pool_.has_table(0)) wanted += ceil_div(sliding, pool_.pages_per_slab(0));
    if (pool_.has_table(1)) wanted += ceil_div(full, pool_.pages_per_slab(1));
    slabs = std::max(slabs, wanted);
  }
  return slabs <= pool_.slabs();
}

void KvCache::drop_prefixes() {
  if (prefixes_ != nullptr) prefixes_->evict_all();
}

std::size_t KvCache::held_bytes(const SequenceKv& sequence) const {
  std::size_t bytes = 0;
  for (int t = 0; t < kPageTables; ++t) {
    const auto held = std::count_if(sequence.tables_[t].begin(), sequence.tables_[t].end(),
                                    [](PageId page) { return page != kNoPage; });
    bytes += static_cast<std::size_t>(held) * pool_.page_bytes(t);
  }
  return bytes;
}

std::size_t KvCache::own_bytes(const SequenceKv& sequence) const {
  std::size_t bytes = 0;
  for (int t = 0; t < kPageTables; ++t) {
    for (std::int64_t b = 0; b < sequence.pages(t); ++b) {
      const PageId page = sequence.tables_[t][b];
      if (page == kNoPage) continue;
      // The prefix cache holds one reference to each page of its blocks.
      const bool cached = b < static_cast<std::int64_t>(sequence.nodes_.size());
      if (pool_.references(page) == (cached ? 2U : 1U)) bytes += pool_.page_bytes(t);
    }
  }
  return bytes;
}

KvUse KvCache::use() const {
  KvUse use;
  use.budget_bytes = budget_bytes_;
  use.arena_bytes = pool_.arena_bytes();
  use.used_bytes = pool_.used_bytes();
  use.peak_bytes = pool_.peak_bytes();
  for (int t = 0; t < kPageTables; ++t) {
    use.pages_in_use[t] = pool_.pages_in_use(t);
    if (prefixes_ == nullptr) continue;
    use.cached_pages[t] = prefixes_->cached_pages(t);
    use.cached_bytes += static_cast<std::size_t>(use.cached_pages[t]) * pool_.page_bytes(t);
  }
  if (prefixes_ != nullptr) {
    use.cached_blocks = prefixes_->nodes();
    use.evicted_pages = prefixes_->evicted_pages();
  }
  use.sequences = sequences_;
  use.prefix_lookup_tokens = prefix_lookup_tokens_;
  use.prefix_hit_tokens = prefix_hit_tokens_;
  return use;
}

}  // namespace draftwerk
