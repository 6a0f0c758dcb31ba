#include "kvcache/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace draftwerk {
namespace {

using Tokens = std::vector<TokenId>;
using Node = PrefixCache::Node;

constexpr std::size_t kUnit = kPageUnit;

/// `blocks` of whole-block tokens; block i is filled with first + values[i], so that equal values are equal blocks.
Tokens blocks_of(const std::vector<int>& values) {
  Tokens tokens;
  for (const int value : values) {
    for (int i = 0; i < kPageSize; ++i) tokens.push_back(value * 100 + i);
  }
  return tokens;
}

/// A pool and a cache over it, with the sequence's side of the protocol in its simplest form.
struct Fixture {
  explicit Fixture(int window, PerTable<std::size_t> sizes = {kUnit, kUnit}, std::uint64_t hash_mask = UINT64_MAX)
      : pool(sizes, 4096 * kUnit), cache(pool, window, hash_mask) {}

  /// Inserts all whole blocks of `tokens` as a sequence would that ends at once; returns what it found there.
  std::int64_t insert(const std::string& salt, const Tokens& tokens) {
    auto prefix = cache.open(salt, tokens, 0);  // recomputes everything
    Node* node = prefix.root;
    std::vector<Node*> nodes;
    const std::int64_t before = cache.nodes();
    for (std::size_t b = 0; b < tokens.size() / kPageSize; ++b) {
      PerTable<PageId> pages{kNoPage, kNoPage};
      for (int t = 0; t < kPageTables; ++t) {
        if (pool.has_table(t)) pages[t] = *pool.allocate(t);
      }
      node = cache.extend(node, std::span(tokens).subspan(b * kPageSize).first<kPageSize>(), pages);
      for (int t = 0; t < kPageTables; ++t) {
        EXPECT_EQ(pages[t], node->pages[t]);
        if (pool.has_table(t)) {
          EXPECT_EQ(pool.references(pages[t]), 2U);
        }
      }
      nodes.push_back(node);
    }
    for (auto n = nodes.rbegin(); n != nodes.rend(); ++n) {
      cache.touch(*n);
      for (int t = 0; t < kPageTables; ++t) {
        if (pool.has_table(t)) cache.let_go(*n, t);
      }
    }
    cache.close(node);
    return static_cast<std::int64_t>(nodes.size()) - (cache.nodes() - before);
  }

  /// Positions of the longest usable prefix.
  std::int64_t match(const std::string& salt, const Tokens& tokens, std::int64_t limit = 1 << 20) {
    auto prefix = cache.open(salt, tokens, limit);
    cache.close(prefix.nodes.empty() ? prefix.root : prefix.nodes.back());
    return static_cast<std::int64_t>(prefix.nodes.size()) * kPageSize;
  }

