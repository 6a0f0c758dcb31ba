// Included before all else where the kernels' tests (tests/cuda) are compiled for a GPU that is there: what they use of
// the emulated device.
#pragma once

#include <cuda_runtime.h>

namespace emulation {

/// The order of a GPU's threads is its own.
enum class Order { forward, backward, shuffled, changing };
inline void set_order(Order, unsigned = 0) {}
inline void reset() {}

}  // namespace emulation
