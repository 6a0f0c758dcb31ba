#include "backend/cpu/sampler.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <utility>

#include "backend/cpu/choosing.h"

namespace draftwerk::cpu {

const SamplerKernels& sampler_kernels(Isa isa) {
  if (vector_isa(isa) == Isa::avx512) return avx512::kSamplerKernels;
  if (isa == Isa::avx2) return avx2::kSamplerKernels;
  return portable::kSamplerKernels;
}

namespace {

/// A greedy row takes a microsecond, about what it costs to wake a worker.
constexpr std::int64_t kGreedyGrain = 8;
/// What a screen could not choose.
constexpr TokenId kUndecided = -2;

bool keeps(Cut cut, float z, TokenId token) { return z > cut.value || (z == cut.value && token <= cut.last); }

/// The draft that a draft follows; -1: the last known token.
int parent_of(const VerifyGroup& group, int draft) {
  return group.parents.empty() ? draft - 1 : group.parents[static_cast<std::size_t>(draft)];
}

/// The draft that follows draft `parent` (-1: the last known token) and is `token`; -1 if there is none.
int draft_of(const VerifyGroup& group, int parent, TokenId token) {
  for (int draft = parent + 1; draft < static_cast<int>(group.drafts.size()); ++draft) {
    if (parent_of(group, draft) == parent && group.drafts[static_cast<std::size_t>(draft)] == token) return draft;
  }
  return -1;
}

/// The drafts from the last known token to row `row` of a group, copied to the end of `path` where they lie apart.
std::span<const TokenId> drafts_before(const VerifyGroup& group, int row, std::vector<TokenId>& path) {
  if (group.parents.empty()) return group.drafts.first(static_cast<std::size_t>(row));
  std::size_t first = path.size();
  for (int draft = row - 1; draft >= 0; draft = parent_of(group, draft)) {
    path[--first] = group.drafts[static_cast<std::size_t>(draft)];
  }
  return std::span<const TokenId>(path).subspan(first);
}

/// `logit` NaN counts as minus infinity, as does every token of a row without a finite logit.
float log_probability(float logit, double normalizer) {
  const double difference = static_cast<double>(scaled(logit, 1.0F)) - normalizer;
  return std::isnan(difference) ? kMinusInfinity : static_cast<float>(difference);
}

}  // namespace

struct alignas(64) Sampler::Scratch {
  std::vector<float> z;
  std::vector<TokenId> tokens;
  std::vector<std::uint8_t> touched;                ///< per chunk: its maximum is out of date
  std::vector<std::pair<TokenId, float>> original;  ///< the logits that were overwritten, as they were
  std::vector<TokenId> path;                        ///< [max_rows]
};

struct Sampler::Choice {
  TokenId token = 0;
  float logprob = 0.0F;
  double normalizer = 0.0;  ///< log of the sum of exp(logit)
  std::vector<TokenLogprob> top;
};

Sampler::Sampler(Isa isa, int vocabulary, int max_rows, int workers)
    : kernels_(sampler_kernels(isa)),
      vocabulary_(vocabulary),
      scratch_(static_cast<std::size_t>(workers)),
      choices_(static_cast<std::size_t>(max_rows)),
      chosen_(std::make_unique<std::atomic<TokenId>[]>(static_cast<std::size_t>(max_rows))),
      max_rows_(max_rows) {
  const auto chunks = static_cast<std::size_t>((vocabulary + kLogitChunk - 1) / kLogitChunk);
  for (Scratch& scratch : scratch_) {
    scratch.z.assign(kListCapacity, kMinusInfinity);
    scratch.tokens.assign(kListCapacity, 0);
    scratch.touched.assign(chunks, 0);
    scratch.path.assign(static_cast<std::size_t>(max_rows), 0);
  }
  tasks_.reserve(static_cast<std::size_t>(max_rows));
}

Sampler::~Sampler() = default;

void Sampler::verify_logits(const LogitRows& logits, std::span<const VerifyGroup> groups,
                            std::span<VerifyResult> results, WorkerPool& pool, RowScreen* screen) {
  // Rows in the order of their place in the group: a later row is needed only if the drafts before it were right.
  tasks_.clear();
  bool heavy = screen != nullptr;
  std::size_t longest = 0;
  for (const VerifyGroup& group : groups) longest = std::max(longest, group.drafts.size());
  for (std::size_t row = 0; row <= longest; ++row) {
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (row <= groups[g].drafts.size()) tasks_.push_back({static_cast<int>(g), static_cast<int>(row)});
    }
  }
  for (const VerifyGroup& group : groups) {
    const SamplingParams& sampling = *group.sampling;
    heavy = heavy || sampling.temperature > 0.0F || sampling.needs_history() || sampling.logprobs >= 0;
    const auto first = static_cast<std::size_t>(group.first_output);
    for (std::size_t row = 0; row <= group.drafts.size(); ++row) {
      chosen_[first + row].store(-1, std::memory_order_relaxed);
    }
  }

