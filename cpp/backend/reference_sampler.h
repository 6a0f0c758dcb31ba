// Choosing tokens, written for reading: full arrays, a sort, one row at a time, straight from the list in sampling.h.
// It is the specification that every backend's sampler is tested against.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/sampling.h"

namespace draftwerk {

/// Gumbel(0, 1) noise of `token` at `position`: -ln(-ln(1 - w)), w = (noise_word + 0.5) / 2^32.
float gumbel_noise(std::uint64_t seed, std::int64_t position, TokenId token);

struct ReferenceChoice {
  TokenId token = 0;
  float logprob = 0.0F;
  std::vector<TokenLogprob> top;
};

/// The token at `position`, from logits [vocabulary] and the tokens before it. `logprob` and `top` are filled if
/// sampling.logprobs asks for them.
ReferenceChoice reference_choose(std::span<const float> logits, const SamplingParams& sampling, std::int64_t position,
                                 const TokenHistory& history, std::span<const TokenId> banned);

/// The candidates of one row by its logits [vocabulary]; see Backend::propose.
std::vector<Candidate> reference_propose(std::span<const float> logits, const ProposeRow& row, int count);

/// Verifies one group, choice after choice. `logits` [drafts + 1, vocabulary] starts at the group's first row.
VerifyResult reference_verify(std::span<const float> logits, int vocabulary, const VerifyGroup& group);

}  // namespace draftwerk
