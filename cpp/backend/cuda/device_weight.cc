#include "backend/cuda/device_weight.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "backend/backend_checks.h"
#include "backend/cuda/device_table.h"

namespace draftwerk::cuda {

DeviceWeight::DeviceWeight(WeightType type, std::int64_t rows, std::int64_t columns, Uploader& uploader) : type_(type) {
  check_shape("weight", type, rows, columns, kMostRows);
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
  check_upload(*this, first_row, count, source_type);
  const auto panel_bytes = static_cast<std::size_t>(view_.panel_bytes());
  const std::size_t row_bytes = stored_row_bytes(source_type, view_.columns);
  auto* to = static_cast<std::byte*>(memory_.get()) + static_cast<std::size_t>(first_row / kPanelRows) * panel_bytes;
  const auto panels_at_once = static_cast<std::int64_t>(Uploader::kBytes / panel_bytes);
  const std::int64_t panels = (count + kPanelRows - 1) / kPanelRows;
  cpu::WorkerPool& workers = uploader.workers();
  const std::size_t scratch_bytes = pack_scratch_bytes(type_, view_.columns);
  const auto scratch = std::make_unique<std::byte[]>(scratch_bytes * static_cast<std::size_t>(workers.size()));
  for (std::int64_t first = 0; first < panels; first += panels_at_once) {
    std::byte* const buffer = uploader.next();
    const std::int64_t part = std::min(panels_at_once, panels - first);
    // What pack_panel could refuse is checked above: the body of a parallel loop must not throw.
    workers.parallel_for(part, 1, [&](std::int64_t begin, std::int64_t end, int worker) {
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t row = (first + p) * kPanelRows;
        pack_panel(type_, view_.columns, static_cast<int>(std::min<std::int64_t>(kPanelRows, count - row)), source_type,
                   source + static_cast<std::size_t>(row) * row_bytes,
                   buffer + static_cast<std::size_t>(p) * panel_bytes,
                   scratch.get() + static_cast<std::size_t>(worker) * scratch_bytes);
      }
    });
    uploader.send(to + static_cast<std::size_t>(first) * panel_bytes, static_cast<std::size_t>(part) * panel_bytes);
  }
}

}  // namespace draftwerk::cuda
