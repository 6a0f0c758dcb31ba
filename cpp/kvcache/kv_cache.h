// The KV cache as the engine sees it: sequences that grow, commit and end, on pages from one budget.
//
//   sequence = cache.open(salt, prompt, prompt.size() - 1)      starts after the longest cached prefix
//   each step: cache.reserve(sequence, sequence.positions() + rows)
//              ... the step writes K/V of positions n .. n + rows - 1 through sequence.table(0 and 1) ...
//              cache.commit(sequence, tokens[0, n + accepted))
//   cache.close(sequence)                                       finished blocks stay cached
//
// Everything here is for the engine thread alone, but for arena_bytes() and fits(), which read what never changes; and
// throws nothing but std::bad_alloc outside the constructor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "kvcache/page_pool.h"
#include "kvcache/prefix_cache.h"

namespace draftwerk {

/// What the model's layers need.
struct KvShape {
  /// Bytes of one page (kPageSize positions) of all layers of each type together; 0: no such layers.
  std::size_t page_bytes[kPageTables] = {0, 0};
  /// Positions that a row of table 0 sees, its own included: p - window + 1 .. p. 0: no window, all of them.
  int window = 0;
};

/// Figures for statistics and for the scheduler.
struct KvUse {
  std::size_t budget_bytes = 0;  ///< as asked for
  std::size_t arena_bytes = 0;   ///< what the pages are cut from; at most the budget
  std::size_t used_bytes = 0;    ///< in pages held by sequences or by the prefix cache
  std::size_t peak_bytes = 0;    ///< the most that used_bytes ever was
  std::size_t cached_bytes = 0;  ///< the part of used_bytes that only the prefix cache holds, free on demand
  std::int64_t pages_in_use[kPageTables] = {0, 0};
  std::int64_t cached_pages[kPageTables] = {0, 0};  ///< of those, held by the prefix cache alone
  std::int64_t cached_blocks = 0;                   ///< blocks that the prefix cache knows
  std::int64_t sequences = 0;                       ///< open now
  /// Positions that lookups could at most have found; since the start, as all that follow.
  std::int64_t prefix_lookup_tokens = 0;
  std::int64_t prefix_hit_tokens = 0;  ///< positions found
  std::int64_t evicted_pages = 0;
};

/// The pages of one sequence. A move-only handle; must be closed by KvCache::close before destruction.
class SequenceKv {
 public:
  SequenceKv() = default;
  SequenceKv(const SequenceKv&) = delete;
  SequenceKv& operator=(const SequenceKv&) = delete;
  SequenceKv(SequenceKv&& other) noexcept;
  SequenceKv& operator=(SequenceKv&& other) noexcept;  ///< the target must be closed
  ~SequenceKv();

  /// The page of each kPageSize positions, as Segment::pages wants it; kNoPage where a sliding page was freed. Good
  /// until the next call to the cache with this sequence. Null or empty for a layer type that does not exist.
  [[nodiscard]] const PageId* table(int t) const { return tables_[t].data(); }
  /// Entries of table(t).
  [[nodiscard]] std::int64_t pages(int t) const { return static_cast<std::int64_t>(tables_[t].size()); }
  /// Positions with committed K/V; the next row to compute is at this position.
  [[nodiscard]] std::int64_t positions() const { return positions_; }
  /// Positions that rows may be written to: [0, reserved()).
  [[nodiscard]] std::int64_t reserved() const { return blocks_ * kPageSize; }
  /// Positions that came from the prefix cache.
  [[nodiscard]] std::int64_t prefix_positions() const { return prefix_positions_; }
  [[nodiscard]] bool is_open() const { return open_; }

 private:
  friend class KvCache;

