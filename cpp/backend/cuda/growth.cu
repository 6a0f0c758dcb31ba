#include "backend/cuda/growth.h"

#include <cfloat>

#include "backend/cuda/block_reduction.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/noise.cuh"
#include "backend/draft_choice.h"

namespace draftwerk::cuda {
namespace {

/// A draft that was found: candidate `branch` of a pass.
constexpr int kNodes = kMostPassesAhead * kDraftBranches;

struct GrowArguments {
  GrowthView step;
  const ProposedRow* proposed;
  const SampledRow* proposing;
};

/// The chances of a pass's candidates; returns how many there are.
__device__ int chances_of(const ProposedRow& found, const SampledRow& row, int pass, float* chances) {
  const bool greedy = row.way == Way::greedy;
  // Log of the sum of exp(z), whose weights are in units of 2^-40.
  const double normalizer = static_cast<double>(found.largest) + log(ldexp(static_cast<double>(found.mass), -40));
  const int count = min(found.count, kDraftBranches);
  float probability[kDraftBranches];
  for (int i = 0; i < count; ++i) {
    float z = found.value[i];
    if (!greedy) z = __fsub_rn(z, gumbel(word_of_token(row.seed, row.position + pass, found.token[i])));
    probability[i] = static_cast<float>(exp(fmin(static_cast<double>(z) - normalizer, 0.0)));
  }
  draft_chances(found.value, probability, count, greedy, chances);
  return count;
}

/// A tree in each block, a thread for each draft that was found. The same as drafting/draft_tree.h makes of passes that
/// went ahead. Bound by the latency of some exponentials and two barriers, a few us.
__global__ void __launch_bounds__(kNodes) grow(const GrowArguments a) {
  follow_previous();
  __shared__ float chances[kMostPassesAhead][kDraftBranches];
  __shared__ int counts[kMostPassesAhead];
  __shared__ float reaches[kNodes];
  __shared__ int rows[kMostPassesAhead];  // of the first candidate of each pass, in the segment
  const StepGrowth growth = a.step.growths[blockIdx.x];
  if (growth.drafts == 0) return;
  const int node = thread();
  const int pass = node / kDraftBranches;
  const int branch = node % kDraftBranches;
  const ProposedRow* found = a.proposed + growth.proposed;
  if (node < growth.passes) {
    const ProposedRow& of_pass = found[static_cast<std::int64_t>(node) * growth.outputs];
    counts[node] = chances_of(of_pass, a.proposing[growth.proposed], node, chances[node]);
  }
  // Where less was found than there are rows, the rest are drafts of token 0: as good as any.
  for (int draft = node; draft < growth.drafts; draft += kNodes) {
    const std::int64_t row = std::int64_t{growth.first_row} + 1 + draft;
    a.step.tokens[row] = 0;
    a.step.positions[row] = growth.first_position + 1;
    a.step.paths[row * kMaxPath] = 0;
    a.step.paths[row * kMaxPath + 1] = static_cast<std::uint8_t>(1 + draft);
  }
  __syncthreads();
  float reach = -1.0F;  // there is no such draft
  if (pass < growth.passes && branch < counts[pass]) {
    reach = 1.0F;
    for (int p = 0; p < pass; ++p) reach = counts[p] > 0 ? reach * chances[p][0] : -1.0F;
    reach *= chances[pass][branch];
  }
  reaches[node] = reach;
  __syncthreads();
  int rank = 0;
  for (int other = 0; other < kNodes; ++other) {
    rank += reaches[other] > reach || (reaches[other] == reach && other < node) ? 1 : 0;
  }
  const bool kept = reach >= 0.0F && rank < growth.drafts;
  if (branch == 0) rows[pass] = 1 + rank;
  __syncthreads();
  if (!kept) return;
  // None is likelier than the one that it follows: that one was kept, and is before it.
  const std::int64_t row = std::int64_t{growth.first_row} + 1 + rank;
  a.step.tokens[row] = found[static_cast<std::int64_t>(pass) * growth.outputs].token[branch];
  a.step.positions[row] = growth.first_position + 1 + pass;
  for (int p = 0; p < pass; ++p) a.step.paths[row * kMaxPath + 1 + p] = static_cast<std::uint8_t>(rows[p]);
  a.step.paths[row * kMaxPath + 1 + pass] = static_cast<std::uint8_t>(1 + rank);
}

struct TellArguments {
  StepView step;
  SampledRow* rows;
};

/// A thread for each output row: latency only.
__global__ void tell(const TellArguments a) {
  follow_previous();
  const int output = static_cast<int>(blockIdx.x) * threads() + thread();
  if (output >= a.step.outputs || a.rows[output].way == Way::none) return;
  const std::int32_t row = a.step.output_rows[output];
  if (a.step.row_segment[row] < 0) return;
  const StepSegment& segment = a.step.segments[a.step.row_segment[row]];
  const int draft = row - segment.first_row;
  if (segment.grown == 0 || draft == 0) return;
  const int depth = a.step.positions[row] - segment.first_position;
  SampledRow& its = a.rows[output];
  its.parent = a.step.paths[static_cast<std::int64_t>(row) * kMaxPath + depth - 1];
  its.draft = a.step.tokens[row];
  its.position = a.rows[output - draft].position + depth;
}

}  // namespace

void grow_trees(LaunchList& list, const StepUpload& step, const ProposedRow* proposed, const SampledRow* proposing) {
  list.add(grow, {dim3(static_cast<unsigned>(step.growths())), dim3(kNodes)}, {step.growing(), proposed, proposing});
}

void tell_rows(LaunchList& list, const StepView& step, SampledRow* rows) {
  constexpr unsigned kThreads = 128;
  const unsigned blocks = (static_cast<unsigned>(step.outputs) + kThreads - 1) / kThreads;
  list.add(tell, {dim3(blocks), dim3(kThreads)}, {step, rows});
}

}  // namespace draftwerk::cuda
