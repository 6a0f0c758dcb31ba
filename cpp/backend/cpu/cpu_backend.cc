#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/packing.h"
#include "backend/weight_type.h"

namespace draftwerk {
namespace cpu {
namespace {

void check_shape(const char* what, WeightType type, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (rows > 0 && columns > 0 && rows <= kMost && columns <= kMost && columns % block_columns(type) == 0) return;
  throw std::invalid_argument(std::string(what) + " [" + std::to_string(rows) + ", " + std::to_string(columns) +
                              "] of type " + weight_type_name(type) +
                              ": rows and columns must be positive, columns a multiple of " +
                              std::to_string(block_columns(type)));
}

bool is_tree_of(const Segment& segment, std::span<const std::int64_t> positions) {
  if (segment.parents.size() + 1 != static_cast<std::size_t>(segment.rows) || !is_tree(segment.parents)) return false;
  const auto own = positions.subspan(static_cast<std::size_t>(segment.first_row));
  if (own[0] != segment.first_position) return false;
  for (std::size_t i = 0; i < segment.parents.size(); ++i) {
    if (own[i + 1] != own[static_cast<std::size_t>(segment.parents[i] + 1)] + 1) return false;
  }
  return true;
}

bool is_float(WeightType type) { return block_columns(type) == 1; }

}  // namespace

CpuBackend::CpuBackend(int threads, Isa isa)
    : isa_(isa),
      matmul_(matmul_kernels(isa)),
      layer_(layer_kernels(isa)),
      pool_(threads),
      experts_(matmul_, layer_, pool_) {}

std::string CpuBackend::description() const {
  const int threads = pool_.size();
  return std::string("cpu ") + isa_name(isa_) + ", " + std::to_string(threads) +
         (threads == 1 ? " thread" : " threads");
}

std::unique_ptr<Buffer> CpuBackend::allocate(std::size_t bytes) { return std::make_unique<MappedMemory>(bytes); }

std::unique_ptr<Weight> CpuBackend::create_weight(WeightType type, std::int64_t rows, std::int64_t columns) {
  check_shape("weight", type, rows, columns);
  if (takes_quantized(type) && columns > kMaxQuantizedColumns) {
    throw std::invalid_argument("weight [" + std::to_string(rows) + ", " + std::to_string(columns) + "] of type " +
                                weight_type_name(type) + ": at most " + std::to_string(kMaxQuantizedColumns) +
                                " columns");
  }
  PackedMatrix matrix{type, rows, columns, panel_bytes(type, columns), nullptr};
  MemorySlice memory = weights_.take(static_cast<std::size_t>(panel_count(rows)) * matrix.panel_bytes);
  matrix.data = memory.data;
  return std::make_unique<CpuWeight>(matrix, std::move(memory));
}

void CpuBackend::upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                             const std::byte* source) {
  auto& target = static_cast<CpuWeight&>(weight);
  const PackedMatrix& matrix = target.matrix();
  const bool whole_panels = first_row % kPanel == 0 && (count % kPanel == 0 || first_row + count == matrix.rows);
  if (first_row < 0 || count < 0 || first_row > matrix.rows - count || !whole_panels) {
    throw std::invalid_argument("rows " + std::to_string(first_row) + " .. " + std::to_string(first_row + count) +
                                " of " + std::to_string(matrix.rows) + ": not whole groups of 16");
  }
  const bool converts = is_float(source_type) &&
                        (matrix.type == WeightType::q8_0 || matrix.type == WeightType::q4_0 || is_float(matrix.type));
  if (source_type != matrix.type && !converts) {
    throw std::invalid_argument(std::string("rows of type ") + weight_type_name(source_type) +
                                " for a weight of type " + weight_type_name(matrix.type));
  }
  const std::size_t row_bytes = stored_row_bytes(source_type, matrix.columns);
  std::byte* panels = target.data() + static_cast<std::size_t>(first_row / kPanel) * matrix.panel_bytes;
  // Everything that pack_rows could refuse is checked above: the body of a parallel loop must not throw.
  pool_.parallel_for(panel_count(count), 8, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t rows = std::min(end * kPanel, count) - begin * kPanel;
    pack_rows(matrix.type, matrix.columns, rows, source_type,
              source + static_cast<std::size_t>(begin * kPanel) * row_bytes,
              panels + static_cast<std::size_t>(begin) * matrix.panel_bytes, isa_);
  });
}

