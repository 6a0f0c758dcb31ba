#if defined(__x86_64__)
#define DRAFTWERK_ISA avx512
namespace draftwerk::cpu::avx512 {
inline constexpr int kRegisters = 32;
}  // namespace draftwerk::cpu::avx512
#include "backend/cpu/layer_kernels.inl"
#endif
