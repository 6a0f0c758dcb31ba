// The Backend on the processor: own kernels, one worker pool, float32 activations.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/cpu/isa.h"

namespace draftwerk {

/// A backend that runs on `threads` threads, the calling one included; 0 takes cpu::default_threads(). It must be used
/// by one thread at a time. Throws std::invalid_argument for a negative number and what cpu::choose_isa() throws.
std::unique_ptr<Backend> make_cpu_backend(int threads);

/// The same for a given instruction set, which the machine must have: for tests and benchmarks.
std::unique_ptr<Backend> make_cpu_backend(int threads, cpu::Isa isa);

}  // namespace draftwerk