  PagePool pool;
  PrefixCache cache;
};

TEST(FirstVisiblePage, IsThatOfTheFirstPositionInTheWindow) {
  for (int window = 0; window < 80; ++window) {
    for (std::int64_t position = 0; position < 300; ++position) {
      std::int64_t first = position;
      while (first > 0 && (window == 0 || position - (first - 1) < window)) --first;
      ASSERT_EQ(first_visible_page(position, window), first / kPageSize) << window << ' ' << position;
    }
  }
}

TEST(PrefixCache, ComparesEveryToken) {
  Fixture f(64, {kUnit, kUnit}, 0);  // the hash tells nothing
  const Tokens tokens = blocks_of({1, 2});
  f.insert("", tokens);
  EXPECT_EQ(f.match("", tokens), 32);
  for (int i = 0; i < 32; ++i) {
    Tokens other = tokens;
    other[i] += 1;
    EXPECT_EQ(f.match("", other), i / kPageSize * kPageSize);
  }
  EXPECT_EQ(f.match("", Tokens(tokens.begin(), tokens.end() - 1)), 16);
}

TEST(PrefixCache, RespectsTheLimit) {
  Fixture f(64);
  const Tokens tokens = blocks_of({1, 2, 3});
  f.insert("", tokens);
  for (int limit = -3; limit < 60; ++limit) {
    EXPECT_EQ(f.match("", tokens, limit), std::clamp(limit, 0, 48) / kPageSize * kPageSize);
  }
}

TEST(PrefixCache, SaltsShareNothing) {
  Fixture f(64);
  const Tokens tokens = blocks_of({1, 2});
  f.insert("a", tokens);
  EXPECT_EQ(f.match("", tokens), 0);
  EXPECT_EQ(f.match("b", tokens), 0);
  EXPECT_EQ(f.match(std::string("a\0b", 3), tokens), 0);
  EXPECT_EQ(f.insert("b", tokens), 0);
  EXPECT_EQ(f.cache.nodes(), 4);
  EXPECT_EQ(f.match("a", tokens), 32);
}

TEST(PrefixCache, KeepsOnePageForEqualBlocks) {
  Fixture f(64);
  f.insert("", blocks_of({1, 2, 3}));
  EXPECT_EQ(f.insert("", blocks_of({1, 2, 4})), 2);
  EXPECT_EQ(f.cache.nodes(), 4);
  EXPECT_EQ(f.pool.pages_in_use(0), 4);
  EXPECT_EQ(f.pool.pages_in_use(1), 4);
  EXPECT_EQ(f.cache.cached_pages(0), 4);
  EXPECT_EQ(f.cache.cached_pages(1), 4);
}

/// Without eviction the match is the longest common prefix with anything inserted under the same salt.
TEST(PrefixCache, MatchesLikeBruteForce) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    std::mt19937 random(seed);
    // Every other time all blocks collide in the hash table.
    Fixture f(static_cast<int>(random() % 3 * 40), {kUnit, kUnit}, seed % 2 == 0 ? UINT64_MAX : 0);
    std::vector<std::pair<std::string, Tokens>> inserted;
    for (int step = 0; step < 300; ++step) {
      std::vector<int> values(random() % 8);
      for (int& value : values) value = static_cast<int>(random() % 3);
      const std::string salt(1, static_cast<char>('a' + random() % 2));
      Tokens tokens = blocks_of(values);
      tokens.resize(tokens.size() + random() % kPageSize, 7);
      const auto limit = static_cast<std::int64_t>(random() % (tokens.size() + 2));
      std::int64_t expected = 0;
      for (const auto& [other_salt, other] : inserted) {
        if (other_salt != salt) continue;
        const auto ends = std::mismatch(tokens.begin(), tokens.end(), other.begin(), other.end());
        const std::int64_t blocks = std::min(ends.first - tokens.begin(), limit) / kPageSize;
        expected = std::max(expected, blocks * kPageSize);
      }
      ASSERT_EQ(f.match(salt, tokens, limit), expected);
      if (random() % 2 == 0) {
        f.insert(salt, tokens);
        tokens.resize(tokens.size() / kPageSize * kPageSize);
        inserted.emplace_back(salt, tokens);
      }
    }
    f.cache.evict_all();
    EXPECT_EQ(f.cache.nodes(), 0);
    EXPECT_EQ(f.pool.used_bytes(), 0U);
  }
}

TEST(PrefixCache, NeedsSlidingPagesOnlyInTheWindow) {
  // Every set of missing sliding pages of a chain of 7, against the definition.
  constexpr int kBlocks = 7;
  const Tokens tokens = blocks_of({1, 2, 3, 4, 5, 6, 7});
  for (const int window : {1, 2, 16, 17, 18, 32, 33, 48, 200}) {
    for (unsigned missing = 0; missing < 1U << kBlocks; ++missing) {
      PagePool pool({kUnit, kUnit}, 64 * kUnit);
      PrefixCache cache(pool, window);
      auto prefix = cache.open("", tokens, 0);
      Node* node = prefix.root;
      std::vector<Node*> nodes;
      for (unsigned b = 0; b < kBlocks; ++b) {
        PerTable<PageId> pages{(missing >> b & 1U) != 0 ? kNoPage : *pool.allocate(0), *pool.allocate(1)};
        node = cache.extend(node, std::span(tokens).subspan(b * kPageSize).first<kPageSize>(), pages);
        nodes.push_back(node);
      }
      std::int64_t expected = 0;
      for (std::int64_t p = 1; p <= kBlocks; ++p) {
        bool usable = true;
        for (std::int64_t seen = std::max<std::int64_t>(0, p * kPageSize - window + 1); seen < p * kPageSize; ++seen) {
          usable = usable && (missing >> (seen / kPageSize) & 1U) == 0;
        }
        if (usable) expected = p;
      }
      auto found = cache.open("", tokens, 1 << 20);
      EXPECT_EQ(static_cast<std::int64_t>(found.nodes.size()), expected) << window << ' ' << missing;
      cache.close(found.nodes.empty() ? found.root : found.nodes.back());
      for (Node* n : nodes) {
        for (int t = 0; t < kPageTables; ++t) {
          if (n->pages[t] != kNoPage) cache.let_go(n, t);
        }
      }
      cache.close(node);
    }
  }
}

