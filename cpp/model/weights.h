// The tensors of a checkpoint on the device, by the names that Hugging Face gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/weight_type.h"

namespace draftwerk {

class Weights {
 public:
  explicit Weights(Backend& backend) : backend_(backend) {}

  /// An empty matrix, to be filled by upload_rows. Throws std::invalid_argument if the name is taken or the shape
  /// is impossible for the type.
  void create(const std::string& name, WeightType type, std::int64_t rows, std::int64_t columns);
  /// See Backend::upload_rows. Rows come in order, from 0; `bytes` must be exactly the size of `count` rows in
  /// `source_type`. Throws std::invalid_argument otherwise.
  void upload_rows(const std::string& name, std::int64_t first_row, std::int64_t count, WeightType source_type,
                   std::span<const std::byte> bytes);
  /// A vector in float32 (norm scales). Throws std::invalid_argument if the name is taken or the vector is empty.
  void set_vector(const std::string& name, std::span<const float> values);
  /// A vector of indices, see index_values(). Throws std::invalid_argument if the name is taken or the vector is empty.
  void set_indices(const std::string& name, std::span<const std::int32_t> values);
  /// A table that stays where its bytes are; see Backend::map_table. Throws std::invalid_argument if the name is taken,
  /// or if `bytes` is not exactly the size of the table.
  void map_table(const std::string& name, WeightType type, std::int64_t rows, std::int64_t columns,
                 std::span<const std::byte> bytes, std::shared_ptr<const void> owner);

  /// The matrix of that name; throws std::invalid_argument if it is missing, has another shape or misses rows.
  [[nodiscard]] const Weight& matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const;
  [[nodiscard]] bool contains(const std::string& name) const { return matrices_.contains(name); }
  /// The vector of that name on the device; throws std::invalid_argument if it is missing or has another length.
  [[nodiscard]] const float* vector(const std::string& name, std::int64_t length) const;
  /// What vector() points to, for the host.
  [[nodiscard]] std::vector<float> vector_values(const std::string& name, std::int64_t length) const;
  /// The indices of that name on the device; throws std::invalid_argument if they are missing or have another length.
  [[nodiscard]] const std::int32_t* indices(const std::string& name, std::int64_t length) const;
  /// What indices() points to, for the host; throws std::invalid_argument if they are not distinct and below `limit`.
  [[nodiscard]] std::vector<std::int32_t> index_values(const std::string& name, std::int64_t length,
                                                       std::int64_t limit) const;
  /// As matrix(), for what map_table() took.
  [[nodiscard]] const RowTable& table(const std::string& name, std::int64_t rows, std::int64_t columns) const;
  /// Bytes that all of it occupies on the device; mapped tables occupy none.
  [[nodiscard]] std::size_t bytes() const;

 private:
  struct Matrix {
    std::unique_ptr<Weight> weight;
    std::int64_t uploaded = 0;  // rows so far
  };
  struct Vector {
    std::vector<std::byte> host;
    std::unique_ptr<Buffer> device;
  };
  void require_free(const std::string& name) const;
  void store_vector(const std::string& name, std::span<const std::byte> bytes);
  const Vector& stored(const std::string& name, std::int64_t length) const;

  Backend& backend_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;  // of float32 or int32
  std::map<std::string, std::unique_ptr<RowTable>> tables_;
};

}  // namespace draftwerk
