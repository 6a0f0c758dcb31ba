#include "tensor_cores.h"

#include <cmath>

namespace emulation {

std::uint16_t float_to_f16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const std::uint16_t sign = std::signbit(x) ? 0x8000U : 0U;
  const float size = std::fabs(x);
  if (size >= 65520.0F) return sign | 0x7C00U;
  int exponent = 0;
  std::frexp(size, &exponent);  // size < 2^exponent
  exponent = exponent < -13 ? -13 : exponent;
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // <= 2048
  return sign |
         static_cast<std::uint16_t>(units < 1024 ? units : (static_cast<std::uint32_t>(exponent + 13) << 10) + units);
}

}  // namespace emulation