std::unique_ptr<RowTable> CpuBackend::map_table(WeightType type, std::int64_t rows, std::int64_t columns,
                                                const std::byte* data, std::shared_ptr<const void> owner) {
  check_shape("table", type, rows, columns);
  table_columns_ = std::max(table_columns_, round_up(columns, kPanel));
  table_rows_.resize(pool_.size() * table_columns_);
  return std::make_unique<CpuRowTable>(type, rows, columns, data, std::move(owner));
}

std::size_t CpuBackend::kv_bytes(int heads, int head_dim, KvType type) const {
  return static_cast<std::size_t>(heads) * kv_head_bytes(head_dim, type);
}

void CpuBackend::reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) {
  if (max_rows < 1 || max_outputs < 1 || max_columns < 1 || vocabulary < 1) {
    throw std::invalid_argument("cpu backend: a step needs at least one row, output, column and token");
  }
  if (vocabulary_ != 0 && vocabulary != vocabulary_) {
    throw std::invalid_argument("cpu backend: a vocabulary of " + std::to_string(vocabulary) + " beside one of " +
                                std::to_string(vocabulary_));
  }
  max_rows_ = std::max(max_rows_, max_rows);
  max_outputs_ = std::max(max_outputs_, max_outputs);
  max_columns_ = std::max(max_columns_, round_up(max_columns, 64));
  vocabulary_ = vocabulary;
  // One vector more than needed: rows a power of two apart would share cache sets.
  logit_stride_ = round_up(vocabulary, 16) + 16;
  logit_chunks_ = (vocabulary + kLogitChunk - 1) / kLogitChunk;
  const std::int64_t rows = std::max(max_rows_, max_outputs_);
  inputs_.resize(rows, max_columns_);
  product_.resize(rows * max_columns_);
  logits_.resize(max_outputs_ * logit_stride_);
  logit_maxima_.resize(max_outputs_ * logit_chunks_);
  for (RopeSlot& slot : ropes_) slot.angles.resize(std::int64_t{max_rows_} * kMaxHeadDim);
  row_segment_.resize(static_cast<std::size_t>(max_rows_));
  attention_ = std::make_unique<Attention>(layer_, pool_, max_rows_);
  sparse_ = std::make_unique<SparseLogits>(matmul_, layer_, pool_, max_outputs_, vocabulary);
  sampler_ = std::make_unique<Sampler>(isa_, vocabulary, max_outputs_, pool_.size());
  head_logits_ = {};
}

void CpuBackend::reserve_experts(int max_rows, int chosen, const Experts& experts) {
  if (max_rows < 1 || chosen < 1 || chosen > experts.count) {
    throw std::invalid_argument("cpu backend: " + std::to_string(chosen) + " of " + std::to_string(experts.count) +
                                " experts for " + std::to_string(max_rows) + " rows");
  }
  experts_.reserve(max_rows, chosen, static_cast<int>(experts.gate_up->columns()), experts);
}

void CpuBackend::begin(const StepRows& rows, KvArena arena) {
  require(rows.tokens.size() <= static_cast<std::size_t>(max_rows_), "more rows than reserved");
  require(rows.output_rows.size() <= static_cast<std::size_t>(max_outputs_), "more outputs than reserved");
  require(rows.positions.size() == rows.tokens.size(), "a position for every row");
  step_ = rows;
  arena_ = arena;
  ropes_used_ = 0;
  int row = 0;
  for (std::size_t s = 0; s < rows.segments.size(); ++s) {
    const Segment& segment = rows.segments[s];
    require(segment.first_row == row && segment.rows > 0 && segment.rows <= step_rows() - row,
            "segments that cover the rows in order");
    require(segment.parents.empty() || is_tree_of(segment, rows.positions), "a tree behind the segment's first row");
    for (const int end = row + segment.rows; row < end; ++row) row_segment_[row] = static_cast<int>(s);
  }
  require(row == step_rows(), "segments that cover all rows");
  attention_->begin(step_);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(int threads) { return make_cpu_backend(threads, cpu::choose_isa()); }

std::unique_ptr<Backend> make_cpu_backend(int threads, cpu::Isa isa) {
  if (threads < 0) throw std::invalid_argument("threads: " + std::to_string(threads) + "; 0 (all) or more");
  return std::make_unique<cpu::CpuBackend>(threads == 0 ? cpu::default_threads() : threads, isa);
}

}  // namespace draftwerk
