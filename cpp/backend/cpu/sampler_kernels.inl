// The passes of sampler_kernels.h. Included by one file per instruction set, which defines DRAFTWERK_ISA. Arithmetic
// that decides a token (z, gumbel, weight) is plain multiplication and addition, never fused, so that every
// instruction set gives the same bits; bounds used only for skipping may differ. As no sum here depends on its order
// (weights are integers), everything works on one register of whatever width there is.
#include <cfloat>
#include <climits>

#include "backend/cpu/sampler_kernels.h"
#include "backend/cpu/simd.h"

namespace draftwerk::cpu::DRAFTWERK_ISA {
namespace {

constexpr int kWidth = kRegisterLanes;
constexpr int kWideWidth = kWidth / 2;
using RegisterWord = std::uint32_t __attribute__((vector_size(sizeof(Register))));
using RegisterWide = std::uint64_t __attribute__((vector_size(sizeof(Register))));
using RegisterDouble = double __attribute__((vector_size(sizeof(Register))));

constexpr float kMinusInfinity = -__builtin_inff();

template <typename To, typename From>
To read(const From* p) {
  To v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

/// first, first + 1, ...
RegisterInt count_up(std::int32_t first) {
  std::int32_t lane[kWidth];
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return read<RegisterInt>(lane) + first;
}

bool any(RegisterInt mask) {
#if defined(__AVX512F__)
  const auto m = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi32_mask(m, m) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#else
  std::int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= mask[i];
  return all != 0;
#endif
}

// --- z, weight, gumbel --------------------------------------------------------------------------------------------

/// Lets NaN through, which compares false and so is kept nowhere.
Register scaled(Register value, float scale) {
  const Register z = value * scale;
  const Register most = register_splat(FLT_MAX);
  return most < z ? most : z;
}

float scaled(float value, float scale) {
  const float z = value * scale;
  return FLT_MAX < z ? FLT_MAX : z;
}

RegisterInt kept(Register z, RegisterInt token, Cut cut) {
  return (z > cut.value) | ((z == cut.value) & (token <= cut.last));
}

/// e^x for x <= 0, unfused (Cephes expf); 0 below -30, where the weight is 0, and for NaN.
Register exp_unfused(Register x) {
  const Register low = register_splat(-30.0F);
  const Register magic = register_splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const Register bounded = x > low ? x : low;
  const Register n = (bounded * 1.44269504088896341F + magic) - magic;
  const Register r = (bounded - n * 0.693359375F) + n * 2.12194440e-4F;
  Register p = register_splat(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const Register y = (p * (r * r) + r) + 1.0F;
  const auto power = reinterpret_cast<Register>((__builtin_convertvector(n, RegisterInt) + 127) << 23);
  return x >= low ? y * power : Register{};
}

/// Adds weights, given as values of exp_unfused, in units of 2^-40: in a double of [4096, 8192) the last bit of the
/// significand is worth 2^-40, so adding 4096 rounds, and the bits above those of 4096 are the integer.
void add_weights(Register e, RegisterWide& sum) {
  constexpr std::uint64_t kBits4096 = 0x40B0000000000000U;
  static_assert(kWeightFractionBits == 40);
#if defined(__AVX512F__)
  const auto all = reinterpret_cast<__m512>(e);
  const auto low = reinterpret_cast<RegisterDouble>(_mm512_cvtps_pd(_mm512_castps512_ps256(all)));
  const auto high = reinterpret_cast<RegisterDouble>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)));
#elif defined(__AVX2__)
  const auto all = reinterpret_cast<__m256>(e);
  const auto low = reinterpret_cast<RegisterDouble>(_mm256_cvtps_pd(_mm256_castps256_ps128(all)));
  const auto high = reinterpret_cast<RegisterDouble>(_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)));
#else
  RegisterDouble low;
  RegisterDouble high;
  for (int i = 0; i < kWideWidth; ++i) {
    low[i] = static_cast<double>(e[i]);
    high[i] = static_cast<double>(e[kWideWidth + i]);
  }
#endif
  sum += (reinterpret_cast<RegisterWide>(low + 4096.0) + reinterpret_cast<RegisterWide>(high + 4096.0)) - 2 * kBits4096;
}

