#include "model/gemma.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace draftwerk {
namespace {

// To nearest even.
float rounded_to_bfloat(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x7FFFU + ((bits >> 16) & 1U);
  bits &= 0xFFFF0000U;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The reference rounds the scale of an embedding to the type of its table.
float scale_of_embedding(int width, WeightType type) {
  const float scale = std::sqrt(static_cast<float>(width));
  return type == WeightType::bf16 ? rounded_to_bfloat(scale) : scale;
}

ModelConfig checked(ModelConfig config) {
  check(config);
  return config;
}

}  // namespace

Gemma::Gemma(Backend& backend, ModelConfig config, const Weights& weights, int max_rows, int max_outputs)
    : backend_(backend), config_(checked(std::move(config))), max_rows_(max_rows), max_outputs_(max_outputs) {
  embedding_ = &weights.matrix("model.embed_tokens.weight", config_.vocabulary, config_.hidden);
  head_ = weights.contains("lm_head.weight") ? &weights.matrix("lm_head.weight", config_.vocabulary, config_.hidden)
                                             : embedding_;
  final_norm_ = {weights.vector("model.norm.weight", config_.hidden), config_.norm_epsilon};
  embedding_scale_ = scale_of_embedding(config_.hidden, embedding_->type());
  if (config_.per_layer_width > 0) find_per_layer_inputs(weights);
  // f32 weights ask for f32 throughout; anything narrower keeps its K/V in 16 bits.
  const KvType kv_type = embedding_->type() == WeightType::f32 ? KvType::f32 : KvType::f16;
  decoder_ = std::make_unique<Decoder>(backend_, config_, weights, kv_type, max_rows);
  residual_ = tensor(max_rows_, config_.hidden);
  states_ = tensor(max_outputs_, config_.hidden);
  backend_.reserve(max_rows_, max_outputs_, decoder_->widest(), config_.vocabulary);
}

void Gemma::forward(const StepRows& rows, KvArena arena) {
  backend_.begin(rows, arena);
  backend_.embed(*embedding_, embedding_scale_, residual_);
  if (per_layer_table_ != nullptr) {
    const Projection projection[] = {{per_layer_projection_, per_layer_}};
    backend_.project(residual_, nullptr, projection);
    backend_.mix_token_rows(*per_layer_table_, per_layer_table_scale_, per_layer_norm_, config_.per_layer_width,
                            std::sqrt(0.5F), per_layer_);
  }
  decoder_->forward(residual_, per_layer_);
  backend_.gather_outputs(residual_, final_norm_, states_);
  backend_.head(states_, *head_, config_.final_softcap);
}

void Gemma::find_per_layer_inputs(const Weights& weights) {
  const int width = config_.per_layer_width;
  const int columns = width * static_cast<int>(config_.layers.size());
  per_layer_table_ = &weights.table("model.embed_tokens_per_layer.weight", config_.per_layer_vocabulary, columns);
  per_layer_table_scale_ = scale_of_embedding(width, per_layer_table_->type());
  per_layer_projection_ = &weights.matrix("model.per_layer_model_projection.weight", columns, config_.hidden);
  // The projection is multiplied by hidden^-0.5 before it is normalised. A norm takes such a factor s out again, but
  // for its epsilon: norm(s * x; e) = norm(x; e / s^2).
  per_layer_norm_ = {weights.vector("model.per_layer_projection_norm.weight", width),
                     config_.norm_epsilon * static_cast<float>(config_.hidden)};
  per_layer_ = tensor(max_rows_, columns);
}

Tensor Gemma::tensor(int rows, int columns) {
  const std::size_t elements = static_cast<std::size_t>(backend_.padded_rows(rows)) * static_cast<std::size_t>(columns);
  buffers_.push_back(backend_.allocate(elements * backend_.activation_bytes()));
  return {buffers_.back()->data(), columns};
}

}  // namespace draftwerk
