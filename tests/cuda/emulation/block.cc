#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

uint3 thread_index{};
uint3 block_index{};
dim3 block_size;
dim3 grid_size;

namespace {

enum class State : std::uint8_t { running, at_block_barrier, at_warp_barrier, awaits_launch, ended };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};
using Copies = std::vector<Copy>;
using Together = void (*)(Brought, std::uint32_t);

struct Thread {
  Fiber fiber;
  std::vector<std::function<void()>> open_products;
  std::vector<std::function<void()>> closed_products;
  Copies open_copies;
  std::deque<Copies> closed_copies;
  uint3 index{};
  State state = State::running;
  bool awaited = false;         ///< it knows that the launch before has ended
  std::uint32_t warp_mask = 0;  ///< that it waits for
  Together together = nullptr;  ///< what it will do with them
};

struct Warp {
  std::uint32_t ready = 0;    ///< that can run: bit p is the lane whose turn is the p-th
  std::uint32_t waiting = 0;  ///< lanes at a barrier of the warp
  void* brought[kWarpSize];   ///< by the lanes that wait there
};

/// Of exactly the size that was asked for, so that a sanitizer sees what goes beyond it.
class SharedMemory {
 public:
  void resize(std::size_t bytes) {
    if (bytes == bytes_) return;
    constexpr std::size_t kAlignment = 1024;
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<std::byte*>(memory));
    bytes_ = bytes;
  }
  [[nodiscard]] std::byte* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t bytes_ = 0;
};

/// A launch under way, one block of it at a time.
class Grid {
 public:
  /// `launches`: how many there were before, by which orders change.
  void begin(const Launch& launch, Order order, unsigned launches, std::mt19937& random) {
    const unsigned count = launch.block.x * launch.block.y * launch.block.z;
    if (count == 0 || count > kMaxThreads) {
      throw std::logic_error("a block of " + std::to_string(count) + " threads; 1 to 1024 are possible");
    }
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    launch_ = &launch;
    count_ = count;
    warps_.resize((count + kWarpSize - 1) / kWarpSize);
    constexpr Order kOrders[] = {Order::forward, Order::backward, Order::shuffled};
    order_ = order == Order::changing ? kOrders[launches % 3] : order;
    shared_.resize(launch.shared_bytes);
    blocks_ = in_order(launch.grid.x * launch.grid.y * launch.grid.z, random);
    warp_order_ = in_order(static_cast<unsigned>(warps_.size()), random);
    lane_order_ = in_order(kWarpSize, random);
    for (unsigned turn = 0; turn < kWarpSize; ++turn) turns_[lane_order_[turn]] = turn;
    early_ = false;
  }

  /// Runs the first block up to where it awaits the launch before.
  void start_early() {
    early_ = true;
    begin_block(blocks_.front());
    run_block();
  }

  /// Runs what is left.
  void finish() {
    std::size_t done = 0;
    if (early_) {
      early_ = false;
      enter(blocks_.front());
      for (unsigned t = 0; t < count_; ++t) {
        if (threads_[t]->state == State::awaits_launch) warps_[t / kWarpSize].ready |= turn_of(t % kWarpSize);
      }
      run_block();
      done = 1;
    }
    for (; done < blocks_.size(); ++done) {
      begin_block(blocks_[done]);
      run_block();
    }
  }

  std::byte* shared() { return shared_.get(); }

  int sync_block(bool predicate) {
    Thread& thread = *threads_[running_];
    true_ += predicate;
    thread.state = State::at_block_barrier;
    ++at_barrier_;
    give_way(thread);
    return counted_;
  }

  void await_previous() {
    Thread& thread = *threads_[running_];
    thread.awaited = true;
    if (!early_) return;
    thread.state = State::awaits_launch;
    give_way(thread);
  }

  void meet(std::uint32_t mask, void* brought, Together together) {
    Thread& thread = *threads_[running_];
    const std::uint32_t own = 1U << lane();
    if ((mask & own) == 0) fail("a lane waits for a mask of lanes that it is not in");
    Warp& warp = warps_[running_ / kWarpSize];
    thread.state = State::at_warp_barrier;
    thread.warp_mask = mask;
    thread.together = together;
    warp.brought[lane()] = brought;
    warp.waiting |= own;
    if ((warp.waiting & mask) == mask && all_wait_for(mask)) {
      if (together != nullptr) do_together(warp, mask, together);
      warp.waiting &= ~mask;
      for_each_lane(mask, [&](unsigned l) { warp.ready |= turn_of(l); });  // that it came last is no right to go first
    }
    give_way(thread);
  }

