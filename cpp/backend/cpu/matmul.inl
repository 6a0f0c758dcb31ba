// The matrix kernels, written once over the primitives that matmul_<isa>.cc defines before including this file, in
// namespace draftwerk::cpu::DRAFTWERK_ISA:
//   Float              sixteen f32 lanes, one per row of a panel; Integers: sixteen int32 lanes
//   zero_lanes, splat_lanes, load_lanes<WeightType>, lanes_from_u8, lanes_from_i8, store_lanes, multiply,
//   multiply_add (fused if the machine can), to_lanes
//   kTile              rows of activations that share one pass over a panel
//   zero_point<type>() what dot_block's unsigned weights are too large by; 0 where it takes care of that itself
//   dot_block<type, R>(block, quants, stride, starts, start_stride, dot)   dot[r] = starts[r * start_stride] + sum over
//                      the block's 32 columns of unsigned weight * quants[r * stride + column], exact; `block` points
//                      behind the scales; no starts where the zero point is 0
//   dot_half<half, R>  the same over half a block of q6_k
// Every float operation on an output is written here, once, for any number of rows: that is what makes rows invariant.

// Rows of quantised activations whose int8 values fit in a quarter of the smallest L2 that we expect (512 KiB); they
// stay there while the panels go by.
constexpr std::int64_t kActivationBytes = 128 * 1024;

// Starts (matmul.h) that a call keeps at a time: as many rows as fit share them over all panels.
constexpr std::int64_t kStarts = 16384;
static_assert(kMaxQuantizedColumns / kBlock * 2 <= kStarts);  // two for each block of q6_k

template <WeightType type>
constexpr int starts_per_block() {
  return type == WeightType::q6_k ? 2 : 1;
}

template <WeightType type>
void fill_starts(const Activations& x, std::int64_t first, std::int64_t end, std::int64_t blocks, Start* starts) {
  for (std::int64_t r = first; r < end; ++r) {
    const std::int32_t* sums = x.sums + r * x.block_stride;
    const float* scales = x.scales + r * x.block_stride;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const int low = static_cast<std::int16_t>(sums[b]);
      const int high = sums[b] >> 16;
      if constexpr (type == WeightType::q6_k) {
        (starts++)->whole = -zero_point<type>() * low;
        (starts++)->whole = -zero_point<type>() * high;
      } else if constexpr (type == WeightType::q4_k) {
        (starts++)->scaled = scales[b] * static_cast<float>(low + high);
      } else {
        (starts++)->whole = -zero_point<type>() * (low + high);
      }
    }
  }
}

template <WeightType type, int R>
[[gnu::always_inline]] inline void add_block(const std::byte* block, const std::int8_t* quants, std::int64_t stride,
                                             const float* scales, std::int64_t block_stride, const Start* starts,
                                             std::int64_t start_stride, Float (&y)[R]) {
  const Float weight_scale = load_lanes<WeightType::f16>(block);
  Integers dot[R];
  dot_block<type, R>(block + layout::kHalves, quants, stride, starts, start_stride, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    y[r] = multiply_add(to_lanes(dot[r]), multiply(weight_scale, splat_lanes(scales[r * block_stride])), y[r]);
  }
}

template <int R>
[[gnu::always_inline]] inline void add_block_q4_k(const std::byte* block, Float d, Float negative_dmin,
                                                  const std::int8_t* quants, std::int64_t stride, const float* scales,
                                                  std::int64_t block_stride, const Start* starts,
                                                  std::int64_t start_stride, Float (&y)[R]) {
  const Float weight_scale = multiply(d, lanes_from_u8(block));
  const Float weight_min = multiply(negative_dmin, lanes_from_u8(block + kPanel));
  Integers dot[R];
  dot_block<WeightType::q4_k, R>(block + 2 * kPanel, quants, stride, nullptr, 0, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    y[r] = multiply_add(to_lanes(dot[r]), multiply(weight_scale, splat_lanes(scales[r * block_stride])), y[r]);
    y[r] = multiply_add(weight_min, splat_lanes(starts[r * start_stride].scaled), y[r]);
  }
}

template <int R, int half>
[[gnu::always_inline]] inline void add_half_q6_k(const std::byte* block, Float d, const std::int8_t* quants,
                                                 std::int64_t stride, const float* scales, std::int64_t block_stride,
                                                 const Start* starts, std::int64_t start_stride, Float (&y)[R]) {
  const Float weight_scale = multiply(d, lanes_from_i8(block + half * kPanel));
  Integers dot[R];
  dot_half<half, R>(block + 2 * kPanel, quants, stride, starts + half, start_stride, dot);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    y[r] = multiply_add(to_lanes(dot[r]), multiply(weight_scale, splat_lanes(scales[r * block_stride])), y[r]);
  }
}

