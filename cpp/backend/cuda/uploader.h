// The way of weights to the device: through two pinned buffers in turn, so that one is filled while the other is
// copied.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cpu/worker_pool.h"
#include "backend/cuda/handles.h"

namespace draftwerk::cuda {

class Uploader {
 public:
  /// Most bytes that go at once.
  static constexpr std::size_t kBytes = std::size_t{8} << 20;

  /// `threads` fill buffers, the calling one included.
  explicit Uploader(int threads = 1);
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  Uploader(Uploader&&) = delete;
  Uploader& operator=(Uploader&&) = delete;
  ~Uploader();
  /// Memory of kBytes to fill for the next send(); waits until what was sent from it has arrived.
  std::byte* next();
  /// Copies the first `bytes` of what next() gave to the device. Does not wait.
  void send(void* to, std::size_t bytes);
  /// Copies any memory of the host, which may change as soon as this returns. Does not wait for the last bytes.
  void send(void* to, const std::byte* from, std::size_t bytes);
  /// Fills device memory with zeros, after what was sent and before what will be.
  void clear(void* to, std::size_t bytes);
  /// Who fills buffers.
  [[nodiscard]] cpu::WorkerPool& workers() { return workers_; }
  /// Waits until everything has arrived.
  void wait() const { stream_.wait(); }

 private:
  struct Buffer {
    PinnedMemory memory;
    Event sent;
  };
  cpu::WorkerPool workers_;
  Stream stream_;
  Buffer buffers_[2];
  int turn_ = 0;
};

}  // namespace draftwerk::cuda
