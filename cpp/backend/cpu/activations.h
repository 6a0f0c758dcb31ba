// Scratch for the rows of activations that a product reads, as floats and quantised.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

class ActivationScratch {
 public:
  /// Room for `rows` rows of `columns` values, or for more rows of fewer; pages that are not used cost nothing.
  void resize(std::int64_t rows, std::int64_t columns) {
    const std::int64_t elements = rows * (columns + kBlock - 1) / kBlock * kBlock;
    values_.resize(elements);
    quants_.resize(elements);
    scales_.resize(elements / kBlock);
    sums_.resize(elements / kBlock);
  }

  [[nodiscard]] float* values(std::int64_t row, int columns) const { return values_.data() + row * columns; }

  /// Quantises columns [first, first + count) of row `row` from x[0 .. count); first and count are multiples of 32.
  void quantize(const MatmulKernels& kernels, std::int64_t row, int columns, int first, int count,
                const float* x) const {
    const std::int64_t block = (row * columns + first) / kBlock;
    kernels.quantize_row(x, count, quants_.data() + row * columns + first, scales_.data() + block,
                         sums_.data() + block);
  }

  /// Brings the quantised form of a row into the order of split columns.
  void split(const SplitColumns& order, std::int64_t row, int columns) const {
    split_activations(order, quants_.data() + row * columns, sums_.data() + row * columns / kBlock);
  }

  /// Copies the quantised form of row `from` to row `to`.
  void copy_quantized(std::int64_t from, std::int64_t to, int columns) const {
    const std::int64_t blocks = columns / kBlock;
    std::copy_n(quants_.data() + from * columns, columns, quants_.data() + to * columns);
    std::copy_n(scales_.data() + from * blocks, blocks, scales_.data() + to * blocks);
    std::copy_n(sums_.data() + from * blocks, blocks, sums_.data() + to * blocks);
  }

  /// All rows, in the forms that are wanted.
  [[nodiscard]] Activations view(int columns, bool quantized, bool floats) const {
    Activations x;
    if (floats) {
      x.values = values_.data();
      x.stride = columns;
    }
    if (quantized) {
      x.quants = quants_.data();
      x.scales = scales_.data();
      x.sums = sums_.data();
      x.quant_stride = columns;
      x.block_stride = columns / kBlock;
    }
    return x;
  }

 private:
  ScratchArray<float> values_;
  ScratchArray<std::int8_t> quants_;
  ScratchArray<float> scales_;
  ScratchArray<std::int32_t> sums_;
};

}  // namespace draftwerk::cpu
