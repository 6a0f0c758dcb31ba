// What the sampler needs from an instruction set: passes over one row of logits and over short candidate lists. All
// of them compute the same bits on every instruction set, so the CPU's choice of a token depends on the logits alone.
#pragma once

#include <cstdint>

#include "backend/cpu/isa.h"

namespace draftwerk::cpu {

/// Logits per chunk. The head keeps the maximum of every chunk, from which the sampler learns where not to look.
inline constexpr int kLogitChunk = 256;

/// At least gumbel(word) of every word: word 0 gives -ln(-ln(1 - 2^-33)) = 33 ln 2 = 22.87386 to 7e-6.
inline constexpr float kGumbelMax = 22.8739F;

/// Weights e^(z - z_max) are counted in units of 2^-40. Sums of integers do not depend on their order, which frees
/// vector width, chunks and filters from having to agree on one. 2^23 tokens fit into 64 bits.
inline constexpr int kWeightFractionBits = 40;

/// One row of logits; z = min(value * scale, FLT_MAX). NaN counts as minus infinity everywhere.
struct LogitRow {
  const float* values = nullptr;     ///< [vocabulary]
  const float* chunk_max = nullptr;  ///< [ceil(vocabulary / kLogitChunk)], of the values, NaN ignored
  int vocabulary = 0;
  float scale = 1.0F;  ///< 1 / temperature
};

/// A prefix of the tokens sorted by z descending, then id ascending; every filter keeps such a prefix. A token is kept
/// if z > value, or z == value and token <= last.
struct Cut {
  float value = 0.0F;
  std::int32_t last = 0;
};

/// What the noise of a row is drawn from, apart from the token.
struct NoiseKey {
  std::uint64_t seed = 0;
  std::int64_t position = 0;
};

/// The largest z + gumbel so far, the lowest token on a tie.
struct Winner {
  float score = 0.0F;
  float z = 0.0F;
  std::int32_t token = 0;
};

/// Some tokens of a row with their z, in any order.
struct LogitList {
  const float* z = nullptr;
  const std::int32_t* tokens = nullptr;
  int count = 0;
};

struct SamplerKernels {
  /// The largest of values[0, count), NaN ignored; minus infinity if there is none.
  float (*maximum)(const float* values, int count);
  /// How many of min(values * scale, FLT_MAX) are at least `threshold`.
  int (*count_at_least)(const float* values, int count, float scale, float threshold);
  /// The same over a row, where chunks below the threshold are not read.
  int (*row_count_at_least)(const LogitRow& row, float threshold);
  /// Stores the kept tokens in ascending order, at most `capacity` of them, and returns how many there are, or
  /// capacity + 1 if they do not fit. Arrays have room for a multiple of 16 entries >= capacity.
  int (*row_collect)(const LogitRow& row, Cut cut, int capacity, float* z, std::int32_t* tokens);
  /// The same for a list, in its order, where all that are kept fit.
  int (*list_collect)(const LogitList& list, Cut cut, float* z, std::int32_t* tokens);
  /// Mass of the kept tokens: the sum of their weights for z_max = `top`.
  std::uint64_t (*row_mass)(const LogitRow& row, Cut cut, float top);
  std::uint64_t (*list_mass)(const LogitList& list, Cut cut, float top);
  /// The kept token of the largest z + gumbel; token INT32_MAX if none is kept.
  Winner (*row_best)(const LogitRow& row, Cut cut, NoiseKey noise);
  Winner (*list_best)(const LogitList& list, Cut cut, NoiseKey noise);
  /// Stores the tokens that `cut` keeps and whose z + gumbel is at least `score`, in any order, at most `capacity` of
  /// them, and returns how many there are, or capacity + 1 if they do not fit.
  int (*row_collect_scores)(const LogitRow& row, Cut cut, NoiseKey noise, float score, int capacity,
                            std::int32_t* tokens);
  /// Single values, for the specification and for tests: gumbel noise of a random word, and the weight of
  /// difference = z - z_max <= 0.
  float (*gumbel)(std::uint32_t word);
  std::uint64_t (*weight)(float difference);
};

const SamplerKernels& sampler_kernels(Isa isa);

namespace portable {
extern const SamplerKernels kSamplerKernels;
}
namespace avx2 {
extern const SamplerKernels kSamplerKernels;
}
namespace avx512 {
extern const SamplerKernels kSamplerKernels;
}

}  // namespace draftwerk::cpu
