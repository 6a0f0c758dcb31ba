#include "test_backend.h"

#include "backend/cpu/cpu_backend.h"

namespace draftwerk::testing {

std::unique_ptr<Backend> make_test_backend(int threads) { return make_cpu_backend(threads); }
bool test_backend_is_cpu() { return true; }

}  // namespace draftwerk::testing
