// The GPUs of a machine.
#pragma once

#include <cstddef>
#include <string>

namespace draftwerk::cuda {

/// What kernels are sized by.
struct DeviceInfo {
  int number = 0;
  std::string name;
  int major = 0;  ///< of its compute capability
  int minor = 0;
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;  ///< that a block may ask for
  bool warpgroups = false;       ///< whether kernels have matrix instructions of warpgroups there (warpgroup.cuh)
};

/// How many there are. Throws std::runtime_error, with the reason and what would work, where it is none.
int count_devices();
/// Makes a GPU the calling thread's and returns what it is. Throws std::runtime_error where there is no such GPU, or it
/// is too old.
DeviceInfo use_device(int number);

}  // namespace draftwerk::cuda
