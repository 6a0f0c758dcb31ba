// Conversion to q4_0 for any processor, and the choice between the instruction sets.
#define DRAFTWERK_ISA portable
#include "backend/cpu/int4.inl"

namespace draftwerk::cpu {

namespace avx2 {
extern const QuantizeInt4 kQuantizeInt4;
}  // namespace avx2
namespace avx512 {
extern const QuantizeInt4 kQuantizeInt4;
}  // namespace avx512

QuantizeInt4 int4_quantizer(Isa isa) {
#if defined(__x86_64__)
  if (vector_isa(isa) == Isa::avx512) return avx512::kQuantizeInt4;
  if (isa == Isa::avx2) return avx2::kQuantizeInt4;
#else
  static_cast<void>(isa);
#endif
  return portable::kQuantizeInt4;
}

}  // namespace draftwerk::cpu
