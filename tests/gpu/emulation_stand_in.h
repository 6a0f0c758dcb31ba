// Included before all else where the kernels' tests (tests/cuda) are compiled for a GPU that is there: what they use of
// the emulated device, and memory that both host and GPU may touch, as theirs is there.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace emulation {

/// The order of a GPU's threads is its own.
enum class Order { forward, backward, shuffled, changing };
inline void set_order(Order, unsigned = 0) {}
inline void reset() {}

inline float f16_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
inline std::uint16_t float_to_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }

}  // namespace emulation

// Tests read what kernels wrote, and hand them memory of their own (managed_memory.cc).
#define cudaMalloc(pointer, bytes) cudaMallocManaged(pointer, bytes, cudaMemAttachGlobal)
