#if defined(__x86_64__)
#define DRAFTWERK_ISA avx2
namespace draftwerk::cpu::avx2 {
inline constexpr int kRegisters = 16;
}  // namespace draftwerk::cpu::avx2
#include "backend/cpu/layer_kernels.inl"
#endif
