// The tests of models and engines on a GPU that is there, by the library that the core loads.
#include "test_backend.h"

#include "backend/cuda_library.h"

namespace draftwerk::testing {

std::unique_ptr<Backend> make_test_backend(int) {
  static const CudaLibrary kLibrary(DRAFTWERK_CUDA_LIBRARY);
  return kLibrary.make_backend(0);
}
bool test_backend_is_cpu() { return false; }

}  // namespace draftwerk::testing
