// Products of many rows with bf16 weights (matmul.h), as prompts have them, by instructions of a warpgroup
// (warpgroup.cuh).
#pragma once

#include "backend/cuda/launch.h"
#include "backend/cuda/matmul.h"

namespace draftwerk::cuda {

/// Records the launch, of products.tile_count tiles of kGroupRows and so many blocks for each.
void record_products_by_warpgroups(LaunchList& launches, int blocks_of_tile, const Products& products);
/// Lets the kernel have the shared memory that it needs.
void allow_products_by_warpgroups();

}  // namespace draftwerk::cuda
