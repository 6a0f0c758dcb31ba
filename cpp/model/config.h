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
  int mlp = 0;                ///< width of the gated MLP (intermediate_size)
  bool shares_kv = false;     ///< has no K/V of its own: reads those of the last layer of its type that has
  bool key_is_value = false;  ///< no value projection: the values are the projected keys
};

/// Rotary embedding of one layer type: frequency i is base^(-2i / head_dim) / scaling for the first `rotated` share of
/// the head_dim / 2 pairs and 0 for the others, which stay as they are.
struct RopeConfig {
  double base = 10000.0;
  double scaling = 1.0;
  double rotated = 1.0;
};

/// Mixture of experts beside the MLP of every layer; no experts: none.
struct ExpertConfig {
  int count = 0;
  int chosen = 0;  ///< per row
  int mlp = 0;     ///< width of one expert
};

struct ModelConfig {
  int vocabulary = 0;
  int hidden = 0;
  float norm_epsilon = 1e-6F;
  float attention_scale = 1.0F;  ///< factor of query . key
  float final_softcap = 0.0F;    ///< of the logits; 0: none
  int window = 0;                ///< positions that a row of a sliding layer sees, its own included
  std::int64_t max_positions = 0;
  bool value_norm = false;     ///< values are normalised per head, without a scale
  bool layer_scalars = false;  ///< every layer's output is multiplied by a number of its own
  int per_layer_width = 0;     ///< of the per-layer embeddings (hidden_size_per_layer_input); 0: none
  int per_layer_vocabulary = 0;
  ExpertConfig experts;
  RopeConfig rope[kPageTables];  ///< by LayerType
  std::vector<LayerConfig> layers;
};

/// Throws std::invalid_argument naming the field if a size is out of range or does not divide as it must.
void check(const ModelConfig& config);

/// The multi-token-prediction drafter of a target: a few layers that own no K/V and read the target's.
struct MtpConfig {
  ModelConfig text;          ///< its layers all share K/V; per-layer embeddings and experts it has none
  int target_hidden = 0;     ///< hidden size of the target that it was made for (backbone_hidden_size)
  int clusters = 0;          ///< of the head's tokens, which it scores first (num_centroids); 0: it scores every token
  int chosen_clusters = 0;   ///< whose tokens get logits (centroid_intermediate_top_k)
  int draft_vocabulary = 0;  ///< tokens of a head made of rows of the target's (draft_vocab_size); 0: one of its own

  /// Rows of the head.
  [[nodiscard]] int head_tokens() const { return draft_vocabulary > 0 ? draft_vocabulary : text.vocabulary; }
};

void check(const MtpConfig& config);

}  // namespace draftwerk
