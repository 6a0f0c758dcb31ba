// What the CUDA runtime hands out, owned.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "backend/cuda/error.h"

namespace draftwerk::cuda {

/// Owns a handle and gives it back with `kRelease`.
template <typename Handle, auto kRelease>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) kRelease(handle_);
  }
  [[nodiscard]] Handle get() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

class Stream : public Owned<cudaStream_t, cudaStreamDestroy> {
 public:
  using Owned::Owned;
  static Stream create() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    return Stream(stream);
  }
  void wait() const { check(cudaStreamSynchronize(get()), "computing a step"); }
};

/// A point in a stream to wait for; or one to measure time from, which takes the device a little longer.
class Event : public Owned<cudaEvent_t, cudaEventDestroy> {
 public:
  using Owned::Owned;
  static Event create() { return with(cudaEventDisableTiming); }
  static Event timed() { return with(cudaEventDefault); }

 private:
  static Event with(unsigned flags) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, flags), "making an event");
    return Event(event);
  }
};

class Graph : public Owned<cudaGraph_t, cudaGraphDestroy> {
 public:
  using Owned::Owned;
  static Graph create() {
    cudaGraph_t graph = nullptr;
    check(cudaGraphCreate(&graph, 0), "making a graph");
    return Graph(graph);
  }
};

class GraphExec : public Owned<cudaGraphExec_t, cudaGraphExecDestroy> {
 public:
  using Owned::Owned;
  static GraphExec of(const Graph& graph) {
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph.get(), 0), "instantiating a graph");
    return GraphExec(executable);
  }
};

/// Device memory; not initialised.
class DeviceMemory : public Owned<void*, cudaFree> {
 public:
  using Owned::Owned;
  static DeviceMemory of(std::size_t bytes) {
    void* pointer = nullptr;
    check_allocation(cudaMalloc(&pointer, bytes), bytes);
    return DeviceMemory(pointer);
  }
};

/// Host memory that copies to and from the device read and write directly.
class PinnedMemory : public Owned<void*, cudaFreeHost> {
 public:
  using Owned::Owned;
  static PinnedMemory of(std::size_t bytes) {
    void* pointer = nullptr;
    check(cudaHostAlloc(&pointer, bytes, cudaHostAllocDefault), "allocating pinned memory");
    return PinnedMemory(pointer);
  }
};

}  // namespace draftwerk::cuda
