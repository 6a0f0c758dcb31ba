#include "backend/cuda/sampler_kernels.h"

#include <algorithm>
#include <bit>

#include "backend/cuda/block_reduction.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/logit_row.cuh"
#include "backend/cuda/short_list.cuh"

namespace draftwerk::cuda {
namespace {

/// Chunks that a warp of the passes over all logits takes at once: 2 KiB.
constexpr int kChunksPerWarp = 2;
constexpr int kPassWarps = 8;
constexpr int kPassThreads = kPassWarps * kWarp;
/// Of the kernels that give a row to a block.
constexpr int kRowThreads = 512;
constexpr int kAdjustThreads = 256;

/// Which ranks a pass is about.
enum class Pass : std::int32_t {
  original,  ///< of the logits as they came, at temperature 1: for log-probabilities
  adjusted,  ///< by what the row is chosen by
};

struct PassArguments {
  SamplerView view;
  Pass pass;
  std::int32_t unused;
};

__device__ LogitRow row_of(const SamplerView& view, int row, Pass pass) {
  const SampledRow& sampled = view.rows[row];
  const bool original = pass == Pass::original;
  return LogitRow(view.logits, row, original ? 1.0F : sampled.scale, original ? FLT_MAX : sampled.limit, sampled.seed,
                  sampled.position + view.passes_before);
}

__device__ Rank* of_chunks(std::uint64_t* ranks, const LogitRow& row, int output) {
  return ranks + static_cast<std::int64_t>(output) * row.chunks();
}

/// Best ranks of all chunks. Bound by reading the logits: 8 rows of 262,144 are 8 MiB, about 2.5 us at 3.5 TB/s from
/// memory; four 16-byte loads are under way in every lane.
__global__ void __launch_bounds__(kPassThreads) scan(const PassArguments a) {
  follow_previous();
  const auto output = static_cast<int>(blockIdx.y);
  const SampledRow& sampled = a.view.rows[output];
  if (sampled.way == Way::none || (a.pass == Pass::original && sampled.logprobs < 0)) return;
  const LogitRow row = row_of(a.view, output, a.pass);
  const int chunks = row.chunks();
  const int first = (static_cast<int>(blockIdx.x) * warps() + warp()) * kChunksPerWarp;
  if (first >= chunks) return;
  Chunk loaded[kChunksPerWarp];
#pragma unroll
  for (int c = 0; c < kChunksPerWarp; ++c) loaded[c] = load_chunk(row, min(first + c, chunks - 1));
#pragma unroll
  for (int c = 0; c < kChunksPerWarp; ++c) {
    const Rank best = warp_max(lane_best(row, loaded[c]));
    if (lane() == 0 && first + c < chunks) of_chunks(a.view.best, row, output)[first + c] = best;
  }
}

/// Masses of whole rows and the winners of their chunks, for the rows that need them. Reads the logits again, mostly
/// from the second-level cache; bound by arithmetic, some 40 instructions a token for noise and 30 for mass: about 0.7
/// us for each row of 262,144 once the device is full.
__global__ void __launch_bounds__(kPassThreads) weigh(const PassArguments a) {
  follow_previous();
  const auto output = static_cast<int>(blockIdx.y);
  const SampledRow& sampled = a.view.rows[output];
  const bool original = a.pass == Pass::original;
  const bool mass = original ? sampled.logprobs >= 0 : sampled.needs_mass != 0;
  const bool noise = !original && sampled.way == Way::whole;
  if (sampled.way == Way::none || !(mass || noise)) return;
  const LogitRow row = row_of(a.view, output, a.pass);
  const int chunks = row.chunks();
  const Rank* best = of_chunks(a.view.best, row, output);
  const float top = fminf(value_of(block_best(best, chunks)), FLT_MAX);
  const int first = (static_cast<int>(blockIdx.x) * warps() + warp()) * kChunksPerWarp;
  std::uint64_t sum = 0;
  for (int c = first; c < min(first + kChunksPerWarp, chunks); ++c) {
    const bool empty = best[c] == kNowhere;
    Chunk chunk;
    if (!empty) chunk = load_chunk(row, c);
    if (mass && !empty) sum += mass_of(row, chunk, kLowestRank, top);
    if (!noise) continue;
    const Rank winner = empty ? kNowhere : winner_of(row, chunk, kLowestRank);
    if (lane() == 0) of_chunks(a.view.winners, row, output)[c] = winner;
  }
  if (!mass) return;
  sum = block_sum(sum);
  if (thread() == 0) a.view.masses[static_cast<std::int64_t>(output) * gridDim.x + blockIdx.x] = sum;
}

__device__ std::uint64_t total_mass(const std::uint64_t* masses, int output, int parts) {
  std::uint64_t sum = 0;
  for (int i = thread(); i < parts; i += threads()) sum += masses[static_cast<std::int64_t>(output) * parts + i];
  return block_sum(sum);
}

struct ListArguments {
  SamplerView view;
  std::int32_t mass_blocks;
  std::int32_t count;  ///< candidates
};

/// Mass and most probable tokens of the rows whose log-probabilities are asked for. A block takes a row; bound by the
/// latency of a dozen dependent steps, about 5 us.
__global__ void __launch_bounds__(kRowThreads, 1) log_probabilities(const ListArguments a) {
  follow_previous();
  __shared__ ShortList list;
  const auto output = static_cast<int>(blockIdx.x);
  const SampledRow& sampled = a.view.rows[output];
  if (sampled.way == Way::none || sampled.logprobs < 0) return;
  const LogitRow row = row_of(a.view, output, Pass::original);
  const Rank* best = of_chunks(a.view.best, row, output);
  RowLogprobs& result = a.view.logprobs[output];
  const float largest = value_of(block_best(best, row.chunks()));
  const std::uint64_t mass = total_mass(a.view.masses, output, a.mass_blocks);
  int count = 0;
  if (sampled.logprobs > 0) count = min(list_best(row, best, sampled.logprobs, list), sampled.logprobs);
  for (int i = thread(); i < count; i += threads()) {
    result.top[i] = {token_of(list.rank[i]), value_of(list.rank[i])};
  }
  if (thread() == 0) {
    result.mass = mass;
    result.largest = largest;
    result.count = count;
  }
}

/// Steps 1 to 3 of sampling.h. A block takes a row; bound by the latency of reading and writing logits here and there,
/// about 3 us for up to 1,024 penalties.
__global__ void __launch_bounds__(kAdjustThreads) adjust(const PassArguments a) {
  follow_previous();
  const auto output = static_cast<int>(blockIdx.x);
  const SampledRow& sampled = a.view.rows[output];
  if (sampled.way == Way::none || sampled.penalties == sampled.adjustments_end) return;
  const LogitRow row = row_of(a.view, output, Pass::adjusted);
  const Adjustment* all = a.view.adjustments;
  const Adjustment* path = all + sampled.path;
  float* originals = sampled.originals < 0 ? nullptr : a.view.originals + sampled.originals - sampled.penalties;

  for (int i = sampled.penalties + thread(); i < sampled.biases; i += threads()) {
    const int column = row.column(all[i].token);
    if (column < 0) continue;
    float logit = row.values[column];
    if (originals != nullptr) originals[i] = logit;
    const bool in_prompt = (all[i].value & 1) != 0;
    int in_output = all[i].value >> 1;
    for (int d = 0; d < sampled.path_length; ++d) in_output += path[d].token == all[i].token ? 1 : 0;
    if (!in_prompt && in_output == 0) continue;
    logit = logit > 0.0F ? __fdiv_rn(logit, sampled.repetition_penalty) : __fmul_rn(logit, sampled.repetition_penalty);
    if (in_output > 0) {
      const float frequency = __fmul_rn(sampled.frequency_penalty, static_cast<float>(in_output));
      logit = __fsub_rn(logit, __fadd_rn(sampled.presence_penalty, frequency));
    }
    row.values[column] = logit;
  }
  __syncthreads();
  for (int i = sampled.biases + thread(); i < sampled.bans; i += threads()) {
    const std::int32_t token = all[i].token;
    if (i > sampled.biases && all[i - 1].token == token) continue;  // who has the token's first adds them all
    const int column = row.column(token);
    if (column < 0) continue;
    float logit = row.values[column];
    if (originals != nullptr) originals[i] = logit;
    for (int j = i; j < sampled.bans && all[j].token == token; ++j) {
      logit = __fadd_rn(logit, __int_as_float(all[j].value));
    }
    row.values[column] = logit;
  }
  __syncthreads();
  for (int i = sampled.bans + thread(); i < sampled.adjustments_end; i += threads()) {
    const int column = row.column(all[i].token);
    if (column < 0) continue;
    if (originals != nullptr) originals[i] = row.values[column];
    row.values[column] = minus_infinity();
  }
}

/// The logit that a token had before the adjustments: the first record of it, or what it still is.
__device__ float original_logit(const SamplerView& view, const SampledRow& sampled, const LogitRow& row,
                                std::int32_t token) {
  std::uint64_t first = 0;  // as a distance from the end, of which the largest is wanted
  if (sampled.originals >= 0) {
    for (int i = sampled.penalties + thread(); i < sampled.adjustments_end; i += threads()) {
      if (view.adjustments[i].token != token) continue;
      first = max(first, static_cast<std::uint64_t>(sampled.adjustments_end - i));
    }
    first = block_max(first);
  }
  if (first == 0) return row.values[token];
  const int place = sampled.adjustments_end - static_cast<int>(first) - sampled.penalties;
  return view.originals[sampled.originals + place];
}

/// The nucleus of `mass`: those with less than so many units before them.
__device__ std::uint64_t nucleus_of(float top_p, std::uint64_t mass) {
  const double share = static_cast<double>(top_p) * static_cast<double>(mass);
  const auto units = static_cast<std::uint64_t>(share);
  return units < 1 ? 1 : units;
}

/// The lowest rank that min_p keeps beside the largest z.
__device__ Rank cut_of_min_p(const SampledRow& sampled, float top) {
  return sampled.log_min_p > minus_infinity() ? rank_from(__fadd_rn(top, sampled.log_min_p)) : kLowestRank;
}

/// Steps 6 to 9 in a sorted list of the top_k and perhaps more: the winner, as the rank of its score.
__device__ Rank choose_listed(const SampledRow& sampled, const LogitRow& row, ShortList& list, int found) {
  if (found == 0) return kNowhere;
  const int count = min(found, sampled.top_k);
  const float top = value_of(list.rank[0]);
  std::uint64_t nucleus = 0;
  if (sampled.top_p < 1.0F) {
    std::uint64_t mass = 0;
    for (int first = 0; first < count; first += threads()) {
      const int i = first + thread();
      std::uint64_t total = 0;
      const std::uint64_t own = i < count ? weight(__fsub_rn(value_of(list.rank[i]), top)) : 0;
      const std::uint64_t before = block_sum_before(own, total);
      if (i < count) list.before[i] = mass + before;
      mass += total;
    }
    nucleus = nucleus_of(sampled.top_p, mass);
  }
  const Rank cut = cut_of_min_p(sampled, top);
  Rank winner = kNowhere;
  for (int i = thread(); i < count; i += threads()) {  // each its own entries of `before`
    const Rank rank = list.rank[i];
    if (rank < cut || (sampled.top_p < 1.0F && list.before[i] >= nucleus)) continue;
    const std::int32_t token = token_of(rank);
    const float noise = gumbel(word_of_token(row.seed, row.position, token));
    winner = max(winner, rank_of(__fadd_rn(value_of(rank), noise), token));
  }
  return block_max(winner);
}

/// Steps 6 to 9 in a whole row, whose winners are known. The nucleus is never built: it is a prefix of the sorted
/// tokens, so if the winner of all tokens lies inside, it is the winner of the nucleus, and it lies inside if the mass
/// before it is small enough. Otherwise it and everything behind it are out, and the rest competes again: rarely more
/// than once.
__device__ Rank choose_whole(const SampledRow& sampled, const LogitRow& row, const Rank* best, const Rank* winners,
                             std::uint64_t mass) {
  const Rank first = block_best(best, row.chunks());
  if (first == kNowhere) return kNowhere;
  const float top = value_of(first);
  Rank cut = kLowestRank;
  if (sampled.top_k > 0) cut = cut_of_best(row, best, sampled.top_k, kLowestRank);
  std::uint64_t nucleus = 0;
  if (sampled.top_p < 1.0F) {
    nucleus = nucleus_of(sampled.top_p, sampled.top_k > 0 ? mass_at_least(row, best, cut, top) : mass);
  }
  cut = max(cut, cut_of_min_p(sampled, top));
  Rank winner = block_best(winners, row.chunks());
  while (true) {
    const std::int32_t token = token_of(winner);
    const int column = row.column(token);
    const Rank rank = rank_of(row.scaled(row.values[column]), token);
    if (rank >= cut) {
      if (sampled.top_p >= 1.0F || mass_at_least(row, best, rank + 1, top) < nucleus) return winner;
      cut = rank + 1;
    }
    winner = winner_at_least(row, best, cut);
  }
}

/// Takes a token out of the running: its logit becomes minus infinity.
__device__ void exclude(const LogitRow& row, std::int32_t token, Rank* best, Rank* winners) {
  const int column = row.column(token);
  __syncthreads();
  if (thread() == 0) row.values[column] = minus_infinity();
  __syncthreads();
  if (warp() == 0) {
    const int c = column / kLogitChunk;
    const Chunk chunk = load_chunk(row, c);
    const Rank left = warp_max(lane_best(row, chunk));
    const Rank winner = winners == nullptr ? kNowhere : winner_of(row, chunk, kLowestRank);
    if (lane() == 0) best[c] = left;
    if (lane() == 0 && winners != nullptr) winners[c] = winner;
  }
  __syncthreads();
}

/// Chooses at one row per block, by steps 4 to 9 of sampling.h: one token, or several candidates one after the other,
/// each as if those before it had no finite logit. Bound by the latency of its steps: about 2 us for a greedy row, 6 us
/// for top_k 64 with top_p of 262,144 tokens, of which it reads the few chunks that hold the best.
__global__ void __launch_bounds__(kRowThreads, 1) choose(const ListArguments a) {
  follow_previous();
  __shared__ ShortList list;
  const auto output = static_cast<int>(blockIdx.x);
  const SampledRow& sampled = a.view.rows[output];
  if (sampled.way == Way::none) return;
  const LogitRow row = row_of(a.view, output, Pass::adjusted);
  Rank* best = of_chunks(a.view.best, row, output);
  Rank* winners = sampled.way == Way::whole ? of_chunks(a.view.winners, row, output) : nullptr;
  ProposedRow* proposed = a.view.proposed == nullptr ? nullptr : a.view.proposed + output;
  const Rank first = block_best(best, row.chunks());
  Rank top = first;
  std::uint64_t mass = sampled.needs_mass != 0 ? total_mass(a.view.masses, output, a.mass_blocks) : 0;
  if (proposed != nullptr && thread() == 0) {
    proposed->mass = mass;
    proposed->largest = fminf(value_of(first), FLT_MAX);
  }
  int found = 0;
  if (sampled.way == Way::listed) found = list_best(row, best, sampled.top_k + a.count - 1, list);

  std::int32_t chosen = -1;
  std::int32_t likeliest = 0;  // as verify() has it where nothing is left
  int candidates = 0;
  for (; candidates < a.count; ++candidates) {
    if (candidates > 0 && sampled.way == Way::listed) {
      int at = 0;
      while (token_of(list.rank[at]) != chosen) ++at;  // there, and mostly near the front
      remove(list, at, found);
      --found;
    } else if (candidates > 0) {
      const Rank out = rank_of(row.scaled(row.values[row.column(chosen)]), chosen);
      exclude(row, chosen, best, winners);
      const Rank next = block_best(best, row.chunks());
      if (sampled.top_p < 1.0F && sampled.top_k == 0 && sampled.way == Way::whole) {
        // Weights are relative to the largest z.
        const bool same = value_of(next) == value_of(top);
        mass = same ? mass - weight(__fsub_rn(value_of(out), value_of(top)))
                    : mass_at_least(row, best, kLowestRank, value_of(next));
      }
      top = next;
    }
    const Rank winner = sampled.way == Way::greedy   ? top
                        : sampled.way == Way::listed ? choose_listed(sampled, row, list, found)
                                                     : choose_whole(sampled, row, best, winners, mass);
    if (winner == kNowhere) break;
    chosen = token_of(winner);
    if (candidates == 0) likeliest = chosen;
    if (proposed != nullptr && thread() == 0) {
      proposed->token[candidates] = chosen;
      proposed->value[candidates] = value_of(winner);
    }
  }
  if (proposed != nullptr) {
    if (thread() != 0) return;
    proposed->count = candidates;
    if (a.view.tokens != nullptr) a.view.tokens[a.view.output_rows[output]] = likeliest;
    return;
  }
  chosen = max(chosen, 0);
  if (thread() == 0) a.view.chosen[output] = chosen;
  if (sampled.logprobs >= 0) {
    const float logit = original_logit(a.view, sampled, row, chosen);
    if (thread() == 0) a.view.logprobs[output].chosen = logit;
  }
}

struct AcceptArguments {
  SamplerView view;
  std::int32_t outputs;
  std::int32_t unused;
};

/// A thread for each group, at its first row, follows the drafts that were chosen. Latency only, about 1 us.
__global__ void accept(const AcceptArguments a) {
  follow_previous();
  const int first = static_cast<int>(blockIdx.x) * threads() + thread();
  if (first >= a.outputs) return;
  const int rows = a.view.rows[first].group_rows;
  int row = 0;
  for (int i = 0; i < rows; ++i) {
    const std::int32_t token = a.view.chosen[first + row];
    int next = row + 1;
    while (next < rows && (a.view.rows[first + next].parent != row || a.view.rows[first + next].draft != token)) ++next;
    const bool drafted = next < rows;
    a.view.accepted[first + i] = {token, drafted ? next - 1 : -1};
    if (!drafted) return;
    row = next;
  }
}

int pass_warps(int columns) { return std::min(kPassWarps, (chunks_of(columns) + kChunksPerWarp - 1) / kChunksPerWarp); }

LaunchShape pass_shape(int columns, int outputs) {
  return {dim3(static_cast<unsigned>(sampler_mass_blocks(columns)), static_cast<unsigned>(outputs)),
          dim3(static_cast<unsigned>(pass_warps(columns) * kWarp))};
}

/// A block for each row: of more threads where there is more to look at.
LaunchShape row_shape(int columns, int outputs) {
  const unsigned wanted = std::bit_ceil(static_cast<unsigned>(columns) / 64U);
  return {dim3(static_cast<unsigned>(outputs)), dim3(std::clamp(wanted, 64U, static_cast<unsigned>(kRowThreads)))};
}

/// From the adjustments to the choice.
void record_choice(LaunchList& list, const SamplerView& view, int outputs, int count, SamplerNeeds needs) {
  const int columns = view.logits.columns;
  const PassArguments pass{view, Pass::adjusted, 0};
  if (needs.adjustments) list.add(adjust, {dim3(static_cast<unsigned>(outputs)), dim3(kAdjustThreads)}, pass);
  list.add(scan, pass_shape(columns, outputs), pass);
  if (needs.passes) list.add(weigh, pass_shape(columns, outputs), pass);
  list.add(choose, row_shape(columns, outputs), {view, sampler_mass_blocks(columns), count});
}

}  // namespace

int sampler_chunks(int columns) { return chunks_of(columns); }

int sampler_mass_blocks(int columns) {
  const int chunks_per_block = pass_warps(columns) * kChunksPerWarp;
  return (chunks_of(columns) + chunks_per_block - 1) / chunks_per_block;
}

void record_verify(LaunchList& list, const SamplerView& view, int outputs, SamplerNeeds needs) {
  const int columns = view.logits.columns;
  if (needs.logprobs) {
    const PassArguments pass{view, Pass::original, 0};
    list.add(scan, pass_shape(columns, outputs), pass);
    list.add(weigh, pass_shape(columns, outputs), pass);
    list.add(log_probabilities, row_shape(columns, outputs), {view, sampler_mass_blocks(columns), 0});
  }
  record_choice(list, view, outputs, 1, needs);
  list.add(accept, {dim3(static_cast<unsigned>((outputs + 127) / 128)), dim3(128)}, {view, outputs, 0});
}

void record_propose(LaunchList& list, const SamplerView& view, int outputs, int count, SamplerNeeds needs) {
  record_choice(list, view, outputs, count, needs);
}

}  // namespace draftwerk::cuda
