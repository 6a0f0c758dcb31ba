#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace draftwerk {
namespace {

Tensor narrowed(Tensor tensor, int columns) { return {tensor.data, columns}; }

}  // namespace

Tensor columns_of(const Backend& backend, Tensor tensor, int first, int count) {
  const std::size_t offset = static_cast<std::size_t>(first) * backend.activation_bytes();
  return {static_cast<std::byte*>(tensor.data) + offset, count, tensor.row_stride()};
}

// --- the pass ----------------------------------------------------------------------------------------------------

void Decoder::forward(Tensor residual, Tensor per_layer) {
  int index = 0;
  for (const Layer& layer : layers_) {
    attention(layer, residual);
    feed_forward(layer, residual);
    if (config_.per_layer_width > 0) {
      const int width = config_.per_layer_width;
      add_per_layer(layer, columns_of(backend_, per_layer, index++ * width, width), residual);
    }
  }
}

void Decoder::move_kv(std::span<const KvMove> moves) { backend_.move_kv(own_kv_, moves); }

void Decoder::attention(const Layer& layer, Tensor residual) {
  const LayerConfig& c = layer.config;
  const Tensor query = narrowed(query_, c.query_heads * c.head_dim);
  const Tensor attended = narrowed(attended_, c.query_heads * c.head_dim);
  if (c.shares_kv) {
    const Projection projections[] = {{layer.query, query}};
    backend_.project(residual, &layer.input_norm, projections);
    backend_.prepare_queries(query, c.query_heads, layer.query_norm, layer.rope);
  } else {
    const Tensor key = narrowed(key_, c.kv_heads * c.head_dim);
    const Tensor value = c.key_is_value ? key : narrowed(value_, c.kv_heads * c.head_dim);
    const Projection projections[] = {{layer.query, query}, {layer.key, key}, {layer.value, value}};
    backend_.project(residual, &layer.input_norm, std::span(projections).first(c.key_is_value ? 2 : 3));
    backend_.append_kv(query, key, value, c.query_heads, layer.query_norm, layer.key_norm,
                       config_.value_norm ? &layer.value_norm : nullptr, layer.rope, layer.kv);
  }
  backend_.attend(query, c.query_heads, layer.kv, layer.sees, config_.attention_scale, attended);
  backend_.project_add(attended, *layer.attention_output, layer.post_attention_norm, residual, 1.0F);
}

void Decoder::feed_forward(const Layer& layer, Tensor residual) {
  // A layer's output is scaled by whatever writes it last.
  const float scale = config_.per_layer_width > 0 ? 1.0F : layer.output_scale;
  const Tensor gated = narrowed(gated_, layer.config.mlp);
  backend_.project_geglu(residual, layer.pre_feedforward_norm, *layer.gate, *layer.up, gated);
  if (config_.experts.count == 0) {
    backend_.project_add(gated, *layer.down, layer.post_feedforward_norm, residual, scale);
    return;
  }
  const Projection down[] = {{layer.down, mlp_}};
  backend_.project(gated, nullptr, down);
  backend_.experts(residual, layer.router, layer.pre_experts_norm, layer.experts, mixed_);
  backend_.add_normed(mlp_, layer.post_mlp_norm, mixed_, layer.post_experts_norm, layer.post_feedforward_norm, residual,
                      scale);
}

void Decoder::add_per_layer(const Layer& layer, Tensor per_layer, Tensor residual) {
  backend_.project_gelu(residual, *layer.per_layer_gate, per_layer, per_layer_);
  backend_.project_add(per_layer_, *layer.per_layer_projection, layer.post_per_layer_norm, residual,
                       layer.output_scale);
}

// --- construction ------------------------------------------------------------------------------------------------

/// The tensors of one layer by the last part of their names.
class Decoder::TensorsOfLayer {
 public:
  TensorsOfLayer(const Weights& weights, std::size_t index, float epsilon)
      : weights_(weights), prefix_("model.layers." + std::to_string(index) + "."), epsilon_(epsilon) {}

  [[nodiscard]] const Weight* matrix(const char* name, std::int64_t rows, std::int64_t columns) const {
    return &weights_.matrix(prefix_ + name, rows, columns);
  }
  [[nodiscard]] const float* vector(const char* name, std::int64_t length) const {
    return weights_.vector(prefix_ + name, length);
  }
  [[nodiscard]] std::vector<float> vector_values(const char* name, std::int64_t length) const {
    return weights_.vector_values(prefix_ + name, length);
  }
  [[nodiscard]] Norm norm(const char* name, std::int64_t length) const { return {vector(name, length), epsilon_}; }

