// Weight matrices in device memory, in the layout of weight_layout.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/handles.h"
#include "backend/cuda/uploader.h"
#include "backend/cuda/weight_layout.h"

namespace draftwerk::cuda {

class DeviceWeight final : public Weight {
 public:
  /// A matrix of zeros. Throws std::invalid_argument as Backend::create_weight does, and CudaError.
  DeviceWeight(WeightType type, std::int64_t rows, std::int64_t columns, Uploader& uploader);
  [[nodiscard]] WeightType type() const override { return type_; }
  [[nodiscard]] std::int64_t rows() const override { return view_.rows; }
  [[nodiscard]] std::int64_t columns() const override { return view_.columns; }
  [[nodiscard]] std::size_t bytes() const override { return bytes_; }
  [[nodiscard]] const MatrixView& view() const { return view_; }

  /// See Backend::upload_rows, whose errors are std::invalid_argument. `source` is not needed any more when this
  /// returns; kernels may read the rows once the uploader was waited for.
  void upload(std::int64_t first_row, std::int64_t count, WeightType source_type, const std::byte* source,
              Uploader& uploader);

 private:
  WeightType type_;
  std::size_t bytes_;
  DeviceMemory memory_;
  MatrixView view_;
};

inline const MatrixView& view_of(const Weight& weight) { return static_cast<const DeviceWeight&>(weight).view(); }

}  // namespace draftwerk::cuda
