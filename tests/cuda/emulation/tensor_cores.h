// Number formats and what PTX calls matrix instructions, with the fragments of its manual ("Matrix multiply-accumulate
// operation using mma instruction"): lane l has group l / 4 and place l % 4.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "vector_types.h"

namespace emulation {

inline float bf16_to_float(std::uint16_t x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }
/// To nearest, ties to even; NaN becomes 0x7FFF.
inline std::uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}
/// Its bits as those of a float are the number divided by 2^112, which multiplying takes back exactly.
inline float f16_to_float(std::uint16_t x) {
  const std::uint32_t sign = (x & 0x8000U) << 16;
  if ((x & 0x7C00U) == 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U | (x & 0x3FFU) << 13);
  return std::bit_cast<float>(sign | (x & 0x7FFFU) << 13) * 0x1p112F;
}
/// To nearest, ties to even; infinity where it is too large; NaN becomes 0x7FFF.
std::uint16_t float_to_f16(float x);

namespace tensor_cores {

template <typename Accumulator>
struct Fragments {
  Accumulator* d;          ///< 4
  const std::uint32_t* a;  ///< 4
  const std::uint32_t* b;  ///< 2
};

/// d += a b over the fragments of a warp: a [16, K], b [K, 8], d [16, 8]. Format: how numbers lie in registers.
/// Register 0 of a has rows 0-7, 1 rows 8-15, both of the left half; 2 and 3 of the right half. Of b: the upper half
/// and the lower.
template <typename Format>
void multiply(Brought brought, std::uint32_t) {
  using Accumulator = typename Format::Accumulator;
  constexpr unsigned kPerWord = Format::kPerWord;
  constexpr unsigned kColumns = 8 * kPerWord;
  Accumulator a[16][kColumns];
  Accumulator b[kColumns][8];
  for (unsigned l = 0; l < kWarpSize; ++l) {
    const auto& of_lane = *static_cast<const Fragments<Accumulator>*>(brought[l]);
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned i = 0; i < kPerWord; ++i) {
        const unsigned k = (half * 4 + l % 4) * kPerWord + i;
        a[l / 4][k] = Format::decode(of_lane.a[2 * half], i);
        a[l / 4 + 8][k] = Format::decode(of_lane.a[2 * half + 1], i);
        b[k][l / 4] = Format::decode(of_lane.b[half], i);
      }
    }
  }
  for (unsigned row = 0; row < 16; ++row) {
    const auto place = [&](unsigned column) -> Accumulator& {
      const unsigned l = row % 8 * 4 + column / 2;
      return static_cast<const Fragments<Accumulator>*>(brought[l])->d[row / 8 * 2 + column % 2];
    };
    Accumulator d[8];
    for (unsigned column = 0; column < 8; ++column) d[column] = place(column);
    for (unsigned k = 0; k < kColumns; ++k) {
      for (unsigned column = 0; column < 8; ++column) d[column] += a[row][k] * b[k][column];
    }
    for (unsigned column = 0; column < 8; ++column) place(column) = d[column];
  }
}

template <typename Format>
void mma(typename Format::Accumulator (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  Fragments<typename Format::Accumulator> own{d, a, b};
  meet(0xFFFFFFFFU, &own, multiply<Format>);
}

struct Bf16 {
  using Accumulator = float;
  static constexpr unsigned kPerWord = 2;
  static float decode(std::uint32_t word, unsigned i) {
    return bf16_to_float(static_cast<std::uint16_t>(word >> 16 * i));
  }
};
struct F16 {
  using Accumulator = float;
  static constexpr unsigned kPerWord = 2;
  static float decode(std::uint32_t word, unsigned i) {
    return f16_to_float(static_cast<std::uint16_t>(word >> 16 * i));
  }
};
struct S8 {
  using Accumulator = int;
  static constexpr unsigned kPerWord = 4;
  static int decode(std::uint32_t word, unsigned i) { return static_cast<std::int8_t>(word >> 8 * i); }
};

}  // namespace tensor_cores

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::mma<tensor_cores::Bf16>(d, a, b);
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::mma<tensor_cores::F16>(d, a, b);
}
inline void mma_s8(int (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::mma<tensor_cores::S8>(d, a, b);
}

inline std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t d = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const float difference =
        bf16_to_float(static_cast<std::uint16_t>(a >> 16 * i)) - bf16_to_float(static_cast<std::uint16_t>(b >> 16 * i));
    d |= static_cast<std::uint32_t>(float_to_bf16(difference)) << 16 * i;
  }
  return d;
}

