#include "backend/cuda/projections.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cuda/device_weight.h"
#include "backend/cuda/rows.h"
#include "backend/round_up.h"

namespace draftwerk::cuda {
/// A product and where it goes.
struct Projections::Output {
  const Weight* weight = nullptr;
  const Weight* paired = nullptr;
  Tensor output;
  Tensor factor;
  Epilogue epilogue = Epilogue::none;
  bool leaves = false;  ///< as operands too
};

void Projections::reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) {
  max_rows_ = std::max(max_rows_, max_rows);
  max_outputs_ = std::max(max_outputs_, max_outputs);
  max_columns_ = std::max(max_columns_, max_columns);
  vocabulary_ = vocabulary;
  const int rows = std::max(max_rows_, max_outputs_);
  logit_stride_ = round_up(vocabulary, 32);
  for (GrowingMemory& operands : operands_) operands.reserve(operand_bytes(rows, max_columns_));
  begin();
  partials_.reserve(partial_floats() * sizeof(float));
  counters_.reserve(counter_count() * sizeof(unsigned));
  check(cudaMemset(counters_.get(), 0, counter_count() * sizeof(unsigned)), "clearing device memory");
  check(cudaDeviceSynchronize(), "clearing device memory");
  product_.reserve(static_cast<std::size_t>(rows) * static_cast<std::size_t>(max_columns_) * sizeof(float));
  logits_.reserve(static_cast<std::size_t>(max_outputs_) * static_cast<std::size_t>(logit_stride_) * sizeof(float));
}

void Projections::begin() {
  turn_ = 0;
  sum_.reset();
  left_operands_ = {};
}

void Projections::operands(LaunchList& launches, int rows, Tensor input, const Norm* norm) {
  require(rows <= std::max(max_rows_, max_outputs_) && input.columns <= max_columns_, "an input larger than reserved");
  if (sum_ && sum_->residual.data == input.data && sum_->residual.columns == input.columns && sum_->rows == rows) {
    turn_ = 1 - turn_;
    add_norm(launches, rows, sum_->product, sum_->norm, sum_->residual, sum_->scale, sink_of(turn_, input.columns),
             norm);
    sum_.reset();
    return;
  }
  settle(launches);
  if (norm == nullptr && left_operands_.data == input.data && left_operands_.columns == input.columns &&
      left_operands_.recorded == launches.recorded()) {
    turn_ = 1 - turn_;
    return;
  }
  record_operands(launches, rows, input, norm, sink_of(turn_, input.columns).data);
}

OperandView Projections::read_operands(int columns) const {
  const OperandSink sink = sink_of(turn_, columns);
  return {sink.data, sink.tile_bytes};
}

OperandSink Projections::sink_of(std::size_t turn, int columns) const {
  return {static_cast<std::byte*>(operands_[turn].get()), static_cast<std::int64_t>(operand_bytes(1, columns))};
}

OperandSink Projections::sink(Tensor output) const {
  constexpr int kWholeColumns = 64;  // others would have to be filled up with zeros
  if (output.columns % kWholeColumns != 0 || output.columns > max_columns_) return {};
  return sink_of(1 - turn_, output.columns);
}

void Projections::left(const LaunchList& launches, Tensor output) {
  left_operands_ = {};
  if (sink(output).data != nullptr) left_operands_ = {output.data, output.columns, launches.recorded()};
}

void Projections::settle(LaunchList& launches) {
  if (!sum_) return;
  add_norm(launches, sum_->rows, sum_->product, sum_->norm, sum_->residual, sum_->scale);
  sum_.reset();
}

/// Multiplies what operands() made, by one launch for each format that occurs.
void Projections::multiply(LaunchList& launches, int rows, std::span<const Output> outputs, float softcap) {
  require(outputs.size() <= Products::kMostParts, "at most four products of an input");
  const int columns = view_of(*outputs.front().weight).columns;
  for (const WeightFormat format : kWeightFormats) {
    Products products{};
    products.operands = read_operands(columns);
    products.partials = static_cast<float*>(partials_.get());
    products.counters = static_cast<unsigned*>(counters_.get());
    products.rows = rows;
    products.slots_per_row = 1;
    products.softcap = softcap;
    for (const Output& output : outputs) {
      const MatrixView& weight = view_of(*output.weight);
      require(weight.columns == columns && weight.rows == output.output.columns, "matching projection shapes");
      if (weight.format != format) continue;
      const Tensor& factor = output.factor;
      products.parts[products.part_count++] = {weight.data,
                                               output.paired == nullptr ? nullptr : view_of(*output.paired).data,
                                               static_cast<float*>(output.output.data),
                                               static_cast<const float*>(factor.data),
                                               output.leaves ? sink(output.output) : OperandSink{},
                                               weight.panel_bytes(),
                                               0,
                                               weight.rows,
                                               weight.chunks,
                                               split_count(weight),
                                               output.output.row_stride(),
                                               factor.row_stride(),
                                               0,
                                               0,
                                               output.epilogue};
    }
    if (products.part_count > 0) record_products(launches, format, device_, products);
  }
}

