// What it means to choose a token: the parameters and the position-keyed noise. Every backend and every drafter
// chooses by these definitions; cpp/backend/cpu/sampler.cc carries them out on the CPU.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace draftwerk {

using TokenId = std::int32_t;

/// How one sequence chooses its tokens. The order of operations for the logits l of one row is
///   1. repetition penalty over tokens of prompt and output: l > 0 ? l / r : l * r   (Keskar et al. 2019)
///   2. presence and frequency penalty over tokens of the output: l -= presence + frequency * count
///   3. logit bias: l += bias, entry by entry; banned tokens become minus infinity
///   4. temperature 0: the token of the largest l, the lowest id on a tie; done
///   5. z = min(l * (1 / temperature), FLT_MAX), in float32
///   6. top_k: keep the k largest z (ties: lower ids first); 0, or k >= vocabulary, keeps all
///   7. top_p: of what is left, sorted by z descending then id ascending, keep the tokens before which the mass is
///      less than top_p times the mass of all that is left; at least one token; 1 keeps all
///   8. min_p: keep z >= max(z) + log(min_p); 0 keeps all
///   9. the token of the largest z + gumbel(seed, position, token) among those kept, the lowest id on a tie
///      (Gumbel-max: distributed exactly as softmax(z) over the kept tokens)
/// A mass is a sum of softmax weights exp(z - max(z)), each a float32 rounded to a multiple of 2^-40, so that it is
/// exact and no order of summation need be agreed on: total as an integer T of such units, the tokens kept by top_p
/// are those with fewer than max(1, floor(top_p * T)) units before them (the product in float64).
/// gumbel = -ln(-ln(1 - w)), w = (noise_word + 0.5) / 2^32, in float32 without fused operations: the same bits on
/// every CPU. It is at most 33 ln 2 = 22.87, so tokens far below the best need no noise.
/// A NaN logit counts as minus infinity; a row of nothing but those gives token 0. Ids outside the vocabulary in the
/// history, the bias and the bans are ignored.
/// Log-probabilities reported to the user are those of log softmax of the logits before step 1, its sum over weights
/// as above; the n most probable tokens are those of the n largest logits, in that order, lower ids first on a tie.
struct SamplingParams {
  float temperature = 0.0F;
  std::int32_t top_k = 0;
  float top_p = 1.0F;
  float min_p = 0.0F;
  float repetition_penalty = 1.0F;
  float presence_penalty = 0.0F;
  float frequency_penalty = 0.0F;
  std::uint64_t seed = 0;
  std::vector<std::pair<TokenId, float>> logit_bias;
  /// -1: no log-probabilities; n >= 0: that of the chosen token and of the n most probable tokens.
  std::int32_t logprobs = -1;

  [[nodiscard]] bool needs_history() const {
    return repetition_penalty != 1.0F || presence_penalty != 0.0F || frequency_penalty != 0.0F;
  }
};

/// How often each token occurred so far in one sequence; what the penalties read.
struct TokenCount {
  bool in_prompt = false;
  std::int32_t in_output = 0;
};
using TokenHistory = std::unordered_map<TokenId, TokenCount>;

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0.0F;
};

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit words from
/// a 128-bit counter and a 64-bit key.
struct PhiloxWords {
  std::uint32_t word[4];
};

constexpr PhiloxWords philox4x32(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                 std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ULL * c0;
    const std::uint64_t p1 = 0xCD9E8D57ULL * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {{c0, c1, c2, c3}};
}

/// The random word that keys the noise of `token` at absolute position `position` under `seed`: word token % 4 of
/// the Philox block with counter (position low, position high, token / 4, 0) and the seed as key.
constexpr std::uint32_t noise_word(std::uint64_t seed, std::int64_t position, TokenId token) {
  const auto p = static_cast<std::uint64_t>(position);
  const auto v = static_cast<std::uint32_t>(token);
  return philox4x32(static_cast<std::uint32_t>(p), static_cast<std::uint32_t>(p >> 32), v / 4, 0,
                    static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32))
      .word[v % 4];
}

}  // namespace draftwerk
