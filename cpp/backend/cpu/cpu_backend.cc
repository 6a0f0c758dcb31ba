#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"
#include "backend/weight_type.h"

namespace draftwerk {
namespace cpu {
namespace {

// Pieces of work. Handing one out costs some tens of nanoseconds, forking and joining about a microsecond; a thread
// streams about 12 bytes per nanosecond from memory.
constexpr std::int64_t kPanelBytesPerPiece = 16 * 1024;
constexpr std::int64_t kElementsPerPiece = 2048;  // of row operations: about 1 us
// Rows of a prompt come in hundreds; then a piece is this many panels, so that activations are read once for several.
constexpr int kManyRows = 64;
constexpr std::int64_t kPiecesPerThread = 12;
// Distinct rotary embeddings (one per layer type) whose angles are kept during a step.
constexpr int kRopeSlots = 4;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// A broken call by our own code, not a user's mistake.
void require(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("cpu backend: ") + what);
}

class CpuWeight final : public Weight {
 public:
  CpuWeight(const PackedMatrix& matrix, MemorySlice memory) : matrix_(matrix), memory_(std::move(memory)) {}
  [[nodiscard]] WeightType type() const override { return matrix_.type; }
  [[nodiscard]] std::int64_t rows() const override { return matrix_.rows; }
  [[nodiscard]] std::int64_t columns() const override { return matrix_.columns; }
  [[nodiscard]] std::size_t bytes() const override {
    return static_cast<std::size_t>(panel_count(matrix_.rows)) * matrix_.panel_bytes;
  }
  [[nodiscard]] const PackedMatrix& matrix() const { return matrix_; }
  [[nodiscard]] std::byte* data() const { return memory_.data; }

 private:
  PackedMatrix matrix_;
  MemorySlice memory_;
};

const PackedMatrix& packed(const Weight& weight) { return static_cast<const CpuWeight&>(weight).matrix(); }

float* row_of(Tensor tensor, std::int64_t row) { return static_cast<float*>(tensor.data) + row * tensor.columns; }

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, Isa isa)
      : isa_(isa), matmul_(matmul_kernels(isa)), layer_(layer_kernels(isa)), pool_(threads) {}

  [[nodiscard]] std::string description() const override {
    const int threads = pool_.size();
    return std::string("cpu ") + isa_name(isa_) + ", " + std::to_string(threads) +
           (threads == 1 ? " thread" : " threads");
  }

  std::unique_ptr<Buffer> allocate(std::size_t bytes) override { return std::make_unique<MappedMemory>(bytes); }
  std::unique_ptr<Weight> create_weight(WeightType type, std::int64_t rows, std::int64_t columns) override;
  void upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                   const std::byte* source) override;
  void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) override;
  [[nodiscard]] std::size_t kv_bytes(int heads, int head_dim, KvType type) const override;
  [[nodiscard]] std::size_t activation_bytes() const override { return sizeof(float); }

  void begin(const StepRows& rows, KvArena arena) override;
  void embed(const Weight& table, float scale, Tensor out) override;
  void project(Tensor input, const Norm* norm, std::span<const Projection> outputs) override;
  void project_geglu(Tensor input, const Norm& norm, const Weight& gate, const Weight& up, Tensor output) override;
  void project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual) override;
  void append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm, const Norm& key_norm,
                 const Rope& rope, const KvLayer& kv) override;
  void attend(Tensor query, int query_heads, const KvLayer& kv, int window, float scale, Tensor output) override;
  void head(Tensor hidden, const Norm& norm, const Weight& weight, float softcap) override;
  void verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) override;
  void read_logits(std::span<float> out) override;

 private:
  /// Angles of one rotary embedding for every row of the step: cosines, then sines, [head_dim / 2] each.
  struct RopeSlot {
    const float* inverse_frequency = nullptr;
    int head_dim = 0;
    ScratchArray<float> angles;  ///< [max_rows, kMaxHeadDim]
  };
  [[nodiscard]] int step_rows() const { return static_cast<int>(step_.tokens.size()); }
  [[nodiscard]] int step_outputs() const { return static_cast<int>(step_.output_rows.size()); }
  Activations prepare(Tensor input, const Norm* norm, const int* row_indices, int rows, bool quantized, bool floats);
  [[nodiscard]] std::int64_t panel_grain(const PackedMatrix& matrix, std::int64_t panels, int rows) const;
  const float* angles(const Rope& rope, int head_dim);

  Isa isa_;
  const MatmulKernels& matmul_;
  const LayerKernels& layer_;
  WorkerPool pool_;
  WeightArena weights_;

  // Limits of reserve() and the scratch it makes.
  int max_rows_ = 0;
  int max_outputs_ = 0;
  std::int64_t max_columns_ = 0;
  int vocabulary_ = 0;
  std::int64_t logit_stride_ = 0;
  std::int64_t logit_chunks_ = 0;
  ScratchArray<float> normed_;        ///< [rows, columns]
  ScratchArray<float> product_;       ///< [rows, columns]
  ScratchArray<std::int8_t> quants_;  ///< [rows, columns]
  ScratchArray<float> scales_;        ///< [rows, columns / 32]
  ScratchArray<std::int32_t> sums_;   ///< [rows, columns / 32]
  ScratchArray<float> logits_;        ///< [outputs, logit_stride_]
  ScratchArray<float> logit_maxima_;  ///< [outputs, logit_chunks_]
  RopeSlot ropes_[kRopeSlots];
  int ropes_used_ = 0;
  std::unique_ptr<Attention> attention_;
  std::unique_ptr<Sampler> sampler_;

  // The step.
  StepRows step_;
  KvArena arena_;
  std::vector<int> row_segment_;  ///< [rows] index of the segment
};

