// Errors of the device as exceptions that say what was being done.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend/backend.h"

namespace draftwerk::cuda {

/// A call of the CUDA runtime that failed; the device still works.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const char* what)
      : std::runtime_error(std::string("CUDA error while ") + what + ": " + cudaGetErrorString(code) + " (" +
                           cudaGetErrorName(code) + ")"),
        code_(code) {}
  [[nodiscard]] cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

/// The GPU's memory does not do.
class OutOfDeviceMemory : public std::bad_alloc {
 public:
  explicit OutOfDeviceMemory(std::string what) : what_(std::move(what)) {}
  [[nodiscard]] const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

/// A broken call by our own code, not a user's mistake.
inline void require(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("cuda backend: ") + what);
}

/// Throws what a failed call calls for: DeviceFailure if nothing works after it, else CudaError.
[[noreturn]] void fail(cudaError_t code, const char* what);

/// Throws unless a call went well.
inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) fail(code, what);
}

/// Throws OutOfDeviceMemory, with how much there is, unless an allocation of so many bytes of the device's went well.
void check_allocation(cudaError_t code, std::size_t bytes);

}  // namespace draftwerk::cuda
