// Sampler kernels for AVX2.
#define DRAFTWERK_ISA avx2
#include "backend/cpu/sampler_kernels.inl"
