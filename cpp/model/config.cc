#include "model/config.h"

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

}  // namespace

void check(const ModelConfig& config) {
  require_in("vocab_size", config.vocabulary, 1, 1 << 24);
  require_in("hidden_size", config.hidden, 1, 1 << 16);
  require_in("max_position_embeddings", config.max_positions, 1, std::int64_t{1} << 24);
  require_in("number of layers", static_cast<std::int64_t>(config.layers.size()), 1, 1024);
  for (const LayerConfig& layer : config.layers) {
    require_in("num_attention_heads", layer.query_heads, 1, 1024);
    require_in("num_key_value_heads", layer.kv_heads, 1, 1024);
    require(layer.query_heads % layer.kv_heads == 0, "num_attention_heads " + std::to_string(layer.query_heads) +
                                                         " is not a multiple of num_key_value_heads " +
                                                         std::to_string(layer.kv_heads));
    require_in("head_dim", layer.head_dim, 16, 1024);
    require(layer.head_dim % 32 == 0, "head_dim is " + std::to_string(layer.head_dim) + ", must be a multiple of 32");
    require_in("intermediate_size", layer.mlp, 1, 1 << 20);
    if (layer.type == LayerType::sliding) require_in("sliding_window", config.window, 1, 1 << 24);
  }
  for (const RopeConfig& rope : config.rope) {
    require(rope.base > 0.0 && rope.scaling > 0.0, "RoPE base and scaling must be positive");
  }
}

}  // namespace draftwerk