  PerTable<std::vector<PageId>> tables_;
  std::vector<PrefixCache::Node*> nodes_;  // of the registered blocks: a prefix of the committed ones
  PrefixCache::Node* root_ = nullptr;      // null: registers nothing
  std::int64_t positions_ = 0;
  std::int64_t prefix_positions_ = 0;
  std::int64_t blocks_ = 0;      // allocated, those that slid out included
  std::int64_t first_live_ = 0;  // first block that still has its page in table 0
  bool open_ = false;
};

class KvCache {
 public:
  /// `prefix_cache`: whether finished blocks are kept for later sequences. Throws std::invalid_argument if the shape
  /// is empty or negative, or if the budget does not hold a page of the larger type for each type (PagePool).
  KvCache(const KvShape& shape, std::size_t budget_bytes, bool prefix_cache);
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;
  KvCache(KvCache&&) = delete;
  KvCache& operator=(KvCache&&) = delete;
  ~KvCache();  ///< every sequence must have been closed

  /// Bytes of KV arena that the page ids address; at most the budget.
  [[nodiscard]] std::size_t arena_bytes() const { return pool_.arena_bytes(); }

  /// A sequence over `tokens` that starts with the longest cached prefix of at most `limit` positions (a prompt's last
  /// token must be computed, so the limit is its length - 1). Only sequences with the same salt share pages. An open
  /// sequence keeps its pages from eviction: what is to be had back under pressure must be closed, its blocks stay
  /// cached.
  SequenceKv open(std::string_view salt, std::span<const TokenId> tokens, std::int64_t limit);

  /// Counts what open() found for a sequence, of `limit` positions: for one that goes on, as others are closed and
  /// opened again until there is room.
  void count_lookup(const SequenceKv& sequence, std::int64_t limit);

  /// Makes room for positions [0, positions): allocates what is missing, evicting cached prefixes if needed. False if
  /// that is not enough, and then nothing has changed but for the evictions: the scheduler preempts or queues.
  ///
  /// Where fits() holds, preempting (closing) all other sequences and then this one makes room in the end: its pages
  /// may be scattered so that too few slabs are whole, and in that case closing it drops the prefix cache, and the
  /// next sequence to open starts from an empty arena.
  [[nodiscard]] bool reserve(SequenceKv& sequence, std::int64_t positions);
  /// Whether reserve() might succeed if others gave back so many bytes. False: it would not.
  [[nodiscard]] bool may_reserve(const SequenceKv& sequence, std::int64_t positions, std::size_t freed) const;

  /// The K/V of `tokens` (all of the sequence, from position 0; not fewer than last time) is now valid: registers
  /// finished blocks with the prefix cache, frees the pages that no row from position tokens.size() on can see through
  /// the window, and the pages beyond the current block that rejected drafts no longer need. Takes time for what is
  /// new. Pages of finished blocks may be exchanged for equal ones of another sequence.
  void commit(SequenceKv& sequence, std::span<const TokenId> tokens);

  /// Gives all pages back. Finished blocks stay in the prefix cache until evicted. Closing twice is harmless.
  void close(SequenceKv& sequence);

  /// Could a sequence of this many positions, alone in an empty cache, always go on in steps of up to `max_step_rows`
  /// rows? (The rows of a step all need pages at once, beside the window.)
  [[nodiscard]] bool fits(std::int64_t positions, int max_step_rows) const;

  /// Evicts every cached prefix that no open sequence holds.
  void drop_prefixes();

  /// Bytes in the pages that this sequence shares with no other one now.
  [[nodiscard]] std::size_t own_bytes(const SequenceKv& sequence) const;
  /// Bytes in all of its pages.
  [[nodiscard]] std::size_t held_bytes(const SequenceKv& sequence) const;

  [[nodiscard]] KvUse use() const;

 private:
  void register_blocks(SequenceKv& sequence, std::span<const TokenId> tokens);
  void let_go(SequenceKv& sequence, std::int64_t block, int table);

  std::size_t budget_bytes_;
  int window_;
  PagePool pool_;
  std::unique_ptr<PrefixCache> prefixes_;  // null: switched off
  std::int64_t sequences_ = 0;
  std::int64_t holders_ = 0;        // open sequences that have pages
  bool scattered_ = false;          // a sequence alone found too little room although it fits()
  bool skip_registration_ = false;  // for the next sequence to open: it must not leave pages behind
  std::int64_t prefix_lookup_tokens_ = 0;
  std::int64_t prefix_hit_tokens_ = 0;
};

}  // namespace draftwerk
