// Chooses tokens on the CPU exactly as cpp/backend/sampling.h defines it, reading as little of a row as it can.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
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

/// What may choose the tokens of rows without all of their logits.
class RowScreen {
 public:
  RowScreen() = default;
  RowScreen(const RowScreen&) = delete;
  RowScreen& operator=(const RowScreen&) = delete;
  RowScreen(RowScreen&&) = delete;
  RowScreen& operator=(RowScreen&&) = delete;
  virtual ~RowScreen() = default;
  /// The token that row `row` of a group chooses, if that can be said. One call at a time for each worker of the pool.
  [[nodiscard]] virtual std::optional<TokenId> choose(const VerifyGroup& group, int row, NoiseKey noise,
                                                      int worker) = 0;
  /// Computes all logits of all rows.
  virtual void complete() = 0;
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

  /// results[g] becomes what groups[g] accepts: the group's first row chooses the token at `position`; if a draft that
  /// follows the last known token equals it, that draft's row chooses the next one, and so on until no draft does. Rows
  /// are chosen in parallel; which thread does it, and what else is in the step, changes nothing. A row without any
  /// finite logit gives token 0. Log-probabilities are filled if sampling->logprobs >= 0, `top` if it is > 0.
  /// With a `screen` that chooses first, the logits are there once it has completed them.
  void verify_logits(const LogitRows& logits, std::span<const VerifyGroup> groups, std::span<VerifyResult> results,
                     WorkerPool& pool, RowScreen* screen = nullptr);

  /// Finds `count` candidates for each of the rows (Backend::propose), where verify_logits would choose in row i of the
  /// logits, were it the row behind the last draft of rows[i]. No log-probabilities are taken.
  void propose(const LogitRows& logits, std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates,
               WorkerPool& pool);

 private:
  struct Scratch;
  struct Choice;
  struct Task {
    int group = 0;
    int row = 0;  ///< within the group
  };

  void choose_row(const LogitRows& logits, const VerifyGroup& group, int row, Scratch& scratch, RowScreen* screen,
                  int worker);
  [[nodiscard]] bool is_undecided(const VerifyGroup& group, int row) const;
  [[nodiscard]] bool is_out(const VerifyGroup& group, int row) const;
  void record(const VerifyGroup& group, VerifyResult& result) const;
  void choose(const LogitRows& logits, const VerifyGroup& group, int row, Scratch& scratch, Choice& choice) const;
  void find_candidates(float* values, float* chunk_max, const ProposeRow& row, bool keep_original, Scratch& scratch,
                       std::span<Candidate> candidates, double* normalizer) const;
  void record_logprobs(const LogitRow& row, int count, Scratch& scratch, Choice& choice) const;
  void adjust(float* values, float* chunk_max, const ProposeRow& row, bool keep_original, Scratch& scratch) const;
  void exclude(TokenId token, float* values, float* chunk_max) const;
  void refresh_maximum(int chunk, const float* values, float* chunk_max) const;
  [[nodiscard]] Candidate choose_sampled(const LogitRow& row, const SamplingParams& sampling, NoiseKey noise) const;

  const SamplerKernels& kernels_;
  int vocabulary_;
  std::vector<Scratch> scratch_;  ///< one per worker
  std::vector<Choice> choices_;   ///< one per output row
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<TokenId>[]> chosen_;  ///< per output row, the token chosen there, -1 until it is
  int max_rows_;
};

}  // namespace draftwerk::cpu