 private:
  const Weights& weights_;
  std::string prefix_;
  float epsilon_;
};

Decoder::Decoder(Backend& backend, const ModelConfig& config, const Weights& weights, KvType kv_type, int max_rows)
    : backend_(backend), config_(config) {
  for (const LayerConfig& c : config.layers) {
    Layer layer{};
    layer.config = c;
    layer.sees = {c.type == LayerType::sliding ? config.window : 0, true};
    place_kv(layer, kv_type);
    layers_.push_back(layer);
  }
  build(weights);
  allocate_activations(max_rows);
}

Decoder::Decoder(Backend& backend, const ModelConfig& config, const Weights& weights, const SharedKv& target, int reach,
                 int max_rows)
    : backend_(backend), config_(config), shared_kv_(target) {
  for (const LayerConfig& c : config.layers) {
    Layer layer{};
    layer.config = c;
    layer.sees = {c.type == LayerType::sliding ? reach : 0, false};
    layer.kv = target[static_cast<std::size_t>(c.type)];
    layers_.push_back(layer);
  }
  build(weights);
  allocate_activations(max_rows);
}

/// Where a layer keeps its keys and values in the pages of its type, or whose it reads.
void Decoder::place_kv(Layer& layer, KvType kv_type) {
  const LayerConfig& c = layer.config;
  const int table = static_cast<int>(c.type);
  KvLayer& shared = shared_kv_[static_cast<std::size_t>(table)];
  if (!c.shares_kv) {
    const std::size_t bytes = backend_.kv_bytes(c.kv_heads, c.head_dim, kv_type);
    std::size_t& page = page_shape_.page_bytes[table];
    shared = {table, page, page + bytes, c.kv_heads, c.head_dim, kv_type};
    page += 2 * bytes;
    own_kv_.push_back(shared);
  }
  layer.kv = shared;
}

void Decoder::build(const Weights& weights) {
  int longest = 0;
  for (const LayerConfig& c : config_.layers) longest = std::max(longest, c.head_dim);
  ones_ = constants(std::vector<float>(static_cast<std::size_t>(longest), 1.0F));
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    const TensorsOfLayer tensors(weights, i, config_.norm_epsilon);
    find_attention(layer, tensors);
    find_feed_forward(layer, tensors);
    if (config_.experts.count > 0) find_experts(layer, tensors);
    if (config_.layer_scalars) layer.output_scale = tensors.vector_values("layer_scalar", 1)[0];
    if (const int width = config_.per_layer_width; width > 0) {
      layer.per_layer_gate = tensors.matrix("per_layer_input_gate.weight", width, config_.hidden);
      layer.per_layer_projection = tensors.matrix("per_layer_projection.weight", config_.hidden, width);
      layer.post_per_layer_norm = tensors.norm("post_per_layer_input_norm.weight", config_.hidden);
    }
  }
}

void Decoder::find_attention(Layer& layer, const TensorsOfLayer& tensors) {
  const LayerConfig& c = layer.config;
  const int query_width = c.query_heads * c.head_dim;
  const int kv_width = c.kv_heads * c.head_dim;
  layer.rope = {inverse_frequencies(config_.rope[static_cast<int>(c.type)], c.head_dim)};
  layer.input_norm = tensors.norm("input_layernorm.weight", config_.hidden);
  layer.query = tensors.matrix("self_attn.q_proj.weight", query_width, config_.hidden);
  layer.query_norm = tensors.norm("self_attn.q_norm.weight", c.head_dim);
  if (!c.shares_kv) {
    layer.key = tensors.matrix("self_attn.k_proj.weight", kv_width, config_.hidden);
    layer.key_norm = tensors.norm("self_attn.k_norm.weight", c.head_dim);
    layer.value_norm = {ones_, config_.norm_epsilon};
    if (!c.key_is_value) layer.value = tensors.matrix("self_attn.v_proj.weight", kv_width, config_.hidden);
  }
  layer.attention_output = tensors.matrix("self_attn.o_proj.weight", config_.hidden, query_width);
  layer.post_attention_norm = tensors.norm("post_attention_layernorm.weight", config_.hidden);
}

