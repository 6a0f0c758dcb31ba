#include "test_backend.h"

#include "backend/cpu/cpu_backend.h"

namespace draftwerk::testing {

std::unique_ptr<Backend> make_test_backend(int threads) { return make_cpu_backend(threads); }

}  // namespace draftwerk::testing
