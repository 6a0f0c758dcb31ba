#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace draftwerk {
namespace {

std::string shape_text(std::int64_t rows, std::int64_t columns) {
  return std::string("[").append(std::to_string(rows)) + ", " + std::to_string(columns) + "]";
}

void require_shape(const std::string& name, std::int64_t rows, std::int64_t columns, std::int64_t wanted_rows,
                   std::int64_t wanted_columns) {
  if (rows == wanted_rows && columns == wanted_columns) return;
  throw std::invalid_argument("tensor " + name + " has shape " + shape_text(rows, columns) + ", the config asks for " +
                              shape_text(wanted_rows, wanted_columns));
}

template <typename Value>
std::vector<Value> values_of(const std::vector<std::byte>& bytes) {
  std::vector<Value> values(bytes.size() / sizeof(Value));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(Value));
  return values;
}

}  // namespace

void Weights::create(const std::string& name, WeightType type, std::int64_t rows, std::int64_t columns) {
  require_free(name);
  if (rows <= 0) throw std::invalid_argument("tensor " + name + " has no rows");
  static_cast<void>(stored_row_bytes(type, columns));  // throws if the shape is impossible
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
  require_free(name);
  store_vector(name, std::as_bytes(values));
}

void Weights::set_indices(const std::string& name, std::span<const std::int32_t> values) {
  require_free(name);
  store_vector(name, std::as_bytes(values));
}

void Weights::store_vector(const std::string& name, std::span<const std::byte> bytes) {
  if (bytes.empty()) throw std::invalid_argument("tensor " + name + " is empty");
  vectors_[name] = {std::vector<std::byte>(bytes.begin(), bytes.end()), backend_.constants(bytes)};
}

void Weights::map_table(const std::string& name, WeightType type, std::int64_t rows, std::int64_t columns,
                        std::span<const std::byte> bytes, std::shared_ptr<const void> owner) {
  require_free(name);
  if (rows <= 0) throw std::invalid_argument("tensor " + name + " has no rows");
  const std::size_t expected = static_cast<std::size_t>(rows) * stored_row_bytes(type, columns);
  if (bytes.size() != expected) {
    throw std::invalid_argument("tensor " + name + ": " + std::to_string(bytes.size()) + " bytes for " +
                                std::to_string(rows) + " rows that take " + std::to_string(expected));
  }
  tables_[name] = backend_.map_table(type, rows, columns, bytes.data(), std::move(owner));
}

void Weights::require_free(const std::string& name) const {
  if (matrices_.contains(name) || vectors_.contains(name) || tables_.contains(name)) {
    throw std::invalid_argument("tensor " + name + " is there twice");
  }
}

const Weight& Weights::matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
  const auto it = matrices_.find(name);
  if (it == matrices_.end()) throw std::invalid_argument("tensor " + name + " is missing");
  const Matrix& matrix = it->second;
  const Weight& weight = *matrix.weight;
  require_shape(name, weight.rows(), weight.columns(), rows, columns);
  if (matrix.uploaded != rows) {
    throw std::invalid_argument("tensor " + name + ": only " + std::to_string(matrix.uploaded) + " of " +
                                std::to_string(rows) + " rows were uploaded");
  }
  return weight;
}

const RowTable& Weights::table(const std::string& name, std::int64_t rows, std::int64_t columns) const {
  const auto it = tables_.find(name);
  if (it == tables_.end()) throw std::invalid_argument("tensor " + name + " is missing");
  require_shape(name, it->second->rows(), it->second->columns(), rows, columns);
  return *it->second;
}

const float* Weights::vector(const std::string& name, std::int64_t length) const {
  return static_cast<const float*>(stored(name, length).device->data());
}

std::vector<float> Weights::vector_values(const std::string& name, std::int64_t length) const {
  return values_of<float>(stored(name, length).host);
}

const std::int32_t* Weights::indices(const std::string& name, std::int64_t length) const {
  return static_cast<const std::int32_t*>(stored(name, length).device->data());
}

std::vector<std::int32_t> Weights::index_values(const std::string& name, std::int64_t length,
                                                std::int64_t limit) const {
  std::vector<std::int32_t> values = values_of<std::int32_t>(stored(name, length).host);
  std::vector<bool> seen(static_cast<std::size_t>(limit));
  for (const std::int32_t value : values) {
    const auto index = static_cast<std::size_t>(value);
    if (value < 0 || index >= seen.size()) {
      throw std::invalid_argument("tensor " + name + " holds " + std::to_string(value) + ", allowed: 0 to " +
                                  std::to_string(limit - 1));
    }
    if (seen[index]) throw std::invalid_argument("tensor " + name + " holds " + std::to_string(value) + " twice");
    seen[index] = true;
  }
  return values;
}

/// Of `length` values of four bytes.
const Weights::Vector& Weights::stored(const std::string& name, std::int64_t length) const {
  const auto it = vectors_.find(name);
  if (it == vectors_.end()) throw std::invalid_argument("tensor " + name + " is missing");
  const auto found = static_cast<std::int64_t>(it->second.host.size() / sizeof(float));
  if (found != length) {
    throw std::invalid_argument("tensor " + name + " has " + std::to_string(found) + " values, the config asks for " +
                                std::to_string(length));
  }
  return it->second;
}

std::size_t Weights::bytes() const {
  std::size_t total = 0;
  for (const auto& [name, matrix] : matrices_) total += matrix.weight->bytes();
  for (const auto& [name, vector] : vectors_) total += vector.device->bytes();
  return total;
}

}  // namespace draftwerk
