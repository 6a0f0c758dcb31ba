// Chooses tokens on the device exactly as cpp/backend/sampling.h defines it. Logits stay there: what comes back are the
// accepted tokens, or candidates, and what their probabilities are made of.
//
// A verification and a round of drafts are made of three calls each: stage_* says which parameters to copy to the
// device in front of a step's launches, record_* appends the launches, finish_* reads what was copied back once
// somebody has waited for the step. The two have memory of their own: a verification may be staged while the drafts
// before it are still being found. Of each kind one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/logits.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/sampler_kernels.h"
#include "backend/cuda/step_upload.h"

namespace draftwerk::cuda {

class Sampler {
 public:
  /// Makes room for steps of up to `max_outputs` output rows, with padding, over a vocabulary of that size, which is
  /// the same in all calls. Only parameters that grow with a request (its history, its biases) may need more later.
  void reserve(int max_outputs, int vocabulary);

  /// Parameters of Backend::verify for a step of `outputs` rows; those that belong to no group are padding. Appends to
  /// `in` what to copy before the launches.
  void stage_verify(std::span<const VerifyGroup> groups, int outputs, std::vector<Copy>& in);
  /// The launches for what was staged last. They are the same bytes for all steps of as many outputs of the same kinds
  /// (any penalty, bias or ban; any log-probabilities; any choice that needs all tokens), if `logits` is the same.
  /// Appends to `out` what to copy behind them.
  /// `grown`: a step in which trees of drafts grow, which its rows are told of first; null: there are none.
  void record_verify(LaunchList& list, const LogitRows& logits, int outputs, const StepView* grown,
                     std::vector<Copy>& out) const;
  /// Results as of Backend::verify, for the groups that were staged.
  void finish_verify(std::span<const VerifyGroup> groups, int outputs, std::span<VerifyResult> results) const;

  /// The same of Backend::propose, and of Backend::propose_ahead, whose passes are staged once, recorded one by one and
  /// collected at the end: row i of the logits is that of rows[i], rows behind those are padding.
  /// 0 < count <= kMaxCandidates, 0 <= pass < kMostPassesAhead.
  void stage_propose(std::span<const ProposeRow> rows, int count, int outputs, std::vector<Copy>& in);
  /// `ahead`: the step, whose tokens the first candidates become; null: none do.
  void record_propose(LaunchList& list, const LogitRows& logits, int count, int outputs, int pass,
                      const StepUpload* ahead) const;
  /// Appends to `out` what to copy behind the launches of so many passes.
  void collect(int passes, int outputs, std::vector<Copy>& out) const;
  void finish_propose(std::span<const ProposeRow> rows, int count, int outputs, int pass,
                      std::span<Candidate> candidates) const;
  /// What was found, [passes, outputs], and what it was chosen by, on the device.
  [[nodiscard]] const ProposedRow* proposed() const;
  [[nodiscard]] const SampledRow* proposing() const;

 private:
  void begin_staging(int outputs);
  SampledRow make_row(const ProposeRow& group, std::span<const TokenId> drafts, int count);
  void add_penalties(const ProposeRow& group, std::span<const TokenId> drafts);
  void add_adjustment(TokenId token, std::int32_t value);
  [[nodiscard]] std::int32_t next_adjustment() const;
  void stage_row(int output, SampledRow row, const ProposeRow& group, int depth);
  void finish_staging(MirroredMemory& memory, std::vector<Copy>& in);
  [[nodiscard]] SamplerView view(const LogitRows& logits, const MirroredMemory& staged, int outputs) const;

  int vocabulary_ = 0;
  MirroredMemory verifying_;  ///< rows, then adjustments
  MirroredMemory verified_;   ///< accepted tokens, then log-probabilities
  MirroredMemory proposing_;  ///< rows, then adjustments
  MirroredMemory proposed_;   ///< candidates, pass by pass
  // As in SamplerView.
  GrowingMemory best_;
  GrowingMemory winners_;
  GrowingMemory masses_;
  GrowingMemory chosen_;
  GrowingMemory originals_;

  // What is being staged.
  std::vector<SampledRow> rows_;
  std::vector<Adjustment> adjustments_;
  std::vector<int> depths_;  ///< of the rows of a group: drafts before each
  std::size_t originals_count_ = 0;
  SamplerNeeds needs_;
};

}  // namespace draftwerk::cuda
