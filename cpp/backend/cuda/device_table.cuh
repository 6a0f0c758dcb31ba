// Values of a DeviceTable, decoded one at a time: what each of ggml's block formats (ggml-quants.c, dequantize_row_*)
// and e4m3 mean. Threads that read neighbouring columns read neighbouring bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device.cuh"
#include "backend/cuda/device_table.h"
#include "backend/weight_type.h"

namespace draftwerk::cuda {
namespace table {

__device__ __forceinline__ int byte_at(const std::byte* p) { return *reinterpret_cast<const std::uint8_t*>(p); }
__device__ __forceinline__ int signed_at(const std::byte* p) { return *reinterpret_cast<const std::int8_t*>(p); }
// Every block has an even number of bytes.
__device__ __forceinline__ std::uint16_t word_at(const std::byte* p) {
  return *reinterpret_cast<const std::uint16_t*>(p);
}
__device__ __forceinline__ float half_at(const std::byte* p) { return f16_to_float(word_at(p)); }

// { f16 d; i8 q[32] }
__device__ __forceinline__ float q8_0(const std::byte* block, int i) {
  return __fmul_rn(half_at(block), static_cast<float>(signed_at(block + 2 + i)));
}

// { f16 d; u8 q[16] }: low nibbles are elements 0..15, high nibbles 16..31.
__device__ __forceinline__ float q4_0(const std::byte* block, int i) {
  const int q = byte_at(block + 2 + i % 16) >> i / 16 * 4 & 15;
  return __fmul_rn(half_at(block), static_cast<float>(q - 8));
}

// { f16 d; u32 fifth bits; u8 q[16] }
__device__ __forceinline__ float q5_0(const std::byte* block, int i) {
  const int low = byte_at(block + 6 + i % 16) >> i / 16 * 4 & 15;
  const int fifth = byte_at(block + 2 + i / 8) >> i % 8 & 1;
  return __fmul_rn(half_at(block), static_cast<float>((low | fifth << 4) - 16));
}

// { f16 d; f16 dmin; u8 packed[12]; u8 q[128] }: eight blocks of 32, each with a 6-bit scale and a 6-bit min.
__device__ __forceinline__ float q4_k(const std::byte* block, int i) {
  const std::byte* packed = block + 4;
  const int b = i / 32;
  int scale;
  int min;
  if (b < 4) {
    scale = byte_at(packed + b) & 63;
    min = byte_at(packed + b + 4) & 63;
  } else {
    scale = (byte_at(packed + b + 4) & 15) | byte_at(packed + b - 4) >> 6 << 4;
    min = byte_at(packed + b + 4) >> 4 | byte_at(packed + b) >> 6 << 4;
  }
  const int q = byte_at(block + 16 + b / 2 * 32 + i % 32) >> b % 2 * 4 & 15;
  const float d = __fmul_rn(half_at(block), static_cast<float>(scale));
  const float low = __fmul_rn(half_at(block + 2), static_cast<float>(min));
  return __fsub_rn(__fmul_rn(d, static_cast<float>(q)), low);
}

// { u8 low[128]; u8 high[64]; i8 scales[16]; f16 d }: two halves of 128, sixteen scales of 16 elements.
__device__ __forceinline__ float q6_k(const std::byte* block, int i) {
  const int half = i / 128;
  const int quarter = i % 128 / 32;
  const int low = byte_at(block + half * 64 + quarter % 2 * 32 + i % 32) >> quarter / 2 * 4 & 15;
  const int high = byte_at(block + 128 + half * 32 + i % 32) >> 2 * quarter & 3;
  const float scale = __fmul_rn(half_at(block + 208), static_cast<float>(signed_at(block + 192 + i / 16)));
  return __fmul_rn(scale, static_cast<float>((low | high << 4) - 32));
}

// { f32 scale; e4m3 values[] }: a whole row, aligned to nothing.
__device__ __forceinline__ float f8_e4m3(const std::byte* row, int i) {
  const int scale = byte_at(row) | byte_at(row + 1) << 8 | byte_at(row + 2) << 16 | byte_at(row + 3) << 24;
  const int magnitude = byte_at(row + 4 + i) & 0x7F;
  const float value = magnitude < 8 ? __fmul_rn(static_cast<float>(magnitude), 0x1p-9F)
                                    : __uint_as_float(static_cast<std::uint32_t>(magnitude + (120 << 3)) << 20);
  return __fmul_rn(__int_as_float(scale), byte_at(row + 4 + i) < 0x80 ? value : -value);
}

}  // namespace table

/// The value in `column` of row `token`, both inside of the table; the float32 that the CPU backend decodes too.
__device__ __forceinline__ float table_value(const TableView& view, std::int32_t token, int column) {
  const std::byte* row = view.data + token * view.row_bytes;
  switch (static_cast<WeightType>(view.type)) {
    case WeightType::f32:
      return *reinterpret_cast<const float*>(row + column * 4);
    case WeightType::f16:
      return table::half_at(row + column * 2);
    case WeightType::bf16:
      return bf16_to_float(table::word_at(row + column * 2));
    case WeightType::q8_0:
      return table::q8_0(row + column / 32 * 34, column % 32);
    case WeightType::q4_0:
      return table::q4_0(row + column / 32 * 18, column % 32);
    case WeightType::q5_0:
      return table::q5_0(row + column / 32 * 22, column % 32);
    case WeightType::q4_k:
      return table::q4_k(row + column / 256 * 144, column % 256);
    case WeightType::q6_k:
      return table::q6_k(row + column / 256 * 210, column % 256);
    case WeightType::f8_e4m3:
      return table::f8_e4m3(row, column);
  }
  return 0.0F;
}

}  // namespace draftwerk::cuda
