#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend/backend_checks.h"
#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/packing.h"
#include "backend/weight_type.h"

namespace draftwerk {
namespace cpu {
namespace {

constexpr const char* kName = "cpu backend";
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;

}  // namespace

CpuBackend::CpuBackend(int threads, Isa isa, Screening screening)
    : isa_(isa),
      screening_(screening),
      matmul_(matmul_kernels(isa)),
      layer_(layer_kernels(isa)),
      pool_(threads),
      experts_(matmul_, layer_, pool_) {}

std::string CpuBackend::description() const {
  const int threads = pool_.size();
  // The backend and, up to a comma, what rounding depends on: with tiles it is that of avx512.
  return std::string("cpu ") + isa_name(vector_isa(isa_)) + (isa_ == Isa::amx ? ", amx" : "") + ", " +
         std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}

std::unique_ptr<Buffer> CpuBackend::allocate(std::size_t bytes) { return std::make_unique<MappedMemory>(bytes); }

std::unique_ptr<Buffer> CpuBackend::constants(std::span<const std::byte> values) {
  std::unique_ptr<Buffer> buffer = allocate(values.size());
  std::copy(values.begin(), values.end(), static_cast<std::byte*>(buffer->data()));
  return buffer;
}

std::unique_ptr<Weight> CpuBackend::create_weight(WeightType type, std::int64_t rows, std::int64_t columns) {
  check_shape("weight", type, rows, columns, kMostRows);
  if (takes_quantized(type) && columns > kMaxQuantizedColumns) {
    throw std::invalid_argument("weight [" + std::to_string(rows) + ", " + std::to_string(columns) + "] of type " +
                                weight_type_name(type) + ": at most " + std::to_string(kMaxQuantizedColumns) +
                                " columns");
  }
  PackedMatrix matrix{packed_type(type), rows, columns, panel_bytes(type, columns), nullptr};
  MemorySlice memory = weights_.take(static_cast<std::size_t>(panel_count(rows)) * matrix.panel_bytes);
  matrix.data = memory.data;
  return std::make_unique<CpuWeight>(type, matrix, std::move(memory));
}

void CpuBackend::upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                             const std::byte* source) {
  auto& target = static_cast<CpuWeight&>(weight);
  const PackedMatrix& matrix = target.matrix();
  check_upload(weight, first_row, count, source_type);
  require(matrix.split == nullptr, "a weight that is not split yet");
  const std::size_t row_bytes = stored_row_bytes(source_type, matrix.columns);
  std::byte* panels = target.data() + static_cast<std::size_t>(first_row / kPanel) * matrix.panel_bytes;
  // Everything that pack_rows could refuse is checked above: the body of a parallel loop must not throw.
  pool_.parallel_for(panel_count(count), 8, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t rows = std::min(end * kPanel, count) - begin * kPanel;
    pack_rows(target.type(), matrix.columns, rows, source_type,
              source + static_cast<std::size_t>(begin * kPanel) * row_bytes,
              panels + static_cast<std::size_t>(begin) * matrix.panel_bytes, isa_);
  });
}

std::unique_ptr<RowTable> CpuBackend::map_table(WeightType type, std::int64_t rows, std::int64_t columns,
                                                const std::byte* data, std::shared_ptr<const void> owner) {
  check_shape("table", type, rows, columns, kMostRows);
  table_columns_ = std::max(table_columns_, round_up(columns, kPanel));
  table_rows_.resize(pool_.size() * table_columns_);
  return std::make_unique<CpuRowTable>(type, rows, columns, data, std::move(owner));
}

std::size_t CpuBackend::kv_bytes(int heads, int head_dim, KvType type) const {
  return static_cast<std::size_t>(heads) * kv_head_bytes(head_dim, type);
}

void CpuBackend::reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) {
  check_sizes(kName, max_rows, max_outputs, max_columns, vocabulary, vocabulary_);
  max_rows_ = std::max(max_rows_, max_rows);
  max_outputs_ = std::max(max_outputs_, max_outputs);
  max_columns_ = std::max(max_columns_, round_up<std::int64_t>(max_columns, 64));
  vocabulary_ = vocabulary;
  // One vector more than needed: rows a power of two apart would share cache sets.
  logit_stride_ = round_up<std::int64_t>(vocabulary, 16) + 16;
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
  if (split_head_ != nullptr) {
    screened_ = std::make_unique<ScreenedHead>(*split_head_, isa_, matmul_, layer_, pool_, max_outputs_, screening_);
  }
  head_logits_ = {};
}

void CpuBackend::screen_head(const Weight& head, const Norm& norm) {
  const auto& weight = static_cast<const CpuWeight&>(head);
  require(weight.rows() == vocabulary_, "a head of the reserved vocabulary");
  if (weight.type() != WeightType::q8_0 || split_head_ != nullptr) return;
  split_head_ = std::make_unique<SplitHead>(weight, norm.scale, weights_, pool_);
  screened_ = std::make_unique<ScreenedHead>(*split_head_, isa_, matmul_, layer_, pool_, max_outputs_, screening_);
}

void CpuBackend::reserve_experts(int max_rows, int chosen, const Experts& experts) {
  check_experts(kName, max_rows, chosen, experts);
  experts_.reserve(max_rows, chosen, static_cast<int>(experts.gate_up->columns()), experts);
}

void CpuBackend::begin(const StepRows& rows, KvArena arena) {
  check_step(kName, rows, max_rows_, max_outputs_);
  if (!rows.growths.empty()) throw std::logic_error("cpu backend: trees of drafts do not grow here");
  step_ = rows;
  arena_ = arena;
  ropes_used_ = 0;
  head_logits_ = {};
  for (std::size_t s = 0; s < rows.segments.size(); ++s) {
    const Segment& segment = rows.segments[s];
    std::fill_n(row_segment_.begin() + segment.first_row, segment.rows, static_cast<int>(s));
  }
  attention_->begin(step_);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(int threads) { return make_cpu_backend(threads, cpu::choose_isa()); }

std::unique_ptr<Backend> make_cpu_backend(int threads, cpu::Isa isa) {
  if (threads < 0) throw std::invalid_argument("threads: " + std::to_string(threads) + "; 0 (all) or more");
  return std::make_unique<cpu::CpuBackend>(threads == 0 ? cpu::default_threads() : threads, isa);
}

}  // namespace draftwerk