void Projections::project(LaunchList& launches, int rows, Tensor input, const Norm* norm,
                          std::span<const Projection> outputs) {
  if (outputs.empty()) return;
  require(outputs.front().weight->columns() == input.columns, "matching projection shapes");
  operands(launches, rows, input, norm);
  Output parts[Products::kMostParts];
  while (!outputs.empty()) {
    const std::size_t count = std::min<std::size_t>(outputs.size(), Products::kMostParts);
    for (std::size_t i = 0; i < count; ++i) parts[i] = {outputs[i].weight, nullptr, outputs[i].output, {}};
    multiply(launches, rows, std::span(parts, count));
    outputs = outputs.subspan(count);
  }
}

void Projections::project_geglu(LaunchList& launches, int rows, Tensor input, const Norm& norm, const Weight& gate,
                                const Weight& up, Tensor output) {
  require(gate.columns() == input.columns && up.columns() == input.columns, "matching gate and up inputs");
  require(gate.rows() == output.columns && up.rows() == output.columns, "matching gate and up outputs");
  operands(launches, rows, input, &norm);
  if (view_of(gate).format == view_of(up).format) {
    const Output pair[] = {{&gate, &up, output, {}, Epilogue::geglu, true}};
    multiply(launches, rows, pair);
    return left(launches, output);
  }
  // Formats differ in no checkpoint that matters: one after the other, the first's product being the other's factor.
  const Output first[] = {{&up, nullptr, output, {}}};
  multiply(launches, rows, first);
  const Output second[] = {{&gate, nullptr, output, output, Epilogue::gelu, true}};
  multiply(launches, rows, second);
  left(launches, output);
}

void Projections::project_gelu(LaunchList& launches, int rows, Tensor input, const Weight& weight, Tensor factor,
                               Tensor output) {
  require(weight.columns() == input.columns && factor.columns == output.columns, "matching projection shapes");
  operands(launches, rows, input, nullptr);
  const Output part[] = {{&weight, nullptr, output, factor, Epilogue::gelu, true}};
  multiply(launches, rows, part);
  left(launches, output);
}

void Projections::project_add(LaunchList& launches, int rows, Tensor input, const Weight& weight, const Norm& norm,
                              Tensor residual, float scale) {
  require(weight.columns() == input.columns, "matching projection shapes");
  require(weight.rows() <= max_columns_, "an output wider than reserved");
  operands(launches, rows, input, nullptr);
  const Tensor output{product_.get(), static_cast<int>(weight.rows())};
  const Output part[] = {{&weight, nullptr, output, {}}};
  multiply(launches, rows, part);
  sum_ = {rows, output, norm, residual, scale};
}

void Projections::head(LaunchList& launches, int outputs, Tensor states, const Weight& weight, float softcap) {
  require(weight.columns() == states.columns && weight.rows() == vocabulary_, "a head of the reserved vocabulary");
  scores(launches, outputs, states, weight, softcap, logits());
}

void Projections::scores(LaunchList& launches, int rows, Tensor states, const Weight& weight, float softcap,
                         Tensor output) {
  if (rows == 0) return;
  operands(launches, rows, states, nullptr);
  const Output part[] = {{&weight, nullptr, output, {}, Epilogue::softcap}};
  multiply(launches, rows, part, softcap);
}

OperandView Projections::round(LaunchList& launches, int rows, Tensor input) {
  operands(launches, rows, input, nullptr);
  return read_operands(input.columns);
}

Tensor Projections::logits() const { return {logits_.get(), vocabulary_, logit_stride_}; }

}  // namespace draftwerk::cuda
