// The KV cache against a plain model of it, over random operations.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <list>
#include <map>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvcache/kv_cache.h"

namespace draftwerk {
namespace {

using Tokens = std::vector<TokenId>;

constexpr std::size_t kUnit = kPageUnit;

/// The cache written without any cleverness: full scans, whole token strings as keys, ages as one counter. It follows
/// the real one's page ids and its number of evictions, and knows by itself what must be found, kept and evicted.
class Model {
 public:
  struct Entry {
    PerTable<PageId> pages{kNoPage, kNoPage};
    std::uint64_t used = 0;
    std::uint64_t slid_out = 0;
  };
  using Key = std::pair<std::string, Tokens>;  // salt and all tokens up to the end of the block
  struct Sequence {
    std::string salt;
    Tokens text;                 // what it will commit
    std::int64_t positions = 0;  // committed
    std::int64_t blocks = 0;     // with pages; while evictions are followed, those before the reservation
    bool registers = true;       // false: the first after a scattered arena was emptied
    SequenceKv kv;
  };

  explicit Model(const KvShape& shape) : shape_(shape) {}

  std::list<Sequence> sequences;
  std::map<Key, Entry> entries;

  static Key key(const Sequence& s, std::int64_t blocks) {
    return {s.salt, Tokens(s.text.begin(), s.text.begin() + blocks * kPageSize)};
  }
  [[nodiscard]] bool visible(std::int64_t block, std::int64_t position) const {
    return shape_.window == 0 || (block + 1) * kPageSize - 1 > position - shape_.window;
  }

  [[nodiscard]] std::int64_t longest(const Sequence& s, std::int64_t limit) const {
    std::int64_t best = 0;
    for (std::int64_t p = 1; p * kPageSize <= limit; ++p) {
      bool usable = true;
      for (std::int64_t b = 0; b < p && usable; ++b) {
        const auto found = entries.find(key(s, b + 1));
        usable = found != entries.end() && (shape_.page_bytes[1] == 0 || found->second.pages[1] != kNoPage) &&
                 (shape_.page_bytes[0] == 0 || !visible(b, p * kPageSize) || found->second.pages[0] != kNoPage);
      }
      if (usable) best = p;
    }
    return best * kPageSize;
  }

  /// Sequences (other than `except`) that hold the page in `table`.
  [[nodiscard]] int holders(int table, PageId page, const Sequence* except = nullptr) const {
    int count = 0;
    for (const Sequence& s : sequences) {
      if (&s == except) continue;
      const std::int64_t pages = std::min(s.blocks, s.kv.pages(table));
      count += static_cast<int>(std::count(s.kv.table(table), s.kv.table(table) + pages, page));
    }
    return count;
  }

  /// Registers the blocks that the real sequence finished since `before` positions.
  void commit(const Sequence& s, std::int64_t before) {
    for (std::int64_t b = before / kPageSize; (b + 1) * kPageSize <= s.positions; ++b) {
      const auto [entry, fresh] = entries.try_emplace(key(s, b + 1));
      if (fresh) entry->second.used = ++clock_;
      for (int t = 0; t < kPageTables; ++t) {
        PageId& page = entry->second.pages[t];
        const PageId now = s.kv.pages(t) == 0 ? kNoPage : s.kv.table(t)[b];
        if (now != kNoPage) {
          if (page != kNoPage) {
            ASSERT_EQ(page, now) << "not exchanged for the known page";
          }
          page = now;
        }
      }
    }
  }

  void close(const Sequence& s) {
    for (std::int64_t b = s.positions / kPageSize - 1; b >= 0; --b) {
      entries.at(key(s, b + 1)).used = ++clock_;
      if (s.kv.pages(0) > 0 && s.kv.table(0)[b] != kNoPage) let_go_sliding(s, b);
    }
  }

  /// A page that went straight from the sequence to the cache within one commit: learn it from the sequence's pages
  /// before the commit.
  void note_sliding_page(const Sequence& s, std::int64_t block, PageId page) {
    PageId& known = entries.at(key(s, block + 1)).pages[0];
    if (known == kNoPage) known = page;
  }

  void let_go_sliding(const Sequence& s, std::int64_t block) {
    Entry& entry = entries.at(key(s, block + 1));
    if (holders(0, entry.pages[0], &s) == 0) entry.slid_out = ++clock_;
  }

