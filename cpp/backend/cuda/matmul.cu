#include "backend/cuda/matmul.h"

#include <algorithm>
#include <cstddef>

#include "backend/cuda/error.h"
#include "backend/cuda/multiply_by_warpgroups.h"
#include "backend/cuda/multiply_few.cuh"
#include "backend/cuda/multiply_many.cuh"
#include "backend/cuda/warpgroup.cuh"

namespace draftwerk::cuda {
namespace {

// Steps of more rows are left to the kernels of many: that of few reads the weights once for every 32.
constexpr int kFewRows = 64;
constexpr int kMostTiles = 4;
// Rows of a block of many. The wide tile is for devices with the shared memory of an A100 or more.
constexpr int kWideTile = 128;
constexpr int kNarrowTile = 64;
constexpr std::size_t kWideTileBytes = std::size_t{163} << 10;
constexpr std::size_t kNarrowTileBytes = std::size_t{99} << 10;
// What a tile of warpgroups takes of the time of a wide one, whose rows are two thirds as many: 192 / 430 to 128 / 360,
// by the TFLOP/s that the second-level cache is expected to let them have.
constexpr int kGroupedTileTime = 5;
constexpr int kWideTileTime = 4;

// Units of work that a device has at once: three blocks on each of 132 SMs.
constexpr int kUnitsAtOnce = 396;
constexpr int kPanelsPerUnit = 4;        // nominally: what a matrix is cut by must not depend on the number of rows
constexpr int kLeastSliceColumns = 128;  // shorter slices are all start and end

/// Calls body.operator()<format, kTiles>() for the kernel of few rows,
template <typename Body>
void with_block(WeightFormat format, int rows, Body&& body) {
  with_format(format, [&]<WeightFormat kFormat>() {
    if (rows <= kOperandRows) {
      body.template operator()<kFormat, 1>();
    } else if (rows <= 2 * kOperandRows) {
      body.template operator()<kFormat, 2>();
    } else {
      body.template operator()<kFormat, 4>();
    }
  });
}

/// or body.operator()<format, kRowWarps>() for that of many.
template <typename Body>
void with_tile(WeightFormat format, int rows, Body&& body) {
  with_format(format, [&]<WeightFormat kFormat>() {
    static_assert(ManyRows<kFormat, 4>::kShared <= kWideTileBytes && ManyRows<kFormat, 2>::kShared <= kNarrowTileBytes);
    if (rows == kWideTile) {
      body.template operator()<kFormat, 4>();
    } else {
      body.template operator()<kFormat, 2>();
    }
  });
}

constexpr int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }

}  // namespace

int split_count(const MatrixView& weight) {
  const int groups = (weight.panels() + kPanelsPerUnit - 1) / kPanelsPerUnit;
  const int most = weight.chunks * chunk_columns(weight.format) / (kSliceWarps * kLeastSliceColumns);
  return std::clamp(kUnitsAtOnce / groups, 1, std::max(most, 1));
}

int tile_rows(int rows, const ProductDevice& device) {
  if (rows <= 2 * kOperandRows) return rows <= kOperandRows ? kOperandRows : 2 * kOperandRows;
  return rows <= kFewRows ? kMostTiles * kOperandRows : device.shared_bytes >= kWideTileBytes ? kWideTile : kNarrowTile;
}

int tile_rows(int rows, int blocks_of_tile, WeightFormat format, const ProductDevice& device) {
  const int size = tile_rows(rows, device);
  if (size != kWideTile) return size;
  // 192 rows with [5376, 21504] are 84 blocks of the wide tile, or 126 of half the work each, on 132 multiprocessors:
  // at the 400 TFLOP/s that mma.sync is expected to give all of them, 0.23 ms or 0.12.
  if (tiles_of(rows, kNarrowTile) * blocks_of_tile <= device.multiprocessors) return kNarrowTile;
  const bool grouped = device.warpgroups && format == WeightFormat::bf16 &&
                       tiles_of(rows, kGroupRows) * kGroupedTileTime <= tiles_of(rows, kWideTile) * kWideTileTime;
  return grouped ? kGroupRows : kWideTile;
}

// Splits are at most kUnitsAtOnce / groups. Twice that many, for pairs and for units larger than a group.
std::size_t counter_count() {
  return std::size_t{kFewRows / (kMostTiles * kOperandRows)} * Products::kMostParts * 2 * kUnitsAtOnce;
}

std::size_t partial_floats() { return counter_count() * kPanelsPerUnit * kPanelRows * kMostTiles * kOperandRows; }

void record_products(LaunchList& launches, WeightFormat format, const ProductDevice& device, Products products) {
  // Numbers the units of a kernel whose units have so many panels, and gives their number.
  const auto number_units = [&products](int unit_panels, bool by_split) {
    int units = 0;
    products.partial_units = 0;
    for (ProductPart& part : std::span(products.parts, static_cast<std::size_t>(products.part_count))) {
      const int panels = (part.outputs + kPanelRows - 1) / kPanelRows;
      const int of_unit = part.paired == nullptr ? unit_panels : unit_panels / 2;
      const int of_part = (panels + of_unit - 1) / of_unit * (by_split ? part.splits : 1);
      part.first_unit = units;
      part.first_partial = products.partial_units;
      units += of_part;
      if (part.splits > 1) products.partial_units += of_part;
    }
    return units;
  };
  const bool of_experts = products.expert_tiles != nullptr;
  const bool many = of_experts ? products.tile_rows > kMostTiles * kOperandRows : products.rows > kFewRows;
  const int blocks_of_tile = many ? number_units(kTilePanels, false) : 0;
  int size = products.tile_rows;
  if (!of_experts) {
    size = tile_rows(products.rows, blocks_of_tile, format, device);
    products.tile_count = tiles_of(products.rows, size);
  }
  if (size == kGroupRows) return record_products_by_warpgroups(launches, blocks_of_tile, products);
  if (many) {
    with_tile(format, size, [&]<WeightFormat kFormat, int kRowWarps>() {
      using T = ManyRows<kFormat, kRowWarps>;
      const dim3 grid(static_cast<unsigned>(products.tile_count), static_cast<unsigned>(blocks_of_tile));
      launches.add(multiply_many<kFormat, kRowWarps>, {grid, dim3(T::kThreads), T::kShared}, products);
    });
    return;
  }
  with_block(format, size, [&]<WeightFormat kFormat, int kTiles>() {
    using B = FewRows<kFormat, kTiles>;
    const int units = number_units(B::kPanels, true);
    launches.add(multiply_few<kFormat, kTiles>,
                 {dim3(static_cast<unsigned>(units * products.tile_count)), dim3(B::kThreads), B::kShared}, products);
  });
}

void allow_products(const ProductDevice& device) {
  for (const WeightFormat format : kWeightFormats) {
    for (const int rows : {kOperandRows, 2 * kOperandRows, 4 * kOperandRows}) {
      with_block(format, rows, [&]<WeightFormat kFormat, int kTiles>() {
        allow_shared(multiply_few<kFormat, kTiles>, FewRows<kFormat, kTiles>::kShared);
      });
    }
    for (const int rows : {kNarrowTile, kWideTile}) {
      if (rows == kWideTile && device.shared_bytes < kWideTileBytes) continue;
      with_tile(format, rows, [&]<WeightFormat kFormat, int kRowWarps>() {
        allow_shared(multiply_many<kFormat, kRowWarps>, ManyRows<kFormat, kRowWarps>::kShared);
      });
    }
  }
  if (device.warpgroups) allow_products_by_warpgroups();
}

}  // namespace draftwerk::cuda
