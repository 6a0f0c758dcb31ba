// Conversion to q4_0 for AVX2.
#if defined(__x86_64__)
#define DRAFTWERK_ISA avx2
#include "backend/cpu/int4.inl"
#endif
