// One request on its way through the engine.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/budget.h"
#include "drafting/drafter.h"
#include "engine/request.h"
#include "engine/stop.h"
#include "kvcache/kv_cache.h"

namespace draftwerk {

using Clock = std::chrono::steady_clock;

struct Sequence {
  RequestId id = 0;
  Request request;
  std::vector<TokenId> tokens;  ///< the prompt, then what was accepted
  std::int64_t computed = 0;    ///< positions whose K/V is valid; < length(): the newest token has none yet
  SequenceKv kv;                ///< open while running
  std::array<std::unique_ptr<DraftState>, kMaxDrafters> draft_states;  ///< by drafter
  int target_row = -1;            ///< output row that chose the last token, in step number ...
  std::int64_t target_step = -1;  ///< ... this one of the engine: its state lasts until the next pass
  SequenceAcceptance acceptance;
  std::vector<TokenId> banned;       ///< tokens that cannot be chosen before min_tokens
  std::vector<TokenId> stop_tokens;  ///< the request's and, unless ignored, the model's, ascending
  StopStringMatcher stop_strings;
  TokenHistory history;  ///< kept only if a penalty reads it
  FinishReason finish_reason = FinishReason::none;
  std::int64_t text_bytes = -1;  ///< see Event::text_bytes

  RequestStatistics statistics;
  Clock::time_point submitted;
  Clock::time_point first_token;
  bool was_scheduled = false;
  bool in_queue = true;  ///< its prompt counts towards EngineOptions::max_queued_tokens

  [[nodiscard]] std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
  [[nodiscard]] std::int64_t prompt_length() const { return static_cast<std::int64_t>(request.prompt.size()); }
  [[nodiscard]] std::int64_t generated() const { return length() - prompt_length(); }
  [[nodiscard]] std::int64_t uncomputed() const { return length() - computed; }
};

}  // namespace draftwerk
