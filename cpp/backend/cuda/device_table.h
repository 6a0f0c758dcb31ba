// A table that is read by row only (Backend::map_table), on the device as a file stores it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "backend/backend.h"
#include "backend/cuda/handles.h"
#include "backend/cuda/uploader.h"

namespace draftwerk::cuda {

/// Its rows, to kernels: table_value() of device_table.cuh reads a value.
struct TableView {
  const std::byte* data;  ///< device memory, [rows] of row_bytes
  std::int64_t row_bytes;
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t type;  ///< a WeightType
  std::int32_t unused = 0;
};

class DeviceTable final : public RowTable {
 public:
  /// `rows` rows of `columns` values as a file stores them in `type`, contiguous at `data`, which is not needed any
  /// more when this returns. Throws std::invalid_argument as Backend::create_weight does, and CudaError.
  DeviceTable(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data, Uploader& uploader);
  [[nodiscard]] WeightType type() const override { return type_; }
  [[nodiscard]] std::int64_t rows() const override { return view_.rows; }
  [[nodiscard]] std::int64_t columns() const override { return view_.columns; }
  [[nodiscard]] const TableView& view() const { return view_; }

 private:
  WeightType type_;
  DeviceMemory memory_;
  TableView view_;
};

/// Rows and columns that kernels number by 32 bits.
inline constexpr std::int64_t kMostRows = std::numeric_limits<std::int32_t>::max() / 2;

}  // namespace draftwerk::cuda
