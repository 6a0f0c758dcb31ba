#include "backend/cuda/embed.h"

#include "backend/cuda/device.cuh"
#include "backend/cuda/device_weight.h"
#include "backend/cuda/weight_fragments.cuh"

namespace draftwerk::cuda {
namespace {

constexpr int kThreads = 256;

struct EmbedArguments {
  const std::int32_t* tokens;
  MatrixView table;
  float* out;
  std::int32_t stride;
  float scale;
};

// A block takes 256 columns of a row. Bound by the latency of a launch and two reads one after the other: 2 us for any
// small step; the lines of a panel that a row lies in are shared by its 15 neighbours, so a row of 5376 bf16 values
// touches 21 KB.
__global__ void __launch_bounds__(kThreads) embed_rows(const EmbedArguments a) {
  follow_previous();
  const int row = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (column >= a.table.columns) return;
  const std::int32_t token = a.tokens[row];
  // A row of padding may have any token.
  const int known = token >= 0 && token < a.table.rows ? token : 0;
  a.out[static_cast<std::int64_t>(row) * a.stride + column] = __fmul_rn(weight_value(a.table, known, column), a.scale);
}

}  // namespace

void embed(LaunchList& launches, const StepView& step, const Weight& table, float scale, Tensor out) {
  const auto rows = static_cast<unsigned>(step.rows);
  const auto parts = static_cast<unsigned>((table.columns() + kThreads - 1) / kThreads);
  launches.add(embed_rows, {dim3(rows, parts), dim3(kThreads)},
               {step.tokens, view_of(table), static_cast<float*>(out.data), out.row_stride(), scale});
}

}  // namespace draftwerk::cuda
