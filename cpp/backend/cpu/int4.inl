// The conversion over one register of rows at a time: a lane is a row, so that no sum crosses lanes. Compiled once per
// instruction set by int4_*.cc, without fused operations, so that all of them agree.
#include "backend/cpu/int4.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {
namespace {

constexpr float kLeast = -8;
constexpr float kMost = 7;
constexpr int kCandidates = 9;
constexpr float kFirstCandidate = -9;
constexpr float kCandidateStep = 0.25F;
constexpr int kAtOnce = 3;  // candidates whose sums fit the registers
static_assert(kCandidates % kAtOnce == 0);

/// The step that `scaled` is nearest to, as a float.
inline Register nearest_step(Register scaled) {
  const Register magic = register_splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const Register least = register_splat(kLeast);
  const Register most = register_splat(kMost);
  const Register rounded = (scaled + magic) - magic;
  const Register raised = rounded > least ? rounded : least;
  return raised < most ? raised : most;
}

/// The scales of kRegisterLanes rows; values[c * kPanel] are those of column c.
Register best_scales(const float* values) {
  Register largest = {};  // by magnitude, with its sign
  Register magnitude = {};
  Register poison = {};
  for (int c = 0; c < kBlock; ++c) {
    const Register v = register_load(values + c * kPanel);
    const Register size = reinterpret_cast<Register>(reinterpret_cast<RegisterInt>(v) & 0x7FFFFFFF);
    const RegisterInt larger = size > magnitude;
    largest = larger ? v : largest;
    magnitude = larger ? size : magnitude;
    poison += v * 0.0F;
  }
  const Register reciprocal = 1.0F / largest;
  Register best = {};
  Register scale = {};
  for (int first = 0; first < kCandidates; first += kAtOnce) {
    Register inverse[kAtOnce];
    Register products[kAtOnce] = {};
    Register squares[kAtOnce] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      inverse[i] = (kFirstCandidate + kCandidateStep * static_cast<float>(first + i)) * reciprocal;
    }
    for (int c = 0; c < kBlock; ++c) {
      const Register v = register_load(values + c * kPanel);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) {
        const Register q = nearest_step(v * inverse[i]);
        products[i] += v * q;
        squares[i] += q * q;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
      const Register fitted = products[i] / squares[i];
      const Register gain = products[i] * fitted;  // by how much it lowers the squared error; NaN is no gain
      const RegisterInt better = gain > best;
      scale = better ? fitted : scale;
      best = better ? gain : best;
    }
  }
  return scale + poison;
}

void quantize_int4(WeightType source_type, const std::byte* source, std::size_t row_stride, int rows,
                   std::byte* block) {
  alignas(64) float values[kBlock * kPanel] = {};
  for (int row = 0; row < rows; ++row, source += row_stride) {
    float columns[kBlock];
    store(columns, load_float(source_type, source));
    store(columns + kLanes, load_float(source_type, source + kLanes * (source_type == WeightType::f32 ? 4 : 2)));
    for (int c = 0; c < kBlock; ++c) values[c * kPanel + row] = columns[c];
  }
  alignas(64) float inverse[kPanel];
  for (int row = 0; row < kPanel; row += kRegisterLanes) register_store(inverse + row, best_scales(values + row));
  for (int row = 0; row < kPanel; ++row) {
    const std::uint16_t half = float_to_half(inverse[row]);
    const float scale = half_to_float(half);
    inverse[row] = scale != 0.0F ? 1.0F / scale : 0.0F;
    std::memcpy(block + row * sizeof half, &half, sizeof half);
  }
  for (int j = 0; j < layout::kGroups / 2; ++j) {
    for (int row = 0; row < kPanel; row += kRegisterLanes) {
      const Register factor = register_load(inverse + row);
      RegisterInt bytes = {};
      for (int i = 0; i < 4; ++i) {
        const auto step = [&](int column) {
          const Register q = nearest_step(register_load(values + column * kPanel + row) * factor);
          return __builtin_convertvector(q, RegisterInt) + 8;
        };
        const int column = j * 4 + i;
        bytes |= (step(column) | step(column + kBlock / 2) << 4) << (8 * i);
      }
      std::memcpy(block + layout::kHalves + static_cast<std::size_t>(j) * layout::kGroupBytes +
                      static_cast<std::size_t>(row) * 4,
                  &bytes, sizeof bytes);
    }
  }
}

}  // namespace

extern const QuantizeInt4 kQuantizeInt4;
const QuantizeInt4 kQuantizeInt4 = quantize_int4;

}  // namespace draftwerk::cpu::DRAFTWERK_ISA
