#include "backend/cpu/worker_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "backend/floating_point.h"

namespace draftwerk::cpu {
namespace {

// `control` is one word: the number of the job in its upper bits, whether it is open in bit 9, and how many workers are
// inside in the bits below. A worker joins by a compare-and-swap that fails once the job is closed, so the caller
// waits only for those who joined: a worker that the system has taken off its core does not hold up a job that the
// others can do alone, and a job's fields are never written while anybody may read them.
constexpr std::uint32_t kOpen = 1U << 9;
constexpr std::uint32_t kInside = kOpen - 1;
static_assert(kInside == kMostThreads);
constexpr std::uint32_t kJob = 1U << 10;
constexpr std::uint32_t kJobMask = ~(kJob - 1);

// Between two operations of a step there are a few microseconds, between two steps (sampling, scheduling) some tens;
// waking a parked worker takes 30-60 us. So spinning for this long keeps workers hot within a generation and lets an
// idle engine go to sleep at once.
constexpr auto kSpin = std::chrono::microseconds(100);
// A caller that waited this long probably waits for a worker whose core does something else. It sleeps, so that its own
// core takes over whatever waits for one: that other work, or the worker.
constexpr int kSpinsBeforeSleep = 2000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/// Part of a job's range, in multiples of its grain.
struct Grains {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// What is left of a thread's share. The thread takes pieces off its front, others off its back.
class alignas(64) Share {
 public:
  void set(Grains range) { left_.store(packed(range), std::memory_order_relaxed); }

  /// Three quarters of it: pieces that continue each other need not be short, but those at the end, which others may
  /// take.
  Grains take_front() {
    return take([](Grains left) {
      return Grains{left.begin + std::max<std::int64_t>(3 * (left.end - left.begin) / 4, 1), left.end};
    });
  }

  /// Half of it.
  Grains take_back() {
    return take([](Grains left) {
      return Grains{left.begin, left.end - std::max<std::int64_t>((left.end - left.begin) / 2, 1)};
    });
  }

 private:
  // Both ends change as one word.
  static std::uint64_t packed(Grains range) {
    return static_cast<std::uint64_t>(range.begin) << 32 | static_cast<std::uint64_t>(range.end);
  }

  /// Takes what shrink(left) leaves out; nothing, begin == end, if nothing is left.
  template <typename Shrink>
  Grains take(const Shrink& shrink) {
    std::uint64_t word = left_.load(std::memory_order_relaxed);
    while (true) {
      const Grains left = {static_cast<std::int64_t>(word >> 32), static_cast<std::int64_t>(word & 0xFFFFFFFFU)};
      if (left.begin >= left.end) return {};
      const Grains rest = shrink(left);
      if (!left_.compare_exchange_weak(word, packed(rest), std::memory_order_relaxed)) continue;
      return rest.begin > left.begin ? Grains{left.begin, rest.begin} : Grains{rest.end, left.end};
    }
  }

  std::atomic<std::uint64_t> left_{0};
};

}  // namespace

struct WorkerPool::State {
  alignas(64) std::atomic<std::uint32_t> control{0};
  alignas(64) std::atomic<int> parked{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};
  // The job; written while it is closed and nobody is inside.
  alignas(64) Invoke invoke = nullptr;
  void* context = nullptr;
  std::int64_t items = 0;
  std::int64_t grain = 1;
  std::vector<Share> shares;
  std::vector<std::thread> workers;

  void do_piece(Grains piece, int worker) const {
    invoke(context, piece.begin * grain, std::min(piece.end * grain, items), worker);
  }

  void take_pieces(int worker) {
    const auto first = static_cast<std::size_t>(worker);
    for (Grains piece = shares[first].take_front(); piece.begin < piece.end; piece = shares[first].take_front()) {
      do_piece(piece, worker);
    }
    // Shares only shrink: whoever has seen each of them empty is done.
    for (std::size_t other = first + 1; other < first + shares.size(); ++other) {
      Share& share = shares[other % shares.size()];
      for (Grains piece = share.take_back(); piece.begin < piece.end; piece = share.take_back()) {
        do_piece(piece, worker);
      }
    }
  }

  /// Returns the control word once its job is not `seen`: spins first, then sleeps.
  std::uint32_t await_job(std::uint32_t seen) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (true) {
      for (int i = 0; i < 32; ++i) {
        const std::uint32_t now = control.load(std::memory_order_acquire);
        if ((now & kJobMask) != seen) return now;
        pause();
      }
      if (std::chrono::steady_clock::now() > deadline) break;
    }
    // Sequentially consistent with run(): either run() sees this worker parked, or this worker sees the new job.
    parked.fetch_add(1, std::memory_order_seq_cst);
    std::uint32_t now = control.load(std::memory_order_seq_cst);
    while ((now & kJobMask) == seen) {
      control.wait(now, std::memory_order_seq_cst);
      now = control.load(std::memory_order_seq_cst);
    }
    parked.fetch_sub(1, std::memory_order_relaxed);
    return now;
  }

