// AMX: one instruction multiplies up to 16 rows of activations by a block of a panel, whose eight groups are the rows
// of a tile as they lie. A panel is unpacked to signed bytes once for many rows, so that no zero point is left; sums go
// through memory to the registers of AVX-512, which scale and add them as matmul.inl does.
//
// A product takes 52 cycles until its sums are in their tile (Intel's optimisation manual), and storing them 16,
// however many rows there are (measured). So products run one pair of blocks ahead of the additions.
#if defined(__x86_64__)

#ifndef DRAFTWERK_ISA  // tests compile this file a second time, with tiles in software
#define DRAFTWERK_ISA amx
#endif

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "backend/cpu/matmul.h"
#include "backend/cpu/places.h"
#include "backend/cpu/split_columns.h"
#include "backend/cpu/tile_instructions.h"

namespace draftwerk::cpu {

namespace DRAFTWERK_ISA {

namespace {

#include "backend/cpu/panels_avx512.inl"

// So few rows are multiplied sooner by AVX-512: unpacking costs as much as three to seven of them.
constexpr int kFewRows = 8;

// Columns of a panel that are unpacked at a time: with their scales 20 KB, which stay in the first cache together with
// 16 rows of activations.
constexpr std::int64_t kSegmentColumns = 1024;
constexpr int kSegmentBlocks = kSegmentColumns / kBlock;
static_assert(kSegmentColumns % kSuperblock == 0);

// Blocks of activations that a call takes at a time: 512 KB, which stay in the second cache, 2 MiB wherever there is
// AMX, while the panels go by.
constexpr std::int64_t kActivationBlocks = 16384;
static_assert(kMaxQuantizedColumns / kBlock <= kActivationBlocks);

struct alignas(64) Segment {
  std::int8_t values[kSegmentBlocks][layout::kGroups][layout::kGroupBytes];
  float scales[kSegmentBlocks][kPanel];
  float mins[kSegmentBlocks][kPanel];  // q4_k: -dmin * min
};

template <WeightType type, int g = 0>
[[gnu::always_inline]] inline void unpack_groups(const std::byte* block,
                                                 std::int8_t (&values)[layout::kGroups][layout::kGroupBytes]) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(kZeroPoint<type>));
  _mm512_store_si512(values[g], _mm512_sub_epi8(weight_group<type, g>(block), zero));
  if constexpr (g + 1 < layout::kGroups) unpack_groups<type, g + 1>(block, values);
}

// Unpacks a panel, block after block.
template <WeightType type, Form form>
class Unpacker {
 public:
  Unpacker(const PackedMatrix& w, std::int64_t panel)
      : panel_(w.data + static_cast<std::size_t>(panel) * w.panel_bytes) {
    if constexpr (form == Form::packed) return;
    rest_ = w.split->rest + static_cast<std::size_t>(panel) * w.split->rest_bytes;
    whole_ = w.split->whole.data();
  }

  // The next `blocks` blocks; superblocks are not divided.
  void unpack(int blocks, Segment& segment) {
    for (int b = 0; b < blocks; ++b) {
      if constexpr (form != Form::packed) {
        unpack_split(b, segment);
      } else if constexpr (type == WeightType::q4_k) {
        if (b % layout::kBlocksPerSuper == 0) begin_superblock();
        _mm512_store_ps(segment.scales[b], _mm512_mul_ps(d_, part_from_u8(panel_)));
        _mm512_store_ps(segment.mins[b], _mm512_mul_ps(negative_dmin_, part_from_u8(panel_ + kPanel)));
        unpack_groups<type>(panel_ + 2 * kPanel, segment.values[b]);
        panel_ += layout::kQ4KBlock;
      } else {
        _mm512_store_ps(segment.scales[b], load_lanes<WeightType::f16, Float>(panel_));
        unpack_groups<type>(panel_ + layout::kHalves, segment.values[b]);
        panel_ += layout::block_of(type);
      }
    }
  }

 private:
  void begin_superblock() {
    d_ = load_lanes<WeightType::f16, Float>(panel_);
    negative_dmin_ = _mm512_mul_ps(load_lanes<WeightType::f16, Float>(panel_ + layout::kHalves), _mm512_set1_ps(-1.0F));
    panel_ += 2 * layout::kHalves;
  }

  void unpack_split(int block, Segment& segment) {
    constexpr bool coarse = form == Form::coarse;
    constexpr int zero = kZeroPoint<WeightType::q8_0>;
    const int whole = *whole_++;
    _mm512_store_ps(segment.scales[block], load_lanes<WeightType::f16, Float>(panel_));
    panel_ += layout::kHalves;
    const auto store = [&](const __m512i(&unsigned_values)[1], int group) __attribute__((always_inline)) {
      // As if the lower halves that a coarse part lacks were 8.
      const int taken_off = coarse && group >= whole ? zero - zero / 16 : zero;
      _mm512_store_si512(segment.values[block][group],
                         _mm512_sub_epi8(unsigned_values[0], _mm512_set1_epi8(static_cast<char>(taken_off))));
    };
    with_whole_groups(whole, [&](auto groups) __attribute__((always_inline)) {
      each_split_group<coarse, groups.value, 1>({panel_, 0}, {rest_, 0}, store);
    });
    const auto halved = static_cast<std::size_t>(layout::kGroups - whole) / 2 * layout::kGroupBytes;
    panel_ += static_cast<std::size_t>(whole) * layout::kGroupBytes + halved;
    rest_ += halved;
  }

