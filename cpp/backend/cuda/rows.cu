#include "backend/cuda/rows.h"

#include "backend/cuda/device.cuh"
#include "backend/cuda/device_table.cuh"
#include "backend/cuda/operands.cuh"

namespace draftwerk::cuda {
namespace {

// Every kernel here has a block for a row. They read and write a few rows of 3 to 22 KB, which takes less than
// launching them (about 2 us); in a prompt they are bound by memory: 2,048 rows of 5,376 read twice and written take 40
// us on an H200. How many threads share a row decides the order of its sums, so it is the same for all rows.
constexpr int kThreads = 512;

/// Calls visit(column) for this thread's columns of a row.
template <typename Visit>
__device__ __forceinline__ void for_each_column(int columns, Visit&& visit) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) visit(i);
}

/// 1 / sqrt(mean + epsilon) of a row whose squares this thread has a sum of. Waits for the block.
__device__ __forceinline__ float norm_factor(float squares, int columns, float epsilon) {
  __shared__ float of_warp[kThreads / kWarp];
  squares = warp_sum(squares);
  __syncthreads();  // everybody has read the last row's
  if (lane() == 0) of_warp[warp()] = squares;
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) sum += of_warp[w];
  return 1.0F / sqrtf(sum / static_cast<float>(columns) + epsilon);
}

__device__ __forceinline__ std::int64_t row_at(int row, int stride) { return static_cast<std::int64_t>(row) * stride; }

struct Gather {
  const float* source;
  const std::int32_t* rows;
  const float* norm_scale;  ///< null: rows as they are
  float* out;
  std::int32_t source_stride;
  std::int32_t out_stride;
  std::int32_t columns;
  float epsilon;
};

__global__ void __launch_bounds__(kThreads) gather_rows(const Gather a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const float* const x = a.source + row_at(a.rows[row], a.source_stride);
  float* const out = a.out + row_at(row, a.out_stride);
  if (a.norm_scale == nullptr) {
    for_each_column(a.columns, [&](int i) { out[i] = x[i]; });
    return;
  }
  float squares = 0.0F;
  for_each_column(a.columns, [&](int i) { squares = fmaf(x[i], x[i], squares); });
  const float factor = norm_factor(squares, a.columns, a.epsilon);
  for_each_column(a.columns, [&](int i) { out[i] = x[i] * factor * a.norm_scale[i]; });
}

struct AddNorm {
  const float* x;
  const float* norm_scale;
  float* residual;
  OperandSink left;
  const float* next_scale;  ///< null: the sum as it is
  std::int32_t x_stride;
  std::int32_t residual_stride;
  std::int32_t columns;
  float epsilon;
  float scale;
  float next_epsilon;
};

__global__ void __launch_bounds__(kThreads) add_norm_rows(const AddNorm a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const float* const x = a.x + row_at(row, a.x_stride);
  float* const residual = a.residual + row_at(row, a.residual_stride);
  float squares = 0.0F;
  for_each_column(a.columns, [&](int i) { squares = fmaf(x[i], x[i], squares); });
  const float factor = norm_factor(squares, a.columns, a.epsilon);
  float squares_of_sum = 0.0F;
  for_each_column(a.columns, [&](int i) {
    const float sum = (residual[i] + x[i] * factor * a.norm_scale[i]) * a.scale;
    residual[i] = sum;
    squares_of_sum = fmaf(sum, sum, squares_of_sum);
  });
  if (a.left.data == nullptr) return;
  // Waits, without a norm as well: the columns of a piece are those of other threads.
  const float next = norm_factor(squares_of_sum, a.columns, a.next_epsilon);
  leave_row<kThreads>(a.left, row, a.columns, [&](int i) {
    return a.next_scale == nullptr ? residual[i] : residual[i] * next * a.next_scale[i];
  });
}

struct AddNormed {
  const float* a;
  const float* b;
  const float* scale_a;
  const float* scale_b;
  const float* norm_scale;
  float* residual;
  std::int32_t a_stride;
  std::int32_t b_stride;
  std::int32_t residual_stride;
  std::int32_t columns;
  float epsilon_a;
  float epsilon_b;
  float epsilon;
  float scale;
};

