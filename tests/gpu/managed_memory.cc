// A test program's memory is managed from main on: tests read what kernels wrote, and hand them a std::vector's. Before
// that, not all of what nvcc has a program do at its beginning may be done, and CUDA may not be called.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory_resource>
#include <new>

namespace {

bool begun = false;

/// The runtime may ask for memory while it is asked for some: that is the C library's.
thread_local bool within = false;

class Managed : public std::pmr::memory_resource {
  void* do_allocate(std::size_t bytes, std::size_t) override {
    void* memory = nullptr;
    within = true;
    const cudaError_t error = cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal);
    within = false;
    if (error != cudaSuccess) {
      std::fprintf(stderr, "managed memory: %s\n", cudaGetErrorString(error));
      std::abort();
    }
    return memory;
  }
  void do_deallocate(void* memory, std::size_t, std::size_t) override {
    within = true;
    static_cast<void>(cudaFree(memory));  // fails at the end of the program, where it does not matter
    within = false;
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

std::pmr::memory_resource& pool() {
  alignas(Managed) static std::byte managed[sizeof(Managed)];
  alignas(std::pmr::synchronized_pool_resource) static std::byte place[sizeof(std::pmr::synchronized_pool_resource)];
  // Never destroyed: what is static may be freed after it would have been.
  static auto* const kPool = new (place) std::pmr::synchronized_pool_resource(new (managed) Managed);
  return *kPool;
}

constexpr std::size_t kHeader = 64;  // in front of what is allocated: its size, or 0 for the C library's

}  // namespace

/// What the linker has the program call where it says cudaMalloc (--wrap).
extern "C" cudaError_t __wrap_cudaMalloc(void** pointer, std::size_t bytes) {
  return cudaMallocManaged(pointer, bytes, cudaMemAttachGlobal);
}

void* operator new(std::size_t bytes) {
  const bool managed = begun && !within;
  void* const memory = managed ? pool().allocate(bytes + kHeader, kHeader) : std::malloc(bytes + kHeader);
  if (memory == nullptr) throw std::bad_alloc();
  *static_cast<std::size_t*>(memory) = managed ? bytes + kHeader : 0;
  return static_cast<std::byte*>(memory) + kHeader;
}
void operator delete(void* memory) noexcept {
  if (memory == nullptr) return;
  std::byte* const begin = static_cast<std::byte*>(memory) - kHeader;
  const std::size_t bytes = *reinterpret_cast<std::size_t*>(begin);
  if (bytes == 0) return std::free(begin);
  pool().deallocate(begin, bytes, kHeader);
}
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

int main(int argc, char** argv) {
  begun = true;
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