  const std::byte* panel_;
  const std::byte* rest_ = nullptr;
  const std::uint8_t* whole_ = nullptr;
  Float d_ = {};
  Float negative_dmin_ = {};
};

// What is asked of memory while a segment is multiplied: so many bytes for each of its blocks.
struct Fetch {
  const std::byte* at = nullptr;
  std::size_t share = 0;

  void ask(std::size_t bytes) {
    if (at == nullptr) return;
    for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    at += bytes;
  }
};

// A panel and, of split columns, its rest: two runs of memory.
using Fetches = std::array<Fetch, 2>;

template <Form form>
Fetches fetches_of(const PackedMatrix& w, std::int64_t panel) {
  const auto p = static_cast<std::size_t>(panel);
  const auto blocks = static_cast<std::size_t>(w.columns / kBlock);
  Fetches fetches;
  fetches[0] = {w.data + p * w.panel_bytes, w.panel_bytes / blocks};
  if constexpr (form == Form::split) {
    fetches[1] = {w.split->rest + p * w.split->rest_bytes, w.split->rest_bytes / blocks};
  }
  return fetches;
}

// The rows of activations of a tile at a segment's first column, and their outputs of a panel.
struct TileRows {
  const std::int8_t* quants;
  std::int64_t quant_stride;
  const float* scales;  // [blocks][rows of the tile]: an address for all of them
  const float* sums;    // q4_k: scale * sum, likewise
  float* y;
  std::int64_t y_stride;
  int done;  // rows at the beginning whose outputs the tile before has
};

// Of the registers, each side of the pipeline has one for sums, one for rows and one for weights: side, 2 + side and
// 4 + side.
TileShapes shapes_for(int rows) {
  TileShapes shapes;
  for (const int side : {0, 1}) {
    shapes.set(side, rows, kPanel * static_cast<int>(sizeof(std::int32_t)));
    shapes.set(2 + side, rows, kBlock);
    shapes.set(4 + side, layout::kGroups, static_cast<int>(layout::kGroupBytes));
  }
  return shapes;
}

// y (+)= a segment's products with R rows; has_mins: of q4_k.
template <bool has_mins, int R>
[[gnu::noinline]] void multiply_segment(const Segment& segment, int blocks, bool first, __mmask16 outputs,
                                        const TileRows& rows, Fetches& fetches) {
  alignas(64) std::int32_t dots[2][R][kPanel];
  Float sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    // As matmul.inl does, for the outputs of a head.
    __builtin_prefetch(rows.y + r * rows.y_stride, 1);
    sum[r] = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(outputs, rows.y + r * rows.y_stride);
  }
  const auto begin = [&]<int side>(std::integral_constant<int, side>, int b) __attribute__((always_inline)) {
    load_tile<2 + side>(rows.quants + b * kBlock, rows.quant_stride);
    load_tile<4 + side>(segment.values[b], layout::kGroupBytes);
    zero_tile<side>();
    multiply_tiles<side, 2 + side, 4 + side>();
  };
  const auto add = [&](int side, int b) __attribute__((always_inline)) {
    const Float weight_scale = _mm512_load_ps(segment.scales[b]);
    const float* scales = rows.scales + b * R;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Float scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[r]));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[side][r])), scale, sum[r]);
      if constexpr (has_mins) {
        sum[r] = _mm512_fmadd_ps(_mm512_load_ps(segment.mins[b]), _mm512_set1_ps(rows.sums[b * R + r]), sum[r]);
      }
    }
  };
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, 1> odd;
  begin(even, 0);
  if (blocks > 1) begin(odd, 1);
  for (int b = 0; b < blocks; b += 2) {
    for (Fetch& fetch : fetches) fetch.ask(2 * fetch.share);
    store_tile<0>(dots[0], sizeof dots[0][0]);
    if (b + 2 < blocks) begin(even, b + 2);
    if (b + 1 < blocks) store_tile<1>(dots[1], sizeof dots[1][0]);
    if (b + 3 < blocks) begin(odd, b + 3);
    add(0, b);
    if (b + 1 < blocks) add(1, b + 1);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= rows.done) _mm512_mask_storeu_ps(rows.y + r * rows.y_stride, outputs, sum[r]);
  }
}

using SegmentKernel = void (*)(const Segment& segment, int blocks, bool first, __mmask16 outputs, const TileRows& rows,
                               Fetches& fetches);

template <bool has_mins, int... R>
SegmentKernel segment_kernel(int rows, std::integer_sequence<int, R...>) {
  static constexpr SegmentKernel kernels[] = {multiply_segment<has_mins, R + 1>...};
  return kernels[rows - 1];
}

