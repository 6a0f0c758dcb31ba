#include "engine/validation.h"

#include <string>

namespace draftwerk {
namespace {

constexpr std::size_t kMaxStopTokens = 256;
constexpr std::size_t kMaxStopStrings = 64;
constexpr std::size_t kMaxStopStringBytes = 1024;
constexpr std::size_t kMaxSaltBytes = 256;

std::string range(std::int64_t low, std::int64_t high) { return std::to_string(low) + " to " + std::to_string(high); }

std::optional<FieldError> check_tokens(const std::string& field, const std::vector<TokenId>& tokens, int vocabulary) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) {
      return FieldError{field + "[" + std::to_string(i) + "]", std::to_string(tokens[i]), range(0, vocabulary - 1)};
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<FieldError> validate(const Request& request, const RequestLimits& limits) {
  const auto prompt = static_cast<std::int64_t>(request.prompt.size());
  if (prompt == 0) return FieldError{"prompt", "no tokens", "at least 1 token"};
  if (prompt >= limits.max_context) {
    return FieldError{"prompt", std::to_string(prompt) + " tokens",
                      "at most " + std::to_string(limits.max_context - 1) + " tokens (context " +
                          std::to_string(limits.max_context) + ")"};
  }
  if (auto error = check_tokens("prompt", request.prompt, limits.vocabulary)) return error;
  if (request.max_tokens < 1 || request.max_tokens > limits.max_context - prompt) {
    return FieldError{"max_tokens", std::to_string(request.max_tokens),
                      range(1, limits.max_context - prompt) + " (context " + std::to_string(limits.max_context) +
                          ", prompt " + std::to_string(prompt) + " tokens)"};
  }
  if (request.min_tokens < 0 || request.min_tokens > request.max_tokens) {
    return FieldError{"min_tokens", std::to_string(request.min_tokens), range(0, request.max_tokens) + " (max_tokens)"};
  }
  if (auto error = validate(request.sampling, limits.vocabulary)) return error;
  if (request.stop_token_ids.size() > kMaxStopTokens) {
    return FieldError{"stop_token_ids", std::to_string(request.stop_token_ids.size()) + " entries",
                      "at most " + std::to_string(kMaxStopTokens)};
  }
  if (auto error = check_tokens("stop_token_ids", request.stop_token_ids, limits.vocabulary)) return error;
  if (request.stop_strings.size() > kMaxStopStrings) {
    return FieldError{"stop", std::to_string(request.stop_strings.size()) + " entries",
                      "at most " + std::to_string(kMaxStopStrings)};
  }
  for (std::size_t i = 0; i < request.stop_strings.size(); ++i) {
    const std::size_t bytes = request.stop_strings[i].size();
    if (bytes == 0 || bytes > kMaxStopStringBytes) {
      return FieldError{"stop[" + std::to_string(i) + "]", std::to_string(bytes) + " bytes",
                        range(1, kMaxStopStringBytes) + " bytes"};
    }
  }
  if (!request.stop_strings.empty() && !limits.knows_text) {
    return FieldError{"stop", std::to_string(request.stop_strings.size()) + " entries",
                      "none: this model was loaded without a tokenizer; use stop_token_ids"};
  }
  if (request.max_draft_length < -1 || request.max_draft_length > limits.max_draft_length) {
    return FieldError{"max_draft_length", std::to_string(request.max_draft_length), range(0, limits.max_draft_length)};
  }
  if (request.salt.size() > kMaxSaltBytes) {
    return FieldError{"salt", std::to_string(request.salt.size()) + " bytes",
                      "at most " + std::to_string(kMaxSaltBytes) + " bytes"};
  }
  return std::nullopt;
}

}  // namespace draftwerk
