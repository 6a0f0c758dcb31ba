// Weight matrices as the CPU kernels read them: panels of 16 output rows, so that one register holds one value of
// every row and a thread streams each panel as one contiguous run of memory.
//
// A quantised panel is a sequence of blocks of 32 columns (for the K types: superblocks of 256), each with its scales
// in front of its values. Nothing is rounded: the checkpoint's bits are only rearranged, and the values become
// unsigned (the zero point is taken off in the dot product, or for tiles when a panel is unpacked). "Group g" is
// columns 4g .. 4g + 3 of a block; 64 bytes hold a group as [16 rows][4 columns]. `nibbles` are four such vectors: the
// j-th holds group j in its low halves and group j + 4 in its high halves, which is also how q4_0 and q5_0 pair
// columns.
//   q8_0  16 x f16 scale | 8 x 64 bytes, value + 128
//   q4_0  16 x f16 scale | nibbles
//   q5_0  16 x f16 scale | 8 x 64 bits, fifth bit of each byte of a group | nibbles
//   q4_k  16 x f16 d, 16 x f16 dmin | 8 blocks of: 16 x u8 scale, 16 x u8 min, nibbles
//   q6_k  16 x f16 d | 8 blocks of: 2 x 16 x i8 scale (per 16 columns), 2 x 64 bytes upper bit pairs, nibbles;
//         in upper vector h, bits 2f and 2f + 1 belong to group 4h + f
//   f32, f16, bf16   [columns][16 rows]
// f8_e4m3 is unpacked to bf16, each value rounded once: there is no other case in which bits are lost.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/isa.h"

namespace draftwerk::cpu {

inline constexpr int kPanel = 16;        ///< output rows per panel
inline constexpr int kBlock = 32;        ///< columns per quantisation block
inline constexpr int kSuperblock = 256;  ///< columns per superblock of q4_k and q6_k

/// Sizes in bytes and counts of the layouts above.
namespace layout {
inline constexpr std::size_t kHalves = kPanel * sizeof(std::uint16_t);  // one f16 per row
inline constexpr std::size_t kGroupBytes = kPanel * 4;                  // one group of four columns
inline constexpr int kGroups = kBlock / 4;
inline constexpr std::size_t kNibbles = kGroups / 2 * kGroupBytes;
inline constexpr std::size_t kFifthBits = kGroups * sizeof(std::uint64_t);
inline constexpr std::size_t kUpperBits = 2 * kGroupBytes;
inline constexpr std::size_t kQ8Block = kHalves + kGroups * kGroupBytes;
inline constexpr std::size_t kQ4Block = kHalves + kNibbles;
inline constexpr std::size_t kQ5Block = kHalves + kFifthBits + kNibbles;
inline constexpr std::size_t kQ4KBlock = 2 * kPanel + kNibbles;
inline constexpr std::size_t kQ6KBlock = 2 * kPanel + kUpperBits + kNibbles;
inline constexpr int kBlocksPerSuper = kSuperblock / kBlock;
inline constexpr std::size_t kQ4KSuper = 2 * kHalves + kBlocksPerSuper * kQ4KBlock;
inline constexpr std::size_t kQ6KSuper = kHalves + kBlocksPerSuper * kQ6KBlock;

/// Of a type whose blocks stand by themselves.
constexpr std::size_t block_of(WeightType type) {
  return type == WeightType::q8_0 ? kQ8Block : type == WeightType::q4_0 ? kQ4Block : kQ5Block;
}
}  // namespace layout

struct SplitColumns;

/// A matrix [rows, columns] in panels; a view. Panel p holds rows 16p .. 16p + 15 (absent rows are zero) and starts at
/// data + p * panel_bytes. `data` is aligned to 32 bytes. A q8_0 matrix may have split columns
/// (split_columns.h): then its panels are the coarse ones.
struct PackedMatrix {
  WeightType type = WeightType::f32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::size_t panel_bytes = 0;
  const std::byte* data = nullptr;
  const SplitColumns* split = nullptr;
};

[[nodiscard]] constexpr std::int64_t panel_count(std::int64_t rows) { return (rows + kPanel - 1) / kPanel; }

/// What the panels of a weight of that type hold: bf16 for f8_e4m3, the type itself for all others.
[[nodiscard]] WeightType packed_type(WeightType type);

/// Bytes of one panel; a multiple of 32. Throws std::invalid_argument if `columns` is not a positive multiple of the
/// type's block (32; 256 for q4_k and q6_k; 1 for the float types).
[[nodiscard]] std::size_t panel_bytes(WeightType type, std::int64_t columns);

/// Packs `count` rows of `columns` values, contiguous at `source`, into the ceil(count / 16) panels at `panels`; the
/// rows that the last panel lacks become zero. source_type == type, or one of f32, f16, bf16 for a q8_0, q4_0, f8_e4m3,
/// f32, f16 or bf16 matrix: floats are rounded to nearest even; q8_0 is as ggml makes it, with scale max|x| / 127 in
/// f16 and ties away from zero, q4_0 is chosen by int4.h, and f8_e4m3 by Float8Row. `isa` says what that may use; the
/// bits do not depend on it. Throws std::invalid_argument for any other combination.
void pack_rows(WeightType type, std::int64_t columns, std::int64_t count, WeightType source_type,
               const std::byte* source, std::byte* panels, Isa isa = Isa::portable);

/// A row of floats or of f8_e4m3, a view, as a row of f8_e4m3. That of floats has the scale max|x| / 448, and each
/// value is the quotient rounded to nearest even. A row that holds what is not finite has no finite scale either.
class Float8Row {
 public:
  Float8Row(WeightType source_type, const std::byte* source, std::int64_t columns);
  [[nodiscard]] float scale() const { return scale_; }
  /// The bits of a value.
  [[nodiscard]] std::uint8_t operator[](std::int64_t column) const;

 private:
  WeightType type_;
  const std::byte* values_;
  float scale_ = 0.0F;
};

/// out[0 .. columns) = scale * dequantised row.
void unpack_row(const PackedMatrix& matrix, std::int64_t row, float scale, float* out);

}  // namespace draftwerk::cpu
