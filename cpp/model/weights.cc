#include "model/weights.h"

#include <array>
#include <cstring>
#include <stdexcept>

namespace draftwerk {
namespace {

// ggml's block sizes: elements per block and bytes per block.
struct Layout {
  WeightType type;
  const char* name;
  int elements;
  int bytes;
};
constexpr std::array<Layout, 8> kLayouts = {{
    {WeightType::f32, "f32", 1, 4},
    {WeightType::f16, "f16", 1, 2},
    {WeightType::bf16, "bf16", 1, 2},
    {WeightType::q8_0, "q8_0", 32, 34},
    {WeightType::q4_0, "q4_0", 32, 18},
    {WeightType::q5_0, "q5_0", 32, 22},
    {WeightType::q4_k, "q4_k", 256, 144},
    {WeightType::q6_k, "q6_k", 256, 210},
}};

const Layout& layout(WeightType type) { return kLayouts.at(static_cast<std::size_t>(type)); }

std::string shape_text(std::int64_t rows, std::int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

}  // namespace

std::size_t stored_row_bytes(WeightType type, std::int64_t columns) {
  const Layout& l = layout(type);
  if (columns <= 0 || columns % l.elements != 0) {
    throw std::invalid_argument("rows of " + std::to_string(columns) + " values cannot be stored as " + l.name +
                                ", which needs a multiple of " + std::to_string(l.elements));
  }
  return static_cast<std::size_t>(columns / l.elements * l.bytes);
}

WeightType parse_weight_type(const std::string& name) {
  for (const Layout& l : kLayouts) {
    if (name == l.name) return l.type;
  }
  std::string known;
  for (const Layout& l : kLayouts) known += (known.empty() ? "" : ", ") + std::string(l.name);
  throw std::invalid_argument("unknown weight type '" + name + "' (known: " + known + ")");
}

const char* weight_type_name(WeightType type) { return layout(type).name; }

void Weights::create(const std::string& name, WeightType type, std::int64_t rows, std::int64_t columns) {
  if (matrices_.contains(name)) throw std::invalid_argument("tensor " + name + " is there twice");
  if (rows <= 0) throw std::invalid_argument("tensor " + name + " has no rows");
  stored_row_bytes(type, columns);
  matrices_[name].weight = backend_.create_weight(type, rows, columns);
}

void Weights::upload_rows(const std::string& name, std::int64_t first_row, std::int64_t count, WeightType source_type,
                          std::span<const std::byte> bytes) {
  const auto it = matrices_.find(name);
  if (it == matrices_.end()) throw std::invalid_argument("tensor " + name + " was not created");
  Matrix& matrix = it->second;
  const std::int64_t rows = matrix.weight->rows();
  if (first_row != matrix.uploaded || count <= 0 || count > rows - first_row) {
    throw std::invalid_argument("tensor " + name + ": rows " + std::to_string(first_row) + " to " +
                                std::to_string(first_row + count) + " do not follow the " +
                                std::to_string(matrix.uploaded) + " of " + std::to_string(rows) + " uploaded so far");
  }
  const std::size_t expected =
      static_cast<std::size_t>(count) * stored_row_bytes(source_type, matrix.weight->columns());
  if (bytes.size() != expected) {
    throw std::invalid_argument("tensor " + name + ": " + std::to_string(bytes.size()) + " bytes for " +
                                std::to_string(count) + " rows that take " + std::to_string(expected));
  }
  backend_.upload_rows(*matrix.weight, first_row, count, source_type, bytes.data());
  matrix.uploaded += count;
}

void Weights::set_vector(const std::string& name, std::span<const float> values) {
  if (values.empty()) throw std::invalid_argument("tensor " + name + " is empty");
  auto& buffer = vectors_[name];
  if (buffer) throw std::invalid_argument("tensor " + name + " is there twice");
  buffer = backend_.allocate(values.size_bytes());
  std::memcpy(buffer->data(), values.data(), values.size_bytes());
}

const Weight& Weights::matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
  const auto it = matrices_.find(name);
  if (it == matrices_.end()) throw std::invalid_argument("tensor " + name + " is missing");
  const Matrix& matrix = it->second;
  const Weight& weight = *matrix.weight;
  if (weight.rows() != rows || weight.columns() != columns) {
    throw std::invalid_argument("tensor " + name + " has shape " + shape_text(weight.rows(), weight.columns()) +
                                ", the config asks for " + shape_text(rows, columns));
  }
  if (matrix.uploaded != rows) {
    throw std::invalid_argument("tensor " + name + ": only " + std::to_string(matrix.uploaded) + " of " +
                                std::to_string(rows) + " rows were uploaded");
  }
  return weight;
}

const float* Weights::vector(const std::string& name, std::int64_t length) const {
  const auto it = vectors_.find(name);
  if (it == vectors_.end()) throw std::invalid_argument("tensor " + name + " is missing");
  const auto found = static_cast<std::int64_t>(it->second->bytes() / sizeof(float));
  if (found != length) {
    throw std::invalid_argument("tensor " + name + " has " + std::to_string(found) + " values, the config asks for " +
                                std::to_string(length));
  }
  return static_cast<const float*>(it->second->data());
}

std::size_t Weights::bytes() const {
  std::size_t total = 0;
  for (const auto& [name, matrix] : matrices_) total += matrix.weight->bytes();
  for (const auto& [name, buffer] : vectors_) total += buffer->bytes();
  return total;
}

}  // namespace draftwerk
