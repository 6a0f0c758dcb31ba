#include "backend/cpu/screened_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "backend/cpu/head_product.h"

namespace draftwerk::cpu {
namespace {

// A chosen token's logit may have been capped by two approximations of tanh, each off by less than 2^-20.
constexpr float kSoftcapSlack = 0x1p-18F;
// Logits below this cannot overflow, and neither can what they are made of.
constexpr double kLargestLogit = 0x1p100;
// Steps that have to be completed cost a whole product more; the others save a third of one.
constexpr int kOneStep = 1 << 16;
constexpr int kMostCompleted = kOneStep / 4;
constexpr int kPause = 64;
// Bytes of a head that are split at a time.
constexpr std::int64_t kSplitTogether = std::int64_t{4} << 20;

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
                           WorkerPool& pool, int max_outputs)
    : head_(head),
      matmul_(matmul),
      layer_(layer),
      pool_(pool),
      choices_(static_cast<std::size_t>(pool.size()),
               BoundedChoice(sampler_kernels(isa), static_cast<int>(head.matrix().rows))),
      reach_(static_cast<std::size_t>(max_outputs)),
      slack_(static_cast<std::size_t>(max_outputs)) {}

bool ScreenedHead::takes(std::span<const VerifyGroup> groups) {
  if (!(head_.longest() < std::numeric_limits<double>::infinity())) return false;
  const std::int64_t vocabulary = head_.matrix().rows;
  const bool possible = std::all_of(groups.begin(), groups.end(), [vocabulary](const VerifyGroup& group) {
    const SamplingParams& sampling = *group.sampling;
    const bool few = sampling.top_k > 0 && sampling.top_k <= kMostChosenAmong && sampling.top_k < vocabulary;
    const bool bounded = sampling.temperature <= 0.0F || few;
    const bool bans = !group.banned.empty() && group.banned_tokens > 0;
    return bounded && !bans && !sampling.needs_history() && sampling.logit_bias.empty() && sampling.logprobs < 0;
  });
  if (!possible) return false;
  if (pause_ > 0) {
    --pause_;
    return false;
  }
  return true;
}

void ScreenedHead::bound(const Activations& x, int outputs, float softcap, const LogitRows& logits) {
  x_ = x;
  outputs_ = outputs;
  softcap_ = softcap;
  logits_ = logits;
  const SplitColumns& columns = head_.columns();
  const auto blocks = static_cast<int>(columns.whole.size());
  for (int row = 0; row < outputs; ++row) {
    double all = 0.0;
    double lossy = 0.0;
    for (int b = 0; b < blocks; ++b) {
      const std::int8_t* quants = x.quants + row * x.quant_stride + b * kBlock;
      const double scale = x.scales[row * x.block_stride + b];
      int squares[2] = {0, 0};
      for (int i = 0; i < kBlock; ++i)
        squares[i < columns.whole[static_cast<std::size_t>(b)] * 4] += quants[i] * quants[i];
      all += scale * scale * (squares[0] + squares[1]);
      lossy += scale * scale * squares[0];
    }
    const double size = head_.longest() * std::sqrt(all);
    const auto at = static_cast<std::size_t>(row);
    // Rounding: each product adds `blocks` terms, whose sizes add up to no more than |w| |x|, with an error of 2^-24 of
    // what is there in each of their (blocks + 2) operations; twice that for both, and twice that to be safe.
    reach_[at] = rounded_up(std::sqrt(lossy) * (1.0 + 0x1p-20));
    slack_[at] = rounded_up(size * (blocks + 8) * 0x1p-22);
    // Then there are no bounds: the row is completed.
    if (!(size < kLargestLogit)) slack_[at] = std::numeric_limits<float>::quiet_NaN();
  }
  const float* lost = head_.lost();
  multiply_head(pool_, matmul_.matmul_coarse, head_.matrix(), x, outputs, logits,
                [&](float* values, int row, std::int64_t first, int count) {
                  const auto at = static_cast<std::size_t>(row);
                  float most = layer_.raise_max(values, lost + first, reach_[at], slack_[at], count);
                  if (softcap_ != 0.0F) {
                    layer_.softcap_max(values, count, softcap_);
                    most = layer_.raise_max(values, lost + first, 0.0F, kSoftcapSlack * softcap_, count);
                  }
                  return most;
                });
  // An average over the last 16 steps or so.
  completed_ -= completed_ / 16;
}

/// Logits of an output row by the head itself.
class ScreenedHead::Row final : public PanelSource {
 public:
  Row(const ScreenedHead& head, int output)
      : head_(head), x_(head.x_.from(output)), values_(head.logits_.values + output * head.logits_.stride) {}
  void compute(std::int32_t panel) override {
    const PackedMatrix& matrix = head_.head_.matrix();
    head_.matmul_.matmul(matrix, panel, panel + 1, x_, 1, values_, head_.logits_.stride);
    const std::int64_t first = std::int64_t{panel} * kPanel;
    const auto count = static_cast<int>(std::min<std::int64_t>(kPanel, matrix.rows - first));
    head_.layer_.softcap_max(values_ + first, count, head_.softcap_);
  }

 private:
  const ScreenedHead& head_;
  Activations x_;
  float* values_;
};

std::optional<TokenId> ScreenedHead::choose(const VerifyGroup& group, int row, NoiseKey noise, int worker) {
  const int output = group.first_output + row;
  const BoundedRow bounds{logits_.values + output * logits_.stride, logits_.chunk_max + output * logits_.chunk_stride};
  Row source(*this, output);
  return choices_[static_cast<std::size_t>(worker)].choose(bounds, *group.sampling, noise, source);
}

void ScreenedHead::complete() {
  multiply_head(pool_, matmul_.matmul, head_.matrix(), x_, outputs_, logits_,
                [&](float* values, int /*row*/, std::int64_t /*first*/, int count) {
                  return layer_.softcap_max(values, count, softcap_);
                });
  completed_ += kOneStep / 16;
  if (completed_ > kMostCompleted) pause_ = kPause;
}

}  // namespace draftwerk::cpu
