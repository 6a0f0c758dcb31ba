#include "backend/cuda/error.h"

#include <cstdio>

namespace draftwerk::cuda {
namespace {

std::string gigabytes(std::size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

}  // namespace

void fail(cudaError_t code, const char* what) {
  static_cast<void>(cudaGetLastError());  // an error that is reported here is not the next call's
  const CudaError error(code, what);
  // An error that ends a device comes back from whatever is asked of it then. Memory that runs out does not end it.
  if (cudaDeviceSynchronize() == cudaSuccess) throw error;
  static_cast<void>(cudaGetLastError());
  throw DeviceFailure(std::string(error.what()) + "; this GPU computes nothing more until the process is started anew");
}

void check_allocation(cudaError_t code, std::size_t bytes) {
  if (code != cudaErrorMemoryAllocation) return check(code, "allocating memory");
  static_cast<void>(cudaGetLastError());
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the memory of the GPU");
  throw OutOfDeviceMemory("the GPU has not enough memory: " + gigabytes(bytes) + " more are needed, and " +
                          gigabytes(free) + " of its " + gigabytes(total) +
                          " are free; use narrower weights (--weights int8 or int4), a smaller KV cache (--kv-memory) "
                          "or a larger GPU");
}

}  // namespace draftwerk::cuda
