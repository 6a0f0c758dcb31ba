// Sampler kernels for any processor.
#define DRAFTWERK_ISA portable
#include "backend/cpu/sampler_kernels.inl"
