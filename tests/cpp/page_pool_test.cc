#include "kvcache/page_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

namespace draftwerk {
namespace {

using Sizes = PerTable<std::size_t>;

constexpr std::size_t kUnit = kPageUnit;

TEST(PagePool, RefusesShapesAndBudgetsThatCannotWork) {
  EXPECT_THROW(PagePool(Sizes{0, 0}, 1 << 20), std::invalid_argument);
  EXPECT_THROW(PagePool(Sizes{4 * kUnit, kUnit}, 8 * kUnit - 1), std::invalid_argument);
  EXPECT_THROW(PagePool(Sizes{4 * kUnit, 0}, 4 * kUnit - 1), std::invalid_argument);
  EXPECT_THROW(PagePool(Sizes{4 * kUnit, 0}, 0), std::invalid_argument);
  EXPECT_THROW(PagePool(Sizes{SIZE_MAX, kUnit}, 1 << 20), std::invalid_argument);
  EXPECT_THROW(PagePool(Sizes{SIZE_MAX / 2, 0}, SIZE_MAX), std::invalid_argument);  // beyond 32-bit page ids
  EXPECT_NO_THROW(PagePool(Sizes{4 * kUnit, kUnit}, 8 * kUnit));
  EXPECT_NO_THROW(PagePool(Sizes{0, 4 * kUnit}, 4 * kUnit));
  EXPECT_NO_THROW(PagePool(Sizes{4 * kUnit - 1, 1}, 8 * kUnit));  // rounded up
}

TEST(PagePool, SlabsOfGemma3WasteNothing) {
  // 15 sliding and 3 full layers; K and V of one head of 256 in 16 bits.
  const std::size_t layer = 2 * 2 * 256 * kPageSize;
  const PagePool pool(Sizes{15 * layer, 3 * layer}, std::size_t{256} << 20);
  EXPECT_EQ(pool.slab_bytes(), 15 * layer);
  EXPECT_EQ(pool.pages_per_slab(0), 1);
  EXPECT_EQ(pool.pages_per_slab(1), 5);
}

TEST(PagePool, WastesLittleWhateverTheShape) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const Sizes sizes{(1 + random() % 200) * kUnit, (1 + random() % 200) * kUnit};
    const std::size_t largest = std::max(sizes[0], sizes[1]);
    const std::size_t budget = largest * (50 + random() % 1000) + random() % largest;
    PagePool pool(sizes, budget);
    ASSERT_LE(pool.arena_bytes(), budget);
    for (int t = 0; t < kPageTables; ++t) {
      std::size_t used = 0;
      std::vector<PageId> pages;
      while (auto page = pool.allocate(t)) {
        pages.push_back(*page);
        used += sizes[t];
      }
      EXPECT_GE(static_cast<double>(used), 0.90 * static_cast<double>(budget)) << sizes[0] << ' ' << sizes[1];
      for (const PageId page : pages) pool.release(page);
    }
  }
}

TEST(PagePool, SlabsGoBackAndForthBetweenTypes) {
  PagePool pool(Sizes{5 * kUnit, kUnit}, 20 * kUnit);
  ASSERT_EQ(pool.slabs(), 4);
  for (int round = 0; round < 3; ++round) {
    for (int t = 0; t < kPageTables; ++t) {
      std::vector<PageId> pages;
      while (auto page = pool.allocate(t)) pages.push_back(*page);
      EXPECT_EQ(static_cast<std::int64_t>(pages.size()), 4 * pool.pages_per_slab(t));
      EXPECT_EQ(pool.used_bytes(), pool.arena_bytes());
      EXPECT_FALSE(pool.allocate(1 - t));
      for (const PageId page : pages) pool.release(page);
      EXPECT_EQ(pool.free_slabs(), 4);
    }
  }
  EXPECT_EQ(pool.peak_bytes(), pool.arena_bytes());
}

