#include "backend/cuda/operands.h"

#include "backend/cuda/device.cuh"
#include "backend/cuda/operands.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kThreads = 256;

struct OperandArguments {
  const float* input;
  const float* scale;  // of the norm; null: there is none
  OperandSink operands;
  std::int32_t columns;
  std::int32_t stride;
  float epsilon;
  std::int32_t unused = 0;
};

// A block takes a row. Bound by latency: a launch, a read and, for a norm, a reduction: 2 to 3 us.
__global__ void __launch_bounds__(kThreads) round_rows(const OperandArguments a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const float* x = a.input + static_cast<std::int64_t>(row) * a.stride;
  float inverse = 1.0F;
  if (a.scale != nullptr) {
    __shared__ float of_warps[kThreads / kWarp];
    float squares = 0;
    for (int c = thread; c < a.columns; c += kThreads) squares = __fmaf_rn(x[c], x[c], squares);
    squares = warp_sum(squares);
    if (lane() == 0) of_warps[warp()] = squares;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) sum = __fadd_rn(sum, of_warps[w]);
    const float mean = __fdiv_rn(sum, static_cast<float>(a.columns));
    inverse = __fdiv_rn(1.0F, __fsqrt_rn(__fadd_rn(mean, a.epsilon)));
  }
  leave_row<kThreads>(a.operands, row, a.columns, [&](int column) {
    const float value = x[column];
    return a.scale == nullptr ? value : __fmul_rn(__fmul_rn(value, inverse), a.scale[column]);
  });
}

constexpr int kMostChunkColumns = 64;
std::int64_t operand_tile_bytes(int columns) {
  return static_cast<std::int64_t>((columns + kMostChunkColumns - 1) / kMostChunkColumns) *
         (kMostChunkColumns / kBlockColumns) * kFragmentBytes;
}

}  // namespace

std::size_t operand_bytes(int rows, int columns) {
  return static_cast<std::size_t>((rows + kOperandRows - 1) / kOperandRows) *
         static_cast<std::size_t>(operand_tile_bytes(columns));
}

void record_operands(LaunchList& launches, int rows, Tensor input, const Norm* norm, std::byte* operands) {
  launches.add(round_rows, {dim3(static_cast<unsigned>(rows)), dim3(kThreads)},
               {static_cast<const float*>(input.data),
                norm == nullptr ? nullptr : norm->scale,
                {operands, operand_tile_bytes(input.columns)},
                input.columns,
                input.row_stride(),
                norm == nullptr ? 0.0F : norm->epsilon});
}

}  // namespace draftwerk::cuda
