// A q8_0 matrix of which most columns can be read in four bits: what a first, coarse product reads lies by itself, so
// that the rest is read for those rows only that turn out to need it.
//
// The upper four bits of a value are the value but for an error of at most half a unit of theirs. Some columns, those
// whose activations are largest, are whole in the coarse part. Nothing is stored twice and nothing is rounded: the bits
// of a panel are those of q8_0 (packing.h), in another order. Within each block of 32 columns the whole ones come
// first, in groups of four of which there are an even number, w of 8; `pairs` = (8 - w) / 2.
//   coarse panel, by block   16 x f16 scale | w x 64 bytes, value + 128 | pairs x 64 bytes: vector j holds the upper
//                            halves of group w + j in its low halves and those of group w + pairs + j in its high ones
//   rest, by block           pairs x 64 bytes: their lower halves likewise
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "backend/cpu/packing.h"

namespace draftwerk::cpu {

/// Columns of a group.
inline constexpr int kGroupColumns = kBlock / layout::kGroups;

struct SplitColumns {
  std::vector<std::uint8_t> order;  ///< [columns] which column of its block stands at each place of it
  std::vector<std::uint8_t> whole;  ///< [columns / 32] groups that are whole: 0, 2, 4, 6 or 8
  std::size_t coarse_bytes = 0;     ///< of a panel
  std::size_t rest_bytes = 0;       ///< likewise
  /// Where the rest of a matrix lies, panel after panel; what PackedMatrix::data points to are the coarse panels.
  const std::byte* rest = nullptr;
};

/// Calls body(std::integral_constant<int, whole>{}).
template <typename Body>
[[gnu::always_inline]] inline void with_whole_groups(int whole, const Body& body) {
  switch (whole) {
    case 0:
      return body(std::integral_constant<int, 0>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 6:
      return body(std::integral_constant<int, 6>{});
    default:
      return body(std::integral_constant<int, 8>{});
  }
}

/// Splits the columns of a matrix: the best third is whole. `importance` [columns], a multiple of 32, says how much
/// each counts; NaN counts as nothing.
[[nodiscard]] SplitColumns split_columns(std::span<const float> importance);

/// Sizes of the rows of a panel.
struct RowNorms {
  double row[kPanel] = {};   ///< |w|, of the whole row
  double lost[kPanel] = {};  ///< of what its coarse part lacks
};

/// Brings a panel of q8_0 into that order and measures its rows. Norms are exact but for rounding in double precision;
/// those of a row with a scale that is not finite are not finite.
RowNorms split_panel(const SplitColumns& split, const std::byte* panel, std::byte* coarse, std::byte* rest);

/// Brings quantised activations, as MatmulKernels::quantize_row leaves them, into the order of the columns. A sum then
/// holds that of the whole columns in its low half and that of all others in its high half.
void split_activations(const SplitColumns& split, std::int8_t* quants, std::int32_t* sums);

/// out[0 .. columns) = scale * dequantised row `lane` of a panel.
void unpack_split_row(const SplitColumns& split, const std::byte* coarse, const std::byte* rest, int lane, float scale,
                      float* out);

}  // namespace draftwerk::cpu
