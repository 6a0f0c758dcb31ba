// The matrix kernels, written once over the primitives that matmul_<isa>.cc defines before including this file, in
// namespace draftwerk::cpu::DRAFTWERK_ISA:
//   Float              sixteen f32 lanes, one per row of a panel: those of a float matrix
//   kParts             parts of a quantised panel, each of kPanel / kParts of its rows; Part: as many f32 lanes, which
//                      is one register where there are registers, Integers: int32 lanes
//   tile_for_few<type, form>(), tile_for_many<type, form>()
//                      tiles (RowTile) of a quantised matrix: for as many rows as one of the first kind has, and for
//                      more. Parts that are multiplied at once, of one panel or of several, share what is loaded of
//                      activations
//   kFloatRows         rows of activations that share one pass over a panel of floats
//   splat_lanes<Lanes>, load_lanes<type, Lanes> (of a float type), store_lanes, multiply, multiply_add (fused if the
//   machine can)       for Float and Part
//   part_from_u8, part_from_i8, to_lanes   Parts of bytes and of Integers
//   kZeroPoint<type>   what dot_block's unsigned weights are too large by; 0 where it takes care of that itself
//   dot_block<type, first>(block, quants, stride, starts, start_stride, dot)
//                      dot[p][r] = starts[r * start_stride] + sum over the block's 32 columns of unsigned weight *
//                      quants[r * stride + column], exact, for the rows of part first + p of the tile's panels, which
//                      are counted from its first panel on; `block` is a Place (places.h), behind the scales; no
//                      starts where the zero point is 0
//   dot_half<half, first>     the same over half a block of q6_k
//   dot_split<coarse, whole, first>(block, rest, quants, stride, starts, start_stride, dot)
//                      the same over a block of split columns (split_columns.h) with so many whole groups, all of it or
//                      its coarse part; zero points are those of q8_0, and 120 for what a coarse part has in four bits
// Every float operation on an output is written here, once, for any number of rows: that is what makes rows invariant.
// multiply_segment in matmul_amx.cc repeats those of some types, in the same order, and changes with them.

// Rows of quantised activations whose int8 values fit in a quarter of the smallest L2 that we expect (512 KiB); they
// stay there while the panels go by.
constexpr std::int64_t kActivationBytes = 128 * 1024;

// So many rows meet the panels of a call together, however wide they are: each pass over them is one over memory.
constexpr std::int64_t kFewestTogether = 32;

// Starts (matmul.h) that a call keeps at a time: as many rows as fit share them over all panels.
constexpr std::int64_t kStarts = 16384;
static_assert(kMaxQuantizedColumns / kBlock * 2 <= kStarts);  // two for each block of q6_k

template <WeightType type>
constexpr int starts_per_block() {
  return type == WeightType::q6_k ? 2 : 1;
}

template <WeightType type, Form form>
void fill_starts(const Activations& x, std::int64_t first, std::int64_t end, std::int64_t blocks, Start* starts) {
  for (std::int64_t r = first; r < end; ++r) {
    const std::int32_t* sums = x.sums + r * x.block_stride;
    const float* scales = x.scales + r * x.block_stride;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const auto [low, high] = halves_of_sum(sums[b]);
      if constexpr (type == WeightType::q6_k) {
        (starts++)->whole = -kZeroPoint<type> * low;
        (starts++)->whole = -kZeroPoint<type> * high;
      } else if constexpr (type == WeightType::q4_k) {
        (starts++)->scaled = scales[b] * static_cast<float>(low + high);
      } else if constexpr (form == Form::coarse) {
        constexpr int zero = kZeroPoint<type>;
        (starts++)->whole = -zero * low - (zero - zero / 16) * high;
      } else {
        (starts++)->whole = -kZeroPoint<type> * (low + high);
      }
    }
  }
}

constexpr int kPartRows = kPanel / kParts;

// Panels of a tile of P parts, and how often it passes over them.
template <int P>
constexpr int kTilePanels = P < kParts ? 1 : P / kParts;
template <int P>
constexpr int kPasses = P < kParts ? kParts / P : 1;

// f32 lanes of P parts from `first` on: load(where a part's rows begin among sixteen elements of `bytes` bytes each).
template <int first, int P, typename Load>
[[gnu::always_inline]] inline void load_parts(Place elements, std::size_t bytes, Part (&lanes)[P], const Load& load) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    lanes[p] = load(elements.in((first + p) / kParts) + (first + p) % kParts * kPartRows * bytes);
  }
}

