// Chooses tokens on the CPU exactly as cpp/backend/sampling.h defines it, reading as little of a row as it can.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/sampler_kernels.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

/// Logits of a step's output rows as the head left them. The sampler overwrites what penalties, bias and bans touch.
struct LogitRows {
  float* values = nullptr;  ///< [outputs, stride] float32
  std::int64_t stride = 0;  ///< floats from row to row, >= vocabulary
  int vocabulary = 0;       ///< that of the Sampler
  /// [outputs, chunk_stride]: chunk_max[r * chunk_stride + c] is the largest of values[r][c * kLogitChunk ...], NaN
  /// ignored (accumulate as v > m ? v : m from minus infinity).
  float* chunk_max = nullptr;
  std::int64_t chunk_stride = 0;
};

/// Chooses tokens. One call at a time; all memory it needs is taken at construction, except that the record of
/// overwritten logits (log-probabilities together with penalties) grows to the longest history seen.
class Sampler {
 public:
  /// `max_rows`: the most output rows of a step; `workers`: the most threads of a pool passed to verify_logits.
  Sampler(Isa isa, int vocabulary, int max_rows, int workers);
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;
  Sampler(Sampler&&) = delete;
  Sampler& operator=(Sampler&&) = delete;
  ~Sampler();

  /// results[g] becomes what groups[g] accepts: in row i of the group the token at position + i is chosen; while it
  /// equals drafts[i] the next row decides, otherwise (or after the last draft) the group ends. Rows are chosen in
  /// parallel; which thread does it, and what else is in the step, changes nothing. A row without any finite logit
  /// gives token 0. Log-probabilities are filled if sampling->logprobs >= 0, `top` if it is > 0.
  void verify_logits(const LogitRows& logits, std::span<const VerifyGroup> groups, std::span<VerifyResult> results,
                     WorkerPool& pool);

  /// tokens[i] becomes what verify_logits would choose in row i of the logits, were it the row behind the last draft of
  /// rows[i]. No log-probabilities are taken.
  void propose(const LogitRows& logits, std::span<const ProposeRow> rows, std::span<TokenId> tokens, WorkerPool& pool);

 private:
  struct Scratch;
  struct Choice;
  struct Task {
    int group = 0;
    int row = 0;  ///< within the group
  };

  void choose(const LogitRows& logits, const VerifyGroup& group, int row, Scratch& scratch, Choice& choice) const;
  TokenId choose_token(float* values, float* chunk_max, const VerifyGroup& group, int row, bool keep_original,
                       Scratch& scratch) const;
  void record_logprobs(const LogitRow& row, int count, Scratch& scratch, Choice& choice) const;
  void adjust(float* values, float* chunk_max, const VerifyGroup& group, int row, bool keep_original,
              Scratch& scratch) const;
  [[nodiscard]] TokenId choose_greedy(const LogitRow& row) const;
  TokenId choose_sampled(const LogitRow& row, const SamplingParams& sampling, NoiseKey noise, Scratch& scratch) const;
  int collect_top(const LogitRow& row, int k, Scratch& scratch, Cut& cut) const;

  const SamplerKernels& kernels_;
  int vocabulary_;
  std::vector<Scratch> scratch_;  ///< one per worker
  std::vector<Choice> choices_;   ///< one per output row
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<int>[]> rejected_;  ///< per group, the first row known to disagree with its draft
  int max_rows_;
};

}  // namespace draftwerk::cpu
