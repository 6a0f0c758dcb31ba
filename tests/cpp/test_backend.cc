#include "test_backend.h"

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/isa.h"

namespace draftwerk::testing {

// Vocabularies of tests are so small that it would hardly ever pay to screen their heads.
std::unique_ptr<Backend> make_test_backend(int threads) {
  return std::make_unique<cpu::CpuBackend>(threads, cpu::choose_isa(), cpu::Screening::always);
}
bool test_backend_is_cpu() { return true; }

}  // namespace draftwerk::testing
