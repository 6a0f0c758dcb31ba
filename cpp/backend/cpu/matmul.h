// Matrix products on the CPU: packed weights (packing.h) times a few or many rows of activations.
//
// Quantised weights meet activations quantised to int8, one f32 scale per 32 columns. Within a block all arithmetic is
// on integers and exact; blocks are then added in ascending order to one f32 accumulator per output:
//   q8_0, q4_0, q5_0   y = fma(dot, w_scale * a_scale, y)
//   q6_k               the same for each half block of 16 columns, w_scale = d * scale
//   q4_k               y = fma(dot, (d * scale) * a_scale, y), then y = fma(-(dmin * min), a_scale * sum, y)
// Float weights meet f32 activations: y = fma(w, x, y) in column order.
//
// Promised: an output's bits depend on its weight row and its activation row alone, never on `rows`, the panel range
// or the tile that it falls in. avx2, avx512 and amx give the same bits; portable gives the same integers but rounds
// products (it has no fma), so it differs from them in the last bits.
#pragma once

#include <cstdint>

#include "backend/cpu/isa.h"
#include "backend/cpu/packing.h"

namespace draftwerk::cpu {

/// Rows of activations; a view. A matmul reads the quantised form if takes_quantized(type), otherwise `values`.
struct Activations {
  const float* values = nullptr;        ///< [rows, columns]
  std::int64_t stride = 0;              ///< elements from row to row of `values`
  const std::int8_t* quants = nullptr;  ///< [rows, columns], -127 .. 127; any where a scale is NaN
  const float* scales = nullptr;        ///< [rows, columns / 32]
  const std::int32_t* sums = nullptr;   ///< [rows, columns / 32], see quantize_row
  std::int64_t quant_stride = 0;        ///< elements from row to row of `quants`
  std::int64_t block_stride = 0;        ///< elements from row to row of `scales` and of `sums`

  /// Those from `row` on. Forms that are absent stay so.
  [[nodiscard]] Activations from(std::int64_t row) const {
    Activations rest = *this;
    if (values != nullptr) rest.values += row * stride;
    if (quants != nullptr) {
      rest.quants += row * quant_stride;
      rest.scales += row * block_stride;
      rest.sums += row * block_stride;
    }
    return rest;
  }
};

/// Widest matrix of a quantised type: a row's share of what a matmul keeps on the stack must fit (kStarts,
/// kActivationBlocks).
inline constexpr std::int64_t kMaxQuantizedColumns = std::int64_t{1} << 18;

/// Whether a matrix of this type is multiplied with int8 activations (the quantised types) or with f32 ones.
[[nodiscard]] bool takes_quantized(WeightType type);

struct MatmulKernels {
  /// Quantises x[0 .. columns), columns a multiple of 32: scale = max|x| / 127 per block, quants to nearest even.
  /// Writes `columns` quants and columns / 32 scales and sums. A sum holds two int16: the sum of the block's first 16
  /// quants in its low half, of the last 16 in its high half. Blocks with max|x| < 2^-100 count as zero; NaN and
  /// infinity come out as NaN products.
  void (*quantize_row)(const float* x, int columns, std::int8_t* quants, float* scales, std::int32_t* sums);
  /// y[r * y_stride + n] = sum over k of w[n][k] * x[r][k] for 0 <= r < rows and the rows n of panels
  /// [first_panel, last_panel); never writes past n = w.rows - 1. Any number of rows; about 8 cost as much as one while
  /// the weights come from memory.
  void (*matmul)(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                 int rows, float* y, std::int64_t y_stride);
  /// The same with the coarse part of a matrix of split columns alone, as if all that it lacks were in the middle of
  /// what it may be: lower halves are 8. Both take activations in the order of split_activations().
  void (*matmul_coarse)(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                        int rows, float* y, std::int64_t y_stride);
  /// out[0 .. columns) = scale * dequantised row: the embedding lookup.
  void (*unpack_row)(const PackedMatrix& w, std::int64_t row, float scale, float* out);
};

/// The kernels of one instruction set; `isa` must be among available_isas().
const MatmulKernels& matmul_kernels(Isa isa);

// What follows is for the kernel files.

/// What the unsigned bytes of a panel are too large by.
template <WeightType type>
inline constexpr int kZeroPoint = type == WeightType::q8_0   ? 128
                                  : type == WeightType::q6_k ? 32
                                  : type == WeightType::q5_0 ? 16
                                  : type == WeightType::q4_0 ? 8
                                                             : 0;

/// How a matrix lies: as packing.h has it, or in split columns, of which all is read or the coarse part.
enum class Form { packed, split, coarse };

/// Rows of activations that meet a panel or several at once, and how much of them.
struct RowTile {
  int parts;  ///< parts of panels that are multiplied at once
  int rows;   ///< at most
  bool operator==(const RowTile&) const = default;
};

/// The two sums that MatmulKernels::quantize_row writes as one.
struct HalvesOfSum {
  int low;
  int high;
};
constexpr HalvesOfSum halves_of_sum(std::int32_t both) { return {static_cast<std::int16_t>(both), both >> 16}; }

/// What the sum of a block's quants (of half a block's for q6_k) contributes to each output of a row: the same for
/// every panel, so a call computes it once.
union Start {
  std::int32_t whole;  ///< -zero point * sum: where the integer product starts
  float scaled;        ///< q4_k: scale * sum, what its mins are multiplied with
};

// One definition per kernel file; use matmul_kernels(Isa).
namespace portable {
const MatmulKernels& matmul_kernels();
}
namespace avx2 {
const MatmulKernels& matmul_kernels();
}
namespace avx512 {
const MatmulKernels& matmul_kernels();
}
namespace amx {
const MatmulKernels& matmul_kernels();
}

}  // namespace draftwerk::cpu
