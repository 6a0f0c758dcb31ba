#include "backend/sampling_validation.h"

#include <charconv>
#include <cmath>
#include <cstddef>
#include <utility>

namespace draftwerk {
namespace {

constexpr float kMaxBias = 1000.0F;

std::string text(float x) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, x).ptr;
  return {buffer, end};
}

std::string text(std::int64_t x) { return std::to_string(x); }

}  // namespace

std::string FieldError::message() const { return field + " is " + value + ", must be " + allowed; }

std::optional<FieldError> validate(const SamplingParams& sampling, int vocabulary) {
  // Written so that NaN fails each of them.
  const float t = sampling.temperature;
  if (!(t == 0.0F || (t >= 1e-3F && t <= 100.0F))) return FieldError{"temperature", text(t), "0, or 0.001 to 100"};
  if (sampling.top_k < 0) return FieldError{"top_k", text(std::int64_t{sampling.top_k}), "0 (all tokens) or more"};
  if (!(sampling.top_p > 0.0F && sampling.top_p <= 1.0F)) {
    return FieldError{"top_p", text(sampling.top_p), "greater than 0 and at most 1"};
  }
  if (!(sampling.min_p >= 0.0F && sampling.min_p <= 1.0F)) return FieldError{"min_p", text(sampling.min_p), "0 to 1"};
  if (!(sampling.repetition_penalty > 0.0F && sampling.repetition_penalty <= 10.0F)) {
    return FieldError{"repetition_penalty", text(sampling.repetition_penalty), "greater than 0 and at most 10"};
  }
  const std::pair<const char*, float> penalties[] = {{"presence_penalty", sampling.presence_penalty},
                                                     {"frequency_penalty", sampling.frequency_penalty}};
  for (const auto& [field, penalty] : penalties) {
    if (!(penalty >= -10.0F && penalty <= 10.0F)) return FieldError{field, text(penalty), "-10 to 10"};
  }
  const auto& bias = sampling.logit_bias;
  if (bias.size() > kMaxLogitBias) {
    return FieldError{"logit_bias", text(static_cast<std::int64_t>(bias.size())) + " entries",
                      "at most " + text(std::int64_t{kMaxLogitBias}) + " entries"};
  }
  // By token, as in the requests of users; the order of entries is not theirs.
  for (const auto& [token, value] : bias) {
    const std::string id = text(std::int64_t{token});
    if (token < 0 || token >= vocabulary) {
      return FieldError{"logit_bias", "token " + id, "tokens 0 to " + text(std::int64_t{vocabulary - 1})};
    }
    if (!(value >= -kMaxBias && value <= kMaxBias)) {
      return FieldError{"logit_bias[" + id + "]", text(value), "-1000 to 1000"};
    }
  }
  if (sampling.logprobs < -1 || sampling.logprobs > kMaxLogprobs) {
    return FieldError{"logprobs", text(std::int64_t{sampling.logprobs}), "0 to " + text(std::int64_t{kMaxLogprobs})};
  }
  return std::nullopt;
}

}  // namespace draftwerk
