// The CUDA backend is a library of its own beside the core, which is loaded when somebody asks for it: a machine
// without a GPU, or without NVIDIA's driver, runs the same core.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace draftwerk {

/// A GPU of this machine.
struct CudaDevice {
  std::string name;
  std::string refusal;  ///< why the backend does not run on it, and what would work; empty: it does
};

/// Loads it from a file, once in the process. Throws std::runtime_error with the reason where it cannot be loaded or is
/// of another build than this core.
class CudaLibrary {
 public:
  explicit CudaLibrary(const std::string& path);

  /// The GPUs, by their numbers. Throws std::runtime_error with the reason if there is none.
  [[nodiscard]] std::vector<CudaDevice> devices() const;
  /// A backend on one of them. Throws std::runtime_error with the reason.
  [[nodiscard]] std::unique_ptr<Backend> make_backend(int device) const;

 private:
  void* handle_ = nullptr;
};

/// What the library exports, by name. Exceptions pass: both sides are of the same build.
namespace cuda_library {

inline constexpr const char* kBuildSymbol = "draftwerk_cuda_build";
inline constexpr const char* kDevicesSymbol = "draftwerk_cuda_devices";
inline constexpr const char* kMakeBackendSymbol = "draftwerk_cuda_make_backend";
using Build = const char* (*)();
using Devices = void (*)(std::vector<CudaDevice>& devices);
using MakeBackend = Backend* (*)(int device);

/// What core and library must agree in: their objects are shared.
[[nodiscard]] const char* build();

}  // namespace cuda_library
}  // namespace draftwerk
