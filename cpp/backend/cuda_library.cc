#include "backend/cuda_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace draftwerk {
namespace {

template <typename Function>
Function symbol(void* handle, const std::string& path, const char* name) {
  void* found = dlsym(handle, name);
  if (found == nullptr) throw std::runtime_error(path + " is not the CUDA backend of draftwerk: it has no " + name);
  return reinterpret_cast<Function>(found);
}

}  // namespace

namespace cuda_library {

#if !defined(DRAFTWERK_VERSION)
#define DRAFTWERK_VERSION "development"
#endif
const char* build() { return "draftwerk " DRAFTWERK_VERSION ", C++ " __VERSION__; }

}  // namespace cuda_library

// It is never unloaded: backends of it, and the threads of the driver, may outlive any object here.
CudaLibrary::CudaLibrary(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) throw std::runtime_error(std::string("the CUDA backend cannot be loaded: ") + dlerror());
  const std::string its = symbol<cuda_library::Build>(handle_, path, cuda_library::kBuildSymbol)();
  if (its != cuda_library::build()) {
    throw std::runtime_error(path + " is of another build (" + its + ") than this core (" + cuda_library::build() +
                             "); install draftwerk and draftwerk-cuda of one version");
  }
  symbol<cuda_library::Devices>(handle_, path, cuda_library::kDevicesSymbol);
  symbol<cuda_library::MakeBackend>(handle_, path, cuda_library::kMakeBackendSymbol);
}

std::vector<CudaDevice> CudaLibrary::devices() const {
  std::vector<CudaDevice> devices;
  reinterpret_cast<cuda_library::Devices>(dlsym(handle_, cuda_library::kDevicesSymbol))(devices);
  return devices;
}

std::unique_ptr<Backend> CudaLibrary::make_backend(int device) const {
  const auto make = reinterpret_cast<cuda_library::MakeBackend>(dlsym(handle_, cuda_library::kMakeBackendSymbol));
  return std::unique_ptr<Backend>(make(device));
}

}  // namespace draftwerk