  void copy_later(const Copy& copy) {
    if (order_ == Order::backward) return carry_out(copy);
    threads_[running_]->open_copies.push_back(copy);
  }
  void close_copies() {
    Thread& thread = *threads_[running_];
    thread.closed_copies.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
  }
  void finish_copies(std::size_t pending) {
    std::deque<Copies>& closed = threads_[running_]->closed_copies;
    for (; closed.size() > pending; closed.pop_front()) {
      for (const Copy& copy : closed.front()) carry_out(copy);
    }
  }

  void multiply_later(std::function<void()> product) {
    if (order_ == Order::backward) return product();
    threads_[running_]->open_products.push_back(std::move(product));
  }
  void close_products() {
    Thread& thread = *threads_[running_];
    std::ranges::move(thread.open_products, std::back_inserter(thread.closed_products));
    thread.open_products.clear();
  }
  void finish_products() {
    // Other threads run in between, as lanes meet for a product.
    const std::vector<std::function<void()>> products = std::exchange(threads_[running_]->closed_products, {});
    for (const std::function<void()>& product : products) product();
  }

  [[nodiscard]] unsigned lane() const { return running_ % kWarpSize; }

 private:
  static void carry_out(const Copy& copy) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  /// Makes a block what its threads see.
  void enter(unsigned block) const {
    const dim3& grid = launch_->grid;
    block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    block_size = launch_->block;
    grid_size = grid;
  }

  void begin_block(unsigned block) {
    enter(block);
    if (launch_->shared_bytes > 0) std::memset(shared_.get(), 0xFF, launch_->shared_bytes);
    for (unsigned t = 0; t < count_; ++t) {
      Thread& thread = *threads_[t];
      thread.index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
      thread.state = State::running;
      thread.awaited = false;
      thread.open_products.clear();
      thread.closed_products.clear();
      thread.open_copies.clear();
      thread.closed_copies.clear();
      thread.fiber.start(run_thread, this);
    }
    at_barrier_ = true_ = 0;
    for (std::size_t w = 0; w < warps_.size(); ++w) {
      const unsigned lanes = std::min(count_ - static_cast<unsigned>(w) * kWarpSize, kWarpSize);
      warps_[w].ready = 0;
      for (unsigned l = 0; l < lanes; ++l) warps_[w].ready |= turn_of(l);
      warps_[w].waiting = 0;
    }
    left_ = count_;
  }

  /// Runs the block until its threads have ended, or all that have not await the launch before.
  void run_block() {
    for (;;) {
      for (const unsigned w : warp_order_) run_warp(w);
      if (left_ == 0) return;
      if (early_ && waiting_for_launch() == left_) return;
      if (at_barrier_ < left_) throw std::logic_error(deadlock());
      counted_ = true_;
      at_barrier_ = true_ = 0;
      for (unsigned t = 0; t < count_; ++t) {
        if (threads_[t]->state == State::at_block_barrier) warps_[t / kWarpSize].ready |= turn_of(t % kWarpSize);
      }
    }
  }

  /// Runs a warp until all its lanes wait for others or have ended.
  void run_warp(unsigned w) {
    running_ = w * kWarpSize;
    turn_ = 0;
    if (Thread* first = next()) first->fiber.resume();
  }

  static void run_thread(void* self) {
    Grid& grid = *static_cast<Grid*>(self);
    grid.launch_->body();
    Thread& thread = *grid.threads_[grid.running_];
    if (!thread.awaited) fail("a thread ends that has not awaited the launch before: what follows may come too early");
    thread.state = State::ended;
    --grid.left_;
    Thread* next = grid.next();
    thread.fiber.end(next == nullptr ? nullptr : &next->fiber);
  }

  void give_way(Thread& thread) {
    Thread* other = next();
    if (other != &thread) thread.fiber.give_way(other == nullptr ? nullptr : &other->fiber);
  }

  /// The lane of the running warp whose turn comes next, which then is the running one; null if none can run.
  Thread* next() {
    std::uint32_t& ready = warps_[running_ / kWarpSize].ready;
    if (ready == 0) return nullptr;
    // Round and round: those behind the last turn come first.
    const std::uint32_t behind = ready & ~((1U << turn_) - 1);
    const auto turn = static_cast<unsigned>(std::countr_zero(behind != 0 ? behind : ready));
    ready &= ~(1U << turn);
    turn_ = turn;
    running_ = first_of_warp() + lane_order_[turn];
    Thread& thread = *threads_[running_];
    thread_index = thread.index;
    return &thread;
  }

  [[nodiscard]] std::uint32_t turn_of(unsigned lane) const { return 1U << turns_[lane]; }

