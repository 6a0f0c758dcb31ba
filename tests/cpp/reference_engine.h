// The specification of the engine's tests, a request alone in an engine that keeps nothing, and what they compare with
// it.
#pragma once

#include <gtest/gtest.h>

#include <utility>

#include "tiny_model.h"

namespace draftwerk::testing {

using Tokens = std::vector<TokenId>;

// A page of tiny_config() takes 16 positions * 2 heads * 32 values * 2 (K, V) * 2 layers = 4096 values per layer type,
// so kTight is a few sequences' worth.
constexpr std::size_t kTight = std::size_t{330} << 10;
constexpr std::size_t kPlenty = std::size_t{16} << 20;

/// As by default, in no more memory than such texts take: an emulated device fills all of it at the start.
inline EngineOptions small_options() {
  EngineOptions options;
  options.kv_memory_bytes = kPlenty;
  return options;
}

/// The smallest with layers of both types, for what is up to the engine more than to the model.
class SmallModel : public TinyModel {
 public:
  SmallModel() : TinyModel(WeightType::q8_0, 1, 128, config()) {}
  /// 16 positions * 32 values * 2 (K, V) of 2 bytes, for each layer type.
  static constexpr std::size_t kPage = std::size_t{2} << 10;

 private:
  static ModelConfig config() {
    ModelConfig config = tiny_config();
    config.hidden = 32;
    config.attention_scale = 1.0F;  // few positions have most of a row's attention, so that each of them matters
    config.layers = {{LayerType::sliding, 2, 1, 32, 32}, {LayerType::full, 2, 1, 32, 32}};
    return config;
  }
};

inline Request make_request(Tokens prompt, std::int64_t max_tokens, std::uint64_t seed = 0) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.sampling.seed = seed;
  request.sampling.temperature = 1.0F;
  return request;
}

inline Tokens random_tokens(int length, unsigned seed) {
  std::mt19937 random(seed);
  return random_prompt(random, length, 300);
}

inline Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline Outcome run(Engine& engine, const Request& request) {
  const RequestId id = engine.submit(request);
  return collect(engine, {id})[id];
}

/// All at once; each has to end at its max_tokens.
inline std::vector<Tokens> run_all(Engine& engine, const std::vector<Request>& requests) {
  std::vector<RequestId> ids;
  ids.reserve(requests.size());
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  auto outcomes = collect(engine, ids);
  std::vector<Tokens> tokens;
  for (const RequestId id : ids) {
    EXPECT_EQ(outcomes[id].finish_reason, FinishReason::length) << outcomes[id].error;
    tokens.push_back(outcomes[id].token_ids);
  }
  return tokens;
}

/// The specification: the same request alone, in an engine of a SmallModel that keeps nothing.
class Reference {
 public:
  Tokens operator()(Request request) {
    request.conversation = 0;
    return run(engine_, request).token_ids;
  }

 private:
  static EngineOptions options() {
    EngineOptions options = small_options();
    options.prefix_cache = false;
    return options;
  }
  SmallModel small_;
  Engine engine_{small_.model(), options(), {}, {}};
};

/// Every sequence has ended and nothing is parked: only the prefix cache may have pages.
inline void expect_nothing_left(Engine& engine) {
  engine.close();
  const EngineStatistics s = engine.statistics();
  EXPECT_EQ(s.running + s.waiting + s.paused + s.conversations, 0);
  EXPECT_EQ(s.finished, s.requests);
  EXPECT_EQ(s.queued_tokens, 0);
  EXPECT_EQ(s.parked_bytes, 0U);
  EXPECT_EQ(s.kv.sequences, 0);
  EXPECT_EQ(s.kv.used_bytes, s.kv.cached_bytes);
}

}  // namespace draftwerk::testing
