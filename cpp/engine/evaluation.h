// Target and drafter outside the engine: logits of a given text, drafts after it, and the time of one pass. For
// evaluation and benchmarks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/gemma.h"
#include "model/mtp.h"

namespace draftwerk {

/// Logits of every position of `tokens`, [tokens.size(), vocabulary] float32 in `out`, computed in chunks of `chunk`
/// rows (0, or more than the model takes: as many as it takes). Throws std::invalid_argument if a token or the length
/// is out of range. The model must not be in use by an engine.
void score(Gemma& model, std::span<const TokenId> tokens, int chunk, std::span<float> out);

/// Some tokens that the model has written by itself, sampled: what there is to choose in them takes as long as it does
/// in text. The model must not be in use by an engine.
std::vector<TokenId> written_text(Gemma& model);

/// Seconds of each of `repeats` passes over `rows` rows of one sequence that already holds `context` positions, all of
/// them of `text` over and over; logits and greedy verification of all rows included. With `rows` above the model's
/// outputs, only the last row has logits, as in prefill. Throws std::invalid_argument for sizes out of range.
std::vector<double> time_passes(Gemma& model, std::span<const TokenId> text, int rows, int repeats, int context);

/// One round of drafting.
struct DraftRound {
  std::vector<TokenId> tokens;
  std::vector<float> logits;  ///< [drafts, vocabulary]: what each draft was chosen from
};

/// `count` drafts after `tokens`, whose last one is the newest known token: the target computes all before it, in
/// chunks of `chunk` rows (0: as many as it takes), the drafter goes on from there. Throws std::invalid_argument if
/// there are fewer than two tokens, or one or the length is out of range. Neither model may be in use by an engine.
DraftRound draft(MtpModel& model, std::span<const TokenId> tokens, int count, const SamplingParams& sampling,
                 int chunk);

/// Seconds of each of `repeats` rounds of `count` drafts for each of `sequences` sequences that share `context`
/// positions of K/V, of `text` over and over. Throws std::invalid_argument for sizes out of range.
std::vector<double> time_drafts(MtpModel& model, std::span<const TokenId> text, int sequences, int count, int repeats,
                                int context);

}  // namespace draftwerk
