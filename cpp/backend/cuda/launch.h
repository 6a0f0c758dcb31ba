// Launches of kernels: recorded while the model runs through a step, and run on the device as graphs.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "backend/cuda/handles.h"

namespace draftwerk::cuda {

/// A copy between pinned and device memory, in front of a step's launches or behind them.
struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  std::size_t bytes = 0;
};

/// How many threads run a kernel, and their dynamic shared memory.
struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
};

/// A kernel of one argument as the runtime knows it.
template <typename Arguments>
const void* kernel_address(void (*kernel)(Arguments)) {
#if defined(DRAFTWERK_CUDA_EMULATION)
  return emulation::kernel_address(kernel);
#else
  return reinterpret_cast<const void*>(kernel);
#endif
}

/// Lets a kernel be launched with up to `bytes` of dynamic shared memory; more than 48 KiB have to be asked for.
template <typename Arguments>
void allow_shared(void (*kernel)(Arguments), std::size_t bytes) {
  check(cudaFuncSetAttribute(kernel_address(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "asking for shared memory");
}

/// Kernels to run one after the other. A step is recorded into one, so that the model need not know of graphs: a step
/// of the same kernels, shapes and arguments as an earlier one is the same bytes.
class LaunchList {
 public:
  /// Appends kernel(arguments); nothing where the grid is empty. The struct should have no padding: its bytes would be
  /// compared too.
  template <typename Arguments>
  void add(void (*kernel)(Arguments), const LaunchShape& shape, const std::type_identity_t<Arguments>& arguments) {
    static_assert(std::is_trivially_copyable_v<Arguments> && alignof(Arguments) <= 16);
    append(kernel_address(kernel), shape, &arguments, sizeof arguments);
  }

  void clear();
  [[nodiscard]] bool empty() const { return count_ == 0; }
  [[nodiscard]] std::size_t size() const { return count_; }
  /// Launches that were ever added.
  [[nodiscard]] std::size_t recorded() const { return recorded_; }
  /// Everything in it.
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

  /// Launches each on its own.
  void run(cudaStream_t stream) const;
  /// A graph of them, each after the one before. From Hopper on, if `early`, a kernel's blocks start as soon as there
  /// is room for them, and await the end of the kernel before (programmatic dependent launch).
  [[nodiscard]] GraphExec instantiate(bool early) const;

 private:
  struct Entry;
  void append(const void* kernel, const LaunchShape& shape, const void* arguments, std::size_t bytes);
  template <typename Visit>
  void for_each(Visit&& visit) const;

  std::vector<std::byte> bytes_;  ///< entries, each followed by its argument
  std::size_t count_ = 0;
  std::size_t recorded_ = 0;
};

}  // namespace draftwerk::cuda
