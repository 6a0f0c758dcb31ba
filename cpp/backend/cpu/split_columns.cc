#include "backend/cpu/split_columns.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "backend/cpu/quantized_blocks.h"

namespace draftwerk::cpu {
namespace {

using namespace layout;

// A head is read coarsely in two thirds of its bytes with this share: more lets fewer rows through and reads more.
constexpr double kWholeShare = 1.0 / 3.0;

/// Sixteen dwords, of which each holds four columns of a row.
struct Group {
  std::uint32_t row[kPanel];
};

Group load_group(const std::byte* p) {
  Group group;
  std::memcpy(&group, p, sizeof group);
  return group;
}

void store_group(const Group& group, std::byte* p) { std::memcpy(p, &group, sizeof group); }

}  // namespace

SplitColumns split_columns(std::span<const float> importance) {
  const std::size_t columns = importance.size();
  const std::size_t blocks = columns / kBlock;
  SplitColumns split;
  split.order.resize(columns);
  split.whole.assign(blocks, 0);
  const auto weight = [&](std::size_t column) { return importance[column] > 0.0F ? importance[column] : 0.0F; };
  constexpr int kUnit = 2 * kGroupColumns;  // groups come in pairs
  struct Unit {
    double importance;
    std::size_t block;
  };
  std::vector<Unit> units;
  for (std::size_t b = 0; b < blocks; ++b) {
    std::uint8_t* order = &split.order[b * kBlock];
    std::iota(order, order + kBlock, std::uint8_t{0});
    std::stable_sort(order, order + kBlock,
                     [&](std::uint8_t a, std::uint8_t c) { return weight(b * kBlock + a) > weight(b * kBlock + c); });
    for (int first = 0; first < kBlock; first += kUnit) {
      double sum = 0.0;
      for (int i = first; i < first + kUnit; ++i) sum += weight(b * kBlock + order[i]);
      units.push_back({sum, b});
    }
  }
  // Within a block units descend, so that a stable order takes them from its beginning.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.importance > b.importance; });
  const auto chosen = static_cast<std::size_t>(std::lround(kWholeShare * static_cast<double>(units.size())));
  for (std::size_t i = 0; i < chosen; ++i) split.whole[units[i].block] += 2;
  for (const std::uint8_t whole : split.whole) {
    split.coarse_bytes += kHalves + (kGroups + whole) / 2U * kGroupBytes;
    split.rest_bytes += (kGroups - whole) / 2U * kGroupBytes;
  }
  return split;
}

RowNorms split_panel(const SplitColumns& split, const std::byte* panel, std::byte* coarse, std::byte* rest) {
  const std::byte* source = panel;
  RowNorms norms;
  for (std::size_t b = 0; b < split.whole.size(); ++b, source += kQ8Block) {
    std::memcpy(coarse, source, kHalves);
    const int whole = split.whole[b];
    const std::uint8_t* order = &split.order[b * kBlock];
    Group groups[kGroups] = {};
    float row_squares[kPanel] = {};
    float lost_squares[kPanel] = {};
    for (int place = 0; place < kBlock; ++place) {
      const Group from = load_group(source + kHalves + order[place] / kGroupColumns * kGroupBytes);
      const int from_shift = order[place] % kGroupColumns * 8;
      const int to_shift = place % kGroupColumns * 8;
      Group& to = groups[place / kGroupColumns];
      // Squares of bytes and their sums over a block are exact in float32.
      for (int r = 0; r < kPanel; ++r) {
        const std::uint32_t byte = from.row[r] >> from_shift & 255U;
        to.row[r] |= byte << to_shift;
        const float value = static_cast<float>(static_cast<std::int32_t>(byte)) - 128.0F;
        row_squares[r] += value * value;
      }
      if (place < whole * kGroupColumns) continue;
      for (int r = 0; r < kPanel; ++r) {
        const auto low = static_cast<std::int32_t>(from.row[r] >> from_shift & 15U);
        const float lost = static_cast<float>(low) - 8.0F;
        lost_squares[r] += lost * lost;
      }
    }
    for (int r = 0; r < kPanel; ++r) {
      std::uint16_t bits;
      std::memcpy(&bits, coarse + r * sizeof bits, sizeof bits);
      const double scale = half_to_float(bits);
      norms.row[r] += scale * scale * row_squares[r];
      norms.lost[r] += scale * scale * lost_squares[r];
    }
    coarse += kHalves;
    for (int g = 0; g < whole; ++g, coarse += kGroupBytes) store_group(groups[g], coarse);
    const int pairs = (kGroups - whole) / 2;
    for (int j = 0; j < pairs; ++j, coarse += kGroupBytes, rest += kGroupBytes) {
      const Group& first = groups[whole + j];
      const Group& second = groups[whole + pairs + j];
      Group upper;
      Group lower;
      for (int r = 0; r < kPanel; ++r) {
        upper.row[r] = (first.row[r] >> 4 & 0x0F0F0F0FU) | (second.row[r] & 0xF0F0F0F0U);
        lower.row[r] = (first.row[r] & 0x0F0F0F0FU) | (second.row[r] & 0x0F0F0F0FU) << 4;
      }
      store_group(upper, coarse);
      store_group(lower, rest);
    }
  }
  for (int r = 0; r < kPanel; ++r) {
    norms.row[r] = std::sqrt(norms.row[r]);
    norms.lost[r] = std::sqrt(norms.lost[r]);
  }
  return norms;
}

void split_activations(const SplitColumns& split, std::int8_t* quants, std::int32_t* sums) {
  for (std::size_t b = 0; b < split.whole.size(); ++b, quants += kBlock, ++sums) {
    std::int8_t before[kBlock];
    std::memcpy(before, quants, sizeof before);
    const std::uint8_t* order = &split.order[b * kBlock];
    std::int32_t whole = 0;
    std::int32_t others = 0;
    for (int place = 0; place < kBlock; ++place) {
      quants[place] = before[order[place]];
      (place < split.whole[b] * kGroupColumns ? whole : others) += quants[place];
    }
    *sums = (whole & 0xFFFF) | static_cast<std::int32_t>(static_cast<std::uint32_t>(others) << 16);
  }
}

void unpack_split_row(const SplitColumns& split, const std::byte* coarse, const std::byte* rest, int lane, float scale,
                      float* out) {
  for (std::size_t b = 0; b < split.whole.size(); ++b, out += kBlock) {
    std::uint16_t bits;
    std::memcpy(&bits, coarse + lane * sizeof bits, sizeof bits);
    const float d = half_to_float(bits);
    coarse += kHalves;
    const int whole = split.whole[b];
    const int pairs = (kGroups - whole) / 2;
    const std::byte* upper = coarse + whole * kGroupBytes;
    for (int place = 0; place < kBlock; ++place) {
      const int g = place / kGroupColumns;
      const std::size_t at = static_cast<std::size_t>(lane * kGroupColumns + place % kGroupColumns);
      unsigned byte = 0;
      if (g < whole) {
        byte = std::to_integer<unsigned>(coarse[g * kGroupBytes + at]);
      } else {
        const std::size_t vector = static_cast<std::size_t>((g - whole) % pairs) * kGroupBytes + at;
        const int shift = g < whole + pairs ? 0 : 4;
        byte = (std::to_integer<unsigned>(upper[vector]) >> shift & 15U) << 4 |
               (std::to_integer<unsigned>(rest[vector]) >> shift & 15U);
      }
      out[split.order[b * kBlock + place]] = d * static_cast<float>(static_cast<int>(byte) - 128) * scale;
    }
    coarse = upper + pairs * kGroupBytes;
    rest += pairs * kGroupBytes;
  }
}

}  // namespace draftwerk::cpu
