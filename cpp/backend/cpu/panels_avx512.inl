// The values of a panel (packing.h) in AVX-512 registers, for the files that multiply them, which include this in a
// namespace of their own: a register holds a group, 16 rows x 4 columns, or one value of each of 16 rows.

using Float = __m512;

template <WeightType type, typename Lanes>
[[gnu::always_inline]] inline Lanes load_lanes(const std::byte* p) {
  if constexpr (type == WeightType::f32) {
    return _mm512_loadu_ps(p);
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (type == WeightType::f16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
}

[[gnu::always_inline]] inline __m128i load_bytes(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
[[gnu::always_inline]] inline Float part_from_u8(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(p)));
}
[[gnu::always_inline]] inline Float part_from_i8(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p)));
}

[[gnu::always_inline]] inline __m512i load_group(const std::byte* p) { return _mm512_loadu_si512(p); }

// Group g (0..7) from the nibbles of a block.
template <int g>
[[gnu::always_inline]] inline __m512i nibble_group(const std::byte* nibbles) {
  const __m512i both = load_group(nibbles + g % 4 * layout::kGroupBytes);
  const __m512i mask = _mm512_set1_epi8(15);
  if constexpr (g < 4) return _mm512_and_si512(both, mask);
  return _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}

// The unsigned bytes of group g; `block` points behind the block's scales.
template <WeightType type, int g>
[[gnu::always_inline]] inline __m512i weight_group(const std::byte* block) {
  if constexpr (type == WeightType::q8_0) {
    return load_group(block + g * layout::kGroupBytes);
  } else if constexpr (type == WeightType::q4_0 || type == WeightType::q4_k) {
    return nibble_group<g>(block);
  } else if constexpr (type == WeightType::q5_0) {
    std::uint64_t fifth;
    std::memcpy(&fifth, block + g * sizeof fifth, sizeof fifth);
    const __m512i upper = _mm512_maskz_mov_epi8(fifth, _mm512_set1_epi8(16));
    __m512i both = load_group(block + layout::kFifthBits + g % 4 * layout::kGroupBytes);
    if constexpr (g >= 4) both = _mm512_srli_epi16(both, 4);
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi8(15), upper, 0xEA);  // (both & 15) | upper
  } else {
    const __m512i fields = load_group(block + g / 4 * layout::kGroupBytes);
    constexpr int f = g % 4;
    __m512i upper = fields;  // bits 2f and 2f + 1 of each byte, brought to bits 4 and 5
    if constexpr (f < 2) upper = _mm512_slli_epi16(fields, 4 - 2 * f);
    if constexpr (f > 2) upper = _mm512_srli_epi16(fields, 2 * f - 4);
    // low | (upper & 0x30)
    return _mm512_ternarylogic_epi32(nibble_group<g>(block + layout::kUpperBits), upper, _mm512_set1_epi8(0x30), 0xF8);
  }
}

// The bits of `a` where `mask` has ones, those of `b` elsewhere.
[[gnu::always_inline]] inline __m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xE4);
}

// Calls add(values, group) with the unsigned bytes of each group of a block of split columns, those of P panels, of
// which `whole` groups are whole: all of them, or the coarse part, whose lower halves are zero.
template <bool coarse, int whole, int P, typename Add>
[[gnu::always_inline]] inline void each_split_group(Place block, Place rest, const Add& add) {
  __m512i values[P];
#pragma GCC unroll 8
  for (int g = 0; g < whole; ++g) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) values[p] = load_group(block.in(p) + g * layout::kGroupBytes);
    add(values, g);
  }
  block += whole * layout::kGroupBytes;
  constexpr int pairs = (layout::kGroups - whole) / 2;
  const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
#pragma GCC unroll 4
  for (int j = 0; j < pairs; ++j) {
    const std::size_t at = j * layout::kGroupBytes;
    __m512i upper[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      upper[p] = load_group(block.in(p) + at);
      const __m512i first = _mm512_slli_epi16(upper[p], 4);
      values[p] = coarse ? _mm512_and_si512(first, high) : select(high, first, load_group(rest.in(p) + at));
    }
    add(values, whole + j);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      values[p] = coarse ? _mm512_and_si512(upper[p], high)
                         : select(high, upper[p], _mm512_srli_epi16(load_group(rest.in(p) + at), 4));
    }
    add(values, whole + pairs + j);
  }
}
