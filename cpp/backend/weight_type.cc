#include "backend/weight_type.h"

#include <array>
#include <stdexcept>

namespace draftwerk {
namespace {

struct Layout {
  WeightType type;
  const char* name;
  int columns;        // per block
  std::size_t bytes;  // per block
};

// In the order of the enumeration; those of blocks as ggml has them.
constexpr std::array<Layout, 9> kLayouts = {{
    {WeightType::f32, "f32", 1, 4},
    {WeightType::f16, "f16", 1, 2},
    {WeightType::bf16, "bf16", 1, 2},
    {WeightType::q8_0, "q8_0", 32, 34},
    {WeightType::q4_0, "q4_0", 32, 18},
    {WeightType::q5_0, "q5_0", 32, 22},
    {WeightType::q4_k, "q4_k", 256, 144},
    {WeightType::q6_k, "q6_k", 256, 210},
    {WeightType::f8_e4m3, "f8_e4m3", 1, 1},
}};

const Layout& layout(WeightType type) { return kLayouts.at(static_cast<std::size_t>(type)); }

}  // namespace

const char* weight_type_name(WeightType type) { return layout(type).name; }

WeightType parse_weight_type(const std::string& name) {
  for (const Layout& l : kLayouts) {
    if (name == l.name) return l.type;
  }
  std::string known;
  for (const Layout& l : kLayouts) known += (known.empty() ? "" : ", ") + std::string(l.name);
  throw std::invalid_argument("unknown weight type '" + name + "' (known: " + known + ")");
}

bool is_float(WeightType type) {
  return type == WeightType::f32 || type == WeightType::f16 || type == WeightType::bf16;
}

int block_columns(WeightType type) { return layout(type).columns; }

std::size_t block_bytes(WeightType type) { return layout(type).bytes; }

std::size_t row_scale_bytes(WeightType type) { return type == WeightType::f8_e4m3 ? sizeof(float) : 0; }

std::size_t stored_row_bytes(WeightType type, std::int64_t columns) {
  const Layout& l = layout(type);
  if (columns <= 0 || columns % l.columns != 0) {
    throw std::invalid_argument("rows of " + std::to_string(columns) + " values cannot be stored as " + l.name +
                                ", which needs a multiple of " + std::to_string(l.columns));
  }
  return row_scale_bytes(type) + static_cast<std::size_t>(columns / l.columns) * l.bytes;
}

}  // namespace draftwerk
