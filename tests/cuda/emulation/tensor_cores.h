// Number formats and what PTX calls matrix instructions, with the fragments of its manual ("Matrix multiply-accumulate
// operation using mma instruction"): lane l has group l / 4 and place l % 4.
#pragma once

#include <bit>
#include <cmath>
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

/// Element (row, column) of what lanes show: `words` registers a lane, found by the fragments of A of an m16 tile.
/// `per_word`: elements in a register.
struct Place {
  unsigned lane;
  unsigned word;
  unsigned within;
};

/// A [16, 8 * per_word]: register 0 rows 0-7, 1 rows 8-15, both of the left half; 2 and 3 of the right half.
inline Place of_a(unsigned row, unsigned k, unsigned per_word) {
  const unsigned half = k / (4 * per_word);
  const unsigned in_half = k % (4 * per_word);
  return {row % 8 * 4 + in_half / per_word, half * 2 + row / 8, in_half % per_word};
}
/// B [8 * per_word, 8]: register 0 the upper half, 1 the lower.
inline Place of_b(unsigned k, unsigned column, unsigned per_word) {
  const unsigned in_half = k % (4 * per_word);
  return {column * 4 + in_half / per_word, k / (4 * per_word), in_half % per_word};
}

/// d += a b over one instruction's fragments, for this lane's four elements.
template <typename Accumulator, typename Decode>
void multiply(Accumulator (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], unsigned per_word,
              Decode decode) {
  constexpr unsigned kB = 4;  // words of A come first
  std::uint32_t* own = shown(lane());
  std::memcpy(own, a, sizeof a);
  std::memcpy(own + kB, b, sizeof b);
  sync_warp(0xFFFFFFFFU);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8;
    const unsigned column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 8 * per_word; ++k) {
      const Place at_a = of_a(row, k, per_word);
      const Place at_b = of_b(k, column, per_word);
      d[i] += decode(shown(at_a.lane)[at_a.word], at_a.within) * decode(shown(at_b.lane)[kB + at_b.word], at_b.within);
    }
  }
  sync_warp(0xFFFFFFFFU);
}

}  // namespace tensor_cores

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::multiply(d, a, b, 2, [](std::uint32_t word, unsigned i) {
    return bf16_to_float(static_cast<std::uint16_t>(word >> 16 * i));
  });
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::multiply(d, a, b, 2, [](std::uint32_t word, unsigned i) {
    return f16_to_float(static_cast<std::uint16_t>(word >> 16 * i));
  });
}
inline void mma_s8(int (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  tensor_cores::multiply(d, a, b, 4, [](std::uint32_t word, unsigned i) {
    return static_cast<int>(static_cast<std::int8_t>(word >> 8 * i));
  });
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
inline void ldmatrix(std::uint32_t (&r)[4], const void* shared_row, bool transposed) {
  const auto address = reinterpret_cast<std::uintptr_t>(shared_row);
  if (address % 16 != 0) fail("ldmatrix: a row that is not aligned to 16 bytes");
  std::memcpy(shown(lane()), &address, sizeof address);
  sync_warp(0xFFFFFFFFU);
  for (unsigned j = 0; j < 4; ++j) {
    std::uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned row = transposed ? lane() % 4 * 2 + i : lane() / 4;
      const unsigned column = transposed ? lane() / 4 : lane() % 4 * 2 + i;
      std::uintptr_t from;
      std::memcpy(&from, shown(j * 8 + row), sizeof from);
      pair[i] = reinterpret_cast<const std::uint16_t*>(from)[column];
    }
    r[j] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
  sync_warp(0xFFFFFFFFU);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) { ldmatrix(r, shared_row, false); }
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* shared_row) { ldmatrix(r, shared_row, true); }

inline uint4 load_16(const void* global) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) fail("load: an address that is not aligned to 16 bytes");
  return *static_cast<const uint4*>(global);
}

/// Asynchronous copies happen when their group is waited for, and not before.
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
