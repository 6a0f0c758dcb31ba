#include "backend/cuda/experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "backend/cuda/device.cuh"
#include "backend/cuda/device_weight.h"
#include "backend/cuda/weight_fragments.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// --- scores -------------------------------------------------------------------------------------------------------

constexpr int kScoreRows = 4;  // that share what is read of the weights

struct ScoreArguments {
  const float* input;
  const float* scale;  // of the norm
  float* scores;       // [rows, experts]
  MatrixView weight;
  std::int32_t stride;
  std::int32_t rows;
  float epsilon;
  std::int32_t unused;
};

// A block takes 16 experts and four rows, in float32; each of its warps every eighth step of 16 columns. Bound by
// latency: 128 experts of 2816 columns are 720 KB, read by each group of four rows from the second-level cache: 3 us.
__global__ void __launch_bounds__(kThreads) score_rows(const ScoreArguments a) {
  follow_previous();
  __shared__ float squares[kScoreRows][kWarps];
  __shared__ float sums[kWarps][kScoreRows][kPanelRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int panel = static_cast<int>(blockIdx.x);
  const int first_row = static_cast<int>(blockIdx.y) * kScoreRows;
  const int columns = a.weight.columns;
  const float* x[kScoreRows];
  float inverse[kScoreRows];
#pragma unroll
  for (int r = 0; r < kScoreRows; ++r) {
    x[r] = a.input + static_cast<std::int64_t>(min(first_row + r, a.rows - 1)) * a.stride;
    float sum = 0;
    for (int c = thread; c < columns; c += kThreads) sum = __fmaf_rn(x[r][c], x[r][c], sum);
    sum = warp_sum(sum);
    if (lane() == 0) squares[r][warp()] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kScoreRows; ++r) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum = __fadd_rn(sum, squares[r][w]);
    const float mean = __fdiv_rn(sum, static_cast<float>(columns));
    inverse[r] = __fdiv_rn(1.0F, __fsqrt_rn(__fadd_rn(mean, a.epsilon)));
  }

  float upper[kScoreRows] = {};
  float lower[kScoreRows] = {};
  for (int step = warp(); step * 16 < columns; step += kWarps) {
    std::uint32_t fragment[4];
    float upper_scale;
    float lower_scale;
    step_fragment(a.weight, panel, step, fragment, upper_scale, lower_scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = step * 16 + lane() % 4 * 2 + i % 2 + i / 2 * 8;
      if (column >= columns) continue;
      // Registers 0 and 2 are of the upper row, 1 and 3 of the lower.
      const float w_upper = bf16_to_float(static_cast<std::uint16_t>(fragment[i / 2 * 2] >> i % 2 * 16));
      const float w_lower = bf16_to_float(static_cast<std::uint16_t>(fragment[i / 2 * 2 + 1] >> i % 2 * 16));
      const float of_upper = __fmul_rn(upper_scale, w_upper);
      const float of_lower = __fmul_rn(lower_scale, w_lower);
#pragma unroll
      for (int r = 0; r < kScoreRows; ++r) {
        const float normed = __fmul_rn(__fmul_rn(x[r][column], inverse[r]), a.scale[column]);
        upper[r] = __fmaf_rn(of_upper, normed, upper[r]);
        lower[r] = __fmaf_rn(of_lower, normed, lower[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kScoreRows; ++r) {
    for (int bits = 1; bits <= 2; bits *= 2) {
      upper[r] = __fadd_rn(upper[r], __shfl_xor_sync(kAllLanes, upper[r], bits));
      lower[r] = __fadd_rn(lower[r], __shfl_xor_sync(kAllLanes, lower[r], bits));
    }
    if (lane() % 4 == 0) {
      sums[warp()][r][lane() / 4] = upper[r];
      sums[warp()][r][lane() / 4 + 8] = lower[r];
    }
  }
  __syncthreads();
  const int row = thread / kPanelRows;
  const int expert = panel * kPanelRows + thread % kPanelRows;
  if (row >= kScoreRows || first_row + row >= a.rows || expert >= a.weight.rows) return;
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum = __fadd_rn(sum, sums[w][row][thread % kPanelRows]);
  a.scores[static_cast<std::int64_t>(first_row + row) * a.weight.rows + expert] =
      times_row_scale(sum, a.weight, expert);
}

// --- choice -------------------------------------------------------------------------------------------------------

struct ChoiceArguments {
  const float* scores;              // [rows, experts]
  const float* expert_scale;        // [experts]
  const std::int32_t* row_segment;  // [rows]
  std::int32_t* ids;                // [rows, chosen]
  float* weights;                   // [rows, chosen]
  std::int32_t rows;
  std::int32_t experts;
  std::int32_t chosen;
  std::int32_t unused;
};

// A warp takes a row: the best of all scores behind the last one taken, as often as experts are chosen; then it sorts
// them. Bound by latency: 128 experts and 8 chosen are some 100 shuffles, 2 us.
__global__ void __launch_bounds__(kWarp) choose_experts(const ChoiceArguments a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const std::int64_t first = static_cast<std::int64_t>(row) * a.chosen;
  std::int32_t* ids = a.ids + first;
  if (a.row_segment[row] < 0) {
    for (int i = lane(); i < a.chosen; i += kWarp) {
      ids[i] = -1;
      a.weights[first + i] = 0.0F;
    }
    return;
  }
  const float* scores = a.scores + static_cast<std::int64_t>(row) * a.experts;
  // NaN counts as minus infinity.
  const auto score = [scores](int e) { return scores[e] == scores[e] ? scores[e] : -INFINITY; };
  float last_score = INFINITY;
  int last = -1;
  float largest = 0;
  for (int i = 0; i < a.chosen; ++i) {
    float best_score = -INFINITY;
    int best = a.experts;
    for (int e = lane(); e < a.experts; e += kWarp) {
      const float s = score(e);
      const bool left = s < last_score || (s == last_score && e > last);
      if (left && (s > best_score || (s == best_score && e < best))) {
        best_score = s;
        best = e;
      }
    }
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      const float other_score = __shfl_xor_sync(kAllLanes, best_score, bits);
      const int other = __shfl_xor_sync(kAllLanes, best, bits);
      if (other_score > best_score || (other_score == best_score && other < best)) {
        best_score = other_score;
        best = other;
      }
    }
    last_score = best_score;
    last = best;
    if (i == 0) largest = best_score;
    // Sorted by insertion: whoever is above it moves up.
    if (lane() == 0) {
      int at = i;
      for (; at > 0 && ids[at - 1] > best; --at) ids[at] = ids[at - 1];
      ids[at] = best;
    }
  }
  if (lane() != 0) return;
  float sum = 0;
  for (int i = 0; i < a.chosen; ++i) {
    const float weight = expf(__fsub_rn(scores[ids[i]], largest));
    a.weights[first + i] = weight;
    sum = __fadd_rn(sum, weight);
  }
  for (int i = 0; i < a.chosen; ++i) {
    a.weights[first + i] = __fmul_rn(__fdiv_rn(a.weights[first + i], sum), a.expert_scale[ids[i]]);
  }
}

// --- sorting ------------------------------------------------------------------------------------------------------

struct SortArguments {
  const std::int32_t* ids;  // [rows, chosen]
  ExpertTile* tiles;        // [tile_count]
  std::int32_t* slots;      // [tile_count, tile_rows]
  std::int32_t rows;
  std::int32_t chosen;
  std::int32_t experts;
  std::int32_t tile_rows;
  std::int32_t tile_count;
  std::int32_t unused;
};

// A block takes an expert. It counts the pairs of all experts, which says where its own tiles begin, and fills these
// with its pairs in the order of rows. Bound by latency: 3 us; 2048 rows with 8 experts each some 5.
__global__ void __launch_bounds__(kThreads) sort_pairs(const SortArguments a) {
  follow_previous();
  int* const counts = reinterpret_cast<int*>(dynamic_shared());  // [experts]
  __shared__ int tiles_before;
  __shared__ int all_tiles;
  __shared__ int of_warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int expert = static_cast<int>(blockIdx.x);
  for (int e = thread; e < a.experts; e += kThreads) counts[e] = 0;
  if (thread == 0) tiles_before = all_tiles = 0;
  __syncthreads();
  for (int i = thread; i < a.rows * a.chosen; i += kThreads) {
    if (a.ids[i] >= 0) atomicAdd(&counts[a.ids[i]], 1);
  }
  __syncthreads();
  for (int e = thread; e < a.experts; e += kThreads) {
    const int of_expert = (counts[e] + a.tile_rows - 1) / a.tile_rows;
    if (e < expert) atomicAdd(&tiles_before, of_expert);
    atomicAdd(&all_tiles, of_expert);
  }
  __syncthreads();
  const int count = counts[expert];
  const int first_tile = tiles_before;
  const int tiles = (count + a.tile_rows - 1) / a.tile_rows;
  for (int t = thread; t < tiles; t += kThreads) {
    a.tiles[first_tile + t] = {expert, min(a.tile_rows, count - t * a.tile_rows)};
  }
  if (expert == 0) {
    for (int t = all_tiles + thread; t < a.tile_count; t += kThreads) a.tiles[t] = {0, 0};
  }

  std::int32_t* const slots = a.slots + static_cast<std::int64_t>(first_tile) * a.tile_rows;
  int before = 0;
  for (int first = 0; first < a.rows && before < count; first += kThreads) {
    const int row = first + thread;
    int pair = -1;
    for (int i = 0; i < a.chosen && row < a.rows; ++i) {
      if (a.ids[row * a.chosen + i] == expert) pair = row * a.chosen + i;
    }
    const std::uint32_t mine = __ballot_sync(kAllLanes, pair >= 0 ? 1 : 0);
    if (lane() == 0) of_warps[warp()] = __popc(mine);
    __syncthreads();
    int place = before + __popc(mine & ((1U << lane()) - 1U));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp()) place += of_warps[w];
      before += of_warps[w];
    }
    if (pair >= 0) slots[place] = pair;
    __syncthreads();
  }
}

// --- sum ----------------------------------------------------------------------------------------------------------

struct SumArguments {
  const float* outputs;     // [rows, chosen, columns]
  const std::int32_t* ids;  // [rows, chosen]
  const float* weights;     // [rows, chosen]
  float* out;
  std::int32_t stride;
  std::int32_t columns;
  std::int32_t chosen;
  std::int32_t unused;
};

// A block takes 256 columns of a row. Bound by latency, 2 us; for prompts by the bytes of the experts' outputs.
__global__ void __launch_bounds__(kThreads) sum_experts(const SumArguments a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (column >= a.columns) return;
  const std::int64_t first = static_cast<std::int64_t>(row) * a.chosen;
  float sum = 0;
  for (int i = 0; i < a.chosen; ++i) {
    if (a.ids[first + i] < 0) break;
    sum = __fmaf_rn(a.weights[first + i], a.outputs[(first + i) * a.columns + column], sum);
  }
  a.out[static_cast<std::int64_t>(row) * a.stride + column] = sum;
}

// --- host ---------------------------------------------------------------------------------------------------------

/// Tiles of `tile` rows that `pairs` rows of experts can need.
std::int64_t tiles_for(std::int64_t pairs, int experts, int tile) {
  const std::int64_t begun = std::min<std::int64_t>(pairs, experts);  // tiles that may not be full
  return begun + (pairs - begun) / tile;
}

/// Rows of a tile, for as many rows as an expert gets on average; a tile should have room for twice that.
int expert_tile_rows(std::int64_t pairs, int experts, const ProductDevice& device) {
  const std::int64_t average = (pairs + experts - 1) / experts;
  return tile_rows(static_cast<int>(2 * average), device);
}

}  // namespace

