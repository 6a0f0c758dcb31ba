#define DRAFTWERK_ISA portable
namespace draftwerk::cpu::portable {
inline constexpr int kRegisters = 16;
}  // namespace draftwerk::cpu::portable
#include "backend/cpu/layer_kernels.inl"

// Compiled for every machine, so this is also where a table is chosen.
namespace draftwerk::cpu {

namespace avx2 {
extern const LayerKernels kLayerKernels;
}  // namespace avx2
namespace avx512 {
extern const LayerKernels kLayerKernels;
}  // namespace avx512

const LayerKernels& layer_kernels(Isa isa) {
#if defined(__x86_64__)
  if (vector_isa(isa) == Isa::avx512) return avx512::kLayerKernels;
  if (isa == Isa::avx2) return avx2::kLayerKernels;
#else
  static_cast<void>(isa);
#endif
  return portable::kLayerKernels;
}

}  // namespace draftwerk::cpu
