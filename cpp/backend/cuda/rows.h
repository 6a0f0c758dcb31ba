// Operations that take rows as they come: gathering, sums of norms, token tables. As in backend.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/device_table.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/operands.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

/// Backend::gather: out[i] = source[rows[i]] for i < count. `rows` is on the device.
void gather(LaunchList& list, Tensor source, const std::int32_t* rows, int count, Tensor out);

/// Backend::gather_outputs: states[i] = norm(hidden[output_rows[i]]).
void gather_outputs(LaunchList& list, const StepView& step, Tensor hidden, const Norm& norm, Tensor states);

/// residual = (residual + norm(x)) * scale; leaves the sum, or next(sum) where there is such a norm, as operands, if
/// `left` says where.
void add_norm(LaunchList& list, int rows, Tensor x, const Norm& norm, Tensor residual, float scale,
              const OperandSink& left = {}, const Norm* next = nullptr);

/// Backend::add_normed: residual = (residual + norm(norm_a(a) + norm_b(b))) * scale
void add_normed(LaunchList& list, const StepView& step, Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b,
                const Norm& norm, Tensor residual, float scale);

/// Backend::mix_token_rows: x = scale * (norm(x) + table_scale * table[token]) for each run x of `width` columns.
void mix_token_rows(LaunchList& list, const StepView& step, const TableView& table, float table_scale, const Norm& norm,
                    int width, float scale, Tensor inout);

}  // namespace draftwerk::cuda
