// Matrices on the device, with the values that they have there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "backend/cpu/quantized_blocks.h"
#include "backend/cuda/device_weight.h"
#include "random_blocks.h"

namespace draftwerk::cuda {

/// To bfloat16 and back.
inline float rounded(float value) { return cpu::bfloat_to_float(cpu::float_to_bfloat(value)); }

/// A random matrix.
struct Matrix {
  Matrix(WeightType type, std::int64_t rows, std::int64_t columns, std::mt19937& random, Uploader& uploader)
      : weight(type, rows, columns, uploader) {
    const std::vector<std::byte> stored = cpu::random_rows(type, rows, columns, random);
    values = cpu::values_of_rows(type, rows, columns, stored);
    if (format_of(type) == WeightFormat::bf16) std::transform(values.begin(), values.end(), values.begin(), rounded);
    weight.upload(0, rows, type, stored.data(), uploader);
    uploader.wait();
  }
  DeviceWeight weight;
  std::vector<float> values;
};

}  // namespace draftwerk::cuda
