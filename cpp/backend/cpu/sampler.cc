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
  switch (isa) {
    case Isa::avx512:
      return avx512::kSamplerKernels;
    case Isa::avx2:
      return avx2::kSamplerKernels;
    case Isa::portable:
      break;
  }
  return portable::kSamplerKernels;
}

namespace {

/// Up to this many tokens are copied out of the row and compete as a list; a larger top_k works on the row itself.
constexpr int kListCapacity = 2048;
/// A greedy row takes a microsecond, about what it costs to wake a worker.
constexpr std::int64_t kGreedyGrain = 8;
int chunks_of(const LogitRow& row) { return (row.vocabulary + kLogitChunk - 1) / kLogitChunk; }

/// The largest logit; minus infinity if there is none.
float row_maximum(const LogitRow& row) {
  float top = kMinusInfinity;
  for (int c = 0; c < chunks_of(row); ++c) top = row.chunk_max[c] > top ? row.chunk_max[c] : top;
  return top;
}

bool keeps(Cut cut, float z, TokenId token) { return z > cut.value || (z == cut.value && token <= cut.last); }

/// Of the tokens with z == value, the one that is the n-th in id order, n >= 1.
TokenId nth_equal(const LogitRow& row, float value, int n) {
  for (int token = 0; token < row.vocabulary; ++token) {
    if (token % kLogitChunk == 0 && !(scaled(row.chunk_max[token / kLogitChunk], row.scale) >= value)) {
      token += kLogitChunk - 1;
      continue;
    }
    if (scaled(row.values[token], row.scale) == value && --n == 0) return token;
  }
  return INT_MAX;
}

/// Keeps the k tokens of the largest z, given a bound that at least k tokens reach, or the lowest number.
Cut row_cut(const SamplerKernels& kernels, const LogitRow& row, int k, float bound) {
  const float top = scaled(row_maximum(row), row.scale);
  const Threshold found =
      find_threshold(k, bound, top, [&](float threshold) { return kernels.row_count_at_least(row, threshold); });
  return {found.value, found.exact ? INT_MAX : nth_equal(row, found.value, k - found.above)};
}

double log_normalizer(float top, std::uint64_t mass) {
  return static_cast<double>(top) + std::log(std::ldexp(static_cast<double>(mass), -kWeightFractionBits));
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
      rejected_(std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(max_rows))),
      max_rows_(max_rows) {
  const auto chunks = static_cast<std::size_t>((vocabulary + kLogitChunk - 1) / kLogitChunk);
  for (Scratch& scratch : scratch_) {
    scratch.z.assign(kListCapacity, kMinusInfinity);
    scratch.tokens.assign(kListCapacity, 0);
    scratch.touched.assign(chunks, 0);
  }
  tasks_.reserve(static_cast<std::size_t>(max_rows));
}

Sampler::~Sampler() = default;

void Sampler::verify_logits(const LogitRows& logits, std::span<const VerifyGroup> groups,
                            std::span<VerifyResult> results, WorkerPool& pool) {
  // Rows in the order of their place in the group: a later row is needed only if the drafts before it were right.
  tasks_.clear();
  bool heavy = false;
  std::size_t longest = 0;
  for (const VerifyGroup& group : groups) longest = std::max(longest, group.drafts.size());
  for (std::size_t row = 0; row <= longest; ++row) {
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (row <= groups[g].drafts.size()) tasks_.push_back({static_cast<int>(g), static_cast<int>(row)});
    }
  }
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const SamplingParams& sampling = *groups[g].sampling;
    heavy = heavy || sampling.temperature > 0.0F || sampling.needs_history() || sampling.logprobs >= 0;
    rejected_[g].store(static_cast<int>(groups[g].drafts.size()), std::memory_order_relaxed);
  }

  const std::int64_t grain = heavy ? 1 : kGreedyGrain;
  pool.parallel_for(
      static_cast<std::int64_t>(tasks_.size()), grain, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t i = begin; i < end; ++i) {
          const Task task = tasks_[static_cast<std::size_t>(i)];
          const VerifyGroup& group = groups[static_cast<std::size_t>(task.group)];
          std::atomic<int>& rejected = rejected_[static_cast<std::size_t>(task.group)];
          if (task.row > rejected.load(std::memory_order_relaxed)) continue;
          Choice& choice = choices_[static_cast<std::size_t>(group.first_output + task.row)];
          choose(logits, group, task.row, scratch_[static_cast<std::size_t>(worker)], choice);
          if (static_cast<std::size_t>(task.row) == group.drafts.size()) continue;
          if (choice.token == group.drafts[static_cast<std::size_t>(task.row)]) continue;
          int first = rejected.load(std::memory_order_relaxed);
          while (task.row < first && !rejected.compare_exchange_weak(first, task.row, std::memory_order_relaxed)) {
          }
        }
      });

  for (std::size_t g = 0; g < groups.size(); ++g) {
    const int count = rejected_[g].load(std::memory_order_relaxed) + 1;
    const int logprobs = groups[g].sampling->logprobs;
    VerifyResult& result = results[g];
    result.tokens.clear();
    result.logprobs.clear();
    result.top.resize(logprobs > 0 ? static_cast<std::size_t>(count) : 0);
    for (int row = 0; row < count; ++row) {
      const Choice& choice = choices_[static_cast<std::size_t>(groups[g].first_output + row)];
      result.tokens.push_back(choice.token);
      if (logprobs >= 0) result.logprobs.push_back(choice.logprob);
      if (logprobs > 0) result.top[static_cast<std::size_t>(row)] = choice.top;
    }
  }
}

