// What kernels are written with: number formats, reductions over a warp, and the instructions of tensor cores.
// Everything else is CUDA's own. The same source runs on the host, where tests/cuda/emulation stands in for
// <cuda_runtime.h>.
//
// A kernel takes one struct by value, so that a launch can be recorded and compared as bytes (launch.h). Shared memory
// is a __shared__ array where its size is known (48 KiB at most), or dynamic_shared().
//
// Blocks of a kernel may start while the kernel before it still runs. So each thread of every kernel calls
// await_previous() before it reads what another kernel wrote, writes anything or ends; all but those who have weights
// to fetch first do so by follow_previous(), in the beginning.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(DRAFTWERK_CUDA_EMULATION)
#include "tensor_cores.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace draftwerk::cuda {

inline constexpr int kWarp = 32;
inline constexpr std::uint32_t kAllLanes = 0xFFFFFFFFU;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

#if defined(DRAFTWERK_CUDA_EMULATION)

inline std::byte* dynamic_shared() { return emulation::dynamic_shared(); }
inline void let_next_start() {}

using emulation::await_previous;
using emulation::bf16_to_float;
using emulation::cp_async_16;
using emulation::cp_async_commit;
using emulation::cp_async_wait;
using emulation::f16_to_float;
using emulation::float_to_bf16;
using emulation::float_to_f16;
using emulation::ldmatrix_x4;
using emulation::ldmatrix_x4_transposed;
using emulation::load_16;
using emulation::mma_bf16;
using emulation::mma_f16;
using emulation::mma_s8;
using emulation::multiply_bf16x2;
using emulation::subtract_bf16x2;

#else

__device__ __forceinline__ std::byte* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<std::byte*>(memory);
}

/// Lets blocks of the next kernel start once every block of this one has come here: they take what room is left.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the kernel before this one has ended, and with it all before that, and sees what they wrote.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float bf16_to_float(std::uint16_t x) { return __uint_as_float(std::uint32_t{x} << 16); }
__device__ __forceinline__ std::uint16_t float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float f16_to_float(std::uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ std::uint16_t float_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

/// d += a b: a [16, 16] row-major, b [16, 8] column-major, d [16, 8] float32, spread over the lanes of a warp as PTX's
/// mma.m16n8k16 has them.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same of float16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// d += a b: a [16, 32] and b [32, 8] of int8, d int32, as mma.m16n8k32 has them.
__device__ __forceinline__ void mma_s8(int (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// a - b of two bfloat16 each, rounded to nearest even.
__device__ __forceinline__ std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  constexpr std::uint32_t kMinusOnes = 0xBF80BF80U;
  std::uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(kMinusOnes), "r"(a));
  return d;
}

/// a * b of two bfloat16 each, rounded to nearest even, subnormal ones as well: a fused multiply-add of -0, which
/// bf16x2 has on every device.
__device__ __forceinline__ std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  constexpr std::uint32_t kMinusZeros = 0x80008000U;
  std::uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(kMinusZeros));
  return d;
}

/// Four 8x8 matrices of 16-bit values from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// Reads 16 bytes of global memory, aligned to 16, past the first-level cache. Compilers leave it where it is among
/// others of its kind and matrix instructions: what is under way at a time is what a kernel says.
__device__ __forceinline__ uint4 load_16(const void* global) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(global)));
  return x;
}

/// Copies 16 bytes from global to shared memory, both aligned to 16, past the first-level cache; zeros instead where
/// `there` is false, in which case `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool there = true) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
/// Closes a group of the copies of this thread so far.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending groups of this thread are under way; what others copied needs __syncthreads() besides.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

__device__ __forceinline__ void follow_previous() {
  let_next_start();
  await_previous();
}

/// A number that float16 holds, for any: beyond its range the largest, for NaN the smallest.
__device__ __forceinline__ float finite_f16(float x) { return fminf(fmaxf(x, -65504.0F), 65504.0F); }

/// Sum over the lanes of a warp, in every lane, in an order that does not depend on anything.
__device__ __forceinline__ float warp_sum(float x) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

}  // namespace draftwerk::cuda
