// The backend that tests of models and engines run on: each test program has one.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace draftwerk::testing {

/// `threads` is for the CPU.
std::unique_ptr<Backend> make_test_backend(int threads);

}  // namespace draftwerk::testing
