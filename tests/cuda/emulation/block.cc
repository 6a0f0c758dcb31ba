#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulation {

uint3 thread_index{};
uint3 block_index{};
dim3 block_size;
dim3 grid_size;

namespace {

enum class State : std::uint8_t { running, at_block_barrier, at_warp_barrier, ended };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};
using Copies = std::vector<Copy>;
using Together = void (*)(Brought, std::uint32_t);

struct Thread {
  Fiber fiber;
  Copies open_copies;
  std::deque<Copies> closed_copies;
  uint3 index{};
  State state = State::running;
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

class Device {
 public:
  void set_order(Order order, unsigned seed) {
    const std::lock_guard lock(mutex_);
    order_ = order;
    random_.seed(seed);
  }

  void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
    const std::lock_guard lock(mutex_);
    const unsigned count = block.x * block.y * block.z;
    if (count == 0 || count > kMaxThreads) {
      throw std::logic_error("a block of " + std::to_string(count) + " threads; 1 to 1024 are possible");
    }
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    count_ = count;
    warps_.resize((count + kWarpSize - 1) / kWarpSize);
    constexpr Order kOrders[] = {Order::forward, Order::backward, Order::shuffled};
    order_now_ = order_ == Order::changing ? kOrders[launches_++ % 3] : order_;
    shared_.resize(shared_bytes);
    block_size = block;
    grid_size = grid;
    body_ = &body;
    const std::vector<unsigned> blocks = in_order(grid.x * grid.y * grid.z);
    warp_order_ = in_order(static_cast<unsigned>(warps_.size()));
    lane_order_ = in_order(kWarpSize);
    for (unsigned turn = 0; turn < kWarpSize; ++turn) turns_[lane_order_[turn]] = turn;
    for (const unsigned b : blocks) {
      block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      if (shared_bytes > 0) std::memset(shared_.get(), 0xFF, shared_bytes);
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

  void copy_later(const Copy& copy) { threads_[running_]->open_copies.push_back(copy); }
  void close_copies() {
    Thread& thread = *threads_[running_];
    thread.closed_copies.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
  }
  void finish_copies(std::size_t pending) {
    std::deque<Copies>& closed = threads_[running_]->closed_copies;
    for (; closed.size() > pending; closed.pop_front()) {
      for (const Copy& copy : closed.front()) {
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, copy.bytes);
        } else {
          std::memcpy(copy.to, copy.from, copy.bytes);
        }
      }
    }
  }

  [[nodiscard]] unsigned lane() const { return running_ % kWarpSize; }

 private:
  void run_block() {
    for (unsigned t = 0; t < count_; ++t) {
      Thread& thread = *threads_[t];
      thread.index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
      thread.state = State::running;
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
    for (;;) {
      for (const unsigned w : warp_order_) run_warp(w);
      if (left_ == 0) return;
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
    Device& device = *static_cast<Device*>(self);
    (*device.body_)();
    Thread& thread = *device.threads_[device.running_];
    thread.state = State::ended;
    --device.left_;
    Thread* next = device.next();
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

  std::string deadlock() {
    std::string text = "block " + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + " hangs:";
    for (unsigned t = 0; t < count_ && text.size() < 2000; ++t) {
      const Thread& thread = *threads_[t];
      if (thread.state == State::at_block_barrier) text += " " + std::to_string(t) + " at __syncthreads,";
      if (thread.state == State::at_warp_barrier) {
        text += " " + std::to_string(t) + " at a warp's barrier of mask " + std::to_string(thread.warp_mask) + ",";
      }
    }
    return text + " all others have ended";
  }

  std::vector<unsigned> in_order(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0U);
    if (order_now_ == Order::backward) std::reverse(order.begin(), order.end());
    if (order_now_ == Order::shuffled) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  std::mutex mutex_;
  Order order_ = Order::changing;
  Order order_now_ = Order::forward;
  unsigned launches_ = 0;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  std::vector<unsigned> warp_order_;
  std::vector<unsigned> lane_order_;
  unsigned turns_[kWarpSize] = {};  ///< of lanes, in that order
  const std::function<void()>* body_ = nullptr;
  unsigned count_ = 0;    ///< threads of a block
  unsigned running_ = 0;  ///< thread
  unsigned turn_ = 0;     ///< of its lane
  unsigned left_ = 0;     ///< threads that have not ended
  unsigned at_barrier_ = 0;
  int true_ = 0;     ///< predicates of those at the barrier
  int counted_ = 0;  ///< of those that were at the last one
};

Device& device() {
  static Device one;
  return one;
}

}  // namespace

void set_order(Order order, unsigned seed) { device().set_order(order, seed); }

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  device().run(grid, block, shared_bytes, body);
}

void fail(const char* why) {
  std::fprintf(stderr, "kernel, block %u, %u, %u, thread %u, %u, %u: %s\n", block_index.x, block_index.y, block_index.z,
               thread_index.x, thread_index.y, thread_index.z, why);
  std::abort();
}

std::byte* dynamic_shared() { return device().shared(); }
int sync_block(bool predicate) { return device().sync_block(predicate); }
void meet(std::uint32_t mask, void* brought, Together together) { device().meet(mask, brought, together); }
void copy_later(void* to, const void* from, std::size_t bytes) { device().copy_later({to, from, bytes}); }
void close_copies() { device().close_copies(); }
void finish_copies(int pending) { device().finish_copies(static_cast<std::size_t>(pending)); }
unsigned lane() { return device().lane(); }

}  // namespace emulation
