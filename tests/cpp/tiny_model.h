// Small Gemmas with random weights, and engines around them: what the engine's tests run on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "drafting/lookup.h"
#include "drafting/mtp.h"
#include "drafting/random.h"
#include "engine/engine.h"
#include "model/gemma.h"
#include "model/mtp.h"
#include "test_backend.h"

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

/// One small model of each kind of Gemma 4: what its sizes have in miniature.
inline ModelConfig tiny_gemma4_base(int layers) {
  ModelConfig config = tiny_config();
  config.attention_scale = 1.0F;
  config.final_softcap = 30.0F;
  config.value_norm = true;
  config.layer_scalars = true;
  config.rope[1] = {1000000.0, 1.0, 0.25};
  config.layers.clear();
  for (int i = 0; i < layers; ++i) {
    const bool full = i % 2 == 1;
    config.layers.push_back({full ? LayerType::full : LayerType::sliding, 4, full ? 1 : 2, full ? 64 : 32, 96});
  }
  return config;
}

/// E2B and E4B: per-layer embeddings, layers that share K/V, with MLPs of twice the width.
inline ModelConfig tiny_edge_config() {
  ModelConfig config = tiny_gemma4_base(6);
  config.per_layer_width = 32;
  config.per_layer_vocabulary = config.vocabulary;
  for (std::size_t i = 4; i < 6; ++i) {
    config.layers[i].shares_kv = true;
    config.layers[i].mlp *= 2;
  }
  return config;
}

/// 12B and 31B: the values of full layers are their keys.
inline ModelConfig tiny_dense_config() {
  ModelConfig config = tiny_gemma4_base(4);
  for (LayerConfig& layer : config.layers) layer.key_is_value = layer.type == LayerType::full;
  return config;
}

/// 26B-A4B: the same with experts.
inline ModelConfig tiny_experts_config() {
  ModelConfig config = tiny_dense_config();
  config.experts = {8, 2, 32};
  return config;
}

/// A drafter of two layers for a target of any of these shapes, with a head of its own or, if there is a draft
/// vocabulary, by the target's.
inline MtpConfig tiny_mtp_config(const ModelConfig& target, int clusters, int draft_vocabulary = 0) {
  MtpConfig config;
  config.text = tiny_gemma4_base(2);
  config.text.hidden = 32;
  config.text.layers = {target.layers[0], target.layers[1]};
  for (LayerConfig& layer : config.text.layers) {
    layer.shares_kv = true;
    layer.key_is_value = false;
    layer.mlp = 64;
  }
  config.target_hidden = target.hidden;
  config.clusters = clusters;
  config.chosen_clusters = clusters > 0 ? std::max(clusters / 5, 1) : 0;
  config.draft_vocabulary = draft_vocabulary;
  return config;
}

/// Random tensors of the names and shapes that a config asks for.
class TensorMaker {
 public:
  TensorMaker(Weights& weights, WeightType type, unsigned seed) : weights_(weights), type_(type), random_(seed) {}

  void target(const ModelConfig& config) {
    // Embeddings of unit size make greedy text of a random model varied enough to tell sequences apart.
    matrix("model.embed_tokens.weight", config.vocabulary, config.hidden, 1.0F);
    vector("model.norm.weight", config.hidden);
    const int per_layer = config.per_layer_width * static_cast<int>(config.layers.size());
    if (per_layer > 0) {
      matrix("model.per_layer_model_projection.weight", per_layer, config.hidden, 0.2F);
      vector("model.per_layer_projection_norm.weight", config.per_layer_width);
      auto table = std::make_shared<std::vector<float>>(normal(config.per_layer_vocabulary * per_layer, 0.3F));
      weights_.map_table("model.embed_tokens_per_layer.weight", WeightType::f32, config.per_layer_vocabulary, per_layer,
                         std::as_bytes(std::span(*table)), table);
    }
    layers(config);
  }

