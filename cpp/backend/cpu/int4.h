// Converting floats to q4_0: a scale in f16 and sixteen steps, -8 .. 7, for every 32 columns.
//
// The scale is searched for: with m the value of the largest magnitude, each of the nine 1 / scale from -9 / m to
// -7 / m, a quarter apart, rounds the values to steps q, for which sum(x q) / sum(q q) is the scale of the least
// squared error; the best of the nine is taken, rounded to f16, and the values are rounded to its steps. The smallest
// squared error that any scale has is missed by 0.15% for normally distributed values; ggml's m / -8 alone misses it by
// 13%. A block with a NaN or an infinity gets a NaN for its scale, and so do the products with it.
#pragma once

#include <cstddef>

#include "backend/cpu/isa.h"
#include "backend/weight_type.h"

namespace draftwerk::cpu {

/// Writes a block of a q4_0 panel (packing.h): 32 columns of `rows` <= 16 rows, `row_stride` bytes apart, of a float
/// type. Absent rows become zero. The bits are the same on every instruction set.
using QuantizeInt4 = void (*)(WeightType source_type, const std::byte* source, std::size_t row_stride, int rows,
                              std::byte* block);

QuantizeInt4 int4_quantizer(Isa isa);

}  // namespace draftwerk::cpu
