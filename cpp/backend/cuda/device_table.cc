#include "backend/cuda/device_table.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace draftwerk::cuda {

void check_shape(const char* what, WeightType type, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  if (rows > 0 && columns > 0 && rows <= kMost && columns <= kMost && columns % block_columns(type) == 0) return;
  throw std::invalid_argument(std::string(what) + " [" + std::to_string(rows) + ", " + std::to_string(columns) +
                              "] of type " + weight_type_name(type) +
                              ": rows and columns must be positive, columns a multiple of " +
                              std::to_string(block_columns(type)));
}

DeviceTable::DeviceTable(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data,
                         Uploader& uploader)
    : type_(type) {
  check_shape("table", type, rows, columns);
  const std::size_t row_bytes = stored_row_bytes(type, columns);
  const std::size_t bytes = row_bytes * static_cast<std::size_t>(rows);
  memory_ = DeviceMemory::of(bytes);
  view_ = {static_cast<const std::byte*>(memory_.get()), static_cast<std::int64_t>(row_bytes),
           static_cast<std::int32_t>(rows), static_cast<std::int32_t>(columns), static_cast<std::int32_t>(type)};
  uploader.send(memory_.get(), data, bytes);
}

}  // namespace draftwerk::cuda
