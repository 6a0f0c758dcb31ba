// Passes over one row of logits, by a block or by a warp for a chunk of it.
#pragma once

#include <cfloat>
#include <cstdint>

#include "backend/cuda/block_reduction.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/logits.h"
#include "backend/cuda/noise.cuh"
#include "backend/cuda/rank.cuh"

namespace draftwerk::cuda {

/// Logits that a warp takes at once. Of each chunk the best rank is kept, from which later passes learn where not to
/// look.
inline constexpr int kLogitChunk = 256;
inline constexpr int kLaneLogits = kLogitChunk / kWarp;

__host__ __device__ constexpr int chunks_of(int columns) { return (columns + kLogitChunk - 1) / kLogitChunk; }

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000U); }

/// A row, with what turns its logits into what they are ranked by: z = min(logit * scale, limit).
struct LogitRow {
  LogitRows all;
  float* values;
  const std::int32_t* chosen;  ///< its clusters
  float scale;
  float limit;
  std::uint64_t seed;
  std::int64_t position;

  __device__ LogitRow(const LogitRows& rows, int row, float scale, float limit, std::uint64_t seed,
                      std::int64_t position)
      : all(rows),
        values(rows.values + row * rows.stride),
        chosen(rows.chosen == nullptr ? nullptr : rows.chosen + static_cast<std::int64_t>(row) * rows.clusters),
        scale(scale),
        limit(limit),
        seed(seed),
        position(position) {}

  [[nodiscard]] __device__ int chunks() const { return chunks_of(all.columns); }

  /// The token of a column.
  [[nodiscard]] __device__ std::int32_t token(int column) const {
    if (all.tokens == nullptr) return column;
    if (chosen == nullptr) return all.tokens[column];
    const int size = all.cluster_size;
    return all.tokens[chosen[column / size] * size + column % size];
  }

  /// The column of a token of the vocabulary; -1 if it has none.
  [[nodiscard]] __device__ int column(std::int32_t token) const {
    if (all.tokens == nullptr) return token;
    const std::int32_t row = all.row_of[token];
    if (row < 0 || chosen == nullptr) return row;
    const std::int32_t cluster = row / all.cluster_size;
    int first = 0;
    for (int count = all.clusters; count > 0;) {  // the first chosen cluster that is not below
      const int half = count / 2;
      const bool below = chosen[first + half] < cluster;
      first = below ? first + half + 1 : first;
      count = below ? count - half - 1 : half;
    }
    if (first == all.clusters || chosen[first] != cluster) return -1;
    return first * all.cluster_size + row % all.cluster_size;
  }

  [[nodiscard]] __device__ float scaled(float logit) const {
    const float z = __fmul_rn(logit, scale);
    return limit < z ? limit : z;
  }

  /// The rank of a column by its z. Columns behind the last one have minus infinity.
  [[nodiscard]] __device__ Rank rank(float z, int column) const {
    return z > minus_infinity() ? rank_of(z, token(column)) : kNowhere;
  }
};

/// A warp's chunk: kLaneLogits consecutive pairs of four z in each lane.
struct Chunk {
  float z[kLaneLogits];
  int first;  ///< column of the lane's first

  [[nodiscard]] __device__ int column(int i) const { return first + i / 4 * (kLogitChunk / 2) + i % 4; }
};

__device__ __forceinline__ Chunk load_chunk(const LogitRow& row, int index) {
  Chunk chunk;
  chunk.first = index * kLogitChunk + lane() * 4;
#pragma unroll
  for (int i = 0; i < kLaneLogits; i += 4) {
    const int column = chunk.column(i);
    float4 four = make_float4(0, 0, 0, 0);
    if (column + 3 < static_cast<int>(row.all.stride)) four = *reinterpret_cast<const float4*>(row.values + column);
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      chunk.z[i + j] = column + j < row.all.columns ? row.scaled(logits[j]) : minus_infinity();
    }
  }
  return chunk;
}

/// The best rank of what this lane has of a chunk.
__device__ __forceinline__ Rank lane_best(const LogitRow& row, const Chunk& chunk) {
  Rank best = kNowhere;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) best = max(best, row.rank(chunk.z[i], chunk.column(i)));
  return best;
}

/// How many of a chunk, in this lane, reach `cut`.
__device__ __forceinline__ std::uint32_t count_of(const LogitRow& row, const Chunk& chunk, Rank cut) {
  std::uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) count += row.rank(chunk.z[i], chunk.column(i)) >= cut ? 1 : 0;
  return count;
}

/// Mass of those of a chunk, in this lane, that reach `cut`, where `top` is the largest z of the row.
__device__ __forceinline__ std::uint64_t mass_of(const LogitRow& row, const Chunk& chunk, Rank cut, float top) {
  std::uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) {
    const bool kept = cut == kLowestRank || row.rank(chunk.z[i], chunk.column(i)) >= cut;
    const float z = FLT_MAX < chunk.z[i] ? FLT_MAX : chunk.z[i];
    if (kept) sum += weight(__fsub_rn(z, top));
  }
  return sum;
}