  const std::int64_t grain = heavy ? 1 : kGreedyGrain;
  pool.parallel_for(static_cast<std::int64_t>(tasks_.size()), grain,
                    [&](std::int64_t begin, std::int64_t end, int worker) {
                      for (std::int64_t i = begin; i < end; ++i) {
                        const Task task = tasks_[static_cast<std::size_t>(i)];
                        const VerifyGroup& group = groups[static_cast<std::size_t>(task.group)];
                        if (is_out(group, task.row)) continue;
                        choose_row(logits, group, task.row, scratch_[static_cast<std::size_t>(worker)], screen, worker);
                      }
                    });
  if (screen != nullptr && std::any_of(tasks_.begin(), tasks_.end(), [&](const Task& task) {
        return is_undecided(groups[static_cast<std::size_t>(task.group)], task.row);
      })) {
    screen->complete();
    for (const Task& task : tasks_) {
      const VerifyGroup& group = groups[static_cast<std::size_t>(task.group)];
      if (is_undecided(group, task.row)) choose_row(logits, group, task.row, scratch_[0], nullptr, 0);
    }
  }
  for (std::size_t g = 0; g < groups.size(); ++g) record(groups[g], results[g]);
}

/// Chooses the token of a row, if need be from all of its logits unless there is a screen.
void Sampler::choose_row(const LogitRows& logits, const VerifyGroup& group, int row, Scratch& scratch,
                         RowScreen* screen, int worker) {
  const auto output = static_cast<std::size_t>(group.first_output + row);
  Choice& choice = choices_[output];
  if (screen == nullptr) {
    choose(logits, group, row, scratch, choice);
  } else {
    const NoiseKey noise{group.sampling->seed,
                         group.position + static_cast<std::int64_t>(drafts_before(group, row, scratch.path).size())};
    choice.token = screen->choose(group, row, noise, worker).value_or(kUndecided);
  }
  chosen_[output].store(choice.token, std::memory_order_relaxed);
}

/// Whether a row that may count is one of which the screen could not say what it chooses.
bool Sampler::is_undecided(const VerifyGroup& group, int row) const {
  const auto output = static_cast<std::size_t>(group.first_output + row);
  return chosen_[output].load(std::memory_order_relaxed) == kUndecided && !is_out(group, row);
}

/// Whether some draft that a row stands behind is known to be wrong: then nobody asks what would be chosen there.
bool Sampler::is_out(const VerifyGroup& group, int row) const {
  for (int draft = row - 1; draft >= 0; draft = parent_of(group, draft)) {
    const auto output = static_cast<std::size_t>(group.first_output + parent_of(group, draft) + 1);
    const TokenId chosen = chosen_[output].load(std::memory_order_relaxed);
    if (chosen >= 0 && chosen != group.drafts[static_cast<std::size_t>(draft)]) return true;
  }
  return false;
}