std::uint64_t reduce_sum(RegisterWide v) {
  std::uint64_t sum = 0;
  for (int i = 0; i < kWideWidth; ++i) sum += v[i];
  return sum;
}

/// ln x for positive normal x, unfused (Cephes logf); relative precision holds near 1 too, where the exponent is 0
/// and x - 1 exact.
Register log_unfused(Register x) {
  const auto bits = reinterpret_cast<RegisterInt>(x);
  RegisterInt exponent = (bits >> 23) - 126;
  auto m = reinterpret_cast<Register>((bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
  const RegisterInt small = m < register_splat(0.707106781186547524F);
  exponent += small;
  m = (small ? m + m : m) - 1.0F;
  const Register e = __builtin_convertvector(exponent, Register);
  const Register square = m * m;
  Register p = register_splat(7.0376836292e-2F);
  p = p * m - 1.1514610310e-1F;
  p = p * m + 1.1676998740e-1F;
  p = p * m - 1.2420140846e-1F;
  p = p * m + 1.4249322787e-1F;
  p = p * m - 1.6668057665e-1F;
  p = p * m + 2.0000714765e-1F;
  p = p * m - 2.4999993993e-1F;
  p = p * m + 3.3333331174e-1F;
  Register y = p * m * square;
  y = y - e * 2.12194440e-4F;
  y = y - square * 0.5F;
  return (m + y) + e * 0.693359375F;
}

/// -ln(-ln(1 - w)) for w = (word + 0.5) / 2^32, kept below 1. Small w decide who wins, so ln(1 - w) must keep its
/// relative precision there: ln(1 - w) = ln(u) * w / (1 - u) for u the rounded 1 - w (Kahan's log1p).
Register gumbel(RegisterWord word) {
  // Halves convert exactly and their sum rounds once: the nearest float of an unsigned word on every processor.
  const Register high = __builtin_convertvector(reinterpret_cast<RegisterInt>(word >> 16), Register);
  const Register low = __builtin_convertvector(reinterpret_cast<RegisterInt>(word & 0xFFFFU), Register);
  const Register most = register_splat(1.0F - 0x1p-24F);
  Register w = ((high * 65536.0F + low) + 0.5F) * 0x1p-32F;
  w = w < most ? w : most;
  const Register u = 1.0F - w;
  const Register step = 1.0F - u;
  const RegisterInt vanished = step == Register{};
  const Register divisor = vanished ? register_splat(1.0F) : step;
  const Register exponential = vanished ? w : -log_unfused(u) * (w / divisor);
  return -log_unfused(exponential);
}

// --- Philox -------------------------------------------------------------------------------------------------------

/// Product of the low words of the lanes with m.
RegisterWide multiply_low(RegisterWide a, std::uint32_t m) {
#if defined(__AVX512F__)
  return reinterpret_cast<RegisterWide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return reinterpret_cast<RegisterWide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return reinterpret_cast<RegisterWide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (a & 0xFFFFFFFFU) * m;
#endif
}

RegisterWide exclusive_or(RegisterWide a, RegisterWide b, std::uint32_t c) {
#if defined(__AVX512F__)
  return reinterpret_cast<RegisterWide>(_mm512_ternarylogic_epi64(
      reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), _mm512_set1_epi64(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

/// Philox blocks of kWideWidth counters, word by word. Only the low half of each lane means anything: the upper
/// halves carry leftovers of products, which neither multiplication nor exclusive or ever lets down.
struct PhiloxBlocks {
  RegisterWide word[4];
};

PhiloxBlocks philox(NoiseKey noise, RegisterWide block) {
  auto k0 = static_cast<std::uint32_t>(noise.seed);
  auto k1 = static_cast<std::uint32_t>(noise.seed >> 32);
  const auto position = static_cast<std::uint64_t>(noise.position);
  RegisterWide c0 = RegisterWide{} + (position & 0xFFFFFFFFU);
  RegisterWide c1 = RegisterWide{} + (position >> 32);
  RegisterWide c2 = block;
  RegisterWide c3 = RegisterWide{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const RegisterWide p0 = multiply_low(c0, 0xD2511F53U);
    const RegisterWide p1 = multiply_low(c2, 0xCD9E8D57U);
    c0 = exclusive_or(p1 >> 32, c1, k0);
    c2 = exclusive_or(p0 >> 32, c3, k1);
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {{c0, c1, c2, c3}};
}

/// Tokens whose noise comes out of one call of philox().
constexpr int kPhiloxTokens = 2 * kWidth;

// --- rows ---------------------------------------------------------------------------------------------------------

int chunks_of(const LogitRow& row) { return (row.vocabulary + kLogitChunk - 1) / kLogitChunk; }

/// The values of a chunk, of which the last one is completed with minus infinity.
const float* chunk_values(const LogitRow& row, int chunk, float* padded) {
  const float* values = row.values + static_cast<std::int64_t>(chunk) * kLogitChunk;
  const int count = row.vocabulary - chunk * kLogitChunk;
  if (count >= kLogitChunk) return values;
  for (int i = 0; i < kLogitChunk; ++i) padded[i] = i < count ? values[i] : kMinusInfinity;
  return padded;
}

Register load_some(const float* values, int count) {
  if (count >= kWidth) return register_load(values);
  float lane[kWidth];
  for (int i = 0; i < kWidth; ++i) lane[i] = i < count ? values[i] : kMinusInfinity;
  return register_load(lane);
}

float maximum(const float* values, int count) {
  Register most = register_splat(kMinusInfinity);
  for (int i = 0; i < count; i += kWidth) {
    const Register v = load_some(values + i, count - i);
    most = v > most ? v : most;
  }
  float largest = most[0];
  for (int i = 1; i < kWidth; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

int count_at_least(const float* values, int count, float scale, float threshold) {
  RegisterInt found = {};
  for (int i = 0; i < count; i += kWidth) {
    found -= (scaled(load_some(values + i, count - i), scale) >= threshold);
  }
  int sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += found[i];
  // Lanes past the end hold minus infinity, which only a threshold of minus infinity would count.
  return sum < count ? sum : count;
}

int row_count_at_least(const LogitRow& row, float threshold) {
  int sum = 0;
  for (int c = 0; c < chunks_of(row); ++c) {
    if (!(scaled(row.chunk_max[c], row.scale) >= threshold)) continue;
    const int left = row.vocabulary - c * kLogitChunk;
    sum += count_at_least(row.values + static_cast<std::int64_t>(c) * kLogitChunk,
                          left < kLogitChunk ? left : kLogitChunk, row.scale, threshold);
  }
  return sum;
}

int row_collect(const LogitRow& row, Cut cut, int capacity, float* z, std::int32_t* tokens) {
  int found = 0;
  float padded[kLogitChunk];
  for (int c = 0; c < chunks_of(row); ++c) {
    if (!(scaled(row.chunk_max[c], row.scale) >= cut.value)) continue;
    const float* values = chunk_values(row, c, padded);
    for (int i = 0; i < kLogitChunk; i += kWidth) {
      const int first = c * kLogitChunk + i;
      const Register lanes = scaled(register_load(values + i), row.scale);
      const RegisterInt mask = kept(lanes, count_up(first), cut);
      if (!any(mask)) continue;
      for (int j = 0; j < kWidth; ++j) {
        if (mask[j] == 0 || first + j >= row.vocabulary) continue;
        if (found == capacity) return capacity + 1;
        z[found] = lanes[j];
        tokens[found] = first + j;
        ++found;
      }
    }
  }
  return found;
}

std::uint64_t row_mass(const LogitRow& row, Cut cut, float top) {
  RegisterWide sum = {};
  float padded[kLogitChunk];
  for (int c = 0; c < chunks_of(row); ++c) {
    const float most = scaled(row.chunk_max[c], row.scale);
    // e^-28.5 < 2^-41: such weights are 0.
    if (!(most >= cut.value) || most - top < -28.5F) continue;
    const float* values = chunk_values(row, c, padded);
    for (int i = 0; i < kLogitChunk; i += kWidth) {
      const Register z = scaled(register_load(values + i), row.scale);
      const RegisterInt mask = kept(z, count_up(c * kLogitChunk + i), cut);
      if (!any(mask)) continue;
      add_weights(mask ? exp_unfused(z - top) : Register{}, sum);
    }
  }
  return reduce_sum(sum);
}

/// Scores of a register of tokens, where any of them is kept with at least `score`: calls take(lane, score) for these.
template <typename Take>
void compete(Register z, RegisterInt token, RegisterWord word, Cut cut, const float& score, Take&& take) {
  const RegisterInt mask = kept(z, token, cut);
  if (!any(mask)) return;
  const Register scores = z + gumbel(word);
  const RegisterInt contends = mask & (scores >= score);
  if (!any(contends)) return;
  for (int j = 0; j < kWidth; ++j) {
    if (contends[j] != 0) take(j, scores[j]);
  }
}

/// Lets a register of tokens compete.
void compete(Register z, RegisterInt token, RegisterWord word, Cut cut, Winner& best) {
  compete(z, token, word, cut, best.score, [&](int j, float score) {
    if (score > best.score || (score == best.score && token[j] < best.token)) best = {score, z[j], token[j]};
  });
}

/// The largest random word with which a token of z = `most` might reach `score`. As -ln(1 - w) >= w, gumbel <= -ln w,
/// hence w <= e^(most - score); the slack covers the rounding of all that.
std::uint32_t largest_useful_word(float most, float score) {
  const float magnitude = (most < 0 ? -most : most) + (score < 0 ? -score : score);
  const float exponent = (most - score) + (1e-4F + 1e-6F * magnitude);
  if (!(exponent < 0.0F)) return 0xFFFFFFFFU;
  const float words = register_exp(register_splat(exponent))[0] * 0x1p32F;
  return words < 4294967040.0F ? static_cast<std::uint32_t>(words) : 0xFFFFFFFFU;
}

/// Calls some(z, tokens, words) for the registers of a chunk in which a token might reach `score`.
template <typename Some>
void visit_chunk(const LogitRow& row, int chunk, Cut cut, NoiseKey noise, float score, Some&& some) {
  const float most = scaled(row.chunk_max[chunk], row.scale);
  if (!(most >= cut.value) || most + kGumbelMax < score) return;
  const std::uint32_t limit = largest_useful_word(most, score);
  float padded[kLogitChunk];
  const float* values = chunk_values(row, chunk, padded);
  for (int i = 0; i < kLogitChunk; i += kPhiloxTokens) {
    const int first = chunk * kLogitChunk + i;
    if (first >= row.vocabulary) break;
    std::uint64_t counter[kWideWidth];
    for (int j = 0; j < kWideWidth; ++j) counter[j] = static_cast<std::uint64_t>(j);
    const PhiloxBlocks blocks = philox(noise, read<RegisterWide>(counter) + static_cast<std::uint64_t>(first / 4));
    const RegisterWide low = (blocks.word[0] & 0xFFFFFFFFU) | (blocks.word[1] << 32);
    const RegisterWide high = (blocks.word[2] & 0xFFFFFFFFU) | (blocks.word[3] << 32);
    // Most chunks lie so far below the best that only the rarest words matter: look at those before any logarithm.
    if (!any((reinterpret_cast<RegisterWord>(low) <= limit) | (reinterpret_cast<RegisterWord>(high) <= limit))) {
      continue;
    }
    std::uint64_t pair[kWidth];
    for (int j = 0; j < kWideWidth; ++j) {
      pair[2 * j] = low[j];
      pair[2 * j + 1] = high[j];
    }
    for (int half = 0; half < 2; ++half) {
      const auto word = read<RegisterWord>(pair + half * kWideWidth);
      const Register z = scaled(register_load(values + i + half * kWidth), row.scale);
      some(z, count_up(first + half * kWidth), word);
    }
  }
}

void compete_chunk(const LogitRow& row, int chunk, Cut cut, NoiseKey noise, Winner& best) {
  visit_chunk(row, chunk, cut, noise, best.score,
              [&](Register z, RegisterInt token, RegisterWord word) { compete(z, token, word, cut, best); });
}

Winner row_best(const LogitRow& row, Cut cut, NoiseKey noise) {
  int top = 0;
  for (int c = 1; c < chunks_of(row); ++c) {
    if (row.chunk_max[c] > row.chunk_max[top]) top = c;
  }
  Winner best{kMinusInfinity, kMinusInfinity, INT_MAX};
  // A high score early makes the others easy to dismiss.
  compete_chunk(row, top, cut, noise, best);
  for (int c = 0; c < chunks_of(row); ++c) {
    if (c != top) compete_chunk(row, c, cut, noise, best);
  }
  return best;
}

int row_collect_scores(const LogitRow& row, Cut cut, NoiseKey noise, float score, int capacity, std::int32_t* tokens) {
  int found = 0;
  for (int c = 0; c < chunks_of(row) && found <= capacity; ++c) {
    visit_chunk(row, c, cut, noise, score, [&](Register z, RegisterInt token, RegisterWord word) {
      compete(z, token, word, cut, score, [&](int j, float) {
        if (token[j] >= row.vocabulary || found > capacity) return;
        if (found < capacity) tokens[found] = token[j];
        ++found;
      });
    });
  }
  return found;
}

// --- candidate lists ----------------------------------------------------------------------------------------------

/// Lanes past the end hold a token above all.
RegisterInt load_some_tokens(const std::int32_t* tokens, int count) {
  if (count >= kWidth) return read<RegisterInt>(tokens);
  std::int32_t lane[kWidth];
  for (int i = 0; i < kWidth; ++i) lane[i] = i < count ? tokens[i] : INT_MAX;
  return read<RegisterInt>(lane);
}

int list_collect(const LogitList& list, Cut cut, float* z, std::int32_t* tokens) {
  int found = 0;
  for (int i = 0; i < list.count; i += kWidth) {
    const int count = list.count - i < kWidth ? list.count - i : kWidth;
    const RegisterInt mask = kept(load_some(list.z + i, count), load_some_tokens(list.tokens + i, count), cut);
    if (!any(mask)) continue;
    for (int j = 0; j < count; ++j) {
      if (mask[j] == 0) continue;
      z[found] = list.z[i + j];
      tokens[found] = list.tokens[i + j];
      ++found;
    }
  }
  return found;
}

std::uint64_t list_mass(const LogitList& list, Cut cut, float top) {
  RegisterWide sum = {};
  for (int i = 0; i < list.count; i += kWidth) {
    const Register z = load_some(list.z + i, list.count - i);
    const RegisterInt mask = kept(z, load_some_tokens(list.tokens + i, list.count - i), cut);
    if (!any(mask)) continue;
    add_weights(mask ? exp_unfused(z - top) : Register{}, sum);
  }
  return reduce_sum(sum);
}

/// The random words of any tokens: each is one of the four of a block of its own.
RegisterWord words_of(NoiseKey noise, RegisterInt token) {
  using HalfWord = std::uint32_t __attribute__((vector_size(sizeof(Register) / 2)));
  HalfWord half[2];
  std::memcpy(half, &token, sizeof half);
  for (HalfWord& words : half) {
    const PhiloxBlocks blocks = philox(noise, __builtin_convertvector(words / 4, RegisterWide));
    const RegisterWide place = __builtin_convertvector(words % 4, RegisterWide);
    const RegisterWide low = place == 0 ? blocks.word[0] : blocks.word[1];
    const RegisterWide high = place == 2 ? blocks.word[2] : blocks.word[3];
    words = __builtin_convertvector(place < 2 ? low : high, HalfWord);
  }
  return read<RegisterWord>(half);
}

Winner list_best(const LogitList& list, Cut cut, NoiseKey noise) {
  Winner best{kMinusInfinity, kMinusInfinity, INT_MAX};
  for (int i = 0; i < list.count; i += kWidth) {
    const Register z = load_some(list.z + i, list.count - i);
    const RegisterInt token = load_some_tokens(list.tokens + i, list.count - i);
    // Noise is what costs time: only for those that may win.
    if (!any(kept(z, token, cut) & (z + kGumbelMax >= best.score))) continue;
    compete(z, token, words_of(noise, token), cut, best);
  }
  return best;
}

float gumbel_of_word(std::uint32_t word) { return gumbel(RegisterWord{} + word)[0]; }

std::uint64_t weight_of_difference(float difference) {
  RegisterWide sum = {};
  Register e = exp_unfused(register_splat(difference));
  for (int i = 1; i < kWidth; ++i) e[i] = 0.0F;
  add_weights(e, sum);
  return reduce_sum(sum);
}

}  // namespace

const SamplerKernels kSamplerKernels = {
    maximum,   count_at_least, row_count_at_least, row_collect,        list_collect,   row_mass,
    list_mass, row_best,       list_best,          row_collect_scores, gumbel_of_word, weight_of_difference,
};

}  // namespace draftwerk::cpu::DRAFTWERK_ISA
