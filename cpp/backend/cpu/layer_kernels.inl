// The layer kernels over simd.h's lanes; compiled once per instruction set by layer_kernels_*.cc, which define
// DRAFTWERK_ISA and kRegisters, the number of vector registers.
#include "backend/cpu/layer_kernels.h"

#include "backend/cpu/attention_kernels.inl"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {
namespace {

// Sixteen lanes as registers.
constexpr int kLaneRegisters = kLanes / kRegisterLanes;
f32x16 together(const Register (&registers)[kLaneRegisters]) {
  f32x16 lanes;
  std::memcpy(&lanes, registers, sizeof lanes);
  return lanes;
}

float reciprocal_rms(const float* x, float epsilon, int columns) {
  Register sums[kLaneRegisters] = {};
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kLaneRegisters; ++r) {
      const Register v = register_load(x + i + r * kRegisterLanes);
      sums[r] = register_fma(v, v, sums[r]);
    }
  }
  f32x16 squares = together(sums);
  if (i < columns) {
    const f32x16 v = load_partial(x + i, columns - i);
    squares = fma(v, v, squares);
  }
  return 1.0F / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(columns) + epsilon);
}

void rms_norm(const float* x, const float* scale, float epsilon, int columns, float* y) {
  const float factor = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) store(y + i, load(x + i) * factor * load(scale + i));
  if (i < columns) {
    const int rest = columns - i;
    store_partial(y + i, load_partial(x + i, rest) * factor * load_partial(scale + i, rest), rest);
  }
}

void add_rms_norm(const float* x, const float* scale, float epsilon, int columns, float factor, float* residual) {
  const float reciprocal = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(residual + i, fma(load(x + i) * reciprocal, load(scale + i), load(residual + i)) * factor);
  }
  if (i < columns) {
    const int rest = columns - i;
    const f32x16 sum =
        fma(load_partial(x + i, rest) * reciprocal, load_partial(scale + i, rest), load_partial(residual + i, rest));
    store_partial(residual + i, sum * factor, rest);
  }
}

void mix_rms_norm(float* x, const float* scale, float epsilon, int columns, const float* added, float added_factor,
                  float factor) {
  const float reciprocal = reciprocal_rms(x, epsilon, columns);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(x + i, fma(load(x + i) * reciprocal, load(scale + i), load(added + i) * added_factor) * factor);
  }
  if (i < columns) {
    const int rest = columns - i;
    const f32x16 sum = fma(load_partial(x + i, rest) * reciprocal, load_partial(scale + i, rest),
                           load_partial(added + i, rest) * added_factor);
    store_partial(x + i, sum * factor, rest);
  }
}

void widen(WeightType type, const std::byte* source, int count, float* out) {
  const std::size_t element = type == WeightType::f32 ? 4 : 2;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes, source += kLanes * element) store(out + i, load_float(type, source));
  if (i < count) {
    std::byte rest[kLanes * 4] = {};
    std::memcpy(rest, source, static_cast<std::size_t>(count - i) * element);
    store_partial(out + i, load_float(type, rest), count - i);
  }
}

void weighted_sum(const float* x, std::int64_t stride, const std::int32_t* rows, const float* weights, int count,
                  int columns, float* y) {
  const float* first = x + rows[0] * stride;
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    f32x16 sum = load(first + i) * weights[0];
    for (int n = 1; n < count; ++n) sum = fma(load(x + rows[n] * stride + i), splat(weights[n]), sum);
    store(y + i, sum);
  }
  if (i < columns) {
    const int rest = columns - i;
    f32x16 sum = load_partial(first + i, rest) * weights[0];
    for (int n = 1; n < count; ++n) sum = fma(load_partial(x + rows[n] * stride + i, rest), splat(weights[n]), sum);
    store_partial(y + i, sum, rest);
  }
}

void gelu_multiply(const float* gate, const float* up, int columns, float* y) {
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) store(y + i, gelu_tanh(load(gate + i)) * load(up + i));
  if (i < columns) {
    const int rest = columns - i;
    store_partial(y + i, gelu_tanh(load_partial(gate + i, rest)) * load_partial(up + i, rest), rest);
  }
}

float softcap_max(float* x, int columns, float softcap) {
  Register most[kLaneRegisters];
  for (Register& v : most) v = register_splat(-__builtin_inff());
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kLaneRegisters; ++r) {
      float* p = x + i + r * kRegisterLanes;
      Register v = register_load(p);
      if (softcap != 0.0F) {
        v = softcap * register_tanh(v / softcap);
        register_store(p, v);
      }
      most[r] = v > most[r] ? v : most[r];  // NaN is none
    }
  }
  f32x16 largest = together(most);
  if (i < columns) {
    const int rest = columns - i;
    f32x16 v = load_partial(x + i, rest);
    if (softcap != 0.0F) {
      v = softcap * tanh(v / softcap);
      store_partial(x + i, v, rest);
    }
    float lanes[kLanes];
    store(lanes, splat(-__builtin_inff()));
    store_partial(lanes, v, rest);
    largest = max(load(lanes), largest);
  }
  return reduce_max(largest);
}

float raise_max(float* x, const float* errors, float reach, float slack, int columns) {
  Register most = register_splat(-__builtin_inff());
  int i = 0;
  for (; i + kRegisterLanes <= columns; i += kRegisterLanes) {
    const Register v = register_load(x + i) + (register_load(errors + i) * reach + slack);
    register_store(x + i, v);
    most = v > most ? v : most;
  }
  float largest = most[0];
  for (int lane = 1; lane < kRegisterLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  for (; i < columns; ++i) {
    x[i] += errors[i] * reach + slack;
    largest = x[i] > largest ? x[i] : largest;
  }
  return largest;
}

void rotate(float* x, const float* cosine, const float* sine, int head_dim) {
  const int half = head_dim / 2;
  float* y = x + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const f32x16 a = load(x + i);
    const f32x16 b = load(y + i);
    const f32x16 c = load(cosine + i);
    const f32x16 s = load(sine + i);
    store(x + i, a * c - b * s);
    store(y + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i];
    const float b = y[i];
    x[i] = a * cosine[i] - b * sine[i];
    y[i] = b * cosine[i] + a * sine[i];
  }
}

void store_key(const float* key, int head_dim, KvType type, int slot, std::byte* keys) {
  if (type == KvType::f32) {
    for (int d = 0; d < head_dim; ++d) std::memcpy(keys + (d * kPageSize + slot) * 4, key + d, 4);
    return;
  }
  for (int d = 0; d < head_dim; d += kLanes) {
    std::uint16_t halves[kLanes];
    store_half(halves, load(key + d));
    for (int i = 0; i < kLanes; ++i) std::memcpy(keys + ((d + i) * kPageSize + slot) * 2, halves + i, 2);
  }
}

void store_value(const float* value, int head_dim, KvType type, int slot, std::byte* values) {
  if (type == KvType::f32) {
    std::memcpy(values + slot * head_dim * 4, value, static_cast<std::size_t>(head_dim) * 4);
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(values) + slot * head_dim;
  for (int d = 0; d < head_dim; d += kLanes) store_half(halves + d, load(value + d));
}

}  // namespace

extern const LayerKernels kLayerKernels;
const LayerKernels kLayerKernels = {rms_norm,      add_rms_norm, mix_rms_norm, widen,           weighted_sum,
                                    gelu_multiply, softcap_max,  raise_max,    rotate,          store_key,
                                    store_value,   attend_chunk, merge_chunk,  finish_attention};

}  // namespace draftwerk::cpu::DRAFTWERK_ISA