/// Follows the drafts that were chosen.
void Sampler::record(const VerifyGroup& group, VerifyResult& result) const {
  const int logprobs = group.sampling->logprobs;
  result.tokens.clear();
  result.drafts.clear();
  result.logprobs.clear();
  int draft = -1;
  while (true) {
    const Choice& choice = choices_[static_cast<std::size_t>(group.first_output + draft + 1)];
    result.tokens.push_back(choice.token);
    if (logprobs >= 0) result.logprobs.push_back(choice.logprob);
    draft = draft_of(group, draft, choice.token);
    if (draft < 0) break;
    result.drafts.push_back(draft);
  }
  result.top.resize(logprobs > 0 ? result.tokens.size() : 0);
  for (std::size_t i = 0; i < result.top.size(); ++i) {
    const int row = i == 0 ? 0 : result.drafts[i - 1] + 1;
    result.top[i] = choices_[static_cast<std::size_t>(group.first_output + row)].top;
  }
}

void Sampler::propose(const LogitRows& logits, std::span<const ProposeRow> rows, int count,
                      std::span<Candidate> candidates, WorkerPool& pool) {
  const bool heavy = std::any_of(rows.begin(), rows.end(), [](const ProposeRow& row) {
    return row.sampling->temperature > 0.0F || row.sampling->needs_history();
  });
  const auto each = static_cast<std::size_t>(count);
  const auto choose_rows = [&](std::int64_t begin, std::int64_t end, int worker) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const std::span<Candidate> found = candidates.subspan(at * each, each);
      double normalizer = 0.0;
      find_candidates(logits.values + i * logits.stride, logits.chunk_max + i * logits.chunk_stride, rows[at], false,
                      scratch_[static_cast<std::size_t>(worker)], found, &normalizer);
      set_probabilities(kernels_, rows[at], normalizer, found);
    }
  };
  pool.parallel_for(static_cast<std::int64_t>(rows.size()), heavy ? 1 : kGreedyGrain, choose_rows);
}

/// One row, by the list in sampling.h, with its log-probabilities.
void Sampler::choose(const LogitRows& logits, const VerifyGroup& group, int row, Scratch& scratch,
                     Choice& choice) const {
  const SamplingParams& sampling = *group.sampling;
  const std::int64_t output = group.first_output + row;
  float* values = logits.values + output * logits.stride;
  float* chunk_max = logits.chunk_max + output * logits.chunk_stride;

  const bool wants_logprobs = sampling.logprobs >= 0;
  if (wants_logprobs) record_logprobs({values, chunk_max, vocabulary_, 1.0F}, sampling.logprobs, scratch, choice);
  const ProposeRow place{drafts_before(group, row, scratch.path),
                         group.position,
                         group.sampling,
                         group.history,
                         group.banned,
                         group.banned_tokens};
  Candidate best;
  find_candidates(values, chunk_max, place, wants_logprobs, scratch, std::span(&best, 1), nullptr);
  choice.token = best.token;
  if (wants_logprobs) {
    float logit = values[choice.token];
    for (const auto& [token, original] : scratch.original) {
      if (token != choice.token) continue;
      logit = original;
      break;
    }
    choice.logprob = log_probability(logit, choice.normalizer);
  }
}

