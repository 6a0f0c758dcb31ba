// The threads that run the kernels: the caller and size() - 1 workers that spin briefly between jobs, then park.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace draftwerk::cpu {

/// That a pool can have: as many as nine bits count.
inline constexpr int kMostThreads = 511;

class WorkerPool {
 public:
  /// `threads`, the calling one included, are 1 to kMostThreads; throws std::invalid_argument otherwise.
  explicit WorkerPool(int threads);
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;
  WorkerPool(WorkerPool&&) = delete;
  WorkerPool& operator=(WorkerPool&&) = delete;
  ~WorkerPool();

  [[nodiscard]] int size() const;

  /// Calls body(begin, end, worker) until [0, items), fewer than 2^32, is covered in pieces of at least `grain` (but
  /// for the last one), and returns when all of it is done. Each thread has an equal share, of which it takes shrinking
  /// pieces in ascending order, so that it streams memory from one into the next; who has none left takes from the end
  /// of another's (work stealing: Blumofe and Leiserson, 1999). The body must not throw, and what it computes must not
  /// depend on how the range is cut. With one piece (items <= grain) it runs on the caller alone. Whatever the threads'
  /// floating-point environments are, the body has the default one.
  template <typename Body>
  void parallel_for(std::int64_t items, std::int64_t grain, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        items, grain,
        [](void* context, std::int64_t begin, std::int64_t end, int worker) {
          (*static_cast<Plain*>(context))(begin, end, worker);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Invoke = void (*)(void* context, std::int64_t begin, std::int64_t end, int worker);
  void run(std::int64_t items, std::int64_t grain, Invoke invoke, void* context);

  struct State;
  std::unique_ptr<State> state_;
};

/// Threads that suit this process: the processors it may run on (affinity and cgroup quota counted), at least 1
/// and no more than a pool takes.
int default_threads();

}  // namespace draftwerk::cpu
