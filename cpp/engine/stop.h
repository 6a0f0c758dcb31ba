// When a sequence ends: stop tokens and stop strings, matched on bytes as tokens are accepted.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backend/sampling.h"

namespace draftwerk {

/// The bytes that each token adds to the text; empty for control tokens.
class TokenBytes {
 public:
  TokenBytes() = default;
  /// `offsets` has vocabulary + 1 ascending entries into `blob`. Throws std::invalid_argument if they do not fit it.
  TokenBytes(std::vector<std::uint32_t> offsets, std::string blob);

  [[nodiscard]] bool empty() const { return offsets_.empty(); }
  /// Bytes of `token`; none for a token beyond the table.
  [[nodiscard]] std::string_view operator[](TokenId token) const;

 private:
  std::vector<std::uint32_t> offsets_;
  std::string blob_;
};

/// Finds the first stop string in a text that grows token by token, also where it spans tokens.
class StopStringMatcher {
 public:
  StopStringMatcher() = default;
  explicit StopStringMatcher(std::vector<std::string> strings);

  /// Appends `bytes` to the text. If that completes a stop string and `armed`, returns how many bytes of the whole
  /// text lie before it (the earliest start among those completed).
  std::optional<std::int64_t> push(std::string_view bytes, bool armed);

 private:
  std::vector<std::string> strings_;
  std::size_t longest_ = 0;
  std::string tail_;  // the last longest_ - 1 bytes
  std::int64_t bytes_before_tail_ = 0;
};

}  // namespace draftwerk
