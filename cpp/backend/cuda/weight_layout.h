// Weight matrices as the device's kernels read them: fragment by fragment of what tensor cores take.
//
// A panel is 16 output rows, one below the other in the A operand of mma.m16n8k16; it is a sequence of chunks, each of
// which holds the values of some columns so that lane l of a warp finds what the instructions want of it in 16 bytes at
// 16 * l, and after 512 bytes the next 16. A warp therefore reads a chunk in whole runs of 512 bytes, straight to the
// registers of its lanes. Panels follow each other; absent rows and columns are zero.
//
// Lane l has group g = l / 4 and place p = l % 4, and of a step of 16 columns four registers of two values:
//   register 0  row g,     columns 2p, 2p + 1      register 2  row g,     columns 2p + 8, 2p + 9
//   register 1  row g + 8, columns 2p, 2p + 1      register 3  row g + 8, columns 2p + 8, 2p + 9
//
//   bf16  32 columns   [2 steps][lane][register]
//   int8  64 columns   [2 blocks of 32][lane][2 steps][2 words]: word h has registers 2h and 2h + 1; bytes 0 and 2 are
//   the
//                      two values of the first, 1 and 3 of the second; then the scales
//   int4  64 columns   [lane][4 steps]: nibbles r and r + 4 of the word are the two values of register r, plus 8; then
//                      the scales
//   fp8   64 columns   as int8, of e4m3; behind the last chunk of a panel the scales of its rows, 16 float32
// Scales of int8 and int4 are f16, one for each row and block of 32 columns: [g][2 blocks][row g, row g + 8], 64 bytes.
//
// What a weight type becomes: q8_0 is int8, q4_0 is int4 and f8_e4m3 is fp8, exactly. All others are bf16: bf16
// exactly; f32, f16, q5_0, q4_k and q6_k rounded to nearest even after they are decoded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/weight_type.h"

namespace draftwerk::cuda {

enum class WeightFormat : std::int32_t { bf16, int8, int4, fp8 };
inline constexpr WeightFormat kWeightFormats[] = {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4,
                                                  WeightFormat::fp8};

inline constexpr int kPanelRows = 16;
inline constexpr int kBlockColumns = 32;     ///< that share a scale
inline constexpr int kFragmentBytes = 512;   ///< 16 bytes for each lane of a warp
inline constexpr int kChunkScaleBytes = 64;  ///< of int8 and int4
inline constexpr int kRowScaleBytes = 64;    ///< of the rows of a panel of fp8

enum class Scales : std::uint8_t { none, of_blocks, of_rows };
template <int columns, int fragments, Scales scales>
struct ChunkLayout {
  static constexpr int kColumns = columns;
  static constexpr int kFragments = fragments;  ///< of kFragmentBytes
  static constexpr bool kBlockScales = scales == Scales::of_blocks;
  static constexpr bool kRowScales = scales == Scales::of_rows;
  static constexpr int kBytes = fragments * kFragmentBytes + (kBlockScales ? kChunkScaleBytes : 0);
};
template <WeightFormat kFormat>
struct Chunk;
template <>
struct Chunk<WeightFormat::bf16> : ChunkLayout<32, 2, Scales::none> {};
template <>
struct Chunk<WeightFormat::int8> : ChunkLayout<64, 2, Scales::of_blocks> {};
template <>
struct Chunk<WeightFormat::int4> : ChunkLayout<64, 1, Scales::of_blocks> {};
template <>
struct Chunk<WeightFormat::fp8> : ChunkLayout<64, 2, Scales::of_rows> {};

/// Calls body.template operator()<format>().
template <typename Body>
decltype(auto) with_format(WeightFormat format, Body&& body) {
  switch (format) {
    case WeightFormat::int8:
      return body.template operator()<WeightFormat::int8>();
    case WeightFormat::int4:
      return body.template operator()<WeightFormat::int4>();
    case WeightFormat::fp8:
      return body.template operator()<WeightFormat::fp8>();
    default:
      return body.template operator()<WeightFormat::bf16>();
  }
}

[[nodiscard]] WeightFormat format_of(WeightType type);
/// Columns of a chunk, and bytes of a panel of so many.
[[nodiscard]] int chunk_columns(WeightFormat format);
[[nodiscard]] std::int64_t panel_bytes(WeightFormat format, std::int64_t chunks);

/// A matrix [rows, columns] to kernels and to those who launch them.
struct MatrixView {
  const std::byte* data;  ///< device memory: panels, each of `chunks` chunks and perhaps scales
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t chunks;
  WeightFormat format;

  [[nodiscard]] int panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  [[nodiscard]] std::int64_t panel_bytes() const { return cuda::panel_bytes(format, chunks); }
};

/// Lays out up to 16 rows, contiguous at `source` in source_type, as a panel. source_type is `type`, or a float type
/// where `type` is q8_0, q4_0, f8_e4m3 or a float type: the bits of quantised values are those of cpu::pack_rows and
/// cpu::Float8Row. `scratch` is memory of pack_scratch_bytes(), aligned for floats.
void pack_panel(WeightType type, std::int64_t columns, int rows, WeightType source_type, const std::byte* source,
                std::byte* panel, std::byte* scratch);
[[nodiscard]] std::size_t pack_scratch_bytes(WeightType type, std::int64_t columns);

}  // namespace draftwerk::cuda
