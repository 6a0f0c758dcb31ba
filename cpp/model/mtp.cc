#include "model/mtp.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace draftwerk {
namespace {

// A query sees the last window + 1 positions before its own: the reference masks by distance to the newest key, up to
// and including the window (transformers 5.17, models/gemma4_assistant, create_attention_masks).
int sliding_reach(const ModelConfig& config) { return config.window + 1; }

void require_equal(const char* what, std::int64_t drafter, std::int64_t target) {
  if (drafter == target) return;
  throw std::invalid_argument(std::string("the drafter does not fit the target: ") + what + " is " +
                              std::to_string(drafter) + " in the drafter and " + std::to_string(target) +
                              " in the target");
}

/// The config, if a drafter of this shape can read what the target has. (loading/drafter_fit.py tells users so before
/// anything is loaded; this is what memory safety rests on.)
MtpConfig checked(MtpConfig config, const Gemma& target) {
  check(config);
  require_equal("the target's hidden size", config.target_hidden, target.config().hidden);
  require_equal("the vocabulary size", config.text.vocabulary, target.config().vocabulary);
  for (const LayerConfig& layer : config.text.layers) {
    const bool sliding = layer.type == LayerType::sliding;
    const KvLayer& kv = target.shared_kv()[static_cast<std::size_t>(layer.type)];
    if (kv.heads == 0) {
      throw std::invalid_argument(std::string("the drafter does not fit the target: it has ") +
                                  (sliding ? "sliding" : "full") + " attention layers and the target has none");
    }
    require_equal(sliding ? "the head size of sliding layers" : "the head size of full layers", layer.head_dim,
                  kv.head_dim);
    require_equal(
        sliding ? "the number of key-value heads of sliding layers" : "the number of key-value heads of full layers",
        layer.kv_heads, kv.heads);
    if (sliding) require_equal("the sliding window", config.text.window, target.config().window);
  }
  return config;
}

}  // namespace

MtpModel::MtpModel(Gemma& target, MtpConfig config, const Weights& weights)
    : target_(target),
      backend_(target.backend()),
      config_(checked(std::move(config), target)),
      reach_(sliding_reach(config_.text)) {
  const int hidden = config_.text.hidden;
  pre_projection_ = &weights.matrix("pre_projection.weight", hidden, std::int64_t{2} * config_.target_hidden);
  post_projection_ = &weights.matrix("post_projection.weight", config_.target_hidden, hidden);
  final_norm_ = {weights.vector("model.norm.weight", hidden), config_.text.norm_epsilon};
  find_head(weights);
  decoder_ =
      std::make_unique<Decoder>(backend_, config_.text, weights, target.shared_kv(), reach_, target.max_outputs());
  input_ = tensor(2 * config_.target_hidden);
  embedded_token_ = columns_of(backend_, input_, 0, config_.target_hidden);
  previous_state_ = columns_of(backend_, input_, config_.target_hidden, config_.target_hidden);
  residual_ = tensor(hidden);
  states_ = tensor(hidden);
  projected_ = tensor(config_.target_hidden);
  backend_.reserve(target.max_outputs(), target.max_outputs(), std::max(decoder_->widest(), 2 * config_.target_hidden),
                   config_.text.vocabulary);
  if (sparse_head_.weight != nullptr) backend_.reserve_head(sparse_head_);
}

void MtpModel::find_head(const Weights& weights) {
  const int vocabulary = config_.text.vocabulary;
  const int tokens = config_.head_tokens();
  const bool of_target = config_.draft_vocabulary > 0;
  const int columns = of_target ? config_.target_hidden : config_.text.hidden;
  const Weight& head = weights.matrix("lm_head.weight", tokens, columns);
  if (!of_target && config_.clusters == 0) {
    head_ = &head;
    return;
  }
  sparse_head_.weight = &head;
  const char* name = of_target ? "draft_token_ids" : "masked_embedding.token_ordering";
  sparse_head_.tokens = weights.indices(name, tokens);
  std::vector<std::int32_t> row_of(static_cast<std::size_t>(vocabulary), -1);
  std::int32_t row = 0;
  for (const std::int32_t token : weights.index_values(name, tokens, vocabulary)) {
    row_of[static_cast<std::size_t>(token)] = row++;
  }
  buffers_.push_back(backend_.constants(std::as_bytes(std::span(row_of))));
  sparse_head_.row_of = static_cast<const std::int32_t*>(buffers_.back()->data());
  if (config_.clusters > 0) {
    sparse_head_.centroids = &weights.matrix("masked_embedding.centroids.weight", config_.clusters, columns);
    sparse_head_.chosen = config_.chosen_clusters;
  }
  if (of_target) sparse_head_.softcap = target_.config().final_softcap;
}

void MtpModel::first(const StepRows& rows, std::span<const int> states, KvArena arena) {
  backend_.begin(rows, arena);
  backend_.gather(target_.states(), states, previous_state_);
  draft();
}

void MtpModel::next(const StepRows& rows, std::span<const int> before, KvArena arena) {
  backend_.begin(rows, arena);
  backend_.gather(projected_, before, previous_state_);
  draft();
}

void MtpModel::follow(std::span<const int> every_row) {
  backend_.gather(projected_, every_row, previous_state_);
  draft();
}

void MtpModel::draft() {
  backend_.embed(target_.embedding(), target_.embedding_scale(), embedded_token_);
  const Projection projection[] = {{pre_projection_, residual_}};
  backend_.project(input_, nullptr, projection);
  decoder_->forward(residual_, {});
  backend_.gather_outputs(residual_, final_norm_, states_);
  const Projection of_state[] = {{post_projection_, projected_}};
  backend_.project(states_, nullptr, of_state);
  if (config_.draft_vocabulary > 0) {
    backend_.head(projected_, sparse_head_);
  } else if (head_ == nullptr) {
    backend_.head(states_, sparse_head_);
  } else {
    backend_.head(states_, *head_, 0.0F);
  }
}

Tensor MtpModel::tensor(int columns) {
  const auto rows = static_cast<std::size_t>(backend_.padded_rows(target_.max_outputs()));
  const std::size_t elements = rows * static_cast<std::size_t>(columns);
  buffers_.push_back(backend_.allocate(elements * backend_.activation_bytes()));
  return {buffers_.back()->data(), columns};
}

}  // namespace draftwerk