// --- weights -----------------------------------------------------------------------------------------------------

std::unique_ptr<Weight> CpuBackend::create_weight(WeightType type, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (rows <= 0 || columns <= 0 || rows > kMost || columns > kMost || columns % block_columns(type) != 0) {
    throw std::invalid_argument("weight [" + std::to_string(rows) + ", " + std::to_string(columns) + "] of type " +
                                weight_type_name(type) + ": rows and columns must be positive, columns a multiple of " +
                                std::to_string(block_columns(type)));
  }
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
  const auto convertible = [](WeightType type) {
    return type == WeightType::f32 || type == WeightType::f16 || type == WeightType::bf16;
  };
  const bool converts = convertible(source_type) && (matrix.type == WeightType::q8_0 || convertible(matrix.type));
  if (source_type != matrix.type && !converts) {
    throw std::invalid_argument(std::string("rows of type ") + weight_type_name(source_type) +
                                " for a weight of type " + weight_type_name(matrix.type));
  }
  const std::size_t row_bytes =
      static_cast<std::size_t>(matrix.columns / block_columns(source_type)) * block_bytes(source_type);
  std::byte* panels = target.data() + static_cast<std::size_t>(first_row / kPanel) * matrix.panel_bytes;
  // Everything that pack_rows could refuse is checked above: the body of a parallel loop must not throw.
  pool_.parallel_for(panel_count(count), 8, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t rows = std::min(end * kPanel, count) - begin * kPanel;
    pack_rows(matrix.type, matrix.columns, rows, source_type,
              source + static_cast<std::size_t>(begin * kPanel) * row_bytes,
              panels + static_cast<std::size_t>(begin) * matrix.panel_bytes);
  });
}

std::size_t CpuBackend::kv_bytes(int heads, int head_dim, KvType type) const {
  return static_cast<std::size_t>(heads) * kv_head_bytes(head_dim, type);
}

void CpuBackend::reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) {
  if (max_rows < 1 || max_outputs < 1 || max_columns < 1 || vocabulary < 1) {
    throw std::invalid_argument("cpu backend: a step needs at least one row, output, column and token");
  }
  max_rows_ = max_rows;
  max_outputs_ = max_outputs;
  max_columns_ = round_up(max_columns, 64);
  vocabulary_ = vocabulary;
  // One vector more than needed: rows a power of two apart would share cache sets.
  logit_stride_ = round_up(vocabulary, 16) + 16;
  logit_chunks_ = (vocabulary + kLogitChunk - 1) / kLogitChunk;
  const std::int64_t rows = std::max(max_rows, max_outputs);
  const std::int64_t elements = rows * max_columns_;
  normed_.resize(elements);
  product_.resize(elements);
  quants_.resize(elements);
  scales_.resize(elements / kBlock);
  sums_.resize(elements / kBlock);
  logits_.resize(max_outputs * logit_stride_);
  logit_maxima_.resize(max_outputs * logit_chunks_);
  for (RopeSlot& slot : ropes_) slot.angles.resize(std::int64_t{max_rows} * kMaxHeadDim);
  row_segment_.resize(static_cast<std::size_t>(max_rows));
  attention_ = std::make_unique<Attention>(layer_, pool_, max_rows);
  sampler_ = std::make_unique<Sampler>(isa_, vocabulary, max_outputs, pool_.size());
}

