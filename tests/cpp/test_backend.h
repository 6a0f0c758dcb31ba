// The backend that tests of models and engines run on: each test program has one.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace draftwerk::testing {

/// `threads` is for the CPU.
std::unique_ptr<Backend> make_test_backend(int threads);

/// Whether it is the processor's. On others the same tests run fewer and shorter texts, which still pass the window:
/// emulated threads are slow, and a GPU's time is rare.
bool test_backend_is_cpu();

}  // namespace draftwerk::testing
