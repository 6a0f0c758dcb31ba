#include "kvcache/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace draftwerk {
namespace {

using Tokens = std::vector<TokenId>;

constexpr std::size_t kUnit = kPageUnit;

Tokens tokens_from(int first, int count) {
  Tokens tokens(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) tokens[i] = first + i;
  return tokens;
}

/// Runs the sequence to `n` positions in steps of `chunk`.
void advance(KvCache& cache, SequenceKv& sequence, const Tokens& tokens, std::int64_t n, std::int64_t chunk = 16) {
  while (sequence.positions() < n) {
    const std::int64_t next = std::min(n, sequence.positions() + chunk);
    ASSERT_TRUE(cache.reserve(sequence, next));
    cache.commit(sequence, std::span(tokens).first(static_cast<std::size_t>(next)));
  }
}

TEST(KvCache, RefusesWhatCannotWork) {
  EXPECT_THROW(KvCache({{0, 0}, 16}, 1 << 20, true), std::invalid_argument);
  EXPECT_THROW(KvCache({{kUnit, kUnit}, -1}, 1 << 20, true), std::invalid_argument);
  EXPECT_THROW(KvCache({{kUnit, kUnit}, 16}, kUnit, true), std::invalid_argument);
}

TEST(KvCache, FreesPagesThatSlidOutOfTheWindow) {
  for (const int window : {1, 5, 16, 17, 32, 33, 40}) {
    KvCache cache({{kUnit, kUnit}, window}, 64 * kUnit, false);
    const Tokens tokens = tokens_from(0, 200);
    SequenceKv sequence = cache.open("", tokens, 199);
    for (std::int64_t n = 1; n <= 200; ++n) {
      advance(cache, sequence, tokens, n);
      for (std::int64_t b = 0; b < sequence.pages(0); ++b) {
        // The next row, at n, sees n - window + 1 .. n.
        const bool visible = (b + 1) * kPageSize - 1 >= n - window + 1;
        ASSERT_EQ(sequence.table(0)[b] != kNoPage, visible) << window << ' ' << n << ' ' << b;
        ASSERT_NE(sequence.table(1)[b], kNoPage);
      }
    }
    cache.close(sequence);
    EXPECT_EQ(cache.use().used_bytes, 0U);
  }
}

TEST(KvCache, GivesBackThePagesOfRejectedDrafts) {
  KvCache cache({{kUnit, kUnit}, 64}, 64 * kUnit, true);
  const Tokens tokens = tokens_from(0, 40);
  SequenceKv sequence = cache.open("", tokens, 39);
  ASSERT_TRUE(cache.reserve(sequence, 60));
  EXPECT_EQ(sequence.reserved(), 64);
  cache.commit(sequence, std::span(tokens).first(31));
  EXPECT_EQ(sequence.reserved(), 32);
  ASSERT_TRUE(cache.reserve(sequence, 60));
  cache.commit(sequence, std::span(tokens).first(32));  // the current block is the empty third one
  EXPECT_EQ(sequence.reserved(), 48);
  cache.close(sequence);
  cache.close(sequence);
  EXPECT_EQ(cache.use().used_bytes, 4 * kUnit);
  EXPECT_EQ(cache.use().cached_bytes, 4 * kUnit);
}

TEST(KvCache, StartsFromTheLongestPrefix) {
  KvCache cache({{kUnit, kUnit}, 20}, 256 * kUnit, true);
  const Tokens tokens = tokens_from(0, 100);
  SequenceKv first = cache.open("t", tokens, 99);
  EXPECT_EQ(first.positions(), 0);
  advance(cache, first, tokens, 100);
  std::vector<PageId> full(first.table(1), first.table(1) + 6);
  SequenceKv second = cache.open("t", tokens, 99);  // while the first is still running
  EXPECT_EQ(second.positions(), 96);
  EXPECT_EQ(second.prefix_positions(), 96);
  EXPECT_EQ(std::vector<PageId>(second.table(1), second.table(1) + 6), full);
  for (int b = 0; b < 6; ++b) EXPECT_EQ(second.table(0)[b] != kNoPage, b >= 4);  // 96 - 19 = 77 is in block 4
  SequenceKv third = cache.open("t", tokens, 95);
  EXPECT_EQ(third.positions(), 80);
  SequenceKv other = cache.open("u", tokens, 99);
  EXPECT_EQ(other.positions(), 0);
  EXPECT_EQ(cache.use().prefix_lookup_tokens, 0);
  for (const SequenceKv* s : {&first, &second, &other}) cache.count_lookup(*s, 99);
  cache.count_lookup(third, 95);
  const KvUse use = cache.use();
  EXPECT_EQ(use.prefix_lookup_tokens, 99 + 99 + 95 + 99);
  EXPECT_EQ(use.prefix_hit_tokens, 96 + 80);
  EXPECT_EQ(use.sequences, 4);
  for (SequenceKv* s : {&first, &second, &third, &other}) cache.close(*s);
}

TEST(KvCache, WithoutPrefixCacheNothingStays) {
  KvCache cache({{kUnit, kUnit}, 20}, 64 * kUnit, false);
  const Tokens tokens = tokens_from(0, 100);
  for (int round = 0; round < 2; ++round) {
    SequenceKv sequence = cache.open("", tokens, 99);
    EXPECT_EQ(sequence.positions(), 0);
    advance(cache, sequence, tokens, 100);
    cache.close(sequence);
    EXPECT_EQ(cache.use().used_bytes, 0U);
  }
}

TEST(KvCache, EqualBlocksOfRunningSequencesShareTheirPages) {
  KvCache cache({{kUnit, kUnit}, 64}, 64 * kUnit, true);
  const Tokens tokens = tokens_from(0, 40);
  SequenceKv a = cache.open("", tokens, 39);
  SequenceKv b = cache.open("", tokens, 39);
  advance(cache, a, tokens, 40, 40);
  advance(cache, b, tokens, 40, 7);
  for (int t = 0; t < kPageTables; ++t) {
    for (int block = 0; block < 3; ++block) EXPECT_EQ(a.table(t)[block] == b.table(t)[block], block < 2);
    EXPECT_EQ(cache.use().pages_in_use[t], 4);
  }
  cache.close(a);
  EXPECT_EQ(cache.use().cached_bytes, 0U);
  cache.close(b);
  EXPECT_EQ(cache.use().cached_bytes, 4 * kUnit);
}

/// A chunk longer than the window: its early blocks slide out at once, and still serve a prompt that ends there.
TEST(KvCache, CachesAllBlocksOfALongChunk) {
  KvCache cache({{kUnit, kUnit}, 20}, 256 * kUnit, true);
  const Tokens tokens = tokens_from(0, 320);
  SequenceKv a = cache.open("", tokens, 319);
  advance(cache, a, tokens, 320, 320);
  for (std::int64_t n = 0; n <= 320; n += 13) {
    SequenceKv b = cache.open("", std::span(tokens).first(static_cast<std::size_t>(n)), n);
    EXPECT_EQ(b.positions(), n / kPageSize * kPageSize);
    cache.close(b);
  }
  cache.close(a);
}

TEST(KvCache, LayerTypesMayBeMissing) {
  for (const KvShape& shape : {KvShape{{kUnit, 0}, 20}, KvShape{{0, kUnit}, 0}, KvShape{{kUnit, 0}, 0}}) {
    KvCache cache(shape, 64 * kUnit, true);
    const Tokens tokens = tokens_from(0, 100);
    for (int round = 0; round < 2; ++round) {
      SequenceKv sequence = cache.open("", tokens, 99);
      EXPECT_EQ(sequence.positions(), round == 0 ? 0 : 96);
      advance(cache, sequence, tokens, 100);
      for (int t = 0; t < kPageTables; ++t) EXPECT_EQ(sequence.pages(t), shape.page_bytes[t] == 0 ? 0 : 7);
      cache.close(sequence);
    }
    cache.drop_prefixes();
    EXPECT_EQ(cache.use().used_bytes, 0U);
    EXPECT_EQ(cache.use().cached_blocks, 0);
  }
}

TEST(KvCache, AFailedReservationChangesNothing) {
  KvCache cache({{kUnit, kUnit}, 1000}, 8 * kUnit, true);
  const Tokens tokens = tokens_from(0, 100);
  SequenceKv sequence = cache.open("", tokens, 99);
  advance(cache, sequence, tokens, 40);
  const PageId before = sequence.table(0)[2];
  EXPECT_FALSE(cache.reserve(sequence, 65));
  EXPECT_EQ(sequence.reserved(), 48);
  EXPECT_EQ(sequence.table(0)[2], before);
  EXPECT_EQ(cache.use().used_bytes, 6 * kUnit);
  EXPECT_TRUE(cache.reserve(sequence, 64));
  cache.close(sequence);
}

TEST(SequenceKv, MovesItsPages) {
  KvCache cache({{kUnit, kUnit}, 64}, 64 * kUnit, true);
  const Tokens tokens = tokens_from(0, 40);
  SequenceKv a = cache.open("", tokens, 39);
  advance(cache, a, tokens, 40);
  SequenceKv b = std::move(a);
  EXPECT_FALSE(a.is_open());  // NOLINT(bugprone-use-after-move): a moved-from handle is closed
  EXPECT_EQ(b.positions(), 40);
  a = std::move(b);
  EXPECT_TRUE(a.is_open());
  cache.close(a);
  EXPECT_EQ(cache.use().sequences, 0);
}

// --- fits() --------------------------------------------------------------------------------------------------------

/// Slabs that a lone sequence needs to hold positions [0, end) for a step that starts at `begin`, counted page by page.
std::int64_t slabs_needed(const PagePool& pool, int window, std::int64_t begin, std::int64_t end) {
  PerTable<std::set<std::int64_t>> pages;
  for (std::int64_t p = 0; p < end; ++p) {
    pages[1].insert(p / kPageSize);
    if (window == 0 || p > begin - window) pages[0].insert(p / kPageSize);
  }
  std::int64_t slabs = 0;
  for (int t = 0; t < kPageTables; ++t) {
    if (!pool.has_table(t)) continue;
    for (std::int64_t left = static_cast<std::int64_t>(pages[t].size()); left > 0; left -= pool.pages_per_slab(t)) {
      ++slabs;
    }
  }
  return slabs;
}

TEST(KvCacheFits, AgreesWithCounting) {
  std::mt19937 random(3);
  int fitting = 0;
  constexpr int kRounds = 300;
  for (int round = 0; round < kRounds; ++round) {
    const PerTable<std::size_t> sizes{random() % 6 * kUnit, (1 + random() % 5) * kUnit};
    const int window = static_cast<int>(random() % 70);
    const std::size_t budget = (10 + random() % 40) * kUnit;
    const KvCache cache({{sizes[0], sizes[1]}, window}, budget, false);
    const PagePool pool(sizes, budget);
    const auto positions = static_cast<std::int64_t>(1 + random() % 150);
    const int rows = static_cast<int>(1 + random() % 40);
    std::int64_t worst = 0;
    for (std::int64_t begin = 0; begin < positions; ++begin) {
      worst = std::max(worst, slabs_needed(pool, window, begin, std::min(positions, begin + rows)));
    }
    ASSERT_EQ(cache.fits(positions, rows), worst <= pool.slabs()) << sizes[0] << ' ' << sizes[1] << ' ' << window;
    fitting += worst <= pool.slabs() ? 1 : 0;
  }
  EXPECT_GT(fitting, kRounds / 5);
  EXPECT_LT(fitting, kRounds * 4 / 5);
}

TEST(KvCacheFits, SurvivesAbsurdLengths) {
  KvCache cache({{kUnit, kUnit}, 512}, 64 * kUnit, true);
  EXPECT_TRUE(cache.fits(0, 8));
  EXPECT_FALSE(cache.fits(INT64_MAX, INT32_MAX));
  EXPECT_FALSE(cache.fits(std::int64_t{1} << 40, 1));
  SequenceKv sequence = cache.open("", {}, 0);
  EXPECT_FALSE(cache.reserve(sequence, INT64_MAX));
  cache.close(sequence);
}

/// What fits always gets through, however scattered the arena was before: preempting the others and then itself.
TEST(KvCacheFits, WhatFitsGetsThrough) {
  std::mt19937 random(5);
  int restarts = 0;
  for (int round = 0; round < 400; ++round) {
    const KvShape shape{{(1 + random() % 8) * kUnit, (1 + random() % 8) * kUnit}, static_cast<int>(random() % 60)};
    const std::size_t largest = std::max(shape.page_bytes[0], shape.page_bytes[1]);
    KvCache cache(shape, largest * (4 + random() % 20), random() % 3 != 0);
    const int max_rows = static_cast<int>(1 + random() % 40);
    std::int64_t positions = 0;
    while (positions < 600 && cache.fits(positions + 1, max_rows)) ++positions;
    if (positions == 0) continue;
    const Tokens tokens = tokens_from(0, static_cast<int>(positions));
    const auto step = [&](SequenceKv& sequence, const Tokens& of, std::int64_t most) {
      const std::int64_t n = std::min(most, sequence.positions() + 1 + static_cast<std::int64_t>(random() % max_rows));
      if (!cache.reserve(sequence, n)) return false;
      cache.commit(sequence, std::span(of).first(static_cast<std::size_t>(n)));
      return true;
    };

    // Others run beside it until memory is short, then leave.
    SequenceKv sequence = cache.open("", tokens, positions - 1);
    std::list<std::pair<SequenceKv, Tokens>> others;
    for (int i = 0; i < 4; ++i) {
      Tokens text = tokens_from(1000 * (i + 1), static_cast<int>(positions));
      SequenceKv kv = cache.open("", text, positions - 1);
      others.emplace_back(std::move(kv), std::move(text));
    }
    bool room = true;
    while (room && sequence.positions() < positions) {
      room = step(sequence, tokens, positions);
      for (auto& [kv, text] : others) room = room && (kv.positions() == positions || step(kv, text, positions));
    }
    for (auto& [kv, text] : others) cache.close(kv);

    int failures = 0;
    while (sequence.positions() < positions) {
      if (step(sequence, tokens, positions)) continue;
      ASSERT_EQ(++failures, 1) << "round " << round;
      cache.close(sequence);
      sequence = cache.open("", tokens, positions - 1);
    }
    restarts += failures;
    cache.close(sequence);
    cache.drop_prefixes();
    ASSERT_EQ(cache.use().used_bytes, 0U);
  }
  EXPECT_GT(restarts, 0) << "no round met a scattered arena";
}

}  // namespace
}  // namespace draftwerk