template <int first, int P>
[[gnu::always_inline]] inline void load_halves(Place elements, Part (&lanes)[P]) {
  load_parts<first>(elements, 2, lanes, load_lanes<WeightType::f16, Part>);
}

template <int P>
[[gnu::always_inline]] inline void multiply_each(const Part (&factors)[P], Part (&lanes)[P]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) lanes[p] = multiply(factors[p], lanes[p]);
}

// A block's products, or those of half a block, to R rows of outputs of P parts.
template <int P, int R>
[[gnu::always_inline]] inline void add_products(const Integers (&dot)[P][R], const Part (&weight_scales)[P],
                                                const float* scales, std::int64_t block_stride, Part (&y)[P][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Part scale = splat_lanes<Part>(scales[r * block_stride]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      y[p][r] = multiply_add(to_lanes(dot[p][r]), multiply(weight_scales[p], scale), y[p][r]);
    }
  }
}

template <WeightType type, int first, int P, int R>
[[gnu::always_inline]] inline void add_block(Place block, const std::int8_t* quants, std::int64_t stride,
                                             const float* scales, std::int64_t block_stride, const Start* starts,
                                             std::int64_t start_stride, Part (&y)[P][R]) {
  Part weight_scales[P];
  load_halves<first>(block, weight_scales);
  Integers dot[P][R];
  dot_block<type, first>(block + layout::kHalves, quants, stride, starts, start_stride, dot);
  add_products(dot, weight_scales, scales, block_stride, y);
}

template <int first, int P, int R>
[[gnu::always_inline]] inline void add_block_q4_k(Place block, const Part (&d)[P], const Part (&negative_dmin)[P],
                                                  const std::int8_t* quants, std::int64_t stride, const float* scales,
                                                  std::int64_t block_stride, const Start* starts,
                                                  std::int64_t start_stride, Part (&y)[P][R]) {
  Part weight_scales[P];
  load_parts<first>(block, 1, weight_scales, part_from_u8);
  multiply_each(d, weight_scales);
  Part weight_mins[P];
  load_parts<first>(block + kPanel, 1, weight_mins, part_from_u8);
  multiply_each(negative_dmin, weight_mins);
  Integers dot[P][R];
  dot_block<WeightType::q4_k, first>(block + 2 * kPanel, quants, stride, nullptr, 0, dot);
  add_products(dot, weight_scales, scales, block_stride, y);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Part scaled = splat_lanes<Part>(starts[r * start_stride].scaled);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) y[p][r] = multiply_add(weight_mins[p], scaled, y[p][r]);
  }
}

template <int half, int first, int P, int R>
[[gnu::always_inline]] inline void add_half_q6_k(Place block, const Part (&d)[P], const std::int8_t* quants,
                                                 std::int64_t stride, const float* scales, std::int64_t block_stride,
                                                 const Start* starts, std::int64_t start_stride, Part (&y)[P][R]) {
  Part weight_scales[P];
  load_parts<first>(block + half * kPanel, 1, weight_scales, part_from_i8);
  multiply_each(d, weight_scales);
  Integers dot[P][R];
  dot_half<half, first>(block + 2 * kPanel, quants, stride, starts + half, start_stride, dot);
  add_products(dot, weight_scales, scales, block_stride, y);
}

// How far ahead of what is multiplied a panel is asked for again, from the second cache.
constexpr std::size_t kNear = 1024;

// What a pass over a tile's panels asks for as it goes.
struct Ahead {
  const std::byte* next;  // its share of a panel that comes next; null: of nothing
  bool near;              // and once more what lies near in its own first panel (near_prefetch_pays())
};

// Asks for as much of what comes next as `bytes` of the panel are worth, if there is anything, and goes on behind it:
// each of so many passes asks for its share of a next panel, block by block, so that memory is busy as long as
// arithmetic is. Of the panel itself it asks for what lies near: a product that waits for the second cache waits behind
// all that memory has been asked for.
template <int passes>
[[gnu::always_inline]] inline void prefetch(const std::byte* panel, Ahead& ahead, std::size_t bytes) {
  if (ahead.next == nullptr) return;
  if (ahead.near) {
#pragma GCC unroll 16
    for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(panel + kNear + line, 0, 3);
  }
  const std::size_t share = bytes / passes;
#pragma GCC unroll 16
  for (std::size_t line = 0; line < share; line += 64) __builtin_prefetch(ahead.next + line, 0, 2);
  ahead.next += share;
}

