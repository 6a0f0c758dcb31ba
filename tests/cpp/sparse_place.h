// Random places to draft at, for tests of choosing among the tokens of a sparse head.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "backend/backend.h"

namespace draftwerk::testing {

/// What a ProposeRow refers to. Tokens that are banned may lie outside of the vocabulary.
struct SparsePlace {
  SparsePlace(std::mt19937& random, int vocabulary, int head_rows, std::int64_t position) : position(position) {
    const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    if (below(3) != 0) sampling.temperature = 0.25F * static_cast<float>(1 + below(12));
    if (below(2) != 0) sampling.top_k = 1 + below(2 * head_rows);
    if (below(3) == 0) sampling.top_p = 0.05F * static_cast<float>(1 + below(19));
    if (below(4) == 0) sampling.min_p = 0.1F;
    if (below(3) == 0) sampling.repetition_penalty = 1.5F;
    if (below(3) == 0) sampling.presence_penalty = 1.0F;
    if (below(3) == 0) sampling.frequency_penalty = 0.5F;
    sampling.seed = random();
    for (int i = below(4); i > 0; --i) sampling.logit_bias.emplace_back(below(vocabulary), 2.0F);
    for (int i = below(100); i > 0; --i) history[below(vocabulary)] = {i % 2 == 0, i % 3};
    for (int i = below(4); i > 0; --i) drafts.push_back(below(vocabulary));
    for (int i = below(20); i > 0; --i) banned.push_back(below(vocabulary + 20) - 10);
    banned_tokens = below(5);
  }
  [[nodiscard]] ProposeRow row() const { return {drafts, position, &sampling, &history, banned, banned_tokens}; }

  SamplingParams sampling;
  TokenHistory history;
  std::vector<TokenId> drafts;
  std::vector<TokenId> banned;
  int banned_tokens = 0;
  std::int64_t position;
};

}  // namespace draftwerk::testing