ExpertMixture::ExpertMixture(const ProductDevice& device) : device_(device) { allow_products(device); }

void ExpertMixture::reserve(int max_rows, int chosen, const Experts& experts) {
  max_rows_ = std::max<std::int64_t>(max_rows_, max_rows);
  max_pairs_ = std::max(max_pairs_, std::int64_t{max_rows} * chosen);
  max_experts_ = std::max(max_experts_, experts.count);
  max_hidden_ = std::max(max_hidden_, static_cast<int>(experts.gate_up->columns()));
  max_mlp_ = std::max(max_mlp_, experts.mlp);
  // More rows have larger tiles, of which fewer are full.
  const int tile = expert_tile_rows(max_pairs_, 1, device_);
  max_slots_ = max_pairs_ + std::min<std::int64_t>(max_pairs_, max_experts_) * (tile - 1);
  const auto floats = [](std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b) * sizeof(float); };
  scores_.reserve(floats(max_rows_, max_experts_));
  ids_.reserve(floats(max_pairs_, 1));
  weights_.reserve(floats(max_pairs_, 1));
  tiles_.reserve(static_cast<std::size_t>(max_pairs_) * sizeof(ExpertTile));
  slots_.reserve(floats(max_slots_, 1));
  operands_.reserve(std::max(operand_bytes(static_cast<int>(max_rows_), max_hidden_),
                             operand_bytes(static_cast<int>(max_pairs_), max_mlp_)));
  gated_.reserve(floats(max_pairs_, max_mlp_));
  outputs_.reserve(floats(max_pairs_, max_hidden_));
}

