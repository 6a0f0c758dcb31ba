// AMX's instructions, written out because the compiler's own forms take a register's number only as a literal. The
// process has to have asked for tiles: available_isas() (isa.h) does.
#pragma once

#include <cstdint>

#include "backend/cpu/tiles.h"

namespace draftwerk::cpu::amx {

/// Gives the registers their shapes, and zeros in them.
inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

/// No register has a shape any more, so that a switch of threads has 8 KB less to save.
inline void release_tiles() { asm volatile("tilerelease"); }

/// Row r from `rows` + r * stride bytes.
template <int tile>
[[gnu::always_inline]] inline void load_tile(const void* rows, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

/// Row r to `rows` + r * stride bytes.
template <int tile>
[[gnu::always_inline]] inline void store_tile(void* rows, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
[[gnu::always_inline]] inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

/// sum[m][n] += sum over k and i in 0 .. 3 of a[m][4k + i] * b[k][4n + i]: int32 of int8, exact.
template <int sum, int a, int b>
[[gnu::always_inline]] inline void multiply_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

}  // namespace draftwerk::cpu::amx
