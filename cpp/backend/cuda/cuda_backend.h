// The Backend on an NVIDIA GPU.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda_library.h"

namespace draftwerk {

/// The GPUs of this machine, by their numbers. Throws std::runtime_error, with what would work, where there is none: no
/// driver, one that is too old, or no GPU.
std::vector<CudaDevice> cuda_devices();

/// A backend on GPU `device`. It must be used by one thread at a time. Throws what cuda_devices() throws, and
/// std::runtime_error for a number that there is no GPU of and for one that is refused.
std::unique_ptr<Backend> make_cuda_backend(int device);

}  // namespace draftwerk