// Asks for the bytes at `ahead` from here, if any: see multiply_tile.
template <std::size_t bytes>
[[gnu::always_inline]] inline void prefetch_ahead(const std::byte* at, std::size_t ahead) {
  if (ahead == 0) return;
#pragma GCC unroll 16
  for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + ahead + line, 0, 2);
}

// R rows against one panel: y[r] of its sixteen outputs.
template <WeightType type, int R>
[[gnu::always_inline]] inline void add_panel(const std::byte* panel, std::int64_t columns, const Activations& x,
                                             std::int64_t first_row, const Start* starts, std::size_t ahead,
                                             Float (&y)[R]) {
  if constexpr (type == WeightType::f32 || type == WeightType::f16 || type == WeightType::bf16) {
    const float* values = x.values + first_row * x.stride;
    const std::int64_t stride = x.stride;
    constexpr std::size_t bytes = kPanel * (type == WeightType::f32 ? 4 : 2);
    for (std::int64_t c = 0; c < columns; ++c, panel += bytes) {
      if (bytes == 64 || c % 2 == 0) prefetch_ahead<64>(panel, ahead);
      const Float w = load_lanes<type>(panel);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) y[r] = multiply_add(w, splat_lanes(values[r * stride + c]), y[r]);
    }
  } else {
    const std::int8_t* quants = x.quants + first_row * x.quant_stride;
    const float* scales = x.scales + first_row * x.block_stride;
    const std::int64_t stride = x.quant_stride;
    const std::int64_t block_stride = x.block_stride;
    constexpr int each = starts_per_block<type>();
    const std::int64_t start_stride = columns / kBlock * each;
    const std::int8_t* end = quants + columns;
    if constexpr (type == WeightType::q4_k || type == WeightType::q6_k) {
      while (quants != end) {
        const Float d = load_lanes<WeightType::f16>(panel);
        panel += layout::kHalves;
        Float negative_dmin = zero_lanes();
        if constexpr (type == WeightType::q4_k) {
          negative_dmin = multiply(load_lanes<WeightType::f16>(panel), splat_lanes(-1.0F));
          panel += layout::kHalves;
        }
        for (int b = 0; b < layout::kBlocksPerSuper; ++b, quants += kBlock, ++scales, starts += each) {
          if constexpr (type == WeightType::q4_k) {
            prefetch_ahead<layout::kQ4KBlock>(panel, ahead);
            add_block_q4_k<R>(panel, d, negative_dmin, quants, stride, scales, block_stride, starts, start_stride, y);
            panel += layout::kQ4KBlock;
          } else {
            prefetch_ahead<layout::kQ6KBlock>(panel, ahead);
            add_half_q6_k<R, 0>(panel, d, quants, stride, scales, block_stride, starts, start_stride, y);
            add_half_q6_k<R, 1>(panel, d, quants, stride, scales, block_stride, starts, start_stride, y);
            panel += layout::kQ6KBlock;
          }
        }
      }
    } else {
      constexpr std::size_t bytes = type == WeightType::q8_0   ? layout::kQ8Block
                                    : type == WeightType::q4_0 ? layout::kQ4Block
                                                               : layout::kQ5Block;
      for (; quants != end; quants += kBlock, ++scales, starts += each, panel += bytes) {
        prefetch_ahead<bytes>(panel, ahead);
        add_block<type, R>(panel, quants, stride, scales, block_stride, starts, start_stride, y);
      }
    }
  }
}

template <WeightType type, int R>
[[gnu::noinline]] void multiply_tile(const PackedMatrix& w, std::int64_t p, std::size_t ahead, const Activations& x,
                                     std::int64_t first_row, const Start* starts, float* y, std::int64_t y_stride) {
  y += first_row * y_stride + p * kPanel;
  // The outputs of a head are megabytes apart and out of cache: fetched now, their stores do not stall the next tile.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_prefetch(y + r * y_stride, 1);
  Float sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = zero_lanes();
  add_panel<type, R>(w.data + static_cast<std::size_t>(p) * w.panel_bytes, w.columns, x, first_row, starts, ahead, sum);
  const std::int64_t left = w.rows - p * kPanel;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (left >= kPanel) {
      store_lanes(y + r * y_stride, sum[r]);
    } else {
      float lanes[kPanel];
      store_lanes(lanes, sum[r]);
      std::memcpy(y + r * y_stride, lanes, static_cast<std::size_t>(left) * sizeof(float));
    }
  }
}

using TileKernel = void (*)(const PackedMatrix& w, std::int64_t p, std::size_t ahead, const Activations& x,
                            std::int64_t first_row, const Start* starts, float* y, std::int64_t y_stride);

template <WeightType type, int... R>
TileKernel tile_kernel(int rows, std::integer_sequence<int, R...>) {
  static constexpr TileKernel kernels[] = {multiply_tile<type, R + 1>...};
  return kernels[rows - 1];
}

