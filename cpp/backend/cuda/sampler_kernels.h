// The launches by which tokens are chosen, and what they read and write. Logits are taken in chunks, of which the best
// ranks are kept (logit_row.cuh); most choices look at few chunks after that.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/logits.h"

namespace draftwerk::cuda {

/// Passes that may follow each other in a step (Backend::passes_ahead).
inline constexpr int kMostPassesAhead = 16;
/// Candidates of a row, at most.
inline constexpr int kMaxCandidates = 8;
/// The most probable tokens of a row that are reported, at most.
inline constexpr int kMaxTop = 64;
/// The best tokens of a row that are taken into a list, at most.
inline constexpr int kListCapacity = 2048;

/// How a row is chosen from.
enum class Way : std::int32_t {
  none,    ///< it is there for padding
  greedy,  ///< step 4 of sampling.h
  listed,  ///< steps 5 to 9, from a list of the top_k
  whole,   ///< the same where top_k keeps all, or more than fit into a list
};

/// A token whose logit is changed before choosing.
struct Adjustment {
  std::int32_t token;  ///< of the vocabulary
  /// Of a penalty: how often it occurs in the output before the group's first row, times 2, plus 1 if it occurs in the
  /// prompt. Of a bias: that, as the bits of a float. Of a ban: nothing.
  std::int32_t value;
};

/// One output row: its sampling parameters, and its place in its group.
struct SampledRow {
  std::uint64_t seed;
  std::int64_t position;  ///< of the token that is chosen
  float scale;            ///< 1 / temperature; 1 where the choice is greedy
  float limit;            ///< of z: FLT_MAX; infinity where the choice is greedy
  float top_p;
  float log_min_p;  ///< minus infinity: min_p is 0
  Way way;
  std::int32_t top_k;  ///< 0 where it keeps all
  std::int32_t needs_mass;
  std::int32_t logprobs;  ///< as in SamplingParams
  /// Adjustments of the row: penalties [penalties, biases) of distinct tokens, biases [biases, bans) sorted by token,
  /// those of a token in the order of the request, bans [bans, adjustments_end) of distinct tokens.
  std::int32_t penalties;
  std::int32_t biases;
  std::int32_t bans;
  std::int32_t adjustments_end;
  std::int32_t originals;  ///< where the logits that are changed are kept, one for each adjustment; -1: nowhere
  std::int32_t path;       ///< where the drafts before the row begin in SamplerView::adjustments, by their tokens
  std::int32_t path_length;
  float repetition_penalty;
  float presence_penalty;
  float frequency_penalty;
  std::int32_t group_rows;  ///< of a group's first row: how many it has
  std::int32_t parent;      ///< of a draft's row: the row of the group that it follows
  std::int32_t draft;       ///< its token
  std::int32_t unused;
};

/// Of a row that was accepted, as the group's i-th, at index first_output + i.
struct AcceptedToken {
  std::int32_t token;
  std::int32_t draft;  ///< which one it is; -1: it is the target's own, the last one
};

/// What log-probabilities are made of: z = min(logit, FLT_MAX).
struct RowLogprobs {
  struct Token {
    std::int32_t token;
    float z;
  };
  std::uint64_t mass;
  float largest;       ///< z; minus infinity if no logit is finite
  float chosen;        ///< the logit of the chosen token
  std::int32_t count;  ///< of `top`
  std::int32_t unused;
  Token top[kMaxTop];  ///< the most probable, descending
};

/// The candidates of a row.
struct ProposedRow {
  std::uint64_t mass;
  float largest;       ///< z
  std::int32_t count;  ///< candidates that have a finite logit
  std::int32_t token[kMaxCandidates];
  float value[kMaxCandidates];
};

/// Memory on the device.
struct SamplerView {
  LogitRows logits;
  const SampledRow* rows;         ///< [outputs]
  const Adjustment* adjustments;  ///< of all rows
  std::uint64_t* best;            ///< [outputs, chunks] best ranks
  std::uint64_t* winners;         ///< [outputs, chunks] ranks of the largest z + gumbel
  std::uint64_t* masses;          ///< [outputs, blocks of weigh] parts of the row's mass
  float* originals;
  std::int32_t* chosen;     ///< [outputs]
  AcceptedToken* accepted;  ///< [outputs]
  RowLogprobs* logprobs;    ///< [outputs]
  ProposedRow* proposed;    ///< [outputs]
  // Of a pass that drafts ahead: how many were before it, and where the first candidate of a row becomes its token.
  std::int32_t* tokens;             ///< [rows]; null: nowhere
  const std::int32_t* output_rows;  ///< [outputs]
  std::int32_t passes_before;
  std::int32_t unused;
};

/// What some row of a step needs.
struct SamplerNeeds {
  bool logprobs = false;
  bool adjustments = false;
  bool passes = false;  ///< over all tokens: their mass or their noise
};

/// Chooses at every output row and follows the drafts: view.accepted, view.logprobs.
void record_verify(LaunchList& list, const SamplerView& view, int outputs, SamplerNeeds needs);
/// Finds `count` candidates for every output row: view.proposed.
void record_propose(LaunchList& list, const SamplerView& view, int outputs, int count, SamplerNeeds needs);

/// How many of SamplerView::best and ::winners, and how many of ::masses, each output has.
int sampler_chunks(int columns);
int sampler_mass_blocks(int columns);

}  // namespace draftwerk::cuda
