// Operations around products of a step's rows with matrices.
#include <algorithm>

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/pieces.h"

namespace draftwerk::cpu {
namespace {

// Rows of a prompt come in hundreds; then a piece is this many panels, so that activations are read once for several.
constexpr int kManyRows = 64;
constexpr std::int64_t kPiecesPerThread = 12;

}  // namespace

/// Normalises and quantises the first rows of the input, as far as it is wanted.
Activations CpuBackend::prepare(Tensor input, const Norm* norm, int rows, bool quantized, bool floats) {
  const int columns = input.columns;
  require(columns <= max_columns_, "an input wider than reserved");
  if (norm != nullptr || quantized) {
    for_each_row(rows, columns, [&](std::int64_t r, int) {
      const float* x = row_of(input, r);
      if (norm != nullptr) {
        layer_.rms_norm(x, norm->scale, norm->epsilon, columns, inputs_.values(r, columns));
        x = inputs_.values(r, columns);
      }
      if (quantized) inputs_.quantize(matmul_, r, columns, 0, columns, x);
    });
  }
  Activations x = inputs_.view(columns, quantized, floats);
  if (floats && norm == nullptr) {
    x.values = row_of(input, 0);
    x.stride = input.row_stride();
  }
  return x;
}

/// Panels per piece of a product with `panels` panels in all.
std::int64_t CpuBackend::panel_grain(const PackedMatrix& matrix, std::int64_t panels, int rows) const {
  const std::int64_t balanced = std::max<std::int64_t>(panels / (kPiecesPerThread * pool_.size()), 1);
  if (rows >= kManyRows) return balanced;
  return grain_of_bytes(static_cast<std::int64_t>(matrix.panel_bytes));
}

void CpuBackend::project(Tensor input, const Norm* norm, std::span<const Projection> outputs) {
  if (outputs.empty()) return;
  bool quantized = false;
  bool floats = false;
  std::int64_t panels = 0;
  for (const Projection& projection : outputs) {
    const PackedMatrix& matrix = packed(*projection.weight);
    require(matrix.columns == input.columns && projection.output.columns == matrix.rows, "matching projection shapes");
    (takes_quantized(matrix.type) ? quantized : floats) = true;
    panels += panel_count(matrix.rows);
  }
  const Activations x = prepare(input, norm, step_rows(), quantized, floats);
  // One space of panels over all outputs, so that there is no barrier between them.
  const std::int64_t grain = panel_grain(packed(*outputs.front().weight), panels, step_rows());
  pool_.parallel_for(panels, grain, [&](std::int64_t begin, std::int64_t end, int) {
    std::int64_t first = 0;
    for (const Projection& projection : outputs) {
      const PackedMatrix& matrix = packed(*projection.weight);
      const std::int64_t count = panel_count(matrix.rows);
      const std::int64_t from = std::max(begin - first, std::int64_t{0});
      const std::int64_t to = std::min(end - first, count);
      if (from < to) {
        matmul_.matmul(matrix, from, to, x, step_rows(), row_of(projection.output, 0), projection.output.row_stride());
      }
      first += count;
    }
  });
}

void CpuBackend::project_geglu(Tensor input, const Norm& norm, const Weight& gate, const Weight& up, Tensor output) {
  const PackedMatrix& gate_matrix = packed(gate);
  const PackedMatrix& up_matrix = packed(up);
  require(gate_matrix.columns == input.columns && up_matrix.columns == input.columns, "matching gate and up inputs");
  require(gate_matrix.rows == output.columns && up_matrix.rows == output.columns, "matching gate and up outputs");
  require(output.columns <= max_columns_, "an output wider than reserved");
  const bool gate_quantized = takes_quantized(gate_matrix.type);
  const bool up_quantized = takes_quantized(up_matrix.type);
  const int rows = step_rows();
  const Activations x = prepare(input, &norm, rows, gate_quantized || up_quantized, !gate_quantized || !up_quantized);
  const std::int64_t panels = panel_count(gate_matrix.rows);
  const std::int64_t columns = output.columns;
  pool_.parallel_for(panels, panel_grain(gate_matrix, panels, rows), [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(gate_matrix, begin, end, x, rows, product_.data(), columns);
    matmul_.matmul(up_matrix, begin, end, x, rows, row_of(output, 0), output.row_stride());
    const std::int64_t first = begin * kPanel;
    const int count = static_cast<int>(std::min(end * kPanel, columns) - first);
    for (int r = 0; r < rows; ++r) {
      float* out = row_of(output, r) + first;
      layer_.gelu_multiply(product_.data() + r * columns + first, out, count, out);
    }
  });
}

void CpuBackend::project_gelu(Tensor input, const Weight& weight, Tensor factor, Tensor output) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == input.columns && matrix.rows == output.columns && factor.columns == output.columns,
          "matching projection shapes");
  require(output.columns <= max_columns_, "an output wider than reserved");
  const bool quantized = takes_quantized(matrix.type);
  const int rows = step_rows();
  const Activations x = prepare(input, nullptr, rows, quantized, !quantized);
  const std::int64_t panels = panel_count(matrix.rows);
  const std::int64_t columns = output.columns;
  pool_.parallel_for(panels, panel_grain(matrix, panels, rows), [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(matrix, begin, end, x, rows, product_.data(), columns);
    const std::int64_t first = begin * kPanel;
    const int count = static_cast<int>(std::min(end * kPanel, columns) - first);
    for (int r = 0; r < rows; ++r) {
      layer_.gelu_multiply(product_.data() + r * columns + first, row_of(factor, r) + first, count,
                           row_of(output, r) + first);
    }
  });
}

void CpuBackend::project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual, float scale) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == input.columns && matrix.rows == residual.columns, "matching projection shapes");
  require(matrix.rows <= max_columns_, "an output wider than reserved");
  const bool quantized = takes_quantized(matrix.type);
  const int rows = step_rows();
  const Activations x = prepare(input, nullptr, rows, quantized, !quantized);
  const std::int64_t panels = panel_count(matrix.rows);
  pool_.parallel_for(panels, panel_grain(matrix, panels, rows), [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(matrix, begin, end, x, rows, product_.data(), matrix.rows);
  });
  const int columns = residual.columns;
  for_each_row(rows, columns, [&](std::int64_t r, int) {
    layer_.add_rms_norm(product_.data() + r * columns, norm.scale, norm.epsilon, columns, scale, row_of(residual, r));
  });
}

void CpuBackend::experts(Tensor input, const Router& router, const Norm& norm, const Experts& experts, Tensor output) {
  experts_.run(input, step_rows(), router, norm, experts, output);
}

}  // namespace draftwerk::cpu
