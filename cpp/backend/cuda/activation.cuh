// Elementwise functions behind products, written so that no compiler may fuse their operations in one kernel and not in
// another: a row's bits must not depend on which kernel computes it.
#pragma once

#include "backend/cuda/device.cuh"

namespace draftwerk::cuda {

/// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kRootOfTwoOverPi = 0.7978845608F;
  const float cubic = __fmul_rn(__fmul_rn(x, x), x);
  const float t = tanhf(__fmul_rn(kRootOfTwoOverPi, __fmaf_rn(0.044715F, cubic, x)));
  return __fmul_rn(__fmul_rn(0.5F, x), __fadd_rn(1.0F, t));
}

/// cap * tanh(x / cap), or x where cap is 0.
__device__ __forceinline__ float softcapped(float x, float cap) {
  return cap == 0.0F ? x : __fmul_rn(cap, tanhf(__fdiv_rn(x, cap)));
}

}  // namespace draftwerk::cuda
