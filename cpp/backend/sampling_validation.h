// Which sampling parameters a request may ask for.
#pragma once

#include <optional>
#include <string>

#include "backend/sampling.h"

namespace draftwerk {

inline constexpr int kMaxLogprobs = 64;
inline constexpr int kMaxLogitBias = 1024;

/// A parameter outside its range, in the words of the API.
struct FieldError {
  std::string field;    ///< "top_p", "logit_bias[3].token"
  std::string value;    ///< "1.5"
  std::string allowed;  ///< "greater than 0 and at most 1"

  /// "top_p is 1.5, must be greater than 0 and at most 1"
  [[nodiscard]] std::string message() const;
};

/// The first parameter out of range, if any:
///   temperature         0 (greedy), or 0.001 to 100; below that z = logit / temperature loses its precision
///   top_k               0 or more; values of the vocabulary size and above keep all
///   top_p               (0, 1]
///   min_p               [0, 1]
///   repetition_penalty  (0, 10]
///   presence_penalty, frequency_penalty  [-10, 10]
///   logit_bias          at most kMaxLogitBias entries, tokens within the vocabulary, biases within [-1000, 1000]
///   logprobs            -1 to kMaxLogprobs
[[nodiscard]] std::optional<FieldError> validate(const SamplingParams& sampling, int vocabulary);

}  // namespace draftwerk
