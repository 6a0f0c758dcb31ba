#include "test_backend.h"

#include "backend/cuda/cuda_backend.h"

namespace draftwerk::testing {

std::unique_ptr<Backend> make_test_backend(int) { return make_cuda_backend(0); }
bool test_backend_is_cpu() { return false; }

}  // namespace draftwerk::testing
