// Sampler kernels for AVX-512.
#define DRAFTWERK_ISA avx512
#include "backend/cpu/sampler_kernels.inl"
