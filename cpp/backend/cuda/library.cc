// What cuda_library.h looks up.
#include "backend/cuda_library.h"

#include "backend/cuda/cuda_backend.h"

#define DRAFTWERK_EXPORT extern "C" __attribute__((visibility("default")))

DRAFTWERK_EXPORT const char* draftwerk_cuda_build() { return draftwerk::cuda_library::build(); }

DRAFTWERK_EXPORT void draftwerk_cuda_devices(std::vector<draftwerk::CudaDevice>& devices) {
  devices = draftwerk::cuda_devices();
}

DRAFTWERK_EXPORT draftwerk::Backend* draftwerk_cuda_make_backend(int device) {
  return draftwerk::make_cuda_backend(device).release();
}
