// What AMX's tile registers hold: eight of them, each of up to 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace draftwerk::cpu {

inline constexpr int kTiles = 8;
inline constexpr int kTileRows = 16;
inline constexpr int kTileBytes = 64;  ///< of a row

/// Rows, and bytes of a row, of each register: what `ldtilecfg` reads.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int row_bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    bytes[tile] = static_cast<std::uint16_t>(row_bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace draftwerk::cpu
