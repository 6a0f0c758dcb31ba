// The threads that run the kernels: the caller and size() - 1 workers that spin briefly between jobs, then park.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace draftwerk::cpu {

class WorkerPool {
 public:
  /// `threads` >= 1, the calling thread included.
  explicit WorkerPool(int threads);
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;
  WorkerPool(WorkerPool&&) = delete;
  WorkerPool& operator=(WorkerPool&&) = delete;
  ~WorkerPool();

  [[nodiscard]] int size() const;

  /// Calls body(begin, end, worker) until [0, items) is covered in pieces of at least `grain` (but for the last one),
  /// handed out in order to whoever is free, and returns when all of it is done. Pieces shrink as the range runs out,
  /// by guided self-scheduling (Polychronopoulos and Kuck, 1987): long ones stream memory well, short ones at the end
  /// let the threads finish together. The body must not throw, and what it computes must not depend on how the range
  /// is cut. With one piece (items <= grain) it runs on the caller alone.
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

/// Threads that suit this process: the processors it may run on (affinity and cgroup quota counted), at least 1.
int default_threads();

}  // namespace draftwerk::cpu
