#include "backend/cuda/device_weight.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "backend/cuda/device_table.h"

namespace draftwerk::cuda {

DeviceWeight::DeviceWeight(WeightType type, std::int64_t rows, std::int64_t columns, Uploader& uploader) : type_(type) {
  check_shape("weight", type, rows, columns);
  const WeightFormat format = format_of(type);
  const int chunk = chunk_columns(format);
  view_ = {nullptr, static_cast<std::int32_t>(rows), static_cast<std::int32_t>(columns),
           static_cast<std::int32_t>((columns + chunk - 1) / chunk), format};
  if (static_cast<std::size_t>(view_.panel_bytes()) > Uploader::kBytes) {
    throw std::invalid_argument("weight of " + std::to_string(columns) + " columns: 16 rows take " +
                                std::to_string(view_.panel_bytes()) + " bytes, more than the " +
                                std::to_string(Uploader::kBytes) + " that are copied at once");
  }
  bytes_ = static_cast<std::size_t>(view_.panels()) * static_cast<std::size_t>(view_.panel_bytes());
  memory_ = DeviceMemory::of(bytes_);
  view_.data = static_cast<const std::byte*>(memory_.get());
  uploader.clear(memory_.get(), bytes_);
}

void DeviceWeight::upload(std::int64_t first_row, std::int64_t count, WeightType source_type, const std::byte* source,
                          Uploader& uploader) {
  const std::int64_t rows = view_.rows;
  const bool whole_panels = first_row % kPanelRows == 0 && (count % kPanelRows == 0 || first_row + count == rows);
  if (first_row < 0 || count < 0 || first_row > rows - count || !whole_panels) {
    throw std::invalid_argument("rows " + std::to_string(first_row) + " .. " + std::to_string(first_row + count) +
                                " of " + std::to_string(rows) + ": not whole groups of 16");
  }
  const auto is_float = [](WeightType type) { return block_columns(type) == 1; };
  const bool converts =
      is_float(source_type) && (type_ == WeightType::q8_0 || type_ == WeightType::q4_0 || is_float(type_));
  if (source_type != type_ && !converts) {
    throw std::invalid_argument(std::string("rows of type ") + weight_type_name(source_type) +
                                " for a weight of type " + weight_type_name(type_));
  }
  const auto panel_bytes = static_cast<std::size_t>(view_.panel_bytes());
  const std::size_t row_bytes = stored_row_bytes(source_type, view_.columns);
  auto* to = static_cast<std::byte*>(memory_.get()) + static_cast<std::size_t>(first_row / kPanelRows) * panel_bytes;
  const auto rows_at_once = static_cast<std::int64_t>(Uploader::kBytes / panel_bytes) * kPanelRows;
  for (std::int64_t row = 0; row < count;) {
    std::byte* const buffer = uploader.next();
    std::byte* panel = buffer;
    for (const std::int64_t end = std::min(count, row + rows_at_once); row < end; row += kPanelRows) {
      const int part = static_cast<int>(std::min<std::int64_t>(kPanelRows, count - row));
      pack_panel(type_, view_.columns, part, source_type, source + static_cast<std::size_t>(row) * row_bytes, panel);
      panel += panel_bytes;
    }
    const auto bytes = static_cast<std::size_t>(panel - buffer);
    uploader.send(to, bytes);
    to += bytes;
  }
}

}  // namespace draftwerk::cuda