  /// One eviction; returns the pages that it frees.
  int evict() {
    std::uint64_t oldest = UINT64_MAX;
    auto sliding = entries.end();
    auto leaf = entries.end();
    for (auto e = entries.begin(); e != entries.end(); ++e) {
      const PageId page = e->second.pages[0];
      if (shape_.window > 0 && page != kNoPage && holders(0, page) == 0 && e->second.slid_out < oldest) {
        oldest = e->second.slid_out;
        sliding = e;
      }
    }
    for (auto e = entries.begin(); e != entries.end(); ++e) {
      if (e->second.used < oldest && is_free_leaf(e->first)) {
        oldest = e->second.used;
        leaf = e;
      }
    }
    if (leaf != entries.end()) {
      const int freed = (leaf->second.pages[0] != kNoPage ? 1 : 0) + (leaf->second.pages[1] != kNoPage ? 1 : 0);
      entries.erase(leaf);
      prune();
      return freed;
    }
    if (sliding == entries.end()) return 0;
    sliding->second.pages[0] = kNoPage;
    prune();
    return 1;
  }

  /// Entries at the end of a chain that hold no page are of no use.
  void prune() {
    for (auto e = entries.begin(); e != entries.end();) {
      const bool empty = e->second.pages[0] == kNoPage && e->second.pages[1] == kNoPage && is_free_leaf(e->first);
      if (empty) entries.erase(e);
      e = empty ? entries.begin() : std::next(e);
    }
  }

  /// Pages that the cache alone holds.
  [[nodiscard]] std::int64_t cached(int table) const {
    std::int64_t count = 0;
    for (const auto& [k, entry] : entries) {
      count += entry.pages[table] != kNoPage && holders(table, entry.pages[table]) == 0 ? 1 : 0;
    }
    return count;
  }

  /// All pages in use, once each.
  [[nodiscard]] std::set<PageId> pages(int table) const {
    std::set<PageId> all;
    for (const auto& [k, entry] : entries) all.insert(entry.pages[table]);
    for (const Sequence& s : sequences) all.insert(s.kv.table(table), s.kv.table(table) + s.kv.pages(table));
    all.erase(kNoPage);
    return all;
  }

 private:
  [[nodiscard]] bool is_free_leaf(const Key& k) const {
    for (const auto& [other, entry] : entries) {
      if (other.first == k.first && other.second.size() > k.second.size() &&
          std::equal(k.second.begin(), k.second.end(), other.second.begin())) {
        return false;
      }
    }
    return std::none_of(sequences.begin(), sequences.end(), [&](const Sequence& s) {
      return s.kv.is_open() && s.registers && s.salt == k.first &&
             s.positions >= static_cast<std::int64_t>(k.second.size()) &&
             std::equal(k.second.begin(), k.second.end(), s.text.begin());
    });
  }

  KvShape shape_;
  std::uint64_t clock_ = 0;
};

/// What a device would have stored for one position: a number that depends on all tokens so far.
std::uint64_t contents(std::span<const TokenId> tokens) {
  std::uint64_t value = 1;
  for (const TokenId token : tokens) value = value * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(token) + 1;
  return value;
}

class StateMachine {
 public:
  StateMachine(unsigned seed, const KvShape& shape, std::size_t budget)
      : random_(seed), shape_(shape), budget_(budget), cache_(shape, budget, true), model_(shape) {}

  void run(int operations) {
    for (int i = 0; i < operations && !testing::Test::HasFatalFailure(); ++i) {
      const unsigned dice = random_() % 20;
      if (model_.sequences.empty() || (dice < 2 && model_.sequences.size() < 6)) {
        open();
      } else {
        auto s = model_.sequences.begin();
        std::advance(s, random_() % model_.sequences.size());
        if (dice == 2) {
          close(s);
        } else {
          step(s);
        }
      }
      check();
    }
    while (!model_.sequences.empty()) close(model_.sequences.begin());
    check();
    cache_.drop_prefixes();
    const KvUse use = cache_.use();
    EXPECT_EQ(use.used_bytes, 0U);
    EXPECT_EQ(use.cached_bytes, 0U);
    EXPECT_EQ(use.cached_blocks, 0);
  }

  std::int64_t hits = 0;
  std::int64_t failures = 0;
  std::int64_t evictions = 0;

 private:
  using Position = std::list<Model::Sequence>::iterator;

  /// Prompts of few distinct blocks, so that prefixes recur.
  Tokens text() {
    Tokens tokens;
    while (tokens.size() < 400) {
      const int first = random_() % 5 == 0 ? static_cast<int>(random_() % 3) : 0;
      for (int i = 0; i < kPageSize; ++i) tokens.push_back(first * 100 + i);
    }
    const std::size_t changed = random_() % tokens.size();
    if (random_() % 3 == 0) tokens[changed] = static_cast<TokenId>(random_() % 7);
    return tokens;
  }

