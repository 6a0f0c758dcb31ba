#include "model/config.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace draftwerk {
namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument("model config: " + what);
}

void require_in(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  require(value >= low && value <= high, std::string(field) + " is " + std::to_string(value) + ", must be " +
                                             std::to_string(low) + " to " + std::to_string(high));
}

void check_layers(const ModelConfig& config) {
  bool owned[kPageTables] = {false, false};
  for (const LayerConfig& layer : config.layers) {
    require_in("num_attention_heads", layer.query_heads, 1, 1024);
    require_in("num_key_value_heads", layer.kv_heads, 1, 1024);
    require(layer.query_heads % layer.kv_heads == 0, "num_attention_heads " + std::to_string(layer.query_heads) +
                                                         " is not a multiple of num_key_value_heads " +
                                                         std::to_string(layer.kv_heads));
    require_in("head_dim", layer.head_dim, 16, 512);
    require(layer.head_dim % 32 == 0, "head_dim is " + std::to_string(layer.head_dim) + ", must be a multiple of 32");
    require_in("intermediate_size", layer.mlp, 1, 1 << 20);
    if (layer.type == LayerType::sliding) require_in("sliding_window", config.window, 1, 1 << 24);
    owned[static_cast<int>(layer.type)] |= !layer.shares_kv;
  }
  for (const RopeConfig& rope : config.rope) {
    require(rope.base > 0.0 && rope.scaling > 0.0, "RoPE base and scaling must be positive");
    require(rope.rotated >= 0.0 && rope.rotated <= 1.0, "partial_rotary_factor must be 0 to 1");
  }
  const bool any_owned = owned[0] || owned[1];
  for (const LayerConfig& layer : config.layers) {
    require(!any_owned || owned[static_cast<int>(layer.type)],
            std::string("num_kv_shared_layers leaves no ") + (layer.type == LayerType::sliding ? "sliding" : "full") +
                " layer with keys and values of its own");
  }
}

void check_sizes(const ModelConfig& config) {
  require_in("vocab_size", config.vocabulary, 1, 1 << 24);
  require_in("hidden_size", config.hidden, 1, 1 << 16);
  require_in("max_position_embeddings", config.max_positions, 1, std::int64_t{1} << 24);
  require_in("number of layers", static_cast<std::int64_t>(config.layers.size()), 1, 1024);
  require_in("hidden_size_per_layer_input", config.per_layer_width, 0, 1 << 12);
  if (config.per_layer_width > 0) {
    require_in("vocab_size_per_layer_input", config.per_layer_vocabulary, config.vocabulary, 1 << 24);
  }
  const ExpertConfig& experts = config.experts;
  require_in("num_experts", experts.count, 0, 1 << 12);
  if (experts.count == 0) return;
  require_in("top_k_experts", experts.chosen, 1, std::min(experts.count, 64));
  require_in("moe_intermediate_size", experts.mlp, 16, 1 << 16);
  // The experts of a layer lie one below the other in one matrix, in groups of 16 rows.
  require(experts.mlp % 16 == 0 && config.hidden % 16 == 0, "moe_intermediate_size (" + std::to_string(experts.mlp) +
                                                                ") and hidden_size (" + std::to_string(config.hidden) +
                                                                ") must be multiples of 16 in a mixture of experts");
}

}  // namespace

void check(const ModelConfig& config) {
  check_sizes(config);
  check_layers(config);
  require(!config.layers.front().shares_kv, "num_kv_shared_layers leaves no layer with keys and values of its own");
}

void check(const MtpConfig& config) {
  check_sizes(config.text);
  check_layers(config.text);
  require_in("backbone_hidden_size", config.target_hidden, 1, 1 << 16);
  require(config.text.per_layer_width == 0 && config.text.experts.count == 0,
          "a drafter has no per-layer embeddings and no experts");
  for (const LayerConfig& layer : config.text.layers) {
    require(layer.shares_kv, "num_kv_shared_layers must be the number of layers in a drafter");
  }
  require_in("draft_vocab_size", config.draft_vocabulary, 0, config.text.vocabulary);
  const int tokens = config.head_tokens();
  require_in("num_centroids", config.clusters, 0, tokens);
  if (config.clusters == 0) return;
  require(tokens % config.clusters == 0,
          std::string(config.draft_vocabulary > 0 ? "draft_vocab_size (" : "vocab_size (") + std::to_string(tokens) +
              ") is not a multiple of num_centroids (" + std::to_string(config.clusters) + ")");
  require_in("centroid_intermediate_top_k", config.chosen_clusters, 1, config.clusters);
}

}  // namespace draftwerk