template <WeightType type>
void multiply_panels(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                     int rows, float* y, std::int64_t y_stride) {
  const std::int64_t panels = panel_count(w.rows);
  std::int64_t chunk = kActivationBytes / w.columns / kTile * kTile;
  if (chunk < 4 * kTile) chunk = 4 * kTile;
  constexpr bool quantized = type != WeightType::f32 && type != WeightType::f16 && type != WeightType::bf16;
  const std::int64_t row_starts = quantized ? w.columns / kBlock * starts_per_block<type>() : 0;
  Start starts[quantized ? kStarts : 1];
  if (row_starts * chunk > kStarts) chunk = kStarts / row_starts;
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t end = first + chunk < rows ? first + chunk : rows;
    if (first == 0) {  // the panels after it are asked for while the one before them is multiplied
      const std::byte* panel = w.data + static_cast<std::size_t>(first_panel) * w.panel_bytes;
      for (std::size_t line = 0; line < w.panel_bytes; line += 64) __builtin_prefetch(panel + line, 0, 2);
    }
    if constexpr (quantized) fill_starts<type>(x, first, end, w.columns / kBlock, starts);
    for (std::int64_t p = first_panel; p < last_panel; ++p) {
      for (std::int64_t row = first; row < end; row += kTile) {
        // Past the last panel too: a thread's next piece usually begins there.
        const std::size_t ahead = row == first && p + 1 < panels ? w.panel_bytes : 0;
        const int tile = static_cast<int>(end - row < kTile ? end - row : kTile);
        tile_kernel<type>(tile, std::make_integer_sequence<int, kTile>())(
            w, p, ahead, x, row, starts + (row - first) * row_starts, y, y_stride);
      }
    }
  }
}

void matmul(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x, int rows,
            float* y, std::int64_t y_stride) {
  switch (w.type) {
    case WeightType::f32:
      return multiply_panels<WeightType::f32>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::f16:
      return multiply_panels<WeightType::f16>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::bf16:
      return multiply_panels<WeightType::bf16>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q8_0:
      return multiply_panels<WeightType::q8_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q4_0:
      return multiply_panels<WeightType::q4_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q5_0:
      return multiply_panels<WeightType::q5_0>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q4_k:
      return multiply_panels<WeightType::q4_k>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::q6_k:
      return multiply_panels<WeightType::q6_k>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::f8_e4m3:  // no panel holds it
      return;
  }
}

// Sixteen lanes folded to one in halves: the largest, or the sum, which wraps.
template <bool largest>
[[gnu::always_inline]] inline std::uint32_t fold(u32x16 v) {
  using Eight = std::uint32_t __attribute__((vector_size(32)));
  using Four = std::uint32_t __attribute__((vector_size(16)));
  const Eight a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Eight eight = largest ? (a > b ? a : b) : a + b;
  const Four c = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
  const Four d = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const Four four = largest ? (c > d ? c : d) : c + d;
  const Four swapped = __builtin_shufflevector(four, four, 2, 3, 0, 1);
  const Four two = largest ? (four > swapped ? four : swapped) : four + swapped;
  if constexpr (largest) return two[0] > two[1] ? two[0] : two[1];
  return two[0] + two[1];
}

void quantize_row(const float* x, int columns, std::int8_t* quants, float* scales, std::int32_t* sums) {
  using i8x16 = std::int8_t __attribute__((vector_size(16)));
  constexpr float kSmallest = 0x1p-100F;
  for (int first = 0; first < columns; first += kBlock, ++scales, ++sums) {
    const f32x16 low = load(x + first);
    const f32x16 high = load(x + first + kLanes);
    // The order of non-negative floats is that of their bits, in which NaN is above infinity and so not lost.
    const u32x16 low_bits = reinterpret_cast<u32x16>(abs(low));
    const u32x16 high_bits = reinterpret_cast<u32x16>(abs(high));
    std::uint32_t bits = fold<true>(low_bits > high_bits ? low_bits : high_bits);
    // A NaN scale spoils every product, whatever the quants.
    if (bits >= 0x7F800000U) bits = 0x7FC00000U;
    float bound;
    std::memcpy(&bound, &bits, sizeof bound);
    const bool zero = bound < kSmallest;
    const float inverse = zero ? 0.0F : 127.0F / bound;
    *scales = zero ? 0.0F : bound / 127.0F;
    const i32x16 low_quants = truncate(round(low * inverse));
    const i32x16 high_quants = truncate(round(high * inverse));
    const i8x16 narrow[2] = {__builtin_convertvector(low_quants, i8x16), __builtin_convertvector(high_quants, i8x16)};
    std::memcpy(quants + first, narrow, sizeof narrow);
    // Both sums at once; a negative low one has borrowed from the high one.
    const u32x16 both = reinterpret_cast<u32x16>(low_quants) + (reinterpret_cast<u32x16>(high_quants) << 16);
    std::uint32_t sum = fold<false>(both);
    sum += (sum & 0x8000U) << 1;
    std::memcpy(sums, &sum, sizeof sum);
  }
}

constexpr MatmulKernels kKernels = {quantize_row, matmul, unpack_row};
