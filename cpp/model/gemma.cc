#include "model/gemma.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace draftwerk {
namespace {

Tensor narrowed(Tensor tensor, int columns) { return {tensor.data, columns}; }

// To nearest even. The reference rounds the embedding's scale to the type of the checkpoint, which is bf16.
float rounded_to_bfloat(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x7FFFU + ((bits >> 16) & 1U);
  bits &= 0xFFFF0000U;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace

Gemma::Gemma(Backend& backend, ModelConfig config, const Weights& weights, int max_rows, int max_outputs)
    : backend_(backend), config_(std::move(config)), max_rows_(max_rows), max_outputs_(max_outputs) {
  check(config_);
  embedding_ = &weights.matrix("model.embed_tokens.weight", config_.vocabulary, config_.hidden);
  head_ = weights.contains("lm_head.weight") ? &weights.matrix("lm_head.weight", config_.vocabulary, config_.hidden)
                                             : embedding_;
  final_norm_ = {weights.vector("model.norm.weight", config_.hidden), config_.norm_epsilon};
  embedding_scale_ = std::sqrt(static_cast<float>(config_.hidden));
  if (embedding_->type() == WeightType::bf16) embedding_scale_ = rounded_to_bfloat(embedding_scale_);
  build_layers(weights);
  allocate_activations();
}

void Gemma::forward(const StepRows& rows, KvArena arena) {
  backend_.begin(rows, arena);
  backend_.embed(*embedding_, embedding_scale_, residual_);
  for (const Layer& layer : layers_) transformer_layer(layer);
  backend_.head(residual_, final_norm_, *head_, config_.final_softcap);
}

void Gemma::transformer_layer(const Layer& layer) {
  const LayerConfig& c = layer.config;
  const Tensor query = narrowed(query_, c.query_heads * c.head_dim);
  const Tensor key = narrowed(key_, c.kv_heads * c.head_dim);
  const Tensor value = narrowed(value_, c.kv_heads * c.head_dim);
  const Tensor attended = narrowed(attended_, c.query_heads * c.head_dim);
  const Tensor gated = narrowed(gated_, c.mlp);
  const int window = c.type == LayerType::sliding ? config_.window : 0;

  const Projection qkv[] = {{layer.query, query}, {layer.key, key}, {layer.value, value}};
  backend_.project(residual_, &layer.input_norm, qkv);
  backend_.append_kv(query, key, value, c.query_heads, layer.query_norm, layer.key_norm, layer.rope, layer.kv);
  backend_.attend(query, c.query_heads, layer.kv, window, config_.attention_scale, attended);
  backend_.project_add(attended, *layer.attention_output, layer.post_attention_norm, residual_);
  backend_.project_geglu(residual_, layer.pre_feedforward_norm, *layer.gate, *layer.up, gated);
  backend_.project_add(gated, *layer.down, layer.post_feedforward_norm, residual_);
}

void Gemma::build_layers(const Weights& weights) {
  // f32 weights ask for f32 throughout; anything narrower keeps its K/V in 16 bits.
  const KvType kv_type = embedding_->type() == WeightType::f32 ? KvType::f32 : KvType::f16;
  for (std::size_t i = 0; i < config_.layers.size(); ++i) {
    const LayerConfig& c = config_.layers[i];
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto matrix = [&](const char* name, std::int64_t rows, std::int64_t columns) {
      return &weights.matrix(prefix + name + ".weight", rows, columns);
    };
    const auto norm = [&](const char* name, std::int64_t length) {
      return Norm{weights.vector(prefix + name + ".weight", length), config_.norm_epsilon};
    };
    const int query_width = c.query_heads * c.head_dim;
    const int kv_width = c.kv_heads * c.head_dim;
    const int table = static_cast<int>(c.type);
    const std::size_t kv_bytes = backend_.kv_bytes(c.kv_heads, c.head_dim, kv_type);
    Layer layer{};
    layer.config = c;
    layer.query = matrix("self_attn.q_proj", query_width, config_.hidden);
    layer.key = matrix("self_attn.k_proj", kv_width, config_.hidden);
    layer.value = matrix("self_attn.v_proj", kv_width, config_.hidden);
    layer.attention_output = matrix("self_attn.o_proj", config_.hidden, query_width);
    layer.gate = matrix("mlp.gate_proj", c.mlp, config_.hidden);
    layer.up = matrix("mlp.up_proj", c.mlp, config_.hidden);
    layer.down = matrix("mlp.down_proj", config_.hidden, c.mlp);
    layer.input_norm = norm("input_layernorm", config_.hidden);
    layer.query_norm = norm("self_attn.q_norm", c.head_dim);
    layer.key_norm = norm("self_attn.k_norm", c.head_dim);
    layer.post_attention_norm = norm("post_attention_layernorm", config_.hidden);
    layer.pre_feedforward_norm = norm("pre_feedforward_layernorm", config_.hidden);
    layer.post_feedforward_norm = norm("post_feedforward_layernorm", config_.hidden);
    layer.rope = {inverse_frequencies(config_.rope[table], c.head_dim)};
    std::size_t& page = page_shape_.page_bytes[table];
    layer.kv = {table, page, page + kv_bytes, c.kv_heads, c.head_dim, kv_type};
    page += 2 * kv_bytes;
    layers_.push_back(layer);
  }
}

void Gemma::allocate_activations() {
  int query_width = 0;
  int kv_width = 0;
  int mlp = 0;
  for (const LayerConfig& c : config_.layers) {
    query_width = std::max(query_width, c.query_heads * c.head_dim);
    kv_width = std::max(kv_width, c.kv_heads * c.head_dim);
    mlp = std::max(mlp, c.mlp);
  }
  const auto tensor = [&](int columns) {
    const auto rows = static_cast<std::size_t>(max_rows_);
    buffers_.push_back(backend_.allocate(rows * static_cast<std::size_t>(columns) * backend_.activation_bytes()));
    return Tensor{buffers_.back()->data(), columns};
  };
  residual_ = tensor(config_.hidden);
  query_ = tensor(query_width);
  key_ = tensor(kv_width);
  value_ = tensor(kv_width);
  attended_ = tensor(query_width);
  gated_ = tensor(mlp);
  backend_.reserve(max_rows_, max_outputs_, std::max({config_.hidden, query_width, mlp}), config_.vocabulary);
}

const float* Gemma::inverse_frequencies(const RopeConfig& rope, int head_dim) {
  for (const RopeTable& table : rope_tables_) {
    if (table.base == rope.base && table.scaling == rope.scaling && table.head_dim == head_dim) {
      return table.inverse_frequency;
    }
  }
  const int pairs = head_dim / 2;
  buffers_.push_back(backend_.allocate(static_cast<std::size_t>(pairs) * sizeof(float)));
  auto* frequency = static_cast<float*>(buffers_.back()->data());
  for (int i = 0; i < pairs; ++i) {
    frequency[i] = static_cast<float>(std::pow(rope.base, -2.0 * i / head_dim) / rope.scaling);
  }
  rope_tables_.push_back({rope.base, rope.scaling, head_dim, frequency});
  return frequency;
}

}  // namespace draftwerk
