// A small Gemma 3 with random weights, and an engine around it: what the engine's tests run on.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "drafting/lookup.h"
#include "drafting/random.h"
#include "engine/engine.h"
#include "model/gemma.h"

namespace draftwerk::testing {

inline ModelConfig tiny_config() {
  ModelConfig config;
  config.vocabulary = 300;
  config.hidden = 64;
  config.attention_scale = 1.0F / std::sqrt(32.0F);
  config.window = 24;
  config.max_positions = 1024;
  config.rope[0] = {10000.0, 1.0};
  config.rope[1] = {1000000.0, 1.0};
  for (int i = 0; i < 4; ++i) {
    config.layers.push_back({i % 2 == 0 ? LayerType::sliding : LayerType::full, 4, 2, 32, 96});
  }
  return config;
}

/// Backend, weights and model; `type` is what the matrices are stored as.
class TinyModel {
 public:
  explicit TinyModel(WeightType type = WeightType::q8_0, int threads = 1, int max_rows = 128)
      : backend_(make_cpu_backend(threads)), weights_(*backend_), type_(type) {
    const ModelConfig config = tiny_config();
    // Embeddings of unit size make greedy text of a random model varied enough to tell sequences apart.
    add_matrix("model.embed_tokens", config.vocabulary, config.hidden, 1.0F);
    add_vector("model.norm", config.hidden);
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
      const LayerConfig& layer = config.layers[i];
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      const int query = layer.query_heads * layer.head_dim;
      const int kv = layer.kv_heads * layer.head_dim;
      add_matrix(prefix + "self_attn.q_proj", query, config.hidden, 0.2F);
      add_matrix(prefix + "self_attn.k_proj", kv, config.hidden, 0.2F);
      add_matrix(prefix + "self_attn.v_proj", kv, config.hidden, 0.2F);
      add_matrix(prefix + "self_attn.o_proj", config.hidden, query, 0.2F);
      add_matrix(prefix + "mlp.gate_proj", layer.mlp, config.hidden, 0.2F);
      add_matrix(prefix + "mlp.up_proj", layer.mlp, config.hidden, 0.2F);
      add_matrix(prefix + "mlp.down_proj", config.hidden, layer.mlp, 0.2F);
      for (const char* norm :
           {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}) {
        add_vector(prefix + norm, config.hidden);
      }
      add_vector(prefix + "self_attn.q_norm", layer.head_dim);
      add_vector(prefix + "self_attn.k_norm", layer.head_dim);
    }
    model_ = std::make_unique<Gemma>(*backend_, config, weights_, max_rows, max_rows);
  }

  Gemma& model() { return *model_; }

 private:
  void add_matrix(const std::string& name, int rows, int columns, float scale) {
    std::normal_distribution<float> normal(0.0F, scale);
    std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    for (float& v : values) v = normal(random_);
    weights_.create(name + ".weight", type_, rows, columns);
    weights_.upload_rows(name + ".weight", 0, rows, WeightType::f32, std::as_bytes(std::span(values)));
  }

  void add_vector(const std::string& name, int length) {
    std::uniform_real_distribution<float> uniform(0.5F, 1.5F);
    std::vector<float> values(static_cast<std::size_t>(length));
    for (float& v : values) v = uniform(random_);
    weights_.set_vector(name + ".weight", values);
  }

  std::unique_ptr<Backend> backend_;
  Weights weights_;
  WeightType type_;
  std::mt19937 random_{7};
  std::unique_ptr<Gemma> model_;
};

/// Token n of this table adds the letter 'a' + n % 26 to the text; token 0 adds nothing.
inline TokenBytes letter_bytes(int vocabulary) {
  std::vector<std::uint32_t> offsets{0};
  std::string blob;
  for (int t = 0; t < vocabulary; ++t) {
    if (t > 0) blob.push_back(static_cast<char>('a' + t % 26));
    offsets.push_back(static_cast<std::uint32_t>(blob.size()));
  }
  return {std::move(offsets), std::move(blob)};
}

inline std::unique_ptr<Drafter> make_drafter(const std::string& name, int vocabulary) {
  if (name == "lookup") return make_lookup_drafter();
  if (name == "random") return make_random_drafter(vocabulary);
  return nullptr;
}

/// What came of one request.
struct Outcome {
  std::vector<TokenId> token_ids;
  std::vector<bool> drafted;
  std::vector<float> logprobs;
  std::vector<std::vector<TokenLogprob>> top_logprobs;
  FinishReason finish_reason = FinishReason::none;
  std::int64_t text_bytes = -1;
  std::string error;
  RequestStatistics statistics;
};

/// Reads events until each of `ids` has ended; fails by throwing after a minute without one.
inline std::map<RequestId, Outcome> collect(Engine& engine, const std::vector<RequestId>& ids) {
  std::map<RequestId, Outcome> outcomes;
  std::size_t open = ids.size();
  while (open > 0) {
    const std::vector<Event> events = engine.wait_events(std::chrono::seconds(60));
    if (events.empty()) throw std::runtime_error("no event for a minute");
    for (const Event& event : events) {
      Outcome& outcome = outcomes[event.request_id];
      outcome.token_ids.insert(outcome.token_ids.end(), event.token_ids.begin(), event.token_ids.end());
      outcome.drafted.insert(outcome.drafted.end(), event.drafted.begin(), event.drafted.end());
      outcome.logprobs.insert(outcome.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      outcome.top_logprobs.insert(outcome.top_logprobs.end(), event.top_logprobs.begin(), event.top_logprobs.end());
      if (event.finish_reason == FinishReason::none) continue;
      outcome.finish_reason = event.finish_reason;
      outcome.text_bytes = event.text_bytes;
      outcome.error = event.error;
      outcome.statistics = *event.statistics;
      --open;
    }
  }
  return outcomes;
}

inline std::vector<TokenId> random_prompt(std::mt19937& random, int length, int vocabulary) {
  std::uniform_int_distribution<TokenId> token(1, vocabulary - 1);
  std::vector<TokenId> prompt(static_cast<std::size_t>(length));
  for (TokenId& t : prompt) t = token(random);
  return prompt;
}

}  // namespace draftwerk::testing
