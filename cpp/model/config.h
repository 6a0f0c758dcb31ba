// The shape of a target model, as plain data.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace draftwerk {

enum class LayerType : std::uint8_t { sliding = 0, full = 1 };

struct LayerConfig {
  LayerType type = LayerType::full;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int mlp = 0;  ///< width of the gated MLP (intermediate_size)
};

/// Rotary embedding of one layer type: frequency i is base^(-2i / head_dim) / scaling.
struct RopeConfig {
  double base = 10000.0;
  double scaling = 1.0;
};

struct ModelConfig {
  int vocabulary = 0;
  int hidden = 0;
  float norm_epsilon = 1e-6F;
  float attention_scale = 1.0F;  ///< factor of query . key
  float final_softcap = 0.0F;    ///< of the logits; 0: none
  int window = 0;                ///< positions that a row of a sliding layer sees, its own included
  std::int64_t max_positions = 0;
  RopeConfig rope[kPageTables];  ///< by LayerType
  std::vector<LayerConfig> layers;
};

/// Throws std::invalid_argument naming the field if a size is out of range or does not divide as it must.
void check(const ModelConfig& config);

}  // namespace draftwerk