void Decoder::find_feed_forward(Layer& layer, const TensorsOfLayer& tensors) {
  const int mlp = layer.config.mlp;
  layer.pre_feedforward_norm = tensors.norm("pre_feedforward_layernorm.weight", config_.hidden);
  layer.gate = tensors.matrix("mlp.gate_proj.weight", mlp, config_.hidden);
  layer.up = tensors.matrix("mlp.up_proj.weight", mlp, config_.hidden);
  layer.down = tensors.matrix("mlp.down_proj.weight", config_.hidden, mlp);
  layer.post_feedforward_norm = tensors.norm("post_feedforward_layernorm.weight", config_.hidden);
}

void Decoder::find_experts(Layer& layer, const TensorsOfLayer& tensors) {
  const ExpertConfig& e = config_.experts;
  const int hidden = config_.hidden;
  // The router's own scale and hidden^-0.5 are one factor of its norm.
  std::vector<float> factor = tensors.vector_values("router.scale", hidden);
  const float root = 1.0F / std::sqrt(static_cast<float>(hidden));
  for (float& f : factor) f *= root;

  layer.router.weight = tensors.matrix("router.proj.weight", e.count, hidden);
  layer.router.norm = {constants(factor), config_.norm_epsilon};
  layer.router.expert_scale = tensors.vector("router.per_expert_scale", e.count);
  layer.router.chosen = e.chosen;
  const std::int64_t count = e.count;
  layer.experts = {tensors.matrix("experts.gate_up_proj", count * 2 * e.mlp, hidden),
                   tensors.matrix("experts.down_proj", count * hidden, e.mlp), e.count, e.mlp};
  layer.pre_experts_norm = tensors.norm("pre_feedforward_layernorm_2.weight", hidden);
  layer.post_experts_norm = tensors.norm("post_feedforward_layernorm_2.weight", hidden);
  layer.post_mlp_norm = tensors.norm("post_feedforward_layernorm_1.weight", hidden);
}

void Decoder::allocate_activations(int max_rows) {
  int query_width = 0;
  int kv_width = 0;
  int mlp = 0;
  for (const LayerConfig& c : config_.layers) {
    query_width = std::max(query_width, c.query_heads * c.head_dim);
    if (!c.shares_kv) kv_width = std::max(kv_width, c.kv_heads * c.head_dim);
    mlp = std::max(mlp, c.mlp);
  }
  const auto tensor = [&](int columns) {
    const auto rows = static_cast<std::size_t>(backend_.padded_rows(max_rows));
    const std::size_t elements = rows * static_cast<std::size_t>(columns);
    buffers_.push_back(backend_.allocate(elements * backend_.activation_bytes()));
    return Tensor{buffers_.back()->data(), columns};
  };
  query_ = tensor(query_width);
  attended_ = tensor(query_width);
  gated_ = tensor(mlp);
  if (kv_width > 0) {
    key_ = tensor(kv_width);
    value_ = tensor(kv_width);
  }
  if (config_.per_layer_width > 0) per_layer_ = tensor(config_.per_layer_width);
  if (config_.experts.count > 0) {
    mlp_ = tensor(config_.hidden);
    mixed_ = tensor(config_.hidden);
    backend_.reserve_experts(max_rows, config_.experts.chosen, layers_.front().experts);
  }
  widest_ = std::max({config_.hidden, query_width, mlp, config_.per_layer_width * static_cast<int>(layers_.size())});
}

const float* Decoder::inverse_frequencies(const RopeConfig& rope, int head_dim) {
  for (const RopeTable& table : rope_tables_) {
    const RopeConfig& r = table.rope;
    if (r.base == rope.base && r.scaling == rope.scaling && r.rotated == rope.rotated && table.head_dim == head_dim) {
      return table.inverse_frequency;
    }
  }
  const int pairs = head_dim / 2;
  const int rotated = static_cast<int>(rope.rotated * head_dim / 2);
  std::vector<float> frequencies(static_cast<std::size_t>(pairs));
  for (int i = 0; i < rotated; ++i) {
    frequencies[static_cast<std::size_t>(i)] =
        static_cast<float>(std::pow(rope.base, -2.0 * i / head_dim) / rope.scaling);
  }
  rope_tables_.push_back({rope, head_dim, constants(frequencies)});
  return rope_tables_.back().inverse_frequency;
}

const float* Decoder::constants(std::span<const float> values) {
  buffers_.push_back(backend_.constants(std::as_bytes(values)));
  return static_cast<const float*>(buffers_.back()->data());
}

}  // namespace draftwerk