TEST(PagePool, AllocatesFromTheFullestSlab) {
  PagePool pool(Sizes{4 * kUnit, kUnit}, 12 * kUnit);
  std::vector<PageId> pages;
  for (int i = 0; i < 12; ++i) pages.push_back(*pool.allocate(1));
  // Live pages by slab: 1, 3, 2.
  for (const int i : {0, 1, 2, 5, 8, 9}) pool.release(pages[i]);
  EXPECT_EQ(pool.available(1), 6);
  EXPECT_EQ(pool.available(0), 0);
  EXPECT_EQ(*pool.allocate(1), pages[5]);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(*pool.allocate(1) / 4, 2U);
  pool.release(pages[3]);  // its slab was left alone, so it empties
  EXPECT_TRUE(pool.allocate(0));
}

TEST(PagePool, APageLivesUntilItsLastHolderLeaves) {
  PagePool pool(Sizes{kUnit, 0}, 3 * kUnit);
  const PageId page = *pool.allocate(0);
  pool.retain(page);
  pool.retain(page);
  EXPECT_EQ(pool.references(page), 3U);
  pool.release(page);
  pool.release(page);
  EXPECT_EQ(pool.pages_in_use(0), 1);
  EXPECT_NE(*pool.allocate(0), page);
  pool.release(page);
  EXPECT_EQ(pool.references(page), 0U);
  EXPECT_EQ(pool.pages_in_use(0), 1);
  EXPECT_EQ(pool.free_slabs(), 2);
}

/// Random operations against a map of the byte ranges in use.
TEST(PagePool, AgreesWithAPlainModel) {
  struct Use {
    int table;
    std::uint32_t references;
  };
  for (unsigned seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const Sizes sizes{random() % 7 == 0 ? 0 : (1 + random() % 20) * kUnit, (1 + random() % 20) * kUnit};
    const std::size_t budget = 2 * std::max(sizes[0], sizes[1]) + random() % (400 * kUnit);
    PagePool pool(sizes, budget);
    std::map<std::size_t, Use> live;  // by offset in bytes
    std::size_t peak = 0;
    for (int step = 0; step < 4000; ++step) {
      // Phases of growth and of shrinking, so that the arena gets both full and empty.
      const bool grow = random() % 10 < ((step / 500) % 2 == 0 ? 7U : 3U);
      auto any = live.begin();
      if (!live.empty()) std::advance(any, random() % live.size());
      if (grow || live.empty()) {
        const int t = sizes[0] == 0 ? 1 : static_cast<int>(random() % 2);
        const std::int64_t available = pool.available(t);
        const auto page = pool.allocate(t);
        ASSERT_EQ(page.has_value(), available > 0);
        if (!page) continue;
        ASSERT_EQ(pool.available(t), available - 1);
        const std::size_t begin = *page * kUnit;
        ASSERT_LE(begin + sizes[t], pool.arena_bytes());
        const auto after = live.lower_bound(begin);
        if (after != live.end()) {
          ASSERT_LE(begin + sizes[t], after->first);
        }
        if (after != live.begin()) {
          const auto before = std::prev(after);
          ASSERT_LE(before->first + sizes[before->second.table], begin);
        }
        live[begin] = {t, 1};
      } else if (random() % 4 == 0) {
        pool.retain(static_cast<PageId>(any->first / kUnit));
        ++any->second.references;
      } else {
        pool.release(static_cast<PageId>(any->first / kUnit));
        if (--any->second.references == 0) live.erase(any);
      }
      PerTable<std::int64_t> in_use{};
      std::size_t bytes = 0;
      for (const auto& [offset, use] : live) {
        ++in_use[use.table];
        bytes += sizes[use.table];
        if (step % 16 == 0) {
          ASSERT_EQ(pool.references(static_cast<PageId>(offset / kUnit)), use.references);
        }
      }
      peak = std::max(peak, bytes);
      ASSERT_EQ(pool.pages_in_use(0), in_use[0]);
      ASSERT_EQ(pool.pages_in_use(1), in_use[1]);
      ASSERT_EQ(pool.used_bytes(), bytes);
      ASSERT_EQ(pool.peak_bytes(), peak);
    }
    while (!live.empty()) {
      pool.release(static_cast<PageId>(live.begin()->first / kUnit));
      if (--live.begin()->second.references == 0) live.erase(live.begin());
    }
    EXPECT_EQ(pool.used_bytes(), 0U);
    EXPECT_EQ(pool.free_slabs(), pool.slabs());
  }
}

}  // namespace
}  // namespace draftwerk
