// AMX's instructions in software, in place of the real ones (cpp/backend/cpu/tile_instructions.h): so that the kernels
// are tested on machines without tiles, and that what they load and store is seen by the sanitizers. What the machine
// would answer with an illegal instruction ends the program with a line.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "backend/cpu/tiles.h"

namespace draftwerk::cpu::emulated_amx {

struct Registers {
  bool configured = false;
  std::int64_t products = 0;  // since the thread began
  TileShapes shapes;
  std::int8_t bytes[kTiles][kTileRows][kTileBytes] = {};
};

inline Registers& registers() {
  static thread_local Registers all;
  return all;
}

inline void check(bool legal, const char* what) {
  if (legal) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

template <int tile>
void check_tile() {
  static_assert(tile < kTiles);
  check(registers().configured, "used without a configuration");
  check(registers().shapes.rows[tile] > 0, "a register without a shape");
}

inline void configure_tiles(const TileShapes& shapes) {
  check(shapes.palette == 1 && shapes.start_row == 0, "an unknown palette");
  for (int tile = 0; tile < 16; ++tile) {
    const bool exists = tile < kTiles;
    check(shapes.rows[tile] <= (exists ? kTileRows : 0), "too many rows");
    check(shapes.bytes[tile] <= (exists ? kTileBytes : 0), "rows that are too long");
    check((shapes.rows[tile] == 0) == (shapes.bytes[tile] == 0), "half a shape");
  }
  for (const std::uint8_t byte : shapes.reserved) check(byte == 0, "a reserved byte");
  registers() = {true, registers().products, shapes, {}};
}

inline void release_tiles() { registers() = {false, registers().products, {}, {}}; }

template <int tile>
void load_tile(const void* rows, std::int64_t stride) {
  check_tile<tile>();
  Registers& all = registers();
  std::memset(all.bytes[tile], 0, sizeof all.bytes[tile]);
  for (int r = 0; r < all.shapes.rows[tile]; ++r) {
    std::memcpy(all.bytes[tile][r], static_cast<const std::int8_t*>(rows) + r * stride, all.shapes.bytes[tile]);
  }
}

template <int tile>
void store_tile(void* rows, std::int64_t stride) {
  check_tile<tile>();
  const Registers& all = registers();
  for (int r = 0; r < all.shapes.rows[tile]; ++r) {
    std::memcpy(static_cast<std::int8_t*>(rows) + r * stride, all.bytes[tile][r], all.shapes.bytes[tile]);
  }
}

template <int tile>
void zero_tile() {
  check_tile<tile>();
  std::memset(registers().bytes[tile], 0, sizeof registers().bytes[tile]);
}

template <int sum, int a, int b>
void multiply_tiles() {
  static_assert(sum != a && sum != b && a != b);
  check_tile<sum>();
  check_tile<a>();
  check_tile<b>();
  Registers& all = registers();
  ++all.products;
  const TileShapes& shapes = all.shapes;
  check(shapes.rows[a] == shapes.rows[sum], "a product whose rows are not those of its sum");
  check(shapes.bytes[a] == 4 * shapes.rows[b], "factors that do not fit");
  check(shapes.bytes[b] % 4 == 0, "columns that are not whole");
  check(shapes.bytes[b] == shapes.bytes[sum], "a product whose columns are not those of its sum");
  for (int m = 0; m < shapes.rows[sum]; ++m) {
    for (int n = 0; n < shapes.bytes[sum] / 4; ++n) {
      std::int32_t total;
      std::memcpy(&total, &all.bytes[sum][m][4 * n], sizeof total);
      for (int k = 0; k < shapes.rows[b]; ++k) {
        for (int i = 0; i < 4; ++i) total += all.bytes[a][m][4 * k + i] * all.bytes[b][k][4 * n + i];
      }
      std::memcpy(&all.bytes[sum][m][4 * n], &total, sizeof total);
    }
  }
}

}  // namespace draftwerk::cpu::emulated_amx
