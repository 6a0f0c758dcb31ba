// Products of rows with weight matrices: what kernels take, and how a matrix is cut.
//
// The bits of a row's product. Columns are cut into kSliceWarps * splits slices of whole chunks (weight_layout.h), by
// the shape and format of the weight alone. A slice adds up its chunks in ascending order, in float32: of bf16 and fp8
// by the tensor cores, of int8 and int4 each block of 32 columns by the tensor cores and then times its scale to the
// slice's sum (fused). Every kSliceWarps slices are added in ascending order, starting from zero, and those sums again;
// of fp8 the last sum is multiplied by the scale of the row. Whatever kernel computes a product does that. On
// Hopper, instructions of a warp and of a warpgroup add 16 products and a sum to the same bits
// (docs/decisions/2026-12-01-warpgroups.md).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/operands.h"
#include "backend/cuda/weight_layout.h"

namespace draftwerk::cuda {

/// Slices whose sums are added first.
inline constexpr int kSliceWarps = 4;

/// How many groups of kSliceWarps slices the columns of a matrix are cut into.
[[nodiscard]] int split_count(const MatrixView& weight);

/// What becomes of products.
enum class Epilogue : std::int32_t {
  none,
  geglu,    ///< gelu_tanh(product) * paired product
  gelu,     ///< gelu_tanh(product) * factor
  softcap,  ///< softcap * tanh(product / softcap)
};

/// One product of a launch.
struct ProductPart {
  const std::byte* weight;  ///< panels
  const std::byte* paired;  ///< of a second matrix of the same shape, of geglu; null otherwise
  float* output;            ///< [rows, output_stride]
  const float* factor;      ///< [rows, factor_stride], of gelu; null otherwise
  OperandSink left;         ///< the output again, for the product behind this one
  std::int64_t panel_bytes;
  std::int64_t expert_bytes;  ///< from the panels of an expert to those of the next
  std::int32_t outputs;       ///< rows of the matrix
  std::int32_t chunks;
  std::int32_t splits;
  std::int32_t output_stride;
  std::int32_t factor_stride;
  std::int32_t first_unit;     ///< of the launch
  std::int32_t first_partial;  ///< likewise, of those that leave partial sums
  Epilogue epilogue;
};

/// Rows that go to the same expert, of a tile that they need not fill. None: there is nothing to do.
struct ExpertTile {
  std::int32_t expert;
  std::int32_t rows;
};

/// Products of the same rows with matrices of one format. With `expert_tiles`, each tile of rows is multiplied with an
/// expert's part of the matrices, and `slots` says which rows it has.
struct Products {
  static constexpr int kMostParts = 4;
  OperandView operands;
  const ExpertTile* expert_tiles;  ///< [tile_count], or null
  const std::int32_t* slots;       ///< [tile_count, tile_rows], or null: each is a row of output and factor, and that
                                   ///< of the operands is slot / slots_per_row
  float* partials;                 ///< [tile_count][partial units][rows of a tile][outputs of a unit]
  unsigned* counters;              ///< [tile_count][partial units], zero between launches
  ProductPart parts[kMostParts];
  std::int32_t part_count;
  std::int32_t rows;           ///< of the operands, where there are no experts
  std::int32_t slots_per_row;  ///< 1 where there are none
  std::int32_t tile_count;
  std::int32_t tile_rows;      ///< of expert tiles: what tile_rows() gives for some number of rows
  std::int32_t partial_units;  ///< of a tile of rows
  float softcap;
  std::int32_t unused;
};

/// What products need to know of a device. Their bits do not depend on it.
struct ProductDevice {
  std::size_t shared_bytes;  ///< that a block may ask for (cudaDeviceProp::sharedMemPerBlockOptin), at least 99 KiB
  int multiprocessors;
  bool warpgroups;  ///< whether it has their instructions, and the build has them (DeviceInfo::warpgroups)
};

/// Rows that a block takes at once in a product of so many, if multiprocessors do not matter.
[[nodiscard]] int tile_rows(int rows, const ProductDevice& device);
/// The same without experts, where each tile of many rows has so many blocks: fewer rows where the device has room for
/// all of them, more where it has warpgroups for the format.
[[nodiscard]] int tile_rows(int rows, int blocks_of_tile, WeightFormat format, const ProductDevice& device);
/// What `partials` and `counters` need for any launch, in elements.
[[nodiscard]] std::size_t partial_floats();
[[nodiscard]] std::size_t counter_count();

/// Records a launch; fills in where the units of every part begin, and without experts the tiles.
void record_products(LaunchList& launches, WeightFormat format, const ProductDevice& device, Products products);
/// Lets the kernels have the shared memory that they need; once per process and device.
void allow_products(const ProductDevice& device);

}  // namespace draftwerk::cuda