void ExpertMixture::score(LaunchList& launches, int rows, Tensor input, const Router& router) {
  const MatrixView& weight = view_of(*router.weight);
  const auto groups = static_cast<unsigned>((rows + kScoreRows - 1) / kScoreRows);
  launches.add(score_rows, {dim3(static_cast<unsigned>(weight.panels()), groups), dim3(kThreads)},
               {static_cast<const float*>(input.data), router.norm.scale, static_cast<float*>(scores_.get()), weight,
                input.row_stride(), rows, router.norm.epsilon, 0});
}

void ExpertMixture::choose(LaunchList& launches, const StepView& step, const Router& router, int experts) {
  launches.add(choose_experts, {dim3(static_cast<unsigned>(step.rows)), dim3(kWarp)},
               {static_cast<const float*>(scores_.get()), router.expert_scale, step.row_segment,
                static_cast<std::int32_t*>(ids_.get()), static_cast<float*>(weights_.get()), step.rows, experts,
                router.chosen, 0});
}

int ExpertMixture::sort(LaunchList& launches, int rows, int chosen, int experts, int tile_rows) {
  const auto tiles = static_cast<int>(tiles_for(std::int64_t{rows} * chosen, experts, tile_rows));
  launches.add(sort_pairs,
               {dim3(static_cast<unsigned>(experts)), dim3(kThreads), static_cast<std::size_t>(experts) * sizeof(int)},
               {static_cast<const std::int32_t*>(ids_.get()), static_cast<ExpertTile*>(tiles_.get()),
                static_cast<std::int32_t*>(slots_.get()), rows, chosen, experts, tile_rows, tiles, 0});
  return tiles;
}

