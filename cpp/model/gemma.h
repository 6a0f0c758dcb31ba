// The target: a Gemma from token ids to logits, written once against Backend.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/weights.h"

namespace draftwerk {

class Gemma {
 public:
  /// Checks config and weights against each other and allocates the activations of steps of up to `max_rows` rows
  /// with up to `max_outputs` output rows. `backend` and `weights` must outlive the model.
  /// Throws std::invalid_argument naming what is missing or does not fit.
  Gemma(Backend& backend, ModelConfig config, const Weights& weights, int max_rows, int max_outputs);
  Gemma(const Gemma&) = delete;
  Gemma& operator=(const Gemma&) = delete;
  Gemma(Gemma&&) = delete;
  Gemma& operator=(Gemma&&) = delete;
  ~Gemma() = default;

  /// Lets the backend choose tokens without all of their logits where it can: the same tokens, sooner. Before the first
  /// pass.
  void screen_head() { backend_.screen_head(*head_, final_norm_); }
  /// Enqueues one pass over the step's rows; their K/V lands in the pages, the logits of the output rows stay with
  /// the backend for verify(), their final states in states().
  void forward(const StepRows& rows, KvArena arena);
  /// Enqueues, behind such a pass, the moves of what it left in the pages: in all layers, one move after the other.
  void move_kv(std::span<const KvMove> moves) { decoder_->move_kv(moves); }

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] KvPageShape kv_page_shape() const { return decoder_->page_shape(); }
  [[nodiscard]] int max_rows() const { return max_rows_; }
  [[nodiscard]] int max_outputs() const { return max_outputs_; }
  [[nodiscard]] Backend& backend() const { return backend_; }

  // What a drafter reads of it.

  /// Normed final hidden states of the last pass's output rows, [outputs, hidden], until the next pass.
  [[nodiscard]] Tensor states() const { return states_; }
  [[nodiscard]] const Weight& embedding() const { return *embedding_; }
  [[nodiscard]] float embedding_scale() const { return embedding_scale_; }
  /// Of each layer type, the last layer that owns K/V.
  [[nodiscard]] const SharedKv& shared_kv() const { return decoder_->shared_kv(); }

 private:
  void find_per_layer_inputs(const Weights& weights);
  Tensor tensor(int rows, int columns);

  Backend& backend_;
  const ModelConfig config_;
  int max_rows_;
  int max_outputs_;
  float embedding_scale_ = 1.0F;
  const Weight* embedding_ = nullptr;
  const Weight* head_ = nullptr;
  Norm final_norm_;

  // Per-layer embeddings: what every layer gets of the token itself and of its embedding, see forward().
  const RowTable* per_layer_table_ = nullptr;
  float per_layer_table_scale_ = 1.0F;
  const Weight* per_layer_projection_ = nullptr;
  Norm per_layer_norm_;

  std::unique_ptr<Decoder> decoder_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Tensor residual_;   // [rows, hidden]
  Tensor per_layer_;  // [rows, layers * per_layer_width]
  Tensor states_;     // [outputs, hidden]
};

}  // namespace draftwerk