/// Of those of a chunk that reach `cut`, the best by z + gumbel: the rank of that score, in every lane. Most tokens lie
/// so far below the best that only the rarest words matter: each lane computes the noise of the token that looks best
/// by a bound, and then that of any other that might still win.
__device__ __forceinline__ Rank winner_of(const LogitRow& row, const Chunk& chunk, Rank cut) {
  std::uint32_t word[kLaneLogits];
  float bound[kLaneLogits];
  int likely = 0;
  float most = minus_infinity();
#pragma unroll
  for (int i = 0; i < kLaneLogits; i += 4) {
    uint4 words = make_uint4(0, 0, 0, 0);
    if (row.all.tokens == nullptr) {
      words = noise_words(row.seed, row.position, static_cast<std::uint32_t>(chunk.column(i)) / 4);
    }
    const std::uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = i + j;
      const Rank rank = row.rank(chunk.z[at], chunk.column(at));
      word[at] = four[j];
      bound[at] = minus_infinity();
      if (rank < cut) continue;
      if (row.all.tokens != nullptr) word[at] = word_of_token(row.seed, row.position, token_of(rank));
      bound[at] = chunk.z[at] + gumbel_bound(word[at]);
      if (bound[at] > most) {
        most = bound[at];
        likely = at;
      }
    }
  }
  std::uint32_t contenders = most > minus_infinity() ? 1U << likely : 0U;
  Rank best = kNowhere;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    for (; contenders != 0; contenders &= contenders - 1) {
      const int next = __ffs(static_cast<int>(contenders)) - 1;
      float z = 0;
      std::uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) {
        z = i == next ? chunk.z[i] : z;
        own = i == next ? word[i] : own;
      }
      best = max(best, row.rank(__fadd_rn(z, gumbel(own)), chunk.column(next)));
    }
    best = warp_max(best);
    if (round > 0) break;
    const float score = value_of(best);
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      const bool may_win = i != likely && bound[i] > minus_infinity() && bound[i] + noise_slack(chunk.z[i]) >= score;
      contenders |= may_win ? 1U << i : 0U;
    }
  }
  return best;
}

/// Calls visit(chunk) for the chunks of a row whose best reaches `cut`, each in one warp of the block, which loads the
/// next one meanwhile. Neighbours go to different warps: frequent tokens have low ids.
template <typename Visit>
__device__ __forceinline__ void for_chunks(const LogitRow& row, const Rank* best, Rank cut, Visit&& visit) {
  const int chunks = row.chunks();
  for (int first = 0; first < chunks; first += threads()) {
    const int mine = first + lane() * warps() + warp();
    std::uint32_t left = __ballot_sync(kAllLanes, mine < chunks && best[mine] >= cut);
    const auto load_next = [&] {
      return load_chunk(row, first + (__ffs(static_cast<int>(left)) - 1) * warps() + warp());
    };
    if (left == 0) continue;
    Chunk next = load_next();
    while (left != 0) {
      const Chunk chunk = next;
      left &= left - 1;
      if (left != 0) next = load_next();
      visit(chunk);
    }
  }
}

// --- by a whole block; `best` are the best ranks of the row's chunks ------------------------------------------------

__device__ inline Rank block_best(const Rank* best, int chunks) {
  Rank most = kNowhere;
  for (int c = thread(); c < chunks; c += threads()) most = max(most, best[c]);
  return block_max(most);
}

__device__ inline int count_at_least(const LogitRow& row, const Rank* best, Rank cut) {
  std::uint32_t count = 0;
  for_chunks(row, best, cut, [&](const Chunk& chunk) { count += count_of(row, chunk, cut); });
  return static_cast<int>(block_sum(count));
}

__device__ inline std::uint64_t mass_at_least(const LogitRow& row, const Rank* best, Rank cut, float top) {
  std::uint64_t sum = 0;
  for_chunks(row, best, cut, [&](const Chunk& chunk) { sum += mass_of(row, chunk, cut, top); });
  return block_sum(sum);
}

__device__ inline Rank winner_at_least(const LogitRow& row, const Rank* best, Rank cut) {
  Rank winner = kNowhere;
  for_chunks(row, best, cut, [&](const Chunk& chunk) { winner = max(winner, winner_of(row, chunk, cut)); });
  return block_max(winner);
}

/// The lowest rank that is kept of the k best of a row; at least k reach `low`, or it keeps them all.
__device__ inline Rank cut_of_best(const LogitRow& row, const Rank* best, int k, Rank low) {
  const Rank top = block_best(best, row.chunks());
  return rank_of_kth(k, 0, low, max(top, kLowestRank) + 1, [&](Rank cut) { return count_at_least(row, best, cut); });
}

}  // namespace draftwerk::cuda
