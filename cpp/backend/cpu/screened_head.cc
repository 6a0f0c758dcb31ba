#include "backend/cpu/screened_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "backend/cpu/head_product.h"

namespace draftwerk::cpu {
namespace {

// Logits below this cannot overflow, and neither can what they are made of.
constexpr double kLargestLogit = 0x1p100;
// A coarse product saves a third of the whole one while memory bounds both.
constexpr double kMostWork = 0.3;
constexpr double kNewest = 1.0 / 16.0;
constexpr int kPause = 64;
// Rows that a whole product takes in the time in which the head comes from memory.
constexpr int kRowsOfMemory = 8;
// Bytes of a head that are split at a time.
constexpr std::int64_t kSplitTogether = std::int64_t{4} << 20;

// Counters of workers lie in cache lines of their own.
constexpr std::size_t kApart = 64 / sizeof(std::int64_t);

float rounded_up(double value) {
  const auto nearest = static_cast<float>(value);
  return static_cast<double>(nearest) >= value ? nearest
                                               : std::nextafter(nearest, std::numeric_limits<float>::infinity());
}

}  // namespace

SplitHead::SplitHead(const CpuWeight& head, const float* scale, WeightArena& memory, WorkerPool& pool) : weight_(head) {
  const PackedMatrix& matrix = head.matrix();
  require(matrix.type == WeightType::q8_0 && matrix.split == nullptr, "a head of q8_0 to be split");
  std::vector<float> importance(static_cast<std::size_t>(matrix.columns));
  for (std::size_t c = 0; c < importance.size(); ++c) importance[c] = scale[c] * scale[c];
  auto columns = std::make_unique<SplitColumns>(split_columns(importance));
  const std::int64_t panels = panel_count(matrix.rows);
  MemorySlice rest = memory.take(static_cast<std::size_t>(panels) * columns->rest_bytes);
  columns->rest = rest.data;
  lost_.resize(panels * kPanel);
  std::vector<double> longest(static_cast<std::size_t>(pool.size()), 0.0);
  // In place, as what is left of a panel is shorter: part after part, each of which is put together beside it.
  const auto part = std::max<std::int64_t>(kSplitTogether / static_cast<std::int64_t>(matrix.panel_bytes), 1);
  std::vector<std::byte> together(static_cast<std::size_t>(std::min(part, panels)) * columns->coarse_bytes);
  for (std::int64_t first = 0; first < panels; first += part) {
    const std::int64_t count = std::min(part, panels - first);
    const std::byte* panel = matrix.data + static_cast<std::size_t>(first) * matrix.panel_bytes;
    std::byte* rest_panel = rest.data + static_cast<std::size_t>(first) * columns->rest_bytes;
    pool.parallel_for(count, 64, [&](std::int64_t begin, std::int64_t end, int worker) {
      double& most = longest[static_cast<std::size_t>(worker)];
      for (std::int64_t p = begin; p < end; ++p) {
        const auto at = static_cast<std::size_t>(p);
        const RowNorms norms =
            split_panel(*columns, panel + at * matrix.panel_bytes, together.data() + at * columns->coarse_bytes,
                        rest_panel + at * columns->rest_bytes);
        for (int r = 0; r < kPanel; ++r) {
          lost_[(first + p) * kPanel + r] = rounded_up(norms.lost[r] * (1.0 + 0x1p-40));
          const double length = norms.row[r] + 2.0 * norms.lost[r];
          if (length > most || std::isnan(length)) most = length;
        }
      }
    });
    pool.parallel_for(count, 64, [&](std::int64_t begin, std::int64_t end, int) {
      const std::size_t bytes = columns->coarse_bytes;
      std::memcpy(head.data() + static_cast<std::size_t>(first + begin) * bytes,
                  together.data() + static_cast<std::size_t>(begin) * bytes,
                  static_cast<std::size_t>(end - begin) * bytes);
    });
  }
  for (const double most : longest) {
    if (most > longest_ || std::isnan(most)) longest_ = most;
  }
  head.split(std::move(columns), std::move(rest));
}

ScreenedHead::ScreenedHead(const SplitHead& head, Isa isa, const MatmulKernels& matmul, const LayerKernels& layer,
                           WorkerPool& pool, int max_outputs, Screening screening)
    : head_(head),
      matmul_(matmul),
      layer_(layer),
      pool_(pool),
      reach_(static_cast<std::size_t>(max_outputs)),
      slack_(static_cast<std::size_t>(max_outputs)),
      screening_(screening),
      panels_(static_cast<std::size_t>(pool.size()) * kApart, 0) {
  choices_.reserve(static_cast<std::size_t>(pool.size()));
  for (int i = 0; i < pool.size(); ++i) {
    choices_.emplace_back(sampler_kernels(isa), static_cast<int>(head.matrix().rows));
  }
}

void ScreeningPayoff::add(double work) { mean_work_ += (work - mean_work_) * kNewest; }

bool ScreeningPayoff::next_step() {
  if (mean_work_ > kMostWork && pause_ == 0) pause_ = kPause;
  if (pause_ == 0) return true;
  // After a pause it is tried anew, on probation.
  if (--pause_ == 0) mean_work_ = kMostWork / 2;
  return false;
}

bool ScreenedHead::takes(std::span<const VerifyGroup> groups, int outputs) {
  if (outputs == 0) return false;
  if (!(head_.longest() < std::numeric_limits<double>::infinity())) return false;
  if (!std::all_of(groups.begin(), groups.end(), [this](const VerifyGroup& group) { return can_choose(group); })) {
    return false;
  }
  return screening_ == Screening::always || pays(groups);
}

bool ScreenedHead::can_choose(const VerifyGroup& group) const {
  const SamplingParams& sampling = *group.sampling;
  const std::int64_t few = std::min<std::int64_t>(kMostChosenAmong, head_.matrix().rows - 1);
  const bool chosen_among_few = sampling.temperature <= 0.0F || (sampling.top_k > 0 && sampling.top_k <= few);
  const bool bans = !group.banned.empty() && group.banned_tokens > 0;
  return chosen_among_few && !bans && !sampling.needs_history() && sampling.logit_bias.empty() && sampling.logprobs < 0;
}

bool ScreenedHead::pays(std::span<const VerifyGroup> groups) {
  // Each sequence has rows multiplied one by one, some hundred panels of them where it is sampled; with this many, the
  // coarse product does not save as much. (Rows behind a wrong draft do not count: nobody chooses there.)
  const bool sampled = std::any_of(groups.begin(), groups.end(),
                                   [](const VerifyGroup& group) { return group.sampling->temperature > 0.0F; });
  if (sampled && groups.size() > static_cast<std::size_t>(kRowsOfMemory)) return false;
  count_work();
  return payoff_.next_step();
}

/// Takes the work of the step before into the mean.
void ScreenedHead::count_work() {
  if (outputs_ == 0) return;
  double panels = 0.0;
  for (std::int64_t& some : panels_) panels += static_cast<double>(std::exchange(some, 0));
  // Fewer rows than threads keep the others waiting.
  const double waiting = static_cast<double>(pool_.size()) / std::min(pool_.size(), outputs_);
  const double all =
      static_cast<double>(panel_count(head_.matrix().rows)) * std::max(1.0, outputs_ / double{kRowsOfMemory});
  const double work = panels * waiting / all + (completed_ ? 1.0 : 0.0);
  payoff_.add(work);
  outputs_ = 0;
}

void ScreenedHead::bound(const Activations& x, int outputs, float softcap, const LogitRows& logits) {
  x_ = x;
  outputs_ = outputs;
  softcap_ = softcap;
  logits_ = logits;
  completed_ = false;
  ++steps_;
  const SplitColumns& columns = head_.columns();
  const auto blocks = static_cast<int>(columns.whole.size());
  for (int row = 0; row < outputs; ++row) {
    double all = 0.0;
    double lossy = 0.0;
    for (int b = 0; b < blocks; ++b) {
      const std::int8_t* quants = x.quants + row * x.quant_stride + b * kBlock;
      const double scale = x.scales[row * x.block_stride + b];
      const int whole = columns.whole[static_cast<std::size_t>(b)] * kGroupColumns;
      int squares = 0;
      int lossy_squares = 0;
      for (int i = 0; i < kBlock; ++i) squares += quants[i] * quants[i];
      for (int i = whole; i < kBlock; ++i) lossy_squares += quants[i] * quants[i];
      all += scale * scale * squares;
      lossy += scale * scale * lossy_squares;
    }
    // Rounding: the terms of a product, one of each block, have sizes that add up to no more than |w| |x| for the whole
    // product and (|w| + |e|) |x| for the coarse one, and less than (blocks + 2) operations round each of them by 2^-24
    // of what there is. A bound is at most (|w| + 2 |e|) |x|, and rounded three times as it is made. All of that is
    // below half of this.
    const double size = head_.longest() * std::sqrt(all);
    const auto at = static_cast<std::size_t>(row);
    reach_[at] = rounded_up(std::sqrt(lossy) * (1.0 + 0x1p-20));
    slack_[at] = rounded_up(size * (blocks + 8) * 0x1p-22);
    if (!(size < kLargestLogit)) slack_[at] = std::numeric_limits<float>::quiet_NaN();
  }
  const float* lost = head_.lost();
  multiply_head(pool_, matmul_.matmul_coarse, head_.matrix(), x, outputs, logits,
                [&](float* values, int row, std::int64_t first, int count) {
                  const auto at = static_cast<std::size_t>(row);
                  const float most = layer_.raise_max(values, lost + first, reach_[at], slack_[at], count);
                  return softcap_ == 0.0F ? most : layer_.softcap_max(values, count, softcap_);
                });
}

/// Logits of an output row by the head itself.
class ScreenedHead::Row final : public PanelSource {
 public:
  Row(const ScreenedHead& head, int output)
      : head_(head), x_(head.x_.from(output)), values_(head.logits_.values + output * head.logits_.stride) {}
  void compute(std::span<const std::int32_t> panels) override {
    for (std::size_t i = 0; i < panels.size(); ++i) {
      if (i + 1 < panels.size()) prefetch(panels[i + 1]);
      const std::int64_t panel = panels[i];
      // As if it were the last one: what the product would fetch behind it is not what comes next.
      PackedMatrix matrix = head_.head_.matrix();
      const std::int64_t first = panel * kPanel;
      const auto count = static_cast<int>(std::min<std::int64_t>(kPanel, matrix.rows - first));
      matrix.rows = first + count;
      head_.matmul_.matmul(matrix, panel, panel + 1, x_, 1, values_, head_.logits_.stride);
      head_.layer_.softcap_max(values_ + first, count, head_.softcap_);
    }
  }