constexpr bool is_float_panel(WeightType type) {
  return type == WeightType::f32 || type == WeightType::f16 || type == WeightType::bf16;
}

// R rows against one panel of floats: y[r] of its sixteen outputs.
template <WeightType type, int R>
[[gnu::always_inline]] inline void add_float_panel(const std::byte* panel, std::int64_t columns, const Activations& x,
                                                   std::int64_t first_row, Ahead ahead, Float (&y)[R]) {
  const float* values = x.values + first_row * x.stride;
  const std::int64_t stride = x.stride;
  constexpr std::size_t bytes = kPanel * (type == WeightType::f32 ? 4 : 2);
  for (std::int64_t c = 0; c < columns; ++c, panel += bytes) {
    if (bytes == 64 || c % 2 == 0) prefetch<1>(panel, ahead, 64);
    const Float w = load_lanes<type, Float>(panel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) y[r] = multiply_add(w, splat_lanes<Float>(values[r * stride + c]), y[r]);
  }
}

// R rows against P parts of quantised panels.
template <WeightType type, int first, int P, int R>
[[gnu::always_inline]] inline void add_parts(Place panels, std::int64_t columns, const Activations& x,
                                             std::int64_t first_row, const Start* starts, Ahead ahead,
                                             Part (&y)[P][R]) {
  const std::int8_t* quants = x.quants + first_row * x.quant_stride;
  const float* scales = x.scales + first_row * x.block_stride;
  const std::int64_t stride = x.quant_stride;
  const std::int64_t block_stride = x.block_stride;
  constexpr int each = starts_per_block<type>();
  const std::int64_t start_stride = columns / kBlock * each;
  const std::int8_t* end = quants + columns;
  if constexpr (type == WeightType::q4_k || type == WeightType::q6_k) {
    while (quants != end) {
      prefetch<kPasses<P>>(panels.at, ahead, (type == WeightType::q4_k ? 2 : 1) * layout::kHalves);
      Part d[P];
      load_halves<first>(panels, d);
      panels += layout::kHalves;
      Part negative_dmin[P] = {};
      if constexpr (type == WeightType::q4_k) {
        load_halves<first>(panels, negative_dmin);
#pragma GCC unroll 4
        for (Part& lanes : negative_dmin) lanes = multiply(lanes, splat_lanes<Part>(-1.0F));
        panels += layout::kHalves;
      }
      for (int b = 0; b < layout::kBlocksPerSuper; ++b, quants += kBlock, ++scales, starts += each) {
        if constexpr (type == WeightType::q4_k) {
          prefetch<kPasses<P>>(panels.at, ahead, layout::kQ4KBlock);
          add_block_q4_k<first>(panels, d, negative_dmin, quants, stride, scales, block_stride, starts, start_stride,
                                y);
          panels += layout::kQ4KBlock;
        } else {
          prefetch<kPasses<P>>(panels.at, ahead, layout::kQ6KBlock);
          add_half_q6_k<0, first>(panels, d, quants, stride, scales, block_stride, starts, start_stride, y);
          add_half_q6_k<1, first>(panels, d, quants, stride, scales, block_stride, starts, start_stride, y);
          panels += layout::kQ6KBlock;
        }
      }
    }
  } else {
    constexpr std::size_t bytes = layout::block_of(type);
    for (; quants != end; quants += kBlock, ++scales, starts += each, panels += bytes) {
      prefetch<kPasses<P>>(panels.at, ahead, bytes);
      add_block<type, first>(panels, quants, stride, scales, block_stride, starts, start_stride, y);
    }
  }
}