  void drafter(const MtpConfig& config) {
    const ModelConfig& text = config.text;
    matrix("pre_projection.weight", text.hidden, 2 * config.target_hidden, 0.2F);
    matrix("post_projection.weight", config.target_hidden, text.hidden, 0.2F);
    const bool reduced = config.draft_vocabulary > 0;
    const int scored = reduced ? config.target_hidden : text.hidden;
    matrix("lm_head.weight", config.head_tokens(), scored, 1.0F);
    vector("model.norm.weight", text.hidden);
    if (config.clusters > 0) matrix("masked_embedding.centroids.weight", config.clusters, scored, 1.0F);
    if (reduced || config.clusters > 0) {
      std::vector<std::int32_t> order(static_cast<std::size_t>(text.vocabulary));
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random_);
      order.resize(static_cast<std::size_t>(config.head_tokens()));
      weights_.set_indices(reduced ? "draft_token_ids" : "masked_embedding.token_ordering", order);
    }
    layers(text);
  }

 private:
  /// What attention adds to a row, in units of what each MLP does. At 1 hardly a token depends on which keys and values
  /// were read: tests of whole texts then pass with those of another sequence.
  static constexpr float kAttention = 8.0F;

  void layers(const ModelConfig& config) {
    const int hidden = config.hidden;
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
      const LayerConfig& layer = config.layers[i];
      prefix_ = "model.layers." + std::to_string(i) + ".";
      const int query = layer.query_heads * layer.head_dim;
      const int kv = layer.kv_heads * layer.head_dim;
      matrix("self_attn.q_proj.weight", query, hidden, 0.2F);
      vector("self_attn.q_norm.weight", layer.head_dim);
      if (!layer.shares_kv) {
        matrix("self_attn.k_proj.weight", kv, hidden, 0.2F);
        vector("self_attn.k_norm.weight", layer.head_dim);
        if (!layer.key_is_value) matrix("self_attn.v_proj.weight", kv, hidden, 0.2F);
      }
      matrix("self_attn.o_proj.weight", hidden, query, 0.2F);
      matrix("mlp.gate_proj.weight", layer.mlp, hidden, 0.2F);
      matrix("mlp.up_proj.weight", layer.mlp, hidden, 0.2F);
      matrix("mlp.down_proj.weight", hidden, layer.mlp, 0.2F);
      for (const char* norm :
           {"input_layernorm.weight", "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}) {
        vector(norm, hidden);
      }
      vector("post_attention_layernorm.weight", hidden, kAttention);
      if (config.layer_scalars) vector("layer_scalar", 1);
      if (config.per_layer_width > 0) {
        matrix("per_layer_input_gate.weight", config.per_layer_width, hidden, 0.2F);
        matrix("per_layer_projection.weight", hidden, config.per_layer_width, 0.2F);
        vector("post_per_layer_input_norm.weight", hidden);
      }
      if (config.experts.count > 0) experts(config);
    }
    prefix_.clear();
  }

  void experts(const ModelConfig& config) {
    const ExpertConfig& e = config.experts;
    matrix("router.proj.weight", e.count, config.hidden, 1.0F);
    vector("router.scale", config.hidden);
    vector("router.per_expert_scale", e.count);
    matrix("experts.gate_up_proj", e.count * 2 * e.mlp, config.hidden, 0.2F);
    matrix("experts.down_proj", e.count * config.hidden, e.mlp, 0.2F);
    vector("pre_feedforward_layernorm_2.weight", config.hidden);
    vector("post_feedforward_layernorm_1.weight", config.hidden);
    vector("post_feedforward_layernorm_2.weight", config.hidden);
  }

  std::vector<float> normal(int count, float scale) {
    std::normal_distribution<float> distribution(0.0F, scale);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = distribution(random_);
    return values;
  }

  void matrix(const char* name, int rows, int columns, float scale) {
    const std::vector<float> values = normal(rows * columns, scale);
    weights_.create(prefix_ + name, type_, rows, columns);
    weights_.upload_rows(prefix_ + name, 0, rows, WeightType::f32, std::as_bytes(std::span(values)));
  }

  void vector(const char* name, int length, float scale = 1.0F) {
    std::uniform_real_distribution<float> uniform(0.5F, 1.5F);
    std::vector<float> values(static_cast<std::size_t>(length));
    for (float& v : values) v = scale * uniform(random_);
    weights_.set_vector(prefix_ + name, values);
  }

  Weights& weights_;
  WeightType type_;
  std::mt19937 random_;
  std::string prefix_;
};

/// Backend, weights, model and, for tests of it, an MTP drafter; `type` is what the matrices are stored as.
class TinyModel {
 public:
  explicit TinyModel(WeightType type = WeightType::q8_0, int threads = 1, int max_rows = 128,
                     const ModelConfig& config = tiny_config())
      : backend_(make_test_backend(threads)), weights_(*backend_), drafter_weights_(*backend_), type_(type) {
    TensorMaker(weights_, type, 7).target(config);
    model_ = std::make_unique<Gemma>(*backend_, config, weights_, max_rows, max_rows);
  }

  Gemma& model() { return *model_; }
  [[nodiscard]] const Backend& backend() const { return *backend_; }

  /// The model's drafter, made at the first call.
  MtpModel& mtp(int clusters = 0, int draft_vocabulary = 0) {
    if (mtp_ == nullptr) {
      const MtpConfig config = tiny_mtp_config(model_->config(), clusters, draft_vocabulary);
      TensorMaker(drafter_weights_, type_, 8).drafter(config);
      mtp_ = std::make_unique<MtpModel>(*model_, config, drafter_weights_);
    }
    return *mtp_;
  }

  /// "none", or names joined by '+'.
  std::vector<std::unique_ptr<Drafter>> drafters(const std::string& names, int clusters = 0, int draft_vocabulary = 0) {
    std::vector<std::unique_ptr<Drafter>> made;
    if (names.find("mtp") != std::string::npos) made.push_back(make_mtp_drafter(mtp(clusters, draft_vocabulary)));
    if (names.find("lookup") != std::string::npos) made.push_back(make_lookup_drafter());
    if (names.find("random") != std::string::npos) made.push_back(make_random_drafter(model_->config().vocabulary));
    return made;
  }

 private:
  std::unique_ptr<Backend> backend_;
  Weights weights_;
  Weights drafter_weights_;
  WeightType type_;
  std::unique_ptr<Gemma> model_;
  std::unique_ptr<MtpModel> mtp_;
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
