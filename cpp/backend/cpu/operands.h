// What the operations of the CPU backend work on, behind the interface's types: packed weights, mapped tables and rows
// of float32 tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend/backend.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/split_columns.h"
#include "backend/round_up.h"

namespace draftwerk::cpu {

/// A broken call by our own code, not a user's mistake.
inline void require(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("cpu backend: ") + what);
}

class CpuWeight final : public Weight {
 public:
  /// `matrix` is of packed_type(type).
  CpuWeight(WeightType type, const PackedMatrix& matrix, MemorySlice memory)
      : type_(type), matrix_(matrix), memory_(std::move(memory)) {}
  [[nodiscard]] WeightType type() const override { return type_; }
  [[nodiscard]] std::int64_t rows() const override { return matrix_.rows; }
  [[nodiscard]] std::int64_t columns() const override { return matrix_.columns; }
  [[nodiscard]] std::size_t bytes() const override {
    const std::size_t rest = split_ == nullptr ? 0 : split_->rest_bytes;
    return static_cast<std::size_t>(panel_count(matrix_.rows)) * (matrix_.panel_bytes + rest);
  }
  [[nodiscard]] const PackedMatrix& matrix() const { return matrix_; }
  [[nodiscard]] std::byte* data() const { return memory_.data; }
  /// From now on what it holds are split columns: of the same values, the coarse panels at its beginning and the rest
  /// in `rest`.
  void split(std::unique_ptr<SplitColumns> columns, MemorySlice rest) const {
    const std::size_t before = bytes();
    split_ = std::move(columns);
    rest_ = std::move(rest);
    matrix_.panel_bytes = split_->coarse_bytes;
    matrix_.split = split_.get();
    memory_.discard(memory_.data + static_cast<std::size_t>(panel_count(matrix_.rows)) * matrix_.panel_bytes,
                    memory_.data + before);
  }

 private:
  WeightType type_;
  // How the values lie is the backend's affair, not that of who holds the weight.
  mutable PackedMatrix matrix_;
  MemorySlice memory_;
  mutable std::unique_ptr<SplitColumns> split_;
  mutable MemorySlice rest_;
};

/// Rows as a file stores them, read where they are.
class CpuRowTable final : public RowTable {
 public:
  CpuRowTable(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data,
              std::shared_ptr<const void> owner)
      : type_(type),
        rows_(rows),
        columns_(columns),
        row_bytes_(stored_row_bytes(type, columns)),
        data_(data),
        owner_(std::move(owner)) {}
  [[nodiscard]] WeightType type() const override { return type_; }
  [[nodiscard]] std::int64_t rows() const override { return rows_; }
  [[nodiscard]] std::int64_t columns() const override { return columns_; }
  [[nodiscard]] const std::byte* row(std::int64_t index) const {
    return data_ + static_cast<std::size_t>(index) * row_bytes_;
  }

 private:
  WeightType type_;
  std::int64_t rows_;
  std::int64_t columns_;
  std::size_t row_bytes_;
  const std::byte* data_;
  std::shared_ptr<const void> owner_;
};

/// For what knows of split columns.
inline const PackedMatrix& packed_or_split(const Weight& weight) {
  return static_cast<const CpuWeight&>(weight).matrix();
}

inline const PackedMatrix& packed(const Weight& weight) {
  const PackedMatrix& matrix = packed_or_split(weight);
  require(matrix.split == nullptr, "a weight that is no split head");
  return matrix;
}

/// Rows [first, first + rows) of a matrix, both multiples of 16, as a matrix.
inline PackedMatrix panels_of(const PackedMatrix& matrix, std::int64_t first, std::int64_t rows) {
  PackedMatrix part = matrix;
  part.rows = rows;
  part.data += static_cast<std::size_t>(first / kPanel) * matrix.panel_bytes;
  return part;
}

inline float* row_of(Tensor tensor, std::int64_t row) {
  return static_cast<float*>(tensor.data) + row * tensor.row_stride();
}

}  // namespace draftwerk::cpu
