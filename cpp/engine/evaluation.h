// The target outside the engine: logits of a given text, and the time of one pass. For evaluation and benchmarks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/gemma.h"

namespace draftwerk {

/// Logits of every position of `tokens`, [tokens.size(), vocabulary] float32 in `out`, computed in chunks of `chunk`
/// rows (0, or more than the model takes: as many as it takes). Throws std::invalid_argument if a token or the length
/// is out of range. The model must not be in use by an engine.
void score(Gemma& model, std::span<const TokenId> tokens, int chunk, std::span<float> out);

/// Seconds of each of `repeats` passes over `rows` rows of one sequence that already holds `context` positions,
/// logits and greedy verification of all rows included. With `rows` above the model's outputs, only the last row has
/// logits, as in prefill. Throws std::invalid_argument for sizes out of range.
std::vector<double> time_passes(Gemma& model, int rows, int repeats, int context);

}  // namespace draftwerk
