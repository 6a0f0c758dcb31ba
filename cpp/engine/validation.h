// What a request may ask for. Checked before it reaches the engine thread, all but whether it fits into the KV memory,
// which Engine::submit asks the cache.
#pragma once

#include <cstdint>
#include <optional>

#include "backend/sampling_validation.h"
#include "engine/request.h"

namespace draftwerk {

/// What the model and the engine's options allow.
struct RequestLimits {
  int vocabulary = 0;
  std::int64_t max_context = 0;  ///< prompt and output tokens together
  int max_draft_length = 0;
  bool knows_text = false;  ///< token bytes are there, so stop strings can be matched
};

/// The first thing wrong with `request`, or nothing.
std::optional<FieldError> validate(const Request& request, const RequestLimits& limits);

}  // namespace draftwerk