inline std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t d = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const float product =
        bf16_to_float(static_cast<std::uint16_t>(a >> 16 * i)) * bf16_to_float(static_cast<std::uint16_t>(b >> 16 * i));
    d |= static_cast<std::uint32_t>(float_to_bf16(product)) << 16 * i;
  }
  return d;
}

/// Rows of four 8x8 matrices, as lanes point to them; then each lane's two elements of each.
template <bool kTransposed>
void ldmatrix(std::uint32_t (&r)[4], const void* shared_row) {
  if (reinterpret_cast<std::uintptr_t>(shared_row) % 16 != 0) fail("ldmatrix: a row that is not aligned to 16 bytes");
  struct Part {
    std::uint32_t* registers;
    const std::uint16_t* row;
  };
  Part own{r, static_cast<const std::uint16_t*>(shared_row)};
  meet(0xFFFFFFFFU, &own, [](Brought brought, std::uint32_t lanes) {
    for_each_lane(lanes, [&](unsigned l) {
      for (unsigned j = 0; j < 4; ++j) {
        std::uint32_t pair = 0;
        for (unsigned i = 0; i < 2; ++i) {
          const unsigned row = kTransposed ? l % 4 * 2 + i : l / 4;
          const unsigned column = kTransposed ? l / 4 : l % 4 * 2 + i;
          pair |= static_cast<std::uint32_t>(static_cast<const Part*>(brought[j * 8 + row])->row[column]) << 16 * i;
        }
        static_cast<const Part*>(brought[l])->registers[j] = pair;
      }
    });
  });
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) { ldmatrix<false>(r, shared_row); }
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) { ldmatrix<true>(r, shared_row); }

/// sums[t] += a b for tiles of 8 rows of b, as PTX's wgmma of bfloat16 with a in registers: done at once or when
/// it is waited for, with what is in registers and shared memory by then. b: of each tile 8 rows of 64 bytes, in which
/// bits 4 and 5 of an address within shared memory have bits 7 and 8 added without carry (swizzle of 64 bytes).
inline void multiply_by_warpgroup(float (*sums)[4], int tiles, const std::uint32_t (&a)[4], const std::byte* b,
                                  int tile_bytes) {
  const std::ptrdiff_t first = b - dynamic_shared();
  if (first % 512 != 0 && first % 512 != 32) fail("wgmma: operands that do not begin where a swizzle of 64 bytes does");
  multiply_later([=, &a] {
    for (int t = 0; t < tiles; ++t) {
      std::uint32_t of_tile[2];
      for (int half = 0; half < 2; ++half) {
        const std::ptrdiff_t plain =
            first + std::ptrdiff_t{t} * tile_bytes + lane() / 4 * 64 + half * 16 + lane() % 4 * 4;
        std::memcpy(&of_tile[half], dynamic_shared() + (plain ^ (plain >> 7 & 3) << 4), sizeof of_tile[half]);
      }
      mma_bf16(sums[t], a, of_tile);
    }
  });
}

inline uint4 load_16(const void* global) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) fail("load: an address that is not aligned to 16 bytes");
  return *static_cast<const uint4*>(global);
}

/// Asynchronous copies happen when their group is waited for, or at once (block.h).
inline void cp_async_16(void* shared, const void* global, bool there = true) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    fail("cp.async: an address that is not aligned to 16 bytes");
  }
  copy_later(shared, there ? global : nullptr, 16);
}
inline void cp_async_commit() { close_copies(); }
template <int kPending>
void cp_async_wait() {
  finish_copies(kPending);
}

}  // namespace emulation
