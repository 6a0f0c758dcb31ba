#include "backend/cuda/device_table.h"

#include "backend/backend_checks.h"

namespace draftwerk::cuda {

DeviceTable::DeviceTable(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data,
                         Uploader& uploader)
    : type_(type) {
  check_shape("table", type, rows, columns, kMostRows);
  const std::size_t row_bytes = stored_row_bytes(type, columns);
  const std::size_t bytes = row_bytes * static_cast<std::size_t>(rows);
  memory_ = DeviceMemory::of(bytes);
  view_ = {static_cast<const std::byte*>(memory_.get()), static_cast<std::int64_t>(row_bytes),
           static_cast<std::int32_t>(rows), static_cast<std::int32_t>(columns), static_cast<std::int32_t>(type)};
  uploader.send(memory_.get(), data, bytes);
}

}  // namespace draftwerk::cuda
