// The target's head with fewer bytes: tokens chosen exactly as from all logits, of which only few are computed.
//
// A coarse product reads two thirds of the head (split_columns.h). What a row n lost, e, moves its logit by e * x, by
// no more than |e| |x'| (Cauchy-Schwarz), x' being the state x in the columns that lost something. These are the ones
// in which states are smallest, as far as the scale of the norm before the head tells. So each logit has an upper
// bound:
//   l(n) <= coarse(n) + |e(n)| |x'| + slack
// whose slack covers what float32 rounds in both products. A softcap keeps the order of what it is given. Rows that by
// their bounds may be chosen (bounded_choice.h) are multiplied whole, by the kernel that would have multiplied all, and
// whoever is chosen is chosen by such logits.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/cpu/bounded_choice.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/split_columns.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

/// A head in split columns, with what its rows lost.
class SplitHead {
 public:
  /// Splits the columns of a q8_0 matrix, which then takes activations in another order (matmul.h); `scale` [columns]
  /// is that of the norm before it.
  SplitHead(const CpuWeight& head, const float* scale, WeightArena& memory, WorkerPool& pool);

  [[nodiscard]] const Weight& weight() const { return weight_; }
  [[nodiscard]] const PackedMatrix& matrix() const { return weight_.matrix(); }
  [[nodiscard]] const SplitColumns& columns() const { return *weight_.matrix().split; }
  /// |e| of every row, rounded up.
  [[nodiscard]] const float* lost() const { return lost_.data(); }
  /// The largest |w| + 2 |e| of a row w; not finite if a scale of the matrix is not.
  [[nodiscard]] double longest() const { return longest_; }

 private:
  const CpuWeight& weight_;
  ScratchArray<float> lost_;
  double longest_ = 0.0;
};

/// Which steps are screened, of those that can be: where it is likely to be faster, or, for tests, all of them.
enum class Screening { where_it_pays, always };

/// Whether screening pays, as the last sixteen steps or so tell. Work is that of multiplying rows whole, as a share of
/// a product of all.
class ScreeningPayoff {
 public:
  /// The work of a screened step.
  void add(double work);
  /// Whether the next step shall be screened: no for a while once work has been too much.
  [[nodiscard]] bool next_step();

 private:
  double mean_work_ = 0.0;
  int pause_ = 0;  ///< steps that are not to be screened
};

class ScreenedHead final : public RowScreen {
 public:
  /// Scratch for up to `max_outputs` rows. Everything but the ISA outlives the object.
  ScreenedHead(const SplitHead& head, Isa isa, const MatmulKernels& matmul, const LayerKernels& layer, WorkerPool& pool,
               int max_outputs, Screening screening);

  /// Whether these groups' tokens are to be chosen so: whether they can be, as nothing but temperature, top_k, top_p
  /// and min_p matters and there is some top_k unless the choice is greedy, and whether that pays.
  [[nodiscard]] bool takes(std::span<const VerifyGroup> groups, int outputs);

  /// Fills `logits` with upper bounds of the logits of `outputs` rows; `x` holds their states in the order of the split
  /// columns, and stays as it is until the rows are chosen, for which `logits` are overwritten.
  void bound(const Activations& x, int outputs, float softcap, const LogitRows& logits);

  [[nodiscard]] std::optional<TokenId> choose(const VerifyGroup& group, int row, NoiseKey noise, int worker) override;
  void complete() override;

  /// Steps that were screened to the end, without all logits.
  [[nodiscard]] std::int64_t steps() const { return steps_; }

 private:
  class Row;
  [[nodiscard]] bool can_choose(const VerifyGroup& group) const;
  [[nodiscard]] bool pays(std::span<const VerifyGroup> groups);
  void count_work();

  const SplitHead& head_;
  const MatmulKernels& matmul_;
  const LayerKernels& layer_;
  WorkerPool& pool_;
  std::vector<BoundedChoice> choices_;  ///< one per worker
  std::vector<float> reach_;            ///< [max_outputs] |x'|
  std::vector<float> slack_;            ///< [max_outputs]; NaN: there is no bound

  // The step.
  Activations x_;
  int outputs_ = 0;
  float softcap_ = 0.0F;
  LogitRows logits_;

  Screening screening_;
  ScreeningPayoff payoff_;
  std::vector<std::int64_t> panels_;  ///< that this step multiplied whole, one count per worker
  bool completed_ = false;            ///< this step
  std::int64_t steps_ = 0;
};

}  // namespace draftwerk::cpu