TEST(PrefixCache, ABlockComputedAgainGetsItsSlidingPageBack) {
  Fixture f(17);
  const Tokens tokens = blocks_of({1, 2});
  auto prefix = f.cache.open("", tokens, 0);
  PerTable<PageId> pages{kNoPage, *f.pool.allocate(1)};
  Node* node = f.cache.extend(prefix.root, std::span(tokens).first<kPageSize>(), pages);
  f.cache.let_go(node, 1);
  f.cache.close(node);
  EXPECT_EQ(f.match("", tokens), 0);
  f.insert("", tokens);
  EXPECT_EQ(f.match("", tokens), 32);
  EXPECT_EQ(f.pool.pages_in_use(0), 2);
  EXPECT_EQ(f.pool.pages_in_use(1), 2);
}

TEST(PrefixCache, EvictsTheLeastRecentlyUsedLeafFirst) {
  Fixture f(0);
  f.insert("", blocks_of({1, 2, 3}));
  f.insert("", blocks_of({1, 4}));
  f.insert("", blocks_of({5}));
  f.insert("", blocks_of({1, 2}));  // a use of 1 and 2, not of 3
  const auto evict = [&] { EXPECT_TRUE(f.cache.evict_one()); };
  evict();  // 3
  EXPECT_EQ(f.match("", blocks_of({1, 2, 3})), 32);
  evict();  // 4
  EXPECT_EQ(f.match("", blocks_of({1, 4})), 16);
  evict();  // 5
  EXPECT_EQ(f.match("", blocks_of({5})), 0);
  EXPECT_EQ(f.match("", blocks_of({1, 2})), 32);
  evict();  // 2
  EXPECT_EQ(f.match("", blocks_of({1, 2})), 16);
  evict();
  EXPECT_FALSE(f.cache.evict_one());
  EXPECT_EQ(f.cache.evicted_pages(), 10);
  EXPECT_EQ(f.pool.used_bytes(), 0U);
}

TEST(PrefixCache, EvictsNothingThatASequenceHolds) {
  Fixture f(64);
  f.insert("", blocks_of({1, 2, 3}));
  auto held = f.cache.open("", blocks_of({1, 2}), 32);
  ASSERT_EQ(held.nodes.size(), 2U);
  for (Node* node : held.nodes) {
    f.cache.hold(node, 0);
    f.cache.hold(node, 1);
  }
  f.cache.evict_all();
  EXPECT_EQ(f.cache.nodes(), 2);
  EXPECT_EQ(f.pool.pages_in_use(0), 2);
  EXPECT_EQ(f.cache.cached_pages(0), 0);
  EXPECT_EQ(f.cache.cached_pages(1), 0);
  for (Node* node : held.nodes) {
    f.cache.let_go(node, 0);
    f.cache.let_go(node, 1);
  }
  f.cache.close(held.nodes.back());
  EXPECT_EQ(f.match("", blocks_of({1, 2, 3})), 32);
}

/// Sliding pages that nobody has seen for long go before newer prefixes, which stay whole.
TEST(PrefixCache, EvictsOldSlidingPagesOneByOne) {
  Fixture f(17);
  f.insert("", blocks_of({1, 2, 3, 4}));
  auto old = f.cache.open("", blocks_of({1, 2, 3, 4}), 64);  // its nodes are in use, its sliding pages are not
  f.insert("", blocks_of({5, 6}));
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(f.cache.evict_one());
  EXPECT_EQ(f.cache.cached_pages(0), 2);
  EXPECT_EQ(f.cache.cached_pages(1), 6);
  EXPECT_EQ(f.match("", blocks_of({5, 6})), 32);
  EXPECT_EQ(f.match("", blocks_of({1, 2, 3, 4})), 0);
  f.cache.close(old.nodes.back());
}

/// Without full layers a node is nothing but its sliding page: none may stay behind without one.
TEST(PrefixCache, NodesWithoutPagesDisappear) {
  Fixture f(33, {kUnit, 0});
  f.insert("", blocks_of({1, 2, 3, 4}));
  f.insert("", blocks_of({1, 2, 5}));
  auto held = f.cache.open("", blocks_of({1, 2}), 32);  // by a sequence that has let its pages slide out
  f.cache.evict_all();
  EXPECT_EQ(f.cache.nodes(), 2);
  EXPECT_EQ(f.pool.used_bytes(), 0U);
  f.cache.close(held.nodes.back());
  EXPECT_EQ(f.cache.nodes(), 0);
  EXPECT_EQ(f.pool.used_bytes(), 0U);
}

}  // namespace
}  // namespace draftwerk