// --- projections -------------------------------------------------------------------------------------------------

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
    for (const int end = row + segment.rows; row < end; ++row) row_segment_[row] = static_cast<int>(s);
  }
  require(row == step_rows(), "segments that cover all rows");
}

/// Normalises and quantises rows of the input (all in order, or those of `row_indices`), as far as it is wanted.
Activations CpuBackend::prepare(Tensor input, const Norm* norm, const int* row_indices, int rows, bool quantized,
                                bool floats) {
  const int columns = input.columns;
  require(columns <= max_columns_, "an input wider than reserved");
  const std::int64_t blocks = columns / kBlock;
  const bool copy = norm != nullptr || row_indices != nullptr;
  const auto prepare_rows = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* x = row_of(input, row_indices != nullptr ? row_indices[r] : r);
      if (copy) {
        float* target = normed_.data() + r * columns;
        if (norm != nullptr) {
          layer_.rms_norm(x, norm->scale, norm->epsilon, columns, target);
        } else {
          std::memcpy(target, x, static_cast<std::size_t>(columns) * sizeof(float));
        }
        x = target;
      }
      if (quantized) {
        matmul_.quantize_row(x, columns, quants_.data() + r * columns, scales_.data() + r * blocks,
                             sums_.data() + r * blocks);
      }
    }
  };
  if (copy || quantized) pool_.parallel_for(rows, std::max<std::int64_t>(kElementsPerPiece / columns, 1), prepare_rows);
  Activations result;
  if (floats) {
    result.values = copy ? normed_.data() : row_of(input, 0);
    result.stride = columns;
  }
  if (quantized) {
    result.quants = quants_.data();
    result.scales = scales_.data();
    result.sums = sums_.data();
    result.quant_stride = columns;
    result.block_stride = blocks;
  }
  return result;
}

/// Panels per piece of a product with `panels` panels in all.
std::int64_t CpuBackend::panel_grain(const PackedMatrix& matrix, std::int64_t panels, int rows) const {
  const std::int64_t balanced = std::max<std::int64_t>(panels / (kPiecesPerThread * pool_.size()), 1);
  if (rows >= kManyRows) return balanced;
  const auto bytes = static_cast<std::int64_t>(matrix.panel_bytes);
  return std::max<std::int64_t>(kPanelBytesPerPiece / bytes, 1);
}

void CpuBackend::embed(const Weight& table, float scale, Tensor out) {
  const PackedMatrix& matrix = packed(table);
  require(out.columns == matrix.columns, "embedding rows as wide as the output");
  pool_.parallel_for(step_rows(), std::max<std::int64_t>(kElementsPerPiece / out.columns, 1),
                     [&](std::int64_t begin, std::int64_t end, int) {
                       for (std::int64_t r = begin; r < end; ++r) {
                         matmul_.unpack_row(matrix, step_.tokens[static_cast<std::size_t>(r)], scale, row_of(out, r));
                       }
                     });
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
  const Activations x = prepare(input, norm, nullptr, step_rows(), quantized, floats);
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
        matmul_.matmul(matrix, from, to, x, step_rows(), row_of(projection.output, 0), projection.output.columns);
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
  const Activations x =
      prepare(input, &norm, nullptr, rows, gate_quantized || up_quantized, !gate_quantized || !up_quantized);
  const std::int64_t panels = panel_count(gate_matrix.rows);
  const std::int64_t stride = output.columns;
  pool_.parallel_for(panels, panel_grain(gate_matrix, panels, rows), [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(gate_matrix, begin, end, x, rows, product_.data(), stride);
    matmul_.matmul(up_matrix, begin, end, x, rows, row_of(output, 0), stride);
    const std::int64_t first = begin * kPanel;
    const int count = static_cast<int>(std::min(end * kPanel, stride) - first);
    for (int r = 0; r < rows; ++r) {
      float* out = row_of(output, r) + first;
      layer_.gelu_multiply(product_.data() + r * stride + first, out, count, out);
    }
  });
}