/// One row, by the list in sampling.h, as often as there are candidates. The last one's logit stays as it is. The log
/// of the sum of exp(z) over all tokens goes to `normalizer` unless that is null.
void Sampler::find_candidates(float* values, float* chunk_max, const ProposeRow& row, bool keep_original,
                              Scratch& scratch, std::span<Candidate> candidates, double* normalizer) const {
  const SamplingParams& sampling = *row.sampling;
  adjust(values, chunk_max, row, keep_original, scratch);
  const bool greedy = sampling.temperature <= 0.0F;
  const LogitRow logits{values, chunk_max, vocabulary_, greedy ? 1.0F : 1.0F / sampling.temperature};
  if (normalizer != nullptr) {
    const float top = scaled(row_maximum(logits), logits.scale);
    *normalizer = log_normalizer(top, kernels_.row_mass(logits, kKeepAll, top));
  }
  const std::int64_t enough = sampling.top_k + static_cast<std::int64_t>(candidates.size()) - 1;
  if (!greedy && sampling.top_k > 0 && enough < vocabulary_ && enough <= kListCapacity) {
    const int count = collect_top(kernels_, logits, static_cast<int>(enough), scratch.z.data(), scratch.tokens.data());
    cpu::choose_sampled(kernels_, scratch.z.data(), scratch.tokens.data(), count, sampling, noise_of(row), candidates);
  } else {
    std::fill(candidates.begin(), candidates.end(), kNoCandidate);
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      if (i > 0) exclude(candidates[i - 1].token, values, chunk_max);
      candidates[i] = greedy ? largest(logits) : choose_sampled(logits, sampling, noise_of(row));
      if (candidates[i].token < 0) break;
    }
  }
  if (candidates[0].token < 0) candidates[0].token = 0;
}

void Sampler::record_logprobs(const LogitRow& row, int count, Scratch& scratch, Choice& choice) const {
  choice.top.clear();
  const float top = scaled(row_maximum(row), row.scale);
  choice.normalizer = log_normalizer(top, kernels_.row_mass(row, kKeepAll, top));
  count = std::min({count, vocabulary_, kListCapacity});
  if (count <= 0) return;
  const int found = collect_top(kernels_, row, count, scratch.z.data(), scratch.tokens.data());
  const Cut cut = list_cut(kernels_, {scratch.z.data(), scratch.tokens.data(), found}, count, top);
  for (int i = 0; i < found; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (keeps(cut, scratch.z[at], scratch.tokens[at])) choice.top.push_back({scratch.tokens[at], scratch.z[at]});
  }
  std::sort(choice.top.begin(), choice.top.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob > b.logprob || (a.logprob == b.logprob && a.token < b.token);
  });
  for (TokenLogprob& entry : choice.top) entry.logprob = log_probability(entry.logprob, choice.normalizer);
}

void Sampler::adjust(float* values, float* chunk_max, const ProposeRow& row, bool keep_original,
                     Scratch& scratch) const {
  scratch.original.clear();
  bool changed = false;
  adjust_logits(
      row, [&](TokenId token) { return token >= 0 && token < vocabulary_ ? values + token : nullptr; },
      [&](TokenId token, float logit) {
        if (keep_original) scratch.original.emplace_back(token, logit);
        scratch.touched[static_cast<std::size_t>(token / kLogitChunk)] = 1;
        changed = true;
      });
  if (!changed) return;
  for (std::size_t c = 0; c < scratch.touched.size(); ++c) {
    if (scratch.touched[c] == 0) continue;
    scratch.touched[c] = 0;
    refresh_maximum(static_cast<int>(c), values, chunk_max);
  }
}

/// Takes a token out of the running.
void Sampler::exclude(TokenId token, float* values, float* chunk_max) const {
  values[token] = kMinusInfinity;
  refresh_maximum(token / kLogitChunk, values, chunk_max);
}

void Sampler::refresh_maximum(int chunk, const float* values, float* chunk_max) const {
  const int first = chunk * kLogitChunk;
  chunk_max[chunk] = kernels_.maximum(values + first, std::min(kLogitChunk, vocabulary_ - first));
}

/// Steps 6 to 9 in place.
Candidate Sampler::choose_sampled(const LogitRow& row, const SamplingParams& sampling, NoiseKey noise) const {
  const float top = scaled(row_maximum(row), row.scale);
  if (!(top > kMinusInfinity)) return kNoCandidate;
  Cut cut = kKeepAll;
  if (sampling.top_k > 0 && sampling.top_k < vocabulary_) cut = row_cut(kernels_, row, sampling.top_k, -FLT_MAX);
  const Winner winner = choose_among(WholeRow{kernels_, row}, cut, sampling, top, noise);
  return winner.token == INT_MAX ? kNoCandidate : Candidate{winner.token, winner.score};
}

}  // namespace draftwerk::cpu