  void open() {
    Model::Sequence& s = model_.sequences.emplace_back();
    s.salt = random_() % 4 == 0 ? "other" : "";
    s.text = text();
    const auto prompt = static_cast<std::int64_t>(random_() % 300);
    s.registers = !std::exchange(skip_, false);
    const std::int64_t expected = s.registers ? model_.longest(s, prompt) : 0;
    s.kv = cache_.open(s.salt, std::span(s.text).first(static_cast<std::size_t>(prompt + 1)), prompt);
    ASSERT_EQ(s.kv.positions(), expected);
    s.positions = expected;
    s.blocks = expected / kPageSize;
    hits += expected;
    for (int t = 0; t < kPageTables; ++t) {
      for (std::int64_t b = 0; b < s.kv.pages(t); ++b) {
        const bool needed = t == 1 || model_.visible(b, expected);
        ASSERT_EQ(s.kv.table(t)[b], needed ? model_.entries.at(Model::key(s, b + 1)).pages[t] : kNoPage);
      }
    }
  }

  /// Whether no other sequence has pages.
  bool alone(Position s) {
    for (auto other = model_.sequences.begin(); other != model_.sequences.end(); ++other) {
      if (other != s && other->blocks > 0) return false;
    }
    return true;
  }

  void close(Position s) {
    if (s->registers) model_.close(*s);
    if (scattered_ && alone(s)) {
      scattered_ = false;
      skip_ = true;
    }
    cache_.close(s->kv);
    model_.sequences.erase(s);
    model_.prune();
    // Closing evicts only if the arena was scattered: see KvCache::reserve.
    follow_evictions();
  }

  void follow_evictions() {
    while (evictions < cache_.use().evicted_pages) {
      const int freed = model_.evict();
      ASSERT_GT(freed, 0) << "evicted a page that was in use";
      evictions += freed;
    }
    ASSERT_EQ(evictions, cache_.use().evicted_pages);
  }

  void step(Position s) {
    const std::int64_t before = s->positions;
    const auto left = static_cast<std::int64_t>(s->text.size()) - before;
    if (left == 0) return close(s);
    // Mostly decoding with some drafts, sometimes a chunk of prompt.
    const auto rows = std::min(left, static_cast<std::int64_t>(1 + random_() % (random_() % 4 == 0 ? 100 : 6)));
    const KvUse use = cache_.use();
    const std::int64_t reserved = s->kv.reserved();
    if (!cache_.reserve(s->kv, before + rows)) {
      ++failures;
      scattered_ = scattered_ || (alone(s) && cache_.fits(before + rows, static_cast<int>(rows)));
      follow_evictions();
      ASSERT_EQ(s->kv.reserved(), reserved);
      std::size_t wanted = 0;
      for (int t = 0; t < kPageTables; ++t) {
        ASSERT_EQ(s->kv.pages(t), shape_.page_bytes[t] == 0 ? 0 : reserved / kPageSize);
        const std::int64_t missing = (before + rows + kPageSize - 1 - reserved) / kPageSize;
        wanted += static_cast<std::size_t>(missing) * shape_.page_bytes[t];
      }
      const bool hopeless = wanted > use.arena_bytes - use.used_bytes + use.cached_bytes;
      ASSERT_EQ(cache_.use().cached_bytes, hopeless ? use.cached_bytes : 0) << "gave up too early or too late";
      if (random_() % 2 == 0) close(model_.sequences.begin());
      return;
    }
    follow_evictions();
    ASSERT_GE(s->kv.reserved(), before + rows);
    s->blocks = s->kv.reserved() / kPageSize;

    // The rows see what they must see, and write; rejected drafts leave rubbish behind.
    const auto accepted =
        random_() % 3 == 0 ? static_cast<std::int64_t>(random_() % static_cast<unsigned>(rows)) : rows;
    for (int t = 0; t < kPageTables; ++t) {
      if (shape_.page_bytes[t] == 0) continue;
      for (std::int64_t p = 0; p < before; ++p) {
        if (t == 0 && shape_.window > 0 && p <= before - shape_.window) continue;
        const PageId page = s->kv.table(t)[p / kPageSize];
        ASSERT_NE(page, kNoPage);
        ASSERT_EQ(memory_[page][p % kPageSize], contents(std::span(s->text).first(static_cast<std::size_t>(p + 1))));
      }
      for (std::int64_t p = before; p < before + rows; ++p) {
        const PageId page = s->kv.table(t)[p / kPageSize];
        ASSERT_NE(page, kNoPage);
        ASSERT_EQ(model_.holders(t, page), 1) << "writes to a page of others";
        const bool right = p < before + accepted;
        memory_[page][p % kPageSize] =
            right ? contents(std::span(s->text).first(static_cast<std::size_t>(p + 1))) : random_();
      }
    }

    std::vector<PageId> sliding(s->kv.table(0), s->kv.table(0) + s->kv.pages(0));
    s->positions = before + accepted;
    cache_.commit(s->kv, std::span(s->text).first(static_cast<std::size_t>(s->positions)));
    std::vector<std::int64_t> slid;
    for (std::int64_t b = 0; b < s->kv.pages(0); ++b) {
      const bool kept = model_.visible(b, s->positions);
      ASSERT_EQ(s->kv.table(0)[b] != kNoPage, kept);
      if (!kept && sliding[b] != kNoPage) slid.push_back(b);
    }
    if (s->registers) model_.commit(*s, before);
    if (!s->registers) slid.clear();
    for (const std::int64_t b : slid) {
      model_.note_sliding_page(*s, b, sliding[b]);
      model_.let_go_sliding(*s, b);
    }
    const std::int64_t blocks = (before + rows + kPageSize - 1) / kPageSize;
    const std::int64_t keep = s->positions / kPageSize + 1;
    ASSERT_EQ(s->kv.reserved(), std::min(std::max(blocks, reserved / kPageSize), keep) * kPageSize);
    s->blocks = s->kv.reserved() / kPageSize;
  }

