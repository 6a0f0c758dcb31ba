// The kernels in plain C++, and the choice between the instruction sets.
#define DRAFTWERK_ISA portable
#include <utility>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/places.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/split_columns.h"

namespace draftwerk::cpu {

namespace portable {

namespace {

using Float = f32x16;
using Part = Float;
using Integers = i32x16;
using Bytes = std::uint8_t __attribute__((vector_size(16)));

constexpr int kParts = 1;
constexpr int kFloatRows = 4;
template <WeightType type, Form form>
constexpr RowTile tile_for_few() {
  return {1, 4};
}
template <WeightType type, Form form>
constexpr RowTile tile_for_many() {
  return tile_for_few<type, form>();
}

template <typename Lanes>
inline Lanes splat_lanes(float x) {
  return splat(x);
}
inline Float multiply(Float a, Float b) { return a * b; }
inline Float multiply_add(Float a, Float b, Float c) { return fma(a, b, c); }
inline Float to_lanes(Integers v) { return to_float(v); }
inline void store_lanes(float* p, Float v) { store(p, v); }

template <WeightType type, typename Lanes>
inline Lanes load_lanes(const std::byte* p) {
  if constexpr (type == WeightType::f32) {
    Float v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    std::uint16_t words[kPanel];
    std::memcpy(words, p, sizeof words);
    if constexpr (type == WeightType::f16) return load_half(words);
    return load_bfloat(words);
  }
}

inline Float part_from_u8(const std::byte* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, Integers));
}
inline Float part_from_i8(const std::byte* p) {
  using SignedBytes = std::int8_t __attribute__((vector_size(16)));
  SignedBytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, Integers));
}

// The 64 bytes of group g as values less their zero point.
template <WeightType type>
inline void unpack_group(const std::byte* block, int g, std::int16_t (&out)[layout::kGroupBytes]) {
  const std::byte* nibbles = block;
  if constexpr (type == WeightType::q5_0) nibbles += layout::kFifthBits;
  if constexpr (type == WeightType::q6_k) nibbles += layout::kUpperBits;
  const std::byte* both = nibbles + g % 4 * layout::kGroupBytes;
  const int shift = g < 4 ? 0 : 4;
  std::uint64_t fifth = 0;
  if constexpr (type == WeightType::q5_0) std::memcpy(&fifth, block + g * sizeof fifth, sizeof fifth);
  const std::byte* fields = block + g / 4 * layout::kGroupBytes;
  for (int i = 0; i < static_cast<int>(layout::kGroupBytes); ++i) {
    int q;
    if constexpr (type == WeightType::q8_0) {
      q = std::to_integer<int>(block[g * layout::kGroupBytes + i]) - 128;
    } else {
      q = std::to_integer<int>(both[i]) >> shift & 15;
      if constexpr (type == WeightType::q4_0) q -= 8;
      if constexpr (type == WeightType::q5_0) q += static_cast<int>(fifth >> i & 1U) * 16 - 16;
      if constexpr (type == WeightType::q6_k) q += (std::to_integer<int>(fields[i]) >> (g % 4 * 2) & 3) * 16 - 32;
    }
    out[i] = static_cast<std::int16_t>(q);
  }
}

template <WeightType type, int R>
inline void dot_groups(const std::byte* block, int first_group, int last_group, const std::int8_t* quants,
                       std::int64_t stride, Integers (&dot)[R]) {
  std::int32_t sum[R][kPanel] = {};
  for (int g = first_group; g < last_group; ++g) {
    std::int16_t w[layout::kGroupBytes];
    unpack_group<type>(block, g, w);
    for (int r = 0; r < R; ++r) {
      const std::int8_t* q = quants + r * stride + g * 4;
      std::int8_t a[4];  // copied, as GCC 12 vectorises four reads to some of a row behind the last one
      std::memcpy(a, q, sizeof a);
      for (int lane = 0; lane < kPanel; ++lane) {
        const std::int16_t* row = w + lane * 4;
        sum[r][lane] += row[0] * a[0] + row[1] * a[1] + row[2] * a[2] + row[3] * a[3];
      }
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(&dot[r], sum[r], sizeof dot[r]);
}

// dot_groups decodes weights with their sign.
template <WeightType type>
constexpr int kZeroPoint = 0;

template <WeightType type, int first, int R>
inline void dot_block(Place block, const std::int8_t* quants, std::int64_t stride, const Start* /*starts*/,
                      std::int64_t /*start_stride*/, Integers (&dot)[1][R]) {
  dot_groups<type, R>(block.at, 0, layout::kGroups, quants, stride, dot[0]);
}

template <int half, int first, int R>
inline void dot_half(Place block, const std::int8_t* quants, std::int64_t stride, const Start* /*starts*/,
                     std::int64_t /*start_stride*/, Integers (&dot)[1][R]) {
  dot_groups<WeightType::q6_k, R>(block.at, half * 4, half * 4 + 4, quants, stride, dot[0]);
}

template <bool coarse, int whole, int first, int R>
inline void dot_split(Place block, Place rest, const std::int8_t* quants, std::int64_t stride, const Start* /*starts*/,
                      std::int64_t /*start_stride*/, Integers (&dot)[1][R]) {
  std::int32_t sum[R][kPanel] = {};
  constexpr int pairs = (layout::kGroups - whole) / 2;
  const std::byte* halves = block.at + whole * layout::kGroupBytes;
  for (int g = 0; g < layout::kGroups; ++g) {
    const int shift = g < whole + pairs ? 0 : 4;
    const std::size_t vector =
        g < whole ? 0 : static_cast<std::size_t>((g - whole) % (pairs > 0 ? pairs : 1)) * layout::kGroupBytes;
    for (int i = 0; i < static_cast<int>(layout::kGroupBytes); ++i) {
      int value;
      if (g < whole) {
        value = std::to_integer<int>(block.at[g * layout::kGroupBytes + i]) - 128;
      } else {
        const int upper = std::to_integer<int>(halves[vector + i]) >> shift & 15;
        const int lower = coarse ? 8 : std::to_integer<int>(rest.at[vector + i]) >> shift & 15;
        value = upper * 16 + lower - 128;
      }
      for (int r = 0; r < R; ++r) sum[r][i / 4] += value * quants[r * stride + g * 4 + i % 4];
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(&dot[0][r], sum[r], sizeof dot[0][r]);
}

#include "backend/cpu/matmul.inl"

}  // namespace

const MatmulKernels& matmul_kernels() { return kKernels; }

}  // namespace portable

bool takes_quantized(WeightType type) { return !is_float(packed_type(type)); }

const MatmulKernels& matmul_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return amx::matmul_kernels();
  if (isa == Isa::avx512) return avx512::matmul_kernels();
  if (isa == Isa::avx2) return avx2::matmul_kernels();
#endif
  static_cast<void>(isa);
  return portable::matmul_kernels();
}

}  // namespace draftwerk::cpu