void CpuBackend::project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == input.columns && matrix.rows == residual.columns, "matching projection shapes");
  require(matrix.rows <= max_columns_, "an output wider than reserved");
  const bool quantized = takes_quantized(matrix.type);
  const int rows = step_rows();
  const Activations x = prepare(input, nullptr, nullptr, rows, quantized, !quantized);
  const std::int64_t panels = panel_count(matrix.rows);
  pool_.parallel_for(panels, panel_grain(matrix, panels, rows), [&](std::int64_t begin, std::int64_t end, int) {
    matmul_.matmul(matrix, begin, end, x, rows, product_.data(), matrix.rows);
  });
  const int columns = residual.columns;
  pool_.parallel_for(
      rows, std::max<std::int64_t>(kElementsPerPiece / columns, 1), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t r = begin; r < end; ++r) {
          layer_.add_rms_norm(product_.data() + r * columns, norm.scale, norm.epsilon, columns, row_of(residual, r));
        }
      });
}

// --- attention ---------------------------------------------------------------------------------------------------

/// Cosines and sines for every row of the step, computed once per rotary embedding.
const float* CpuBackend::angles(const Rope& rope, int head_dim) {
  for (int i = 0; i < std::min(ropes_used_, kRopeSlots); ++i) {
    const RopeSlot& slot = ropes_[i];
    if (slot.inverse_frequency == rope.inverse_frequency && slot.head_dim == head_dim) return slot.angles.data();
  }
  RopeSlot& slot = ropes_[ropes_used_++ % kRopeSlots];
  slot.inverse_frequency = rope.inverse_frequency;
  slot.head_dim = head_dim;
  const int half = head_dim / 2;
  pool_.parallel_for(step_rows(), 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const auto position = static_cast<float>(step_.positions[static_cast<std::size_t>(r)]);
      float* cosine = slot.angles.data() + r * head_dim;
      for (int i = 0; i < half; ++i) {
        const float angle = position * rope.inverse_frequency[i];
        cosine[i] = std::cos(angle);
        cosine[half + i] = std::sin(angle);
      }
    }
  });
  return slot.angles.data();
}

void CpuBackend::append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm,
                           const Norm& key_norm, const Rope& rope, const KvLayer& kv) {
  const int head_dim = kv.head_dim;
  require(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kMaxHeadDim, "head_dim a multiple of 16 up to 512");
  require(query.columns == query_heads * head_dim && key.columns == kv.heads * head_dim &&
              value.columns == kv.heads * head_dim,
          "matching head shapes");
  const float* step_angles = angles(rope, head_dim);
  const std::size_t head_bytes = kv_head_bytes(head_dim, kv.type);
  const auto prepare_queries = [&](std::int64_t r) {
    const float* cosine = step_angles + r * head_dim;
    for (int h = 0; h < query_heads; ++h) {
      float* q = row_of(query, r) + h * head_dim;
      layer_.rms_norm(q, query_norm.scale, query_norm.epsilon, head_dim, q);
      layer_.rotate(q, cosine, cosine + head_dim / 2, head_dim);
    }
  };
  const auto store_keys_and_values = [&](std::int64_t r) {
    const float* cosine = step_angles + r * head_dim;
    const Segment& segment = step_.segments[static_cast<std::size_t>(row_segment_[static_cast<std::size_t>(r)])];
    const std::int64_t position = step_.positions[static_cast<std::size_t>(r)];
    const int slot = static_cast<int>(position % kPageSize);
    std::byte* page = arena_.base + std::size_t{segment.pages[kv.table][position / kPageSize]} * kPageUnit;
    for (int h = 0; h < kv.heads; ++h) {
      float* k = row_of(key, r) + h * head_dim;
      layer_.rms_norm(k, key_norm.scale, key_norm.epsilon, head_dim, k);
      layer_.rotate(k, cosine, cosine + head_dim / 2, head_dim);
      layer_.store_key(k, head_dim, kv.type, slot, page + kv.key_offset + h * head_bytes);
      layer_.store_value(row_of(value, r) + h * head_dim, head_dim, kv.type, slot,
                         page + kv.value_offset + h * head_bytes);
    }
  };
  // Keys of one page share cache lines, so a piece of those is about a page's worth of rows; queries share nothing and
  // are handed out behind them, few at a time.
  const std::int64_t rows = step_rows();
  const std::int64_t key_pieces = (rows + kPageSize / 2 - 1) / (kPageSize / 2);
  const std::int64_t query_grain = std::max<std::int64_t>(kElementsPerPiece / query.columns, 1);
  const std::int64_t query_pieces = (rows + query_grain - 1) / query_grain;
  const std::int64_t grain = rows == 1 ? 2 : 1;  // one row is not worth a fork
  pool_.parallel_for(key_pieces + query_pieces, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      if (piece < key_pieces) {
        const std::int64_t first = piece * (kPageSize / 2);
        for (std::int64_t r = first; r < std::min(first + kPageSize / 2, rows); ++r) store_keys_and_values(r);
      } else {
        const std::int64_t first = (piece - key_pieces) * query_grain;
        for (std::int64_t r = first; r < std::min(first + query_grain, rows); ++r) prepare_queries(r);
      }
    }
  });
}

