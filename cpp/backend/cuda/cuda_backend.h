// The Backend on an NVIDIA GPU.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace draftwerk {

/// The GPUs of this machine, by their numbers. Throws std::runtime_error, with what would work, where there is none
/// that the backend can run on: no driver, one that is too old, no GPU, or none of compute capability 8.0 or more.
std::vector<std::string> cuda_devices();

/// A backend on GPU `device`. It must be used by one thread at a time. Throws what cuda_devices() throws, and
/// std::runtime_error for a number that there is no GPU of.
std::unique_ptr<Backend> make_cuda_backend(int device);

}  // namespace draftwerk