__global__ void __launch_bounds__(kThreads) add_normed_rows(const AddNormed p) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const float* const a = p.a + row_at(row, p.a_stride);
  const float* const b = p.b + row_at(row, p.b_stride);
  float* const residual = p.residual + row_at(row, p.residual_stride);
  float squares_a = 0.0F;
  float squares_b = 0.0F;
  for_each_column(p.columns, [&](int i) {
    squares_a = fmaf(a[i], a[i], squares_a);
    squares_b = fmaf(b[i], b[i], squares_b);
  });
  const float factor_a = norm_factor(squares_a, p.columns, p.epsilon_a);
  const float factor_b = norm_factor(squares_b, p.columns, p.epsilon_b);
  const auto both = [&](int i) { return fmaf(a[i] * factor_a, p.scale_a[i], b[i] * factor_b * p.scale_b[i]); };
  float squares = 0.0F;
  for_each_column(p.columns, [&](int i) {
    const float x = both(i);
    squares = fmaf(x, x, squares);
  });
  const float factor = norm_factor(squares, p.columns, p.epsilon);
  for_each_column(p.columns,
                  [&](int i) { residual[i] = (residual[i] + both(i) * factor * p.norm_scale[i]) * p.scale; });
}

struct MixRows {
  TableView table;
  const std::int32_t* tokens;
  const float* norm_scale;
  float* inout;
  std::int32_t stride;
  std::int32_t runs;
  std::int32_t width;
  float epsilon;
  float table_scale;
  float scale;
};

constexpr int kRunsPerBlock = 4;

/// A warp for each run of a row.
__global__ void __launch_bounds__(kRunsPerBlock* kWarp) mix_rows(const MixRows a) {
  follow_previous();
  const int run = static_cast<int>(blockIdx.y) * kRunsPerBlock + warp();
  if (run >= a.runs) return;
  const int row = static_cast<int>(blockIdx.x);
  const std::int32_t token = a.tokens[row];
  float* const x = a.inout + row_at(row, a.stride) + run * a.width;
  float squares = 0.0F;
#pragma unroll 8
  for (int i = lane(); i < a.width; i += kWarp) squares = fmaf(x[i], x[i], squares);
  const float factor = 1.0F / sqrtf(warp_sum(squares) / static_cast<float>(a.width) + a.epsilon);
#pragma unroll 8
  for (int i = lane(); i < a.width; i += kWarp) {
    const float added = a.table_scale * table_value(a.table, token, run * a.width + i);
    x[i] = (x[i] * factor * a.norm_scale[i] + added) * a.scale;
  }
}

dim3 blocks(int rows) { return {static_cast<unsigned>(rows)}; }

}  // namespace

void gather(LaunchList& list, Tensor source, const std::int32_t* rows, int count, Tensor out) {
  list.add(gather_rows, {blocks(count), dim3(kThreads)},
           {static_cast<const float*>(source.data), rows, nullptr, static_cast<float*>(out.data), source.row_stride(),
            out.row_stride(), out.columns, 0.0F});
}

void gather_outputs(LaunchList& list, const StepView& step, Tensor hidden, const Norm& norm, Tensor states) {
  list.add(gather_rows, {blocks(step.outputs), dim3(kThreads)},
           {static_cast<const float*>(hidden.data), step.output_rows, norm.scale, static_cast<float*>(states.data),
            hidden.row_stride(), states.row_stride(), states.columns, norm.epsilon});
}

void add_norm(LaunchList& list, int rows, Tensor x, const Norm& norm, Tensor residual, float scale,
              const OperandSink& left, const Norm* next) {
  list.add(add_norm_rows, {blocks(rows), dim3(kThreads)},
           {static_cast<const float*>(x.data), norm.scale, static_cast<float*>(residual.data), left,
            next == nullptr ? nullptr : next->scale, x.row_stride(), residual.row_stride(), residual.columns,
            norm.epsilon, scale, next == nullptr ? 0.0F : next->epsilon});
}

void add_normed(LaunchList& list, const StepView& step, Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b,
                const Norm& norm, Tensor residual, float scale) {
  list.add(add_normed_rows, {blocks(step.rows), dim3(kThreads)},
           {static_cast<const float*>(a.data), static_cast<const float*>(b.data), norm_a.scale, norm_b.scale,
            norm.scale, static_cast<float*>(residual.data), a.row_stride(), b.row_stride(), residual.row_stride(),
            residual.columns, norm_a.epsilon, norm_b.epsilon, norm.epsilon, scale});
}

void mix_token_rows(LaunchList& list, const StepView& step, const TableView& table, float table_scale, const Norm& norm,
                    int width, float scale, Tensor inout) {
  const int runs = inout.columns / width;
  list.add(mix_rows,
           {dim3(static_cast<unsigned>(step.rows), static_cast<unsigned>((runs + kRunsPerBlock - 1) / kRunsPerBlock)),
            dim3(kRunsPerBlock * kWarp)},
           {table, step.tokens, norm.scale, static_cast<float*>(inout.data), inout.row_stride(), runs, width,
            norm.epsilon, table_scale, scale});
}

}  // namespace draftwerk::cuda
