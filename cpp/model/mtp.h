// The multi-token-prediction drafter of a Gemma (Hugging Face: gemma4_assistant): a few decoder layers that read the
// target's keys and values and have none of their own, so that drafting needs no prefill and leaves nothing to undo.
//
// One draft for a sequence whose last known token x is at position n, h being a state as wide as the target's:
//   z = pre_projection * concat(target_embedding(x), h)
//   the layers, queries at position n in every draft of a round, over the target's K/V at the positions before n
//   the head on the normed result gives the draft; post_projection of it is the h of the next draft, whose x is this
//   one
// For a round's first draft h is the target's final state at position n - 1, the one that chose x.
//
// A drafter may have a head of its own over the whole vocabulary, or none (draft_vocab_size): then the h of the next
// draft is computed first, and its products with some rows of the target's head are the logits of their tokens.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/gemma.h"
#include "model/weights.h"

namespace draftwerk {

class MtpModel {
 public:
  /// Rounds over up to target.max_outputs() sequences. `target` and `weights` must outlive the drafter.
  /// Throws std::invalid_argument naming what is missing or does not fit the target.
  MtpModel(Gemma& target, MtpConfig config, const Weights& weights);
  MtpModel(const MtpModel&) = delete;
  MtpModel& operator=(const MtpModel&) = delete;
  MtpModel(MtpModel&&) = delete;
  MtpModel& operator=(MtpModel&&) = delete;
  ~MtpModel() = default;

  /// The first draft of a round: a row for each sequence with its last known token at that token's position, every row
  /// an output row. states[r] is the row of target.states() that chose the token. The drafts' logits stay with the
  /// backend for propose().
  void first(const StepRows& rows, std::span<const int> states, KvArena arena);
  /// Drafts that follow those of the pass before: a row for each, with the token that was drafted, the position
  /// unchanged; before[r] is the row of the pass before that drafted it.
  void next(const StepRows& rows, std::span<const int> before, KvArena arena);
  /// The same without waiting for what was drafted: the rows of the pass before, all of them (`every_row` is 0, 1, 2
  /// and so on), with the tokens that Backend::propose_ahead() gave them.
  void follow(std::span<const int> every_row);

  [[nodiscard]] Gemma& target() const { return target_; }
  /// Positions before the last token's that a row of a sliding layer sees.
  [[nodiscard]] int reach() const { return reach_; }

 private:
  void draft();
  void find_head(const Weights& weights);
  Tensor tensor(int columns);

  Gemma& target_;
  Backend& backend_;
  const MtpConfig config_;
  int reach_;
  const Weight* pre_projection_ = nullptr;
  const Weight* post_projection_ = nullptr;
  Norm final_norm_;
  const Weight* head_ = nullptr;  // scores every token; null: sparse_head_ does it
  SparseHead sparse_head_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Tensor input_;           // [rows, 2 * target hidden]
  Tensor embedded_token_;  // its first half
  Tensor previous_state_;  // its second half
  Tensor residual_;        // [rows, hidden]
  Tensor states_;          // [rows, hidden], normed
  Tensor projected_;       // [rows, target hidden]: the state before the next draft
};

}  // namespace draftwerk
