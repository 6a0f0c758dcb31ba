#include "backend/cuda/devices.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/error.h"

namespace draftwerk {
namespace cuda {
namespace {

constexpr int kLeastMajor = 8;  // bf16 tensor cores, asynchronous copies

#if defined(DRAFTWERK_CUDA_SM90A)
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

/// Why the backend does not run on a GPU; empty: it does.
std::string refusal_of(const cudaDeviceProp& properties, int number) {
  const std::string gpu = "GPU " + std::to_string(number) + " (" + properties.name + ")";
  if (properties.major < kLeastMajor) {
    return gpu + " has compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) + ", and 8.0 or more is needed; use --device cpu";
  }
  return "";
}

/// "13.0" of 13000.
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

int count_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  static_cast<void>(cudaGetLastError());
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    int runtime = 0;
    static_cast<void>(cudaDriverGetVersion(&driver));
    static_cast<void>(cudaRuntimeGetVersion(&runtime));
    if (driver == 0) throw std::runtime_error("no NVIDIA driver was found; install one, or use --device cpu");
    throw std::runtime_error("the NVIDIA driver supports CUDA " + version(driver) + ", and " + version(runtime) +
                             " is needed; install a newer driver, or use --device cpu");
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    throw std::runtime_error("there is no NVIDIA GPU; use --device cpu");
  }
  check(error, "looking for GPUs");
  return count;
}

DeviceInfo use_device(int number) {
  const int count = count_devices();
  if (number < 0 || number >= count) {
    throw std::runtime_error("there is no GPU " + std::to_string(number) + "; there " +
                             (count == 1 ? "is one, 0" : "are " + std::to_string(count) + ", from 0"));
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, number), "asking for a GPU's properties");
  if (const std::string refusal = refusal_of(properties, number); !refusal.empty()) throw std::runtime_error(refusal);
  check(cudaSetDevice(number), "choosing a GPU");
  return {number,
          properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          properties.sharedMemPerBlockOptin,
          kHasSm90a && properties.major == 9 && properties.minor == 0};
}

}  // namespace cuda

std::vector<CudaDevice> cuda_devices() {
  std::vector<CudaDevice> devices;
  const int count = cuda::count_devices();
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, i), "asking for a GPU's properties");
    devices.push_back({properties.name, cuda::refusal_of(properties, i)});
  }
  return devices;
}

}  // namespace draftwerk
