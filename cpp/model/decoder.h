// The decoder layers of a Gemma, of a target or of its drafter, written once against Backend.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace draftwerk {

/// Bytes that one page (kPageSize positions) takes in all layers of each type together; 0: no such layers.
struct KvPageShape {
  std::size_t page_bytes[kPageTables] = {0, 0};
};

/// The layer of each type whose K/V the layers without their own read: the last one of that type that has some.
/// heads is 0 where there is none.
using SharedKv = std::array<KvLayer, kPageTables>;

/// A range of a tensor's columns, in place.
[[nodiscard]] Tensor columns_of(const Backend& backend, Tensor tensor, int first, int count);

class Decoder {
 public:
  /// Finds the layers' tensors and allocates the activations of steps of up to `max_rows` rows. `config` has been
  /// checked and, like `backend` and `weights`, outlives the decoder.
  /// Throws std::invalid_argument naming what is missing or does not fit.
  Decoder(Backend& backend, const ModelConfig& config, const Weights& weights, KvType kv_type, int max_rows);
  /// The same for layers that own no K/V at all and read a target's, at the positions before their own. `reach`: how
  /// many of these a row of a sliding layer sees.
  Decoder(Backend& backend, const ModelConfig& config, const Weights& weights, const SharedKv& target, int reach,
          int max_rows);

  /// residual [rows, hidden] goes through all layers; `per_layer` [rows, layers * per_layer_width] are the layers' own
  /// inputs, if they have any.
  void forward(Tensor residual, Tensor per_layer);
  /// Moves the keys and values of all layers that own some.
  void move_kv(std::span<const KvMove> moves);

  [[nodiscard]] KvPageShape page_shape() const { return page_shape_; }
  [[nodiscard]] const SharedKv& shared_kv() const { return shared_kv_; }
  /// The widest input or output of a projection, for Backend::reserve.
  [[nodiscard]] int widest() const { return widest_; }

 private:
  struct Layer {
    LayerConfig config;
    Visibility sees;
    Rope rope;
    KvLayer kv;
    float output_scale = 1.0F;

    Norm input_norm;
    const Weight* query = nullptr;
    const Weight* key = nullptr;    // null where K/V is another layer's
    const Weight* value = nullptr;  // null there, and where the values are the keys
    Norm query_norm;
    Norm key_norm;
    Norm value_norm;
    const Weight* attention_output = nullptr;
    Norm post_attention_norm;

    Norm pre_feedforward_norm;
    const Weight* gate = nullptr;
    const Weight* up = nullptr;
    const Weight* down = nullptr;
    Norm post_feedforward_norm;

    Router router;
    Experts experts;
    Norm pre_experts_norm;
    Norm post_experts_norm;
    Norm post_mlp_norm;

    const Weight* per_layer_gate = nullptr;
    const Weight* per_layer_projection = nullptr;
    Norm post_per_layer_norm;
  };
  class TensorsOfLayer;

  void attention(const Layer& layer, Tensor residual);
  void feed_forward(const Layer& layer, Tensor residual);
  void add_per_layer(const Layer& layer, Tensor per_layer, Tensor residual);

  void build(const Weights& weights);
  void place_kv(Layer& layer, KvType kv_type);
  void find_attention(Layer& layer, const TensorsOfLayer& tensors);
  void find_feed_forward(Layer& layer, const TensorsOfLayer& tensors);
  void find_experts(Layer& layer, const TensorsOfLayer& tensors);
  void allocate_activations(int max_rows);
  const float* inverse_frequencies(const RopeConfig& rope, int head_dim);
  const float* constants(std::span<const float> values);

  Backend& backend_;
  const ModelConfig& config_;
  std::vector<Layer> layers_;
  std::vector<KvLayer> own_kv_;  // of the layers that own some
  SharedKv shared_kv_{};
  KvPageShape page_shape_;
  int widest_ = 0;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  const float* ones_ = nullptr;  // scale of the norms that have none
  struct RopeTable {
    RopeConfig rope;
    int head_dim;
    const float* inverse_frequency;
  };
  std::vector<RopeTable> rope_tables_;

  Tensor query_;      // [rows, query_heads * head_dim]
  Tensor key_;        // [rows, kv_heads * head_dim]
  Tensor value_;      // [rows, kv_heads * head_dim]
  Tensor attended_;   // [rows, query_heads * head_dim]
  Tensor gated_;      // [rows, mlp]
  Tensor mlp_;        // [rows, hidden], beside experts
  Tensor mixed_;      // [rows, hidden], of the experts
  Tensor per_layer_;  // [rows, per_layer_width], gated
};

}  // namespace draftwerk
