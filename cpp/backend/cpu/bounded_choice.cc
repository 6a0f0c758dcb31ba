#include "backend/cpu/bounded_choice.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <functional>
#include <span>
#include <utility>

#include "backend/cpu/packing.h"

namespace draftwerk::cpu {
namespace {

constexpr int kMostKnown = 1 << 16;  // tokens of a row

/// What a sum of weights is at most, or at least, if its terms are bounds: exp is approximated, and rounded.
std::uint64_t at_most(std::uint64_t mass, int terms) {
  return mass + (mass >> 16U) + static_cast<std::uint64_t>(terms);
}
std::uint64_t at_least(std::uint64_t mass, int terms) {
  const std::uint64_t off = (mass >> 16U) + static_cast<std::uint64_t>(terms);
  return mass > off ? mass - off : 0;
}

}  // namespace

BoundedChoice::BoundedChoice(const SamplerKernels& kernels, int vocabulary)
    : kernels_(&kernels),
      vocabulary_(vocabulary),
      capacity_(std::min(kMostKnown, static_cast<int>(panel_count(vocabulary)) * kPanel)),
      is_known_(static_cast<std::size_t>(panel_count(vocabulary))) {
  panels_.reserve(static_cast<std::size_t>(capacity_ / kPanel));
  const auto size = static_cast<std::size_t>(std::max(capacity_, kListCapacity));
  for (std::vector<float>* values : {&z_, &found_z_, &ranked_}) values->resize(size);
  for (std::vector<std::int32_t>* tokens : {&tokens_, &found_}) tokens->resize(size);
}

std::optional<TokenId> BoundedChoice::choose(const BoundedRow& bounds, const SamplingParams& sampling, NoiseKey noise,
                                             PanelSource& source) {
  const bool greedy = sampling.temperature <= 0.0F;
  begin(bounds, greedy ? 1.0F : 1.0F / sampling.temperature, source);
  // Bounds may have been made of something that is not finite.
  const float top = scaled(row_maximum(row()), scale_);
  if (!(top > -FLT_MAX && top < FLT_MAX)) return std::nullopt;
  return greedy ? choose_greedy() : choose_sampled(sampling, noise);
}

void BoundedChoice::begin(const BoundedRow& bounds, float scale, PanelSource& source) {
  bounds_ = bounds;
  scale_ = scale;
  source_ = &source;
  count_ = 0;
  for (const std::int32_t panel : panels_) is_known_[static_cast<std::size_t>(panel)] = 0;
  panels_.clear();
}

std::optional<TokenId> BoundedChoice::choose_greedy() {
  if (!make_known_largest()) return std::nullopt;
  Candidate best;
  cpu::choose_greedy(*kernels_, z_.data(), tokens_.data(), count_, std::span(&best, 1));
  return best.token;
}

std::optional<TokenId> BoundedChoice::choose_sampled(const SamplingParams& sampling, NoiseKey noise) {
  const int k = sampling.top_k;
  if (!make_known_best(k) || !make_known_largest()) return std::nullopt;
  const float top = best_known();
  Cut cut{kth_known(k), INT_MAX};
  if (sampling.min_p > 0.0F) cut.value = std::max(cut.value, top + std::log(sampling.min_p));
  const float score = kernels_->list_best(known(), cut, noise).score;
  const int contenders = kernels_->row_collect_scores(row(), cut, noise, score, capacity_, found_.data());
  if (contenders > capacity_ || !make_known(found(contenders))) return std::nullopt;
  const Winner winner = kernels_->list_best(known(), cut, noise);
  if (is_kept(winner, k, sampling.top_p, top)) return winner.token;
  if (!make_known_from(winner.z)) return std::nullopt;
  if (is_kept(winner, k, sampling.top_p, top)) return winner.token;

  // The usual choice, among all that there may be.
  const Cut enough{kth_known(k), INT_MAX};
  if (!make_known_from(enough.value)) return std::nullopt;
  const int count = kernels_->list_collect(known(), enough, found_z_.data(), found_.data());
  Candidate best;
  cpu::choose_sampled(*kernels_, found_z_.data(), found_.data(), count, sampling, noise, std::span(&best, 1));
  return best.token;
}

/// Makes the panels of these tokens known; false if they are too many.
bool BoundedChoice::make_known(std::span<const std::int32_t> tokens) {
  const std::size_t before = panels_.size();
  for (const std::int32_t token : tokens) {
    const std::int32_t panel = token / kPanel;
    std::uint8_t& is_known = is_known_[static_cast<std::size_t>(panel)];
    if (is_known != 0) continue;
    if (static_cast<int>(panels_.size()) == capacity_ / kPanel) return false;
    is_known = 1;
    panels_.push_back(panel);
  }
  source_->compute(std::span(panels_).subspan(before));
  for (std::size_t i = before; i < panels_.size(); ++i) {
    const int first = panels_[i] * kPanel;
    for (int token = first; token < std::min(first + kPanel, vocabulary_); ++token, ++count_) {
      const float z = scaled(bounds_.values[token], scale_);
      z_[static_cast<std::size_t>(count_)] = z == z ? z : kMinusInfinity;  // NaN has no order
      tokens_[static_cast<std::size_t>(count_)] = token;
    }
  }
  // Chunks whose bounds have gone are passed over sooner.
  int last = -1;
  for (std::size_t i = before; i < panels_.size(); ++i) {
    const int chunk = panels_[i] * kPanel / kLogitChunk;
    if (std::exchange(last, chunk) == chunk) continue;
    const int first = chunk * kLogitChunk;
    bounds_.chunk_max[chunk] = kernels_->maximum(bounds_.values + first, std::min(kLogitChunk, vocabulary_ - first));
  }
  return true;
}

/// All whose z may be at least that.
bool BoundedChoice::make_known_from(float z) {
  const int count = kernels_->row_collect(row(), {z, INT_MAX}, capacity_, found_z_.data(), found_.data());
  return count <= capacity_ && make_known(found(count));
}

/// The k tokens of the largest bounds.
bool BoundedChoice::make_known_best(int k) {
  const int some = collect_top(*kernels_, row(), k, found_z_.data(), found_.data());
  const float top = kernels_->maximum(found_z_.data(), some);
  const LogitList list{found_z_.data(), found_.data(), some};
  const int count = kernels_->list_collect(list, list_cut(*kernels_, list, k, top), found_z_.data(), found_.data());
  return make_known(found(count));
}

/// The best token, and all that equal it.
bool BoundedChoice::make_known_largest() {
  if (count_ == 0) {
    const TokenId token = largest(row()).token;
    if (!make_known(std::span(&token, 1))) return false;
  }
  const float best = best_known();
  return best > kMinusInfinity && make_known_from(best);
}

/// The k-th largest z of what is known, which is at most that of all.
float BoundedChoice::kth_known(int k) {
  if (count_ < k) return -FLT_MAX;
  std::copy_n(z_.data(), count_, ranked_.data());
  float* ranked = ranked_.data();
  std::nth_element(ranked, ranked + k - 1, ranked + count_, std::greater<>());
  return ranked[k - 1];
}

/// Whether top_k and top_p keep the winner for certain, given that all that might have a higher score are known.
bool BoundedChoice::is_kept(const Winner& winner, int k, float top_p, float top) {
  const Cut before{winner.z, winner.token - 1};
  const int reaching = kernels_->row_count_at_least(row(), winner.z);
  const bool all_before = reaching == kernels_->count_at_least(z_.data(), count_, 1.0F, winner.z);
  if (reaching > k) {
    // Of those that equal it only some rank before it.
    if (!all_before || kernels_->list_collect(known(), before, found_z_.data(), found_.data()) >= k) return false;
  }
  if (!(top_p < 1.0F)) return true;
  // Whichever k tokens top_k keeps, they weigh at least as much as any k others.
  const Cut best_k = count_ > k ? list_cut(*kernels_, known(), k, top) : kKeepAll;
  const std::uint64_t total = at_least(kernels_->list_mass(known(), best_k, top), k);
  const auto allowed = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(top_p * static_cast<double>(total)));
  const std::uint64_t mass = kernels_->row_mass(row(), before, top);
  return (all_before ? mass : at_most(mass, k)) < allowed;
}

}  // namespace draftwerk::cpu