  void work(int worker) {
    const DefaultFloatingPoint environment;
    std::uint32_t seen = 0;
    while (true) {
      std::uint32_t now = await_job(seen);
      seen = now & kJobMask;
      if (stop.load(std::memory_order_acquire)) return;
      while ((now & kOpen) != 0 && (now & kJobMask) == seen) {
        if (control.compare_exchange_weak(now, now + 1, std::memory_order_acquire, std::memory_order_acquire)) {
          take_pieces(worker);
          // Sequentially consistent with sleep_until_done(): either the caller sees that this worker has left, or this
          // worker sees that the caller sleeps.
          control.fetch_sub(1, std::memory_order_seq_cst);
          if (caller_sleeps.load(std::memory_order_seq_cst)) control.notify_all();
          break;
        }
      }
    }
  }

  /// Returns when nobody is inside the closed job.
  void sleep_until_done() {
    caller_sleeps.store(true, std::memory_order_seq_cst);
    for (std::uint32_t now = control.load(std::memory_order_seq_cst); (now & kInside) != 0;) {
      control.wait(now, std::memory_order_seq_cst);
      now = control.load(std::memory_order_seq_cst);
    }
    caller_sleeps.store(false, std::memory_order_relaxed);
  }

  /// Makes a new job known. Only the owning thread writes the job's number, and nobody is inside.
  void publish(std::uint32_t flags) {
    const std::uint32_t job = (control.load(std::memory_order_relaxed) & kJobMask) + kJob;
    control.store(job | flags, std::memory_order_seq_cst);
    if (parked.load(std::memory_order_seq_cst) > 0) control.notify_all();
  }
};

WorkerPool::WorkerPool(int threads) : state_(std::make_unique<State>()) {
  if (threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("worker pool: " + std::to_string(threads) + " threads: must be 1 to " +
                                std::to_string(kMostThreads));
  }
  State* state = state_.get();
  state->shares = std::vector<Share>(static_cast<std::size_t>(threads));
  for (int worker = 1; worker < threads; ++worker) {
    state->workers.emplace_back([state, worker] { state->work(worker); });
  }
}

WorkerPool::~WorkerPool() {
  state_->stop.store(true, std::memory_order_release);
  state_->publish(0);
  for (std::thread& worker : state_->workers) worker.join();
}

int WorkerPool::size() const { return static_cast<int>(state_->workers.size()) + 1; }

void WorkerPool::run(std::int64_t items, std::int64_t grain, Invoke invoke, void* context) {
  if (items <= 0) return;
  const DefaultFloatingPoint environment;
  State& state = *state_;
  grain = std::max<std::int64_t>(grain, 1);
  if (items <= grain || state.workers.empty()) {
    for (std::int64_t begin = 0; begin < items; begin += grain) {
      invoke(context, begin, std::min(begin + grain, items), 0);
    }
    return;
  }
  state.invoke = invoke;
  state.context = context;
  state.items = items;
  state.grain = grain;
  const std::int64_t grains = (items + grain - 1) / grain;
  const auto threads = static_cast<std::int64_t>(state.shares.size());
  for (std::int64_t i = 0; i < threads; ++i) {
    state.shares[static_cast<std::size_t>(i)].set({grains * i / threads, grains * (i + 1) / threads});
  }
  state.publish(kOpen);
  state.take_pieces(0);
  // The last piece is handed out: nobody else need join.
  std::uint32_t now = state.control.fetch_and(~kOpen, std::memory_order_acquire);
  for (int spins = 0; (now & kInside) != 0; ++spins) {
    if (spins == kSpinsBeforeSleep) return state.sleep_until_done();
    pause();
    now = state.control.load(std::memory_order_acquire);
  }
}

namespace {

/// Processors' worth of time that a cgroup v2 directory grants, rounded up; 0 if it sets no limit.
int quota_v2(const std::string& directory) {
  std::ifstream file(directory + "/cpu.max");
  double quota = 0;  // not a number where there is no limit: "max"
  double period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

/// The same for cgroup v1.
int quota_v1() {
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota = 0;
  double period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

/// The tightest limit of the process's cgroup and of those above it; 0 if there is none.
int cgroup_quota() {
  std::string path;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  }
  int limit = quota_v1();
  while (true) {
    const int quota = quota_v2("/sys/fs/cgroup" + path);
    if (quota > 0 && (limit == 0 || quota < limit)) limit = quota;
    const std::size_t slash = path.rfind('/');
    if (slash == std::string::npos) return limit;
    path.resize(slash);
  }
}

}  // namespace

int default_threads() {
  int processors = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) processors = CPU_COUNT(&allowed);
  const int quota = cgroup_quota();
  if (quota > 0) processors = std::min(processors, quota);
  return std::clamp(processors, 1, kMostThreads);
}

}  // namespace draftwerk::cpu