template <WeightType type, Form form = Form::packed>
void multiply_panels(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                     int rows, float* y, std::int64_t y_stride) {
  const std::int64_t blocks = w.columns / kBlock;
  const std::int64_t panels = panel_count(w.rows);
  std::int64_t most = kActivationBlocks / blocks;
  if (most > kTileRows) most -= most % kTileRows;
  const std::int64_t chunks = (rows + most - 1) / most;
  const std::int64_t chunk = (rows + chunks - 1) / chunks;
  Fetches nothing;
  Segment segment;
  float scales[kActivationBlocks];  // by tile: [blocks][height]
  float sums[type == WeightType::q4_k ? kActivationBlocks : 1];
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t count = std::min(chunk, rows - first);
    const std::int64_t tiles = (count + kTileRows - 1) / kTileRows;
    // All tiles are of one height, as that is part of the registers' shapes: the last one begins within the one before.
    const std::int64_t height = (count + tiles - 1) / tiles;
    configure_tiles(shapes_for(static_cast<int>(height)));
    const SegmentKernel multiply = segment_kernel<type == WeightType::q4_k>(
        static_cast<int>(height), std::make_integer_sequence<int, kTileRows>());
    const auto row_of = [&](std::int64_t tile) { return first + std::min(tile * height, count - height); };
    for (std::int64_t t = 0; t < tiles; ++t) {
      for (std::int64_t r = 0; r < height; ++r) {
        const std::int64_t from = (row_of(t) + r) * x.block_stride;
        const std::int64_t to = t * blocks * height + r;
        for (std::int64_t b = 0; b < blocks; ++b) {
          scales[to + b * height] = x.scales[from + b];
          if constexpr (type == WeightType::q4_k) {
            const auto [low, high] = halves_of_sum(x.sums[from + b]);
            sums[to + b * height] = x.scales[from + b] * static_cast<float>(low + high);
          }
        }
      }
    }
    // The panels behind the first one are asked for while the one before them is multiplied.
    if (first == 0 && first_panel < last_panel) {
      for (Fetch fetch : fetches_of<form>(w, first_panel)) fetch.ask(fetch.share * static_cast<std::size_t>(blocks));
    }
    for (std::int64_t p = first_panel; p < last_panel; ++p) {
      Unpacker<type, form> unpacker(w, p);
      const std::int64_t left = std::min<std::int64_t>(w.rows - p * kPanel, kPanel);
      const auto outputs = static_cast<__mmask16>((1U << left) - 1U);
      // The next panel, past the last one too: a thread's next piece usually begins there.
      Fetches fetches;
      if (p + 1 < panels) fetches = fetches_of<form>(w, p + 1);
      for (std::int64_t block = 0; block < blocks; block += kSegmentBlocks) {
        const auto segment_blocks = static_cast<int>(std::min<std::int64_t>(kSegmentBlocks, blocks - block));
        unpacker.unpack(segment_blocks, segment);
        for (std::int64_t t = 0; t < tiles; ++t) {
          const std::int64_t row = row_of(t);
          const std::int64_t at = (t * blocks + block) * height;
          const TileRows tile = {x.quants + row * x.quant_stride + block * kBlock,
                                 x.quant_stride,
                                 scales + at,
                                 type == WeightType::q4_k ? sums + at : nullptr,
                                 y + row * y_stride + p * kPanel,
                                 y_stride,
                                 static_cast<int>(first + t * height - row)};
          multiply(segment, segment_blocks, block == 0, outputs, tile, t == 0 ? fetches : nothing);
        }
      }
    }
  }
  release_tiles();
}

void matmul(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x, int rows,
            float* y, std::int64_t y_stride) {
  if (rows <= kFewRows) {
    return avx512::matmul_kernels().matmul(w, first_panel, last_panel, x, rows, y, y_stride);
  }
  switch (w.type) {
    case WeightType::q8_0:
      if (w.split != nullptr) {
        return multiply_panels<WeightType::q8_0, Form::split>(w, first_panel, last_panel, x, rows, y, y_stride);
      }
      return multiply_panels<WeightType::q8_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q4_0:
      return multiply_panels<WeightType::q4_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q5_0:
      return multiply_panels<WeightType::q5_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q4_k:
      return multiply_panels<WeightType::q4_k>(w, first_panel, last_panel, x, rows, y, y_stride);
    default:  // floats, and q6_k: it has a scale for every 16 columns, and storing sums costs as much for 16 as for 32
      return avx512::matmul_kernels().matmul(w, first_panel, last_panel, x, rows, y, y_stride);
  }
}

void matmul_coarse(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                   int rows, float* y, std::int64_t y_stride) {
  if (rows <= kFewRows) {
    return avx512::matmul_kernels().matmul_coarse(w, first_panel, last_panel, x, rows, y, y_stride);
  }
  multiply_panels<WeightType::q8_0, Form::coarse>(w, first_panel, last_panel, x, rows, y, y_stride);
}

}  // namespace

const MatmulKernels& matmul_kernels() {
  static const MatmulKernels kernels = {avx512::matmul_kernels().quantize_row, matmul, matmul_coarse,
                                        avx512::matmul_kernels().unpack_row};
  return kernels;
}

}  // namespace DRAFTWERK_ISA

}  // namespace draftwerk::cpu

#endif