void CpuBackend::attend(Tensor query, int query_heads, const KvLayer& kv, int window, float scale, Tensor output) {
  require(kv.heads > 0 && query_heads % kv.heads == 0 && query.columns == query_heads * kv.head_dim &&
              output.columns == query.columns,
          "matching head shapes");
  require(kv.head_dim % 16 == 0 && kv.head_dim <= kMaxHeadDim, "head_dim a multiple of 16 up to 512");
  attention_->attend({row_of(query, 0), row_of(output, 0), &kv, query_heads, window, scale}, step_, arena_);
}

// --- logits ------------------------------------------------------------------------------------------------------

void CpuBackend::head(Tensor hidden, const Norm& norm, const Weight& weight, float softcap) {
  const PackedMatrix& matrix = packed(weight);
  require(matrix.columns == hidden.columns && matrix.rows == vocabulary_, "a head of the reserved vocabulary");
  const int outputs = step_outputs();
  if (outputs == 0) return;
  const bool quantized = takes_quantized(matrix.type);
  const Activations x = prepare(hidden, &norm, step_.output_rows.data(), outputs, quantized, !quantized);
  constexpr std::int64_t kPanels = kLogitChunk / kPanel;
  const std::int64_t panels = panel_count(matrix.rows);
  // A piece is a chunk of logits: its maxima are taken while it is in cache.
  pool_.parallel_for(logit_chunks_, 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      matmul_.matmul(matrix, chunk * kPanels, std::min((chunk + 1) * kPanels, panels), x, outputs, logits_.data(),
                     logit_stride_);
      const std::int64_t first = chunk * kLogitChunk;
      const int count = static_cast<int>(std::min<std::int64_t>(kLogitChunk, vocabulary_ - first));
      for (int r = 0; r < outputs; ++r) {
        logit_maxima_[r * logit_chunks_ + chunk] =
            layer_.softcap_max(logits_.data() + r * logit_stride_ + first, count, softcap);
      }
    }
  });
}

void CpuBackend::verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) {
  const LogitRows rows{logits_.data(), logit_stride_, vocabulary_, logit_maxima_.data(), logit_chunks_};
  sampler_->verify_logits(rows, groups, results, pool_);
}

void CpuBackend::read_logits(std::span<float> out) {
  const auto columns = static_cast<std::size_t>(vocabulary_);
  const auto outputs = static_cast<std::size_t>(step_outputs());
  require(out.size() >= outputs * columns, "room for the logits of every output");
  for (std::size_t r = 0; r < outputs; ++r) {
    std::copy_n(logits_.data() + static_cast<std::int64_t>(r) * logit_stride_, columns, out.data() + r * columns);
  }
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(int threads) { return make_cpu_backend(threads, cpu::choose_isa()); }

std::unique_ptr<Backend> make_cpu_backend(int threads, cpu::Isa isa) {
  if (threads < 0) throw std::invalid_argument("threads: " + std::to_string(threads) + "; 0 (all) or more");
  return std::make_unique<cpu::CpuBackend>(threads == 0 ? cpu::default_threads() : threads, isa);
}

}  // namespace draftwerk
