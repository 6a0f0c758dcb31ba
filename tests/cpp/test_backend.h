// The backend that tests of models and engines run on: each test program has one.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace draftwerk::testing {

/// `threads` is for the CPU.
std::unique_ptr<Backend> make_test_backend(int threads);

/// Whether its threads are emulated: the same tests then run fewer and shorter texts, which still pass the window.
bool test_backend_is_emulated();

}  // namespace draftwerk::testing
