// Matrix instructions of a warpgroup, four warps of 128 threads: what Hopper alone has, in code for sm_90a.
//
// They run while the threads go on. From multiply_by_warpgroup() to the await_warpgroup() behind it, nobody may touch
// the sums, the registers of `a` or the shared memory of `b`. Every thread of the warpgroup does the same.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device.cuh"
#include "backend/cuda/operands.h"

/// Whether the code that is compiled has these instructions; what follows is for kernels that ask.
#if defined(DRAFTWERK_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DRAFTWERK_HAS_WARPGROUPS 1
#else
#define DRAFTWERK_HAS_WARPGROUPS 0
#endif

namespace draftwerk::cuda {

inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupTiles = 24;  ///< of 8 rows of operands, of an instruction
inline constexpr int kGroupRows = kGroupTiles * kOperandRows;

#if defined(DRAFTWERK_CUDA_EMULATION)

inline void share_with_warpgroups() {}
inline void begin_warpgroup_products() {}
inline void end_warpgroup_products() { emulation::close_products(); }
/// See below.
inline void multiply_by_warpgroup(float (&sums)[kGroupTiles][4], const std::uint32_t (&a)[4], const std::byte* b,
                                  int tile_bytes) {
  emulation::multiply_by_warpgroup(sums, kGroupTiles, a, b, tile_bytes);
}
inline void await_warpgroup() { emulation::finish_products(); }
inline void await_warpgroup(float (&)[kGroupTiles][4]) { emulation::finish_products(); }

#else

/// Lets matrix instructions see what this thread has written to shared memory, or has waited for (cp_async_wait); other
/// threads need a barrier besides.
__device__ __forceinline__ void share_with_warpgroups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// Before the first product after registers of it were written,
__device__ __forceinline__ void begin_warpgroup_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// and behind the last one before they are awaited.
__device__ __forceinline__ void end_warpgroup_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// sums += a b, for 64 rows of a and 192 columns of b, 16 deep: PTX's wgmma.m64n192k16 with a in registers. A warp has
/// 16 rows of a, and these and the sums of each 8 columns as mma.m16n8k16 has them. b: 24 tiles of 8 rows of operands
/// (operands.h) in shared memory, `tile_bytes` apart; where a block of 32 columns begins, at a multiple of 512 bytes,
/// or 32 behind that for the second half of its pieces.
__device__ __forceinline__ void multiply_by_warpgroup(float (&sums)[kGroupTiles][4], const std::uint32_t (&a)[4],
                                                      const std::byte* b, int tile_bytes) {
  // The descriptor: where it begins and how far apart tiles are, both in units of 16 bytes; 2: swizzle of 64 bytes,
  // with which the leading offset is not used (1).
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(b));
  const std::uint64_t descriptor = std::uint64_t{address >> 4 & 0x3FFFU} | std::uint64_t{1} << 16 |
                                   static_cast<std::uint64_t>(tile_bytes >> 4 & 0x3FFF) << 32 | std::uint64_t{2} << 62;
#define SUMS_OF_TILE(t) "+f"(sums[t][0]), "+f"(sums[t][1]), "+f"(sums[t][2]), "+f"(sums[t][3])
#define SUMS_OF_FOUR(t) SUMS_OF_TILE(t), SUMS_OF_TILE(t + 1), SUMS_OF_TILE(t + 2), SUMS_OF_TILE(t + 3)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
      "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
      "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "
      "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100, 1, 1, "
      "1, 0;"
      : SUMS_OF_FOUR(0), SUMS_OF_FOUR(4), SUMS_OF_FOUR(8), SUMS_OF_FOUR(12), SUMS_OF_FOUR(16), SUMS_OF_FOUR(20)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
#undef SUMS_OF_FOUR
#undef SUMS_OF_TILE
}

/// Waits for all products of the warpgroup,
__device__ __forceinline__ void await_warpgroup() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
/// which are in `sums`, to be read.
__device__ __forceinline__ void await_warpgroup(float (&sums)[kGroupTiles][4]) {
  await_warpgroup();
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[t][i])::"memory");  // not read before
  }
}

#endif

}  // namespace draftwerk::cuda
