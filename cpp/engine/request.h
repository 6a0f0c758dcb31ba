// What a caller asks of the engine and what it gets back: plain records.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backend/sampling.h"

namespace draftwerk {

using RequestId = std::int64_t;
using ConversationId = std::int64_t;  ///< 0: none

struct Request {
  std::vector<TokenId> prompt;  ///< at least one token
  std::int64_t max_tokens = 256;
  /// The first min_tokens tokens are none that would end the sequence, and a stop string that is complete before the
  /// last of them does not end it.
  std::int64_t min_tokens = 0;
  SamplingParams sampling;
  std::vector<TokenId> stop_token_ids;    ///< end the sequence; part of its token ids, not of its text
  std::vector<std::string> stop_strings;  ///< bytes; the text ends before the first one
  bool ignore_eos = false;                ///< the model's end tokens do not end the sequence
  bool drafting = true;
  std::int32_t max_draft_length = -1;  ///< most drafts per step; -1: the engine's own limit
  std::string salt;                    ///< only requests with the same salt share cached prefixes
  /// At its end the request leaves its K/V to this conversation, and it starts from what the request before left, if
  /// its prompt begins with those tokens and goes on, and the salt is the same. Never changes a token. 0: none; a
  /// closed one is as good as none.
  ConversationId conversation = 0;
  bool continues = false;  ///< goes on with what was accepted before: the queue takes it even when it is full
};

enum class FinishReason : std::uint8_t { none, stop, length, cancelled, error };
const char* finish_reason_name(FinishReason reason);

/// What one request cost and how its drafts fared.
struct RequestStatistics {
  std::int64_t prompt_tokens = 0;
  std::int64_t cached_tokens = 0;  ///< prompt tokens whose K/V was there when first scheduled
  std::int64_t generated_tokens = 0;
  std::int64_t steps = 0;  ///< passes of the target that chose tokens for it
  std::int64_t drafted = 0;
  std::int64_t accepted = 0;
  std::int64_t preemptions = 0;
  std::vector<std::int64_t> drafted_by_position;   ///< [i]: steps that drafted more than i tokens ahead
  std::vector<std::int64_t> accepted_by_position;  ///< [i]: steps that accepted more than i drafts
  double queue_seconds = 0.0;                      ///< submit to first scheduled
  double time_to_first_token_seconds = 0.0;        ///< submit to first token; 0 if there was none
  double decode_seconds = 0.0;                     ///< first token to the end; 0 if there was none
};

/// New tokens of one request in one step, or its end. A request's last event has a finish reason.
struct Event {
  RequestId request_id = 0;
  std::vector<TokenId> token_ids;
  std::vector<bool> drafted;  ///< per token: proposed by the drafter and accepted
  std::vector<float> logprobs;
  std::vector<std::vector<TokenLogprob>> top_logprobs;
  std::int64_t position = 0;  ///< absolute position of the first token in this event, or of the next one if it has none
  FinishReason finish_reason = FinishReason::none;
  std::string error;                            ///< with FinishReason::error
  std::int64_t text_bytes = -1;                 ///< after a stop string: bytes of the output's text to keep; else -1
  std::optional<RequestStatistics> statistics;  ///< with a finish reason
};

}  // namespace draftwerk