void Sampler::propose(const LogitRows& logits, std::span<const ProposeRow> rows, std::span<TokenId> tokens,
                      WorkerPool& pool) {
  const bool heavy = std::any_of(rows.begin(), rows.end(), [](const ProposeRow& row) {
    return row.sampling->temperature > 0.0F || row.sampling->needs_history();
  });
  const auto choose_rows = [&](std::int64_t begin, std::int64_t end, int worker) {
    for (std::int64_t i = begin; i < end; ++i) {
      const ProposeRow& row = rows[static_cast<std::size_t>(i)];
      const VerifyGroup group{0, row.drafts, row.position, row.sampling, row.history, row.banned, row.banned_tokens};
      tokens[static_cast<std::size_t>(i)] =
          choose_token(logits.values + i * logits.stride, logits.chunk_max + i * logits.chunk_stride, group,
                       static_cast<int>(row.drafts.size()), false, scratch_[static_cast<std::size_t>(worker)]);
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
  choice.token = choose_token(values, chunk_max, group, row, wants_logprobs, scratch);
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

/// One row, by the list in sampling.h.
TokenId Sampler::choose_token(float* values, float* chunk_max, const VerifyGroup& group, int row, bool keep_original,
                              Scratch& scratch) const {
  const SamplingParams& sampling = *group.sampling;
  adjust(values, chunk_max, group, row, keep_original, scratch);
  if (sampling.temperature <= 0.0F) return choose_greedy({values, chunk_max, vocabulary_, 1.0F});
  const LogitRow scaled_row{values, chunk_max, vocabulary_, 1.0F / sampling.temperature};
  return choose_sampled(scaled_row, sampling, {sampling.seed, group.position + row}, scratch);
}

void Sampler::record_logprobs(const LogitRow& row, int count, Scratch& scratch, Choice& choice) const {
  choice.top.clear();
  const float top = scaled(row_maximum(row), row.scale);
  choice.normalizer = log_normalizer(top, kernels_.row_mass(row, kKeepAll, top));
  count = std::min({count, vocabulary_, kListCapacity});
  if (count <= 0) return;
  Cut cut = kKeepAll;
  const int found = collect_top(row, count, scratch, cut);
  for (int i = 0; i < found; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (keeps(cut, scratch.z[at], scratch.tokens[at])) choice.top.push_back({scratch.tokens[at], scratch.z[at]});
  }
  std::sort(choice.top.begin(), choice.top.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob > b.logprob || (a.logprob == b.logprob && a.token < b.token);
  });
  for (TokenLogprob& entry : choice.top) entry.logprob = log_probability(entry.logprob, choice.normalizer);
}

void Sampler::adjust(float* values, float* chunk_max, const VerifyGroup& group, int row, bool keep_original,
                     Scratch& scratch) const {
  scratch.original.clear();
  bool changed = false;
  adjust_logits(
      group, row, [&](TokenId token) { return token >= 0 && token < vocabulary_ ? values + token : nullptr; },
      [&](TokenId token, float logit) {
        if (keep_original) scratch.original.emplace_back(token, logit);
        scratch.touched[static_cast<std::size_t>(token / kLogitChunk)] = 1;
        changed = true;
      });
  if (!changed) return;
  for (std::size_t c = 0; c < scratch.touched.size(); ++c) {
    if (scratch.touched[c] == 0) continue;
    scratch.touched[c] = 0;
    const int first = static_cast<int>(c) * kLogitChunk;
    chunk_max[c] = kernels_.maximum(values + first, std::min(kLogitChunk, vocabulary_ - first));
  }
}

TokenId Sampler::choose_greedy(const LogitRow& row) const {
  const float top = row_maximum(row);
  if (!(top > kMinusInfinity)) return 0;
  for (int c = 0; c < chunks_of(row); ++c) {
    if (row.chunk_max[c] != top) continue;
    const int end = std::min((c + 1) * kLogitChunk, row.vocabulary);
    for (int token = c * kLogitChunk; token < end; ++token) {
      if (row.values[token] == top) return token;
    }
  }
  return 0;
}

TokenId Sampler::choose_sampled(const LogitRow& row, const SamplingParams& sampling, NoiseKey noise,
                                Scratch& scratch) const {
  const float top = scaled(row_maximum(row), row.scale);
  if (!(top > kMinusInfinity)) return 0;
  Cut cut = kKeepAll;
  TokenId token = INT_MAX;
  if (sampling.top_k > 0 && sampling.top_k < std::min(vocabulary_, kListCapacity + 1)) {
    const int count = collect_top(row, sampling.top_k, scratch, cut);
    const Candidates list{scratch.z.data(), scratch.tokens.data(), count};
    token = choose_among(ShortList{kernels_, list}, cut, sampling, top, noise);
  } else {
    if (sampling.top_k > 0 && sampling.top_k < vocabulary_) cut = row_cut(kernels_, row, sampling.top_k, -FLT_MAX);
    token = choose_among(WholeRow{kernels_, row}, cut, sampling, top, noise);
  }
  return token == INT_MAX ? 0 : token;
}

/// Puts the k tokens of the largest z, k <= kListCapacity, into the scratch lists, perhaps among others, and sets
/// `cut` to keep just them. Returns the length of the lists.
int Sampler::collect_top(const LogitRow& row, int k, Scratch& scratch, Cut& cut) const {
  // The k-th largest chunk maximum bounds the k-th largest token from below, if there are so many chunks.
  float bound = -FLT_MAX;
  const float top = scaled(row_maximum(row), row.scale);
  if (k <= chunks_of(row) && top > -FLT_MAX) {
    bound = find_threshold(k, -FLT_MAX, top, [&](float threshold) {
              return kernels_.count_at_least(row.chunk_max, chunks_of(row), row.scale, threshold);
            }).value;
  }
  float* z = scratch.z.data();
  TokenId* tokens = scratch.tokens.data();
  const int count = kernels_.collect(row, {bound, INT_MAX}, kListCapacity, z, tokens);
  if (count > kListCapacity) {
    cut = row_cut(kernels_, row, k, bound);
    return kernels_.collect(row, cut, kListCapacity, z, tokens);
  }
  cut = list_cut(kernels_, {z, tokens, count}, k, bound, top);
  return count;
}

}  // namespace draftwerk::cpu
