// Conversion to q4_0 for AVX-512.
#if defined(__x86_64__)
#define DRAFTWERK_ISA avx512
#include "backend/cpu/int4.inl"
#endif
