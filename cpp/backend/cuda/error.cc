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

void check_allocation(cudaError_t code, std::size_t bytes) {
  if (code != cudaErrorMemoryAllocation) return check(code, "allocating memory");
  static_cast<void>(cudaGetLastError());
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the memory of the GPU");
  throw std::runtime_error("the GPU has not enough memory: " + gigabytes(bytes) + " more are needed, and " +
                           gigabytes(free) + " of its " + gigabytes(total) +
                           " are free; use narrower weights (--weights int8 or int4), a smaller KV cache (--kv-memory) "
                           "or a larger GPU");
}

}  // namespace draftwerk::cuda
