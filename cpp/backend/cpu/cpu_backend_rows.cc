// Operations that take rows as they come: token tables, gathering, sums of norms.
#include <algorithm>

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/quantized_blocks.h"

namespace draftwerk::cpu {
namespace {

void require_tokens(std::span<const TokenId> tokens, std::int64_t rows) {
  require(std::all_of(tokens.begin(), tokens.end(), [rows](TokenId token) { return token >= 0 && token < rows; }),
          "tokens that the table has");
}

}  // namespace

void CpuBackend::embed(const Weight& table, float scale, Tensor out) {
  const PackedMatrix& matrix = packed_or_split(table);
  require(out.columns == matrix.columns, "embedding rows as wide as the output");
  require_tokens(step_.tokens, matrix.rows);
  for_each_row(step_rows(), out.columns, [&](std::int64_t r, int) {
    matmul_.unpack_row(matrix, step_.tokens[static_cast<std::size_t>(r)], scale, row_of(out, r));
  });
}

void CpuBackend::mix_token_rows(const RowTable& table, float table_scale, const Norm& norm, int width, float scale,
                                Tensor inout) {
  const auto& rows = static_cast<const CpuRowTable&>(table);
  const int columns = inout.columns;
  require(columns == rows.columns() && width > 0 && columns % width == 0, "table rows of whole runs");
  require_tokens(step_.tokens, rows.rows());
  const bool floats = is_float(rows.type());
  for_each_row(step_rows(), columns, [&](std::int64_t r, int worker) {
    float* added = table_rows_.data() + worker * table_columns_;
    const std::byte* source = rows.row(step_.tokens[static_cast<std::size_t>(r)]);
    if (floats) {
      layer_.widen(rows.type(), source, columns, added);
    } else {
      dequantize(rows.type(), source, columns, added);
    }
    float* x = row_of(inout, r);
    for (int first = 0; first < columns; first += width) {
      layer_.mix_rms_norm(x + first, norm.scale, norm.epsilon, width, added + first, table_scale, scale);
    }
  });
}

void CpuBackend::gather(Tensor source, std::span<const int> rows, Tensor out) {
  require(source.columns == out.columns, "rows as wide as those gathered");
  for_each_row(static_cast<std::int64_t>(rows.size()), out.columns, [&](std::int64_t i, int) {
    std::copy_n(row_of(source, rows[static_cast<std::size_t>(i)]), out.columns, row_of(out, i));
  });
}

void CpuBackend::add_normed(Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b, const Norm& norm,
                            Tensor residual, float scale) {
  const int columns = residual.columns;
  require(a.columns == columns && b.columns == columns, "summands as wide as the residual");
  require(columns <= max_columns_, "a sum wider than reserved");
  for_each_row(step_rows(), columns, [&](std::int64_t r, int) {
    float* sum = product_.data() + r * columns;
    layer_.rms_norm(row_of(a, r), norm_a.scale, norm_a.epsilon, columns, sum);
    layer_.add_rms_norm(row_of(b, r), norm_b.scale, norm_b.epsilon, columns, 1.0F, sum);
    layer_.add_rms_norm(sum, norm.scale, norm.epsilon, columns, scale, row_of(residual, r));
  });
}

void CpuBackend::gather_outputs(Tensor hidden, const Norm& norm, Tensor states) {
  require(hidden.columns == states.columns, "states as wide as the rows");
  for_each_row(step_outputs(), states.columns, [&](std::int64_t i, int) {
    layer_.rms_norm(row_of(hidden, step_.output_rows[static_cast<std::size_t>(i)]), norm.scale, norm.epsilon,
                    states.columns, row_of(states, i));
  });
}

}  // namespace draftwerk::cpu
