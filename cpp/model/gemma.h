// The Gemma decoder, written once against Backend.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace draftwerk {

/// Bytes that one page (kPageSize positions) takes in all layers of each type together; 0: no such layers.
struct KvPageShape {
  std::size_t page_bytes[kPageTables] = {0, 0};
};

class Gemma {
 public:
  /// Checks config and weights against each other and allocates the activations of steps of up to `max_rows` rows
  /// with up to `max_outputs` output rows. `backend` and `weights` must outlive the model.
  /// Throws std::invalid_argument naming what is missing or does not fit.
  Gemma(Backend& backend, ModelConfig config, const Weights& weights, int max_rows, int max_outputs);

  /// Enqueues one pass over the step's rows; their K/V lands in the pages, the logits of the output rows stay with
  /// the backend for verify().
  void forward(const StepRows& rows, KvArena arena);

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] KvPageShape kv_page_shape() const { return page_shape_; }
  [[nodiscard]] int max_rows() const { return max_rows_; }
  [[nodiscard]] int max_outputs() const { return max_outputs_; }
  [[nodiscard]] Backend& backend() const { return backend_; }

 private:
  struct Layer {
    LayerConfig config;
    const Weight* query;
    const Weight* key;
    const Weight* value;
    const Weight* attention_output;
    const Weight* gate;
    const Weight* up;
    const Weight* down;
    Norm input_norm;
    Norm query_norm;
    Norm key_norm;
    Norm post_attention_norm;
    Norm pre_feedforward_norm;
    Norm post_feedforward_norm;
    Rope rope;
    KvLayer kv;
  };

  void transformer_layer(const Layer& layer);
  void build_layers(const Weights& weights);
  void allocate_activations();
  const float* inverse_frequencies(const RopeConfig& rope, int head_dim);

  Backend& backend_;
  ModelConfig config_;
  int max_rows_;
  int max_outputs_;
  float embedding_scale_ = 1.0F;
  const Weight* embedding_ = nullptr;
  const Weight* head_ = nullptr;
  Norm final_norm_;
  std::vector<Layer> layers_;
  KvPageShape page_shape_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  struct RopeTable {
    double base, scaling;
    int head_dim;
    const float* inverse_frequency;
  };
  std::vector<RopeTable> rope_tables_;

  Tensor residual_;  // [rows, hidden]
  Tensor query_;     // [rows, query_heads * head_dim]
  Tensor key_;       // [rows, kv_heads * head_dim]
  Tensor value_;     // [rows, kv_heads * head_dim]
  Tensor attended_;  // [rows, query_heads * head_dim]
  Tensor gated_;     // [rows, mlp]
};

}  // namespace draftwerk