  void check() {
    const KvUse use = cache_.use();
    ASSERT_LE(use.arena_bytes, budget_);
    ASSERT_LE(use.used_bytes, use.arena_bytes);
    ASSERT_GE(use.peak_bytes, use.used_bytes);
    ASSERT_EQ(use.cached_blocks, static_cast<std::int64_t>(model_.entries.size()));
    ASSERT_EQ(use.sequences, static_cast<std::int64_t>(model_.sequences.size()));
    std::size_t used = 0;
    std::size_t cached = 0;
    std::map<std::size_t, std::size_t> ranges;  // bytes of the arena in use: begin, end
    for (int t = 0; t < kPageTables; ++t) {
      const std::set<PageId> pages = model_.pages(t);
      ASSERT_EQ(use.pages_in_use[t], static_cast<std::int64_t>(pages.size()));
      ASSERT_EQ(use.cached_pages[t], model_.cached(t));
      used += pages.size() * shape_.page_bytes[t];
      cached += static_cast<std::size_t>(use.cached_pages[t]) * shape_.page_bytes[t];
      for (const PageId page : pages) {
        ASSERT_TRUE(ranges.emplace(page * kUnit, page * kUnit + shape_.page_bytes[t]).second);
      }
    }
    ASSERT_EQ(use.used_bytes, used);
    ASSERT_EQ(use.cached_bytes, cached);
    std::size_t end = 0;
    for (const auto& [first, last] : ranges) {
      ASSERT_GE(first, end) << "pages overlap";
      end = last;
    }
    ASSERT_LE(end, use.arena_bytes);
  }

  std::mt19937 random_;
  KvShape shape_;
  std::size_t budget_;
  KvCache cache_;
  Model model_;
  std::map<PageId, std::array<std::uint64_t, kPageSize>> memory_;
  bool scattered_ = false;
  bool skip_ = false;
};

TEST(KvCacheStateMachine, AgreesWithAPlainModel) {
  std::int64_t hits = 0;
  std::int64_t failures = 0;
  std::int64_t evictions = 0;
  for (unsigned seed = 0; seed < 24 && !testing::Test::HasFatalFailure(); ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    KvShape shape{{(1 + random() % 5) * kUnit, (1 + random() % 5) * kUnit}, static_cast<int>(random() % 60)};
    if (seed % 8 == 6) shape.page_bytes[0] = 0;
    if (seed % 8 == 7) shape.page_bytes[1] = 0;
    const std::size_t largest = std::max(shape.page_bytes[0], shape.page_bytes[1]);
    StateMachine machine(seed, shape, largest * (12 + random() % 60));
    machine.run(500);
    hits += machine.hits;
    failures += machine.failures;
    evictions += machine.evictions;
  }
  // The machine must have been where it is interesting.
  EXPECT_GT(hits, 1000);
  EXPECT_GT(failures, 100);
  EXPECT_GT(evictions, 1000);
}

}  // namespace
}  // namespace draftwerk
