#include "backend/cpu/worker_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace draftwerk::cpu {
namespace {

TEST(WorkerPool, CoversEveryItemOnce) {
  std::mt19937 random(1);
  for (const int threads : {1, 2, 3, 5}) {
    WorkerPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (int round = 0; round < 300; ++round) {
      const std::int64_t items = static_cast<std::int64_t>(random() % 200);
      const std::int64_t grain = 1 + static_cast<std::int64_t>(random() % 9);
      std::vector<int> visits(static_cast<std::size_t>(items));  // plain ints: an item visited twice at once is a race
      std::atomic<bool> sound{true};
      pool.parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end, int worker) {
        if (begin >= end || (end - begin < grain && end != items) || worker < 0 || worker >= threads) sound = false;
        for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
      });
      EXPECT_TRUE(sound);
      EXPECT_TRUE(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; })) << items << " by " << grain;
    }
  }
}

TEST(WorkerPool, ResultsAreVisibleToTheCallerAndToTheNextJob) {
  WorkerPool pool(3);
  std::vector<std::int64_t> a(1000, 1);
  std::vector<std::int64_t> b(1000, 0);
  for (int round = 0; round < 200; ++round) {
    pool.parallel_for(1000, 7, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i)
        b[static_cast<std::size_t>(i)] = a[static_cast<std::size_t>(999 - i)] + 1;
    });
    std::swap(a, b);
  }
  EXPECT_TRUE(std::all_of(a.begin(), a.end(), [](std::int64_t v) { return v == 201; }));
}

TEST(WorkerPool, OnePieceRunsOnTheCaller) {
  WorkerPool pool(4);
  const std::thread::id caller = std::this_thread::get_id();
  int calls = 0;
  pool.parallel_for(8, 8, [&](std::int64_t begin, std::int64_t end, int worker) {
    ++calls;
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 8);
    EXPECT_EQ(worker, 0);
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
  EXPECT_EQ(calls, 1);
  pool.parallel_for(0, 8, [&](std::int64_t, std::int64_t, int) { ++calls; });
  EXPECT_EQ(calls, 1);
}

TEST(WorkerPool, WorkersTakePart) {
  WorkerPool pool(2);
  // Each of two pieces waits for the other, so both threads must be inside at once.
  std::atomic<int> inside{0};
  pool.parallel_for(2, 1, [&](std::int64_t, std::int64_t, int) {
    ++inside;
    while (inside < 2) std::this_thread::yield();
  });
  EXPECT_EQ(inside, 2);
}

TEST(WorkerPool, WhoIsDoneTakesTheSharesOfOthers) {
  WorkerPool pool(2);
  // The first piece of one share waits for all else, most of its own share's rest included.
  std::atomic<std::int64_t> done{0};
  std::atomic<int> callers_of_rest{0};
  pool.parallel_for(64, 1, [&](std::int64_t begin, std::int64_t end, int) {
    if (begin == 0) {
      while (done < 64 - (end - begin)) std::this_thread::yield();
    } else if (begin < 32) {
      ++callers_of_rest;
    }
    done += end - begin;
  });
  EXPECT_EQ(done, 64);
  EXPECT_GT(callers_of_rest, 0);
}

TEST(WorkerPool, PiecesOfAThreadContinueEachOther) {
  WorkerPool pool(2);
  // Each thread waits in its first piece for the other, so neither takes the other's share before it has begun.
  std::atomic<int> begun{0};
  std::atomic<bool> sound{true};
  std::int64_t next[2] = {0, 32};
  pool.parallel_for(64, 1, [&](std::int64_t begin, std::int64_t end, int worker) {
    if (begin == 0 || begin == 32) {
      ++begun;
      while (begun < 2) std::this_thread::yield();
    }
    const bool own = (begin < 32) == (worker == 0);
    if (own && begin != next[worker]) sound = false;
    if (own) next[worker] = end;
  });
  EXPECT_TRUE(sound);
}

TEST(WorkerPool, WakesParkedWorkers) {
  WorkerPool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // well beyond the time that workers spin
    std::atomic<int> inside{0};
    pool.parallel_for(3, 1, [&](std::int64_t, std::int64_t, int) {
      ++inside;
      while (inside < 3) std::this_thread::yield();
    });
    EXPECT_EQ(inside, 3);
  }
}

// As a thread is left that loads a library which is linked with -ffast-math.
TEST(WorkerPool, KeepsSubnormalNumbersWhateverTheThreadsDo) {
#if defined(__x86_64__)
  constexpr unsigned kFlush = 0x8040;
  const unsigned before = _mm_getcsr();
  const auto half = [](float x) {
    const volatile float value = x;
    return value * 0.5F;
  };
  for (const bool made_by_flusher : {false, true}) {
    _mm_setcsr(made_by_flusher ? before | kFlush : before);
    WorkerPool pool(2);
    for (const bool flusher_calls : {false, true}) {
      _mm_setcsr(flusher_calls ? before | kFlush : before);
      float products[2] = {};
      std::atomic<int> inside{0};
      pool.parallel_for(2, 1, [&](std::int64_t, std::int64_t, int worker) {
        ++inside;
        while (inside < 2) std::this_thread::yield();
        products[worker] = half(0x1p-130F);
      });
      float alone = 0.0F;
      pool.parallel_for(1, 1, [&](std::int64_t, std::int64_t, int) { alone = half(0x1p-130F); });
      const float here = half(0x1p-130F);
      _mm_setcsr(before);
      for (const float product : {products[0], products[1], alone}) EXPECT_EQ(product, 0x1p-131F);
      EXPECT_EQ(here, flusher_calls ? 0.0F : 0x1p-131F) << "what the caller does elsewhere is its own affair";
    }
  }
#else
  GTEST_SKIP() << "no portable way to flush subnormal numbers";
#endif
}

TEST(WorkerPool, IdleWorkersUseNoProcessorTime) {
  WorkerPool pool(4);
  pool.parallel_for(100, 1, [](std::int64_t, std::int64_t, int) {});
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double busy = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  // Three spinning workers would burn 0.2 s or more on any machine; parked ones spin for 0.1 ms each.
  EXPECT_LT(busy, 0.1);
}

TEST(WorkerPool, StartsAndStops) {
  for (int round = 0; round < 30; ++round) {
    WorkerPool pool(1 + round % 4);
    if (round % 2 == 0) pool.parallel_for(4, 1, [](std::int64_t, std::int64_t, int) {});
  }
}

TEST(WorkerPool, RefusesNonsense) {
  EXPECT_THROW(WorkerPool(0), std::invalid_argument);
  EXPECT_THROW(WorkerPool(-3), std::invalid_argument);
  EXPECT_THROW(WorkerPool(kMostThreads + 1), std::invalid_argument);
  EXPECT_GE(default_threads(), 1);
  EXPECT_LE(default_threads(), kMostThreads);
  EXPECT_LE(default_threads(), static_cast<int>(std::max(1U, std::thread::hardware_concurrency())));
}

}  // namespace
}  // namespace draftwerk::cpu