  void do_together(const Warp& warp, std::uint32_t mask, Together together) {
    void* brought[kWarpSize] = {};
    for_each_lane(mask, [&](unsigned l) {
      if (threads_[first_of_warp() + l]->together != together) fail("lanes meet at different instructions");
      brought[l] = warp.brought[l];
    });
    together(brought, mask);
  }

  [[nodiscard]] unsigned first_of_warp() const { return running_ / kWarpSize * kWarpSize; }

  [[nodiscard]] bool all_wait_for(std::uint32_t mask) const {
    bool all = true;
    for_each_lane(mask, [&](unsigned l) { all &= threads_[first_of_warp() + l]->warp_mask == mask; });
    return all;
  }

  [[nodiscard]] unsigned waiting_for_launch() const {
    const auto awaits = [](const auto& thread) { return thread->state == State::awaits_launch; };
    return static_cast<unsigned>(std::count_if(threads_.begin(), threads_.begin() + count_, awaits));
  }

  std::string deadlock() {
    std::string text = "block " + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + " hangs:";
    for (unsigned t = 0; t < count_ && text.size() < 2000; ++t) {
      const Thread& thread = *threads_[t];
      if (thread.state == State::at_block_barrier) text += " " + std::to_string(t) + " at __syncthreads,";
      if (thread.state == State::at_warp_barrier) {
        text += " " + std::to_string(t) + " at a warp's barrier of mask " + std::to_string(thread.warp_mask) + ",";
      }
      if (early_ && thread.state == State::awaits_launch) text += " " + std::to_string(t) + " for the launch before,";
    }
    return text + " all others have ended";
  }

  std::vector<unsigned> in_order(unsigned count, std::mt19937& random) const {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0U);
    if (order_ == Order::backward) std::reverse(order.begin(), order.end());
    if (order_ == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  const Launch* launch_ = nullptr;
  Order order_ = Order::forward;
  bool early_ = false;  ///< its first block runs, or has run, ahead of the launch before
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  std::vector<unsigned> blocks_;
  std::vector<unsigned> warp_order_;
  std::vector<unsigned> lane_order_;
  unsigned turns_[kWarpSize] = {};  ///< of lanes, in that order
  unsigned count_ = 0;              ///< threads of a block
  unsigned running_ = 0;            ///< thread
  unsigned turn_ = 0;               ///< of its lane
  unsigned left_ = 0;               ///< threads that have not ended
  unsigned at_barrier_ = 0;
  int true_ = 0;     ///< predicates of those at the barrier
  int counted_ = 0;  ///< of those that were at the last one
};

class Device {
 public:
  void set_order(Order order, unsigned seed) {
    const std::lock_guard lock(mutex_);
    order_ = order;
    random_.seed(seed);
  }

  void run(std::span<const Launch> launches) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < launches.size(); ++i) {
      if (i == 0 || !launches[i].early) begin(i, launches[i]);
      if (i + 1 < launches.size() && launches[i + 1].early) {
        begin(i + 1, launches[i + 1]);
        now_->start_early();
      }
      now_ = &grids_[i % 2];
      now_->finish();
    }
  }

  [[nodiscard]] Grid& now() { return *now_; }

 private:
  void begin(std::size_t number, const Launch& launch) {
    now_ = &grids_[number % 2];
    now_->begin(launch, order_, launches_++, random_);
  }

  std::mutex mutex_;
  Order order_ = Order::changing;
  unsigned launches_ = 0;
  std::mt19937 random_;
  Grid grids_[2];  ///< a launch, and the one behind it
  Grid* now_ = grids_;
};

Device& device() {
  static Device one;
  return one;
}

}  // namespace

void set_order(Order order, unsigned seed) { device().set_order(order, seed); }

void run(std::span<const Launch> launches) { device().run(launches); }

void fail(const char* why) {
  std::fprintf(stderr, "kernel, block %u, %u, %u, thread %u, %u, %u: %s\n", block_index.x, block_index.y, block_index.z,
               thread_index.x, thread_index.y, thread_index.z, why);
  std::abort();
}

std::byte* dynamic_shared() { return device().now().shared(); }
int sync_block(bool predicate) { return device().now().sync_block(predicate); }
void await_previous() { device().now().await_previous(); }
void meet(std::uint32_t mask, void* brought, Together together) { device().now().meet(mask, brought, together); }
void copy_later(void* to, const void* from, std::size_t bytes) { device().now().copy_later({to, from, bytes}); }
void close_copies() { device().now().close_copies(); }
void finish_copies(int pending) { device().now().finish_copies(static_cast<std::size_t>(pending)); }
void multiply_later(std::function<void()> product) { device().now().multiply_later(std::move(product)); }
void close_products() { device().now().close_products(); }
void finish_products() { device().now().finish_products(); }
unsigned lane() { return device().now().lane(); }

}  // namespace emulation
