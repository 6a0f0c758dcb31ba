// Chooses a token exactly as from all logits of a row, where upper bounds of them are known, and the logits themselves
// of as few panels of tokens as need be.
//
// A row of logits holds bounds at first; the logits of a panel that is asked for take their place. So every value is at
// least the logit, and equal to it where the panel is known:
//   greedy   The token of the largest bound is made known. Then all whose bound reaches its logit are: the best of what
//            is known is the best of all.
//   sampled  Of what is known the k-th best bounds from below what top_k keeps. Then all are made known whose bound and
//            noise reach the best score of those kept so far: the winner among all that top_k might keep. It remains to
//            be seen that top_k and top_p do keep it: mostly bounds are enough for that, sometimes all that might rank
//            before it have to be known, rarely all that top_k might keep.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/choosing.h"
#include "backend/cpu/sampler_kernels.h"

namespace draftwerk::cpu {

/// A row of bounds.
struct BoundedRow {
  float* values = nullptr;     ///< [vocabulary]
  float* chunk_max = nullptr;  ///< as of a LogitRow
};

/// What computes the logits of panels of kPanel tokens, or those that the last panel has, in place of its bounds.
class PanelSource {
 public:
  PanelSource() = default;
  PanelSource(const PanelSource&) = delete;
  PanelSource& operator=(const PanelSource&) = delete;
  PanelSource(PanelSource&&) = delete;
  PanelSource& operator=(PanelSource&&) = delete;
  virtual ~PanelSource() = default;
  virtual void compute(std::span<const std::int32_t> panels) = 0;
};

/// A top_k that is no larger can be chosen so: beyond, too many tokens would have to be known.
inline constexpr int kMostChosenAmong = 256;

/// One row at a time; the object is the scratch that it takes.
class BoundedChoice {
 public:
  BoundedChoice(const SamplerKernels& kernels, int vocabulary);

  /// The token that sampling.h defines for temperature, top_k, top_p, min_p and seed alone; top_k is 1 to
  /// kMostChosenAmong and below the vocabulary unless the choice is greedy. Nothing if too many panels would have to be
  /// known, or if no bound is finite; then the row means nothing any more.
  std::optional<TokenId> choose(const BoundedRow& row, const SamplingParams& sampling, NoiseKey noise,
                                PanelSource& source);
  /// How many panels the last choice took.
  [[nodiscard]] int panels() const { return static_cast<int>(panels_.size()); }

 private:
  void begin(const BoundedRow& row, float scale, PanelSource& source);
  std::optional<TokenId> choose_greedy();
  std::optional<TokenId> choose_sampled(const SamplingParams& sampling, NoiseKey noise);
  bool make_known(std::span<const std::int32_t> tokens);
  bool make_known_from(float z);
  bool make_known_best(int k);
  bool make_known_largest();
  float kth_known(int k);
  bool is_kept(const Winner& winner, int k, float top_p, float top);
  [[nodiscard]] std::span<const std::int32_t> found(int count) const {
    return std::span(found_).first(static_cast<std::size_t>(count));
  }
  [[nodiscard]] LogitRow row() const { return {bounds_.values, bounds_.chunk_max, vocabulary_, scale_}; }
  [[nodiscard]] LogitList known() const { return {z_.data(), tokens_.data(), count_}; }
  [[nodiscard]] float best_known() const { return kernels_->maximum(z_.data(), count_); }

  const SamplerKernels* kernels_;
  int vocabulary_;
  int capacity_;  ///< tokens that may be known

  // The row.
  BoundedRow bounds_;
  float scale_ = 1.0F;
  PanelSource* source_ = nullptr;
  int count_ = 0;                       ///< tokens of known panels
  std::vector<float> z_;                ///< of these
  std::vector<std::int32_t> tokens_;    ///< these
  std::vector<std::int32_t> panels_;    ///< in the order in which they became known
  std::vector<std::uint8_t> is_known_;  ///< [panels]

  // A search.
  std::vector<float> found_z_;
  std::vector<std::int32_t> found_;
  std::vector<float> ranked_;
};

}  // namespace draftwerk::cpu