 private:
  void prefetch(std::int64_t panel) const {
    const PackedMatrix& matrix = head_.head_.matrix();
    const auto at = static_cast<std::size_t>(panel);
    const auto fetch = [](const std::byte* data, std::size_t bytes) {
      for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(data + line, 0, 2);
    };
    fetch(matrix.data + at * matrix.panel_bytes, matrix.panel_bytes);
    fetch(matrix.split->rest + at * matrix.split->rest_bytes, matrix.split->rest_bytes);
  }

  const ScreenedHead& head_;
  Activations x_;
  float* values_;
};

std::optional<TokenId> ScreenedHead::choose(const VerifyGroup& group, int row, NoiseKey noise, int worker) {
  const int output = group.first_output + row;
  if (!(slack_[static_cast<std::size_t>(output)] >= 0.0F)) return std::nullopt;
  const BoundedRow bounds{logits_.values + output * logits_.stride, logits_.chunk_max + output * logits_.chunk_stride};
  Row source(*this, output);
  BoundedChoice& choice = choices_[static_cast<std::size_t>(worker)];
  const std::optional<TokenId> token = choice.choose(bounds, *group.sampling, noise, source);
  panels_[static_cast<std::size_t>(worker) * kApart] += choice.panels();
  return token;
}

void ScreenedHead::complete() {
  compute_logits(pool_, matmul_, layer_, head_.matrix(), x_, outputs_, softcap_, logits_);
  completed_ = true;
  --steps_;
}

}  // namespace draftwerk::cpu