void ExpertMixture::run(LaunchList& launches, const StepView& step, Tensor input, const Router& router,
                        const Norm& norm, const Experts& experts, Tensor output) {
  const MatrixView& gate_up = view_of(*experts.gate_up);
  const MatrixView& down = view_of(*experts.down);
  const int rows = step.rows;
  const int hidden = input.columns;
  const int mlp = experts.mlp;
  const int chosen = router.chosen;
  const std::int64_t pairs = std::int64_t{rows} * chosen;
  require(hidden % kPanelRows == 0 && mlp % kPanelRows == 0, "experts of whole panels");
  require(router.weight->rows() == experts.count && router.weight->columns() == hidden && chosen > 0 &&
              chosen <= experts.count,
          "a router for these experts");
  require(gate_up.rows == experts.count * 2 * mlp && gate_up.columns == hidden && down.rows == experts.count * hidden &&
              down.columns == mlp && output.columns == hidden,
          "matching shapes of experts");
  require(rows <= max_rows_ && pairs <= max_pairs_ && experts.count <= max_experts_ && hidden <= max_hidden_ &&
              mlp <= max_mlp_,
          "experts within what is reserved");

  score(launches, rows, input, router);
  choose(launches, step, router, experts.count);
  Products products{};
  products.tile_rows = expert_tile_rows(pairs, experts.count, device_);
  products.tile_count = sort(launches, rows, chosen, experts.count, products.tile_rows);
  products.expert_tiles = static_cast<const ExpertTile*>(tiles_.get());
  products.slots = static_cast<const std::int32_t*>(slots_.get());
  products.part_count = 1;
  auto* const operands = static_cast<std::byte*>(operands_.get());

  // Columns are not split: several experts at once occupy the device.
  record_operands(launches, rows, input, &norm, operands);
  products.operands = {operands, static_cast<std::int64_t>(operand_bytes(1, hidden))};
  products.rows = rows;
  products.slots_per_row = chosen;
  const std::int64_t gate_bytes = mlp / kPanelRows * gate_up.panel_bytes();
  const Tensor gated{gated_.get(), mlp};
  products.parts[0] = {gate_up.data,
                       gate_up.data + gate_bytes,
                       static_cast<float*>(gated.data),
                       nullptr,
                       {},
                       gate_up.panel_bytes(),
                       2 * gate_bytes,
                       mlp,
                       gate_up.chunks,
                       1,
                       mlp,
                       0,
                       0,
                       0,
                       Epilogue::geglu};
  record_products(launches, gate_up.format, device_, products);

  record_operands(launches, static_cast<int>(pairs), gated, nullptr, operands);
  products.operands = {operands, static_cast<std::int64_t>(operand_bytes(1, mlp))};
  products.rows = static_cast<int>(pairs);
  products.slots_per_row = 1;
  products.parts[0] = {down.data,
                       nullptr,
                       static_cast<float*>(outputs_.get()),
                       nullptr,
                       {},
                       down.panel_bytes(),
                       hidden / kPanelRows * down.panel_bytes(),
                       hidden,
                       down.chunks,
                       1,
                       hidden,
                       0,
                       0,
                       0,
                       Epilogue::none};
  record_products(launches, down.format, device_, products);

  const auto parts = static_cast<unsigned>((hidden + kThreads - 1) / kThreads);
  launches.add(sum_experts, {dim3(static_cast<unsigned>(rows), parts), dim3(kThreads)},
               {static_cast<const float*>(outputs_.get()), static_cast<const std::int32_t*>(ids_.get()),
                static_cast<const float*>(weights_.get()), static_cast<float*>(output.data), output.row_stride(),
                hidden, chosen, 0});
}

}  // namespace draftwerk::cuda