// R rows against P parts of panels, the first of which is panel `p`, of a matrix of split columns.
template <bool coarse, int first, int P, int R>
[[gnu::always_inline]] inline void add_split_parts(const PackedMatrix& w, std::int64_t p, Place panels,
                                                   const Activations& x, std::int64_t first_row, const Start* starts,
                                                   Ahead ahead, Part (&y)[P][R]) {
  const SplitColumns& split = *w.split;
  Place rest = {split.rest + static_cast<std::size_t>(p) * split.rest_bytes, split.rest_bytes};
  const std::int64_t blocks = w.columns / kBlock;
  const auto shares = static_cast<std::size_t>(blocks);
  Ahead ahead_of_rest = {nullptr, ahead.near};
  if (!coarse && ahead.next != nullptr) {
    const std::size_t next = static_cast<std::size_t>(ahead.next - w.data) / w.panel_bytes;
    ahead_of_rest.next = split.rest + next * split.rest_bytes + first * split.rest_bytes / kParts;
  }
  const std::int8_t* quants = x.quants + first_row * x.quant_stride;
  const float* scales = x.scales + first_row * x.block_stride;
  for (std::int64_t b = 0; b < blocks; ++b, quants += kBlock, ++scales, ++starts) {
    prefetch<kPasses<P>>(panels.at, ahead, split.coarse_bytes / shares);
    if constexpr (!coarse) prefetch<kPasses<P>>(rest.at, ahead_of_rest, split.rest_bytes / shares);
    const int whole = split.whole[static_cast<std::size_t>(b)];
    Part weight_scales[P];
    load_halves<first>(panels, weight_scales);
    panels += layout::kHalves;
    Integers dot[P][R];
    with_whole_groups(whole, [&](auto groups) __attribute__((always_inline)) {
      dot_split<coarse, groups.value, first>(panels, rest, quants, x.quant_stride, starts, blocks, dot);
    });
    add_products(dot, weight_scales, scales, x.block_stride, y);
    const auto halved = static_cast<std::size_t>(layout::kGroups - whole) / 2 * layout::kGroupBytes;
    panels += static_cast<std::size_t>(whole) * layout::kGroupBytes + halved;
    rest += halved;
  }
}

// Stores the lanes of R rows of outputs, `left` of them at most.
template <typename Lanes, int R>
[[gnu::always_inline]] inline void store_rows(const Lanes (&sum)[R], float* y, std::int64_t y_stride,
                                              std::int64_t left) {
  constexpr std::int64_t lanes = sizeof(Lanes) / sizeof(float);
  if (left <= 0) return;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (left >= lanes) {
      store_lanes(y + r * y_stride, sum[r]);
    } else {
      float some[lanes];
      store_lanes(some, sum[r]);
      std::memcpy(y + r * y_stride, some, static_cast<std::size_t>(left) * sizeof(float));
    }
  }
}

template <WeightType type, Form form, int first, int P, int R>
[[gnu::always_inline]] inline void multiply_parts(const PackedMatrix& w, std::int64_t p, Place panels, Ahead ahead,
                                                  const Activations& x, std::int64_t first_row, const Start* starts,
                                                  float* y, std::int64_t y_stride, std::int64_t left) {
  Part sums[P][R] = {};
  if constexpr (form == Form::packed) {
    add_parts<type, first>(panels, w.columns, x, first_row, starts, ahead, sums);
  } else {
    add_split_parts<form == Form::coarse, first>(w, p, panels, x, first_row, starts, ahead, sums);
  }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) {
    const std::int64_t at = (first + i) * kPartRows;
    store_rows(sums[i], y + at, y_stride, left - at);
  }
}

// R rows against the panels of a tile, P parts at once.
template <WeightType type, Form form, int P, int R>
[[gnu::noinline]] void multiply_tile(const PackedMatrix& w, std::int64_t p, Ahead ahead, const Activations& x,
                                     std::int64_t first_row, const Start* starts, float* y, std::int64_t y_stride) {
  y += first_row * y_stride + p * kPanel;
  // The outputs of a head are megabytes apart and out of cache: fetched now, their stores do not stall the next tile.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kTilePanels<P>; ++i) __builtin_prefetch(y + r * y_stride + i * kPanel, 1);
  }
  const std::byte* panel = w.data + static_cast<std::size_t>(p) * w.panel_bytes;
  const std::int64_t left = w.rows - p * kPanel;
  if constexpr (is_float_panel(type)) {
    Float sum[R] = {};
    add_float_panel<type>(panel, w.columns, x, first_row, ahead, sum);
    store_rows(sum, y, y_stride, left);
  } else {
    const Place panels = {panel, w.panel_bytes};
    multiply_parts<type, form, 0, P, R>(w, p, panels, ahead, x, first_row, starts, y, y_stride, left);
    if constexpr (kPasses<P> == 2) {
      if (ahead.next != nullptr) ahead.next += w.panel_bytes / 2;
      multiply_parts<type, form, P, P, R>(w, p, panels, ahead, x, first_row, starts, y, y_stride, left);
    }
  }
}

using TileKernel = void (*)(const PackedMatrix& w, std::int64_t p, Ahead ahead, const Activations& x,
                            std::int64_t first_row, const Start* starts, float* y, std::int64_t y_stride);

template <WeightType type, Form form, int P, int fewest, int... more>
TileKernel tile_kernel(int rows, std::integer_sequence<int, more...>) {
  static constexpr TileKernel kernels[] = {multiply_tile<type, form, P, fewest + more>...};
  return kernels[rows - fewest];
}

// Fewest rows of a tile where more than `few` are divided among tiles of at most `most`, as evenly as they go.
constexpr int fewest_rows(int few, int most) {
  int fewest = most;
  for (int rows = few + 1; rows <= few + most * most; ++rows) {
    const int each = rows / ((rows + most - 1) / most);
    if (each < fewest) fewest = each;
  }
  return fewest;
}

// The rows from `first` to `end`, more than `few`, against panels of which there are as many as tiles have, or a
// multiple of that; with several panels to a tile, no fewer tiles of rows than it has panels.
template <WeightType type, Form form, int P, int most, int few>
void multiply_rows(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                   std::int64_t first, std::int64_t end, const Start* starts, std::int64_t row_starts, float* y,
                   std::int64_t y_stride) {
  // Tiles of like heights: with AVX2 a row that is left alone costs as much as three.
  constexpr int fewest = fewest_rows(few, most);
  constexpr int together = kTilePanels<P>;
  const std::int64_t tiles = (end - first + most - 1) / most;
  const std::int64_t panels = panel_count(w.rows);
  const bool near = together == 1 && near_prefetch_pays();
  for (std::int64_t p = first_panel; p < last_panel; p += together) {
    std::int64_t row = first;
    for (std::int64_t t = 0; t < tiles; ++t) {
      Ahead ahead = {nullptr, near};
      // The first tiles ask for a panel each. Past the last panel too: a thread's next piece usually begins there.
      const std::int64_t next = p + together + t;
      if (t < together && next < panels) ahead.next = w.data + static_cast<std::size_t>(next) * w.panel_bytes;
      const auto rows = static_cast<int>((end - row + tiles - t - 1) / (tiles - t));
      tile_kernel<type, form, P, fewest>(rows, std::make_integer_sequence<int, most - fewest + 1>())(
          w, p, ahead, x, row, starts + (row - first) * row_starts, y, y_stride);
      row += rows;
    }
  }
}

template <WeightType type, Form form = Form::packed>
void multiply_panels(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                     int rows, float* y, std::int64_t y_stride) {
  constexpr bool quantized = !is_float_panel(type);
  constexpr RowTile few = quantized ? tile_for_few<type, form>() : RowTile{kParts, kFloatRows};
  constexpr RowTile many = quantized ? tile_for_many<type, form>() : few;
  constexpr int most = few.rows > many.rows ? few.rows : many.rows;
  std::int64_t chunk = kActivationBytes / w.columns / most * most;
  if (chunk < kFewestTogether) chunk = kFewestTogether;
  const std::int64_t row_starts = quantized ? w.columns / kBlock * starts_per_block<type>() : 0;
  Start starts[quantized ? kStarts : 1];
  if (row_starts * chunk > kStarts) chunk = kStarts / row_starts;
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t end = first + chunk < rows ? first + chunk : rows;
    if (first == 0) {  // the panels after it are asked for while the one before them is multiplied
      const std::byte* panel = w.data + static_cast<std::size_t>(first_panel) * w.panel_bytes;
      for (std::size_t line = 0; line < w.panel_bytes; line += 64) __builtin_prefetch(panel + line, 0, 2);
    }
    if constexpr (quantized) fill_starts<type, form>(x, first, end, w.columns / kBlock, starts);
    std::int64_t left_panel = first_panel;
    if constexpr (many != few) {
      if (end - first > few.rows) {
        left_panel = last_panel - (last_panel - first_panel) % kTilePanels<many.parts>;
        multiply_rows<type, form, many.parts, many.rows, few.rows>(w, first_panel, left_panel, x, first, end, starts,
                                                                   row_starts, y, y_stride);
      }
    }
    multiply_rows<type, form, few.parts, few.rows, 0>(w, left_panel, last_panel, x, first, end, starts, row_starts, y,
                                                      y_stride);
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
    case WeightType::q6_k:
      return multiply_panels<WeightType::q6_k>(w, first_panel, last_panel, x, rows, y, y_stride);
    case WeightType::f8_e4m3:  // no panel holds it
      return;
  }
}

void matmul_coarse(const PackedMatrix& w, std::int64_t first_panel, std::int64_t last_panel, const Activations& x,
                   int rows, float* y, std::int64_t y_stride) {
  multiply_panels<WeightType::q8_0, Form::coarse>(w, first_panel, last_panel, x, rows, y, y_stride);
}

// The lanes folded to one in halves: the largest, or the sum, which wraps.
template <bool largest, typename Vector>
[[gnu::always_inline]] inline std::uint32_t fold(Vector v) {
  using Eight = std::uint32_t __attribute__((vector_size(32)));
  using Four = std::uint32_t __attribute__((vector_size(16)));
  const auto merged = [](auto a, auto b) __attribute__((always_inline)) {
    if constexpr (largest) {
      return a > b ? a : b;
    } else {
      return a + b;
    }
  };
  if constexpr (sizeof(Vector) == sizeof(u32x16)) {
    const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    return fold<largest>(merged(low, Eight{__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)}));
  } else if constexpr (sizeof(Vector) == sizeof(Eight)) {
    const Four low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
    return fold<largest>(merged(low, Four{__builtin_shufflevector(v, v, 4, 5, 6, 7)}));
  } else {
    const Four two = merged(v, Four{__builtin_shufflevector(v, v, 2, 3, 0, 1)});
    return merged(two[0], two[1]);
  }
}

// A block's quants, in registers, as bytes.
constexpr int kBlockRegisters = kBlock / kRegisterLanes;
[[gnu::always_inline]] inline void store_quants(std::int8_t* p, const RegisterInt (&quants)[kBlockRegisters]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Packing works within halves of a register: the dwords are put in order afterwards.
  const auto words = [&](int i) {
    return _mm256_packs_epi32(reinterpret_cast<__m256i>(quants[i]), reinterpret_cast<__m256i>(quants[i + 1]));
  };
  const __m256i bytes = _mm256_packs_epi16(words(0), words(2));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
#else
  using Narrow = std::int8_t __attribute__((vector_size(kRegisterLanes)));
#pragma GCC unroll 8
  for (int i = 0; i < kBlockRegisters; ++i) {
    const Narrow narrow = __builtin_convertvector(quants[i], Narrow);
    std::memcpy(p + i * kRegisterLanes, &narrow, sizeof narrow);
  }
#endif
}

void quantize_row(const float* x, int columns, std::int8_t* quants, float* scales, std::int32_t* sums) {
  using Word = std::uint32_t __attribute__((vector_size(sizeof(Register))));
  constexpr float kSmallest = 0x1p-100F;
  for (int first = 0; first < columns; first += kBlock, ++scales, ++sums) {
    Register values[kBlockRegisters];
    Word largest = {};
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRegisters; ++i) {
      values[i] = register_load(x + first + i * kRegisterLanes);
      // The order of non-negative floats is that of their bits, in which NaN is above infinity and so not lost.
      const Word magnitude = reinterpret_cast<Word>(values[i]) & 0x7FFFFFFFU;
      largest = magnitude > largest ? magnitude : largest;
    }
    std::uint32_t bits = fold<true>(largest);
    // A NaN scale spoils every product, whatever the quants.
    if (bits >= 0x7F800000U) bits = 0x7FC00000U;
    float bound;
    std::memcpy(&bound, &bits, sizeof bound);
    const bool zero = bound < kSmallest;
    const float inverse = zero ? 0.0F : 127.0F / bound;
    *scales = zero ? 0.0F : bound / 127.0F;
    RegisterInt whole[kBlockRegisters];
    // Both halves' sums at once; a negative low one has borrowed from the high one.
    Word both = {};
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRegisters; ++i) {
      whole[i] = register_truncate(register_round(values[i] * inverse));
      both += reinterpret_cast<Word>(whole[i]) << (i < kBlockRegisters / 2 ? 0 : 16);
    }
    store_quants(quants + first, whole);
    std::uint32_t sum = fold<false>(both);
    sum += (sum & 0x8000U) << 1;
    std::memcpy(sums, &sum, sizeof sum);
  }
}

constexpr MatmulKernels kKernels = {quantize_row, matmul, matmul_coarse, unpack_row};
