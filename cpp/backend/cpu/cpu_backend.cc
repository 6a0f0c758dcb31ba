#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/packing.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk {
namespace cpu {
namespace {

// Pieces of work. Handing one out costs some tens of nanoseconds, forking and joining about a microsecond; a thread
// streams about 12 bytes per nanosecond from memory.
constexpr std::int64_t kPanelBytesPerPiece = 16 * 1024;
constexpr std::int64_t kElementsPerPiece = 8192;  // of row operations: about 3 us
// Rows of a prompt come in hundreds; then a piece is this many panels, so that activations are read once for several.
constexpr int kManyRows = 64;
constexpr std::int64_t kPiecesPerThread = 12;
// Query tiles per thread from which on attention is divided by tiles alone, without splitting their contexts.
constexpr std::int64_t kTilesPerThread = 4;
// Partial results of split contexts that scratch holds; longer contexts proceed in several waves.
constexpr std::int64_t kPartialsPerThread = 64;
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

/// An array in mapped memory: untouched parts cost nothing.
template <typename T>
class ScratchArray {
 public:
  void resize(std::int64_t elements) { memory_.emplace(static_cast<std::size_t>(elements) * sizeof(T)); }
  [[nodiscard]] T* data() const { return static_cast<T*>(memory_->data()); }
  T& operator[](std::int64_t i) const { return data()[i]; }

 private:
  std::optional<MappedMemory> memory_;
};

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
  /// What attend() needs to find a tile's queries.
  struct AttentionCall {
    Tensor query;
    Tensor output;
    const KvLayer* kv;
    int query_heads;
    int group;  ///< query heads per key/value head
    int window;
    float scale;
  };
  /// A tile of queries and where its results go.
  struct TilePlace {
    QueryTile tile;
    KvHeadView kv;
    float* outputs[kQueryTile];
    std::int64_t first_chunk;
    std::int64_t chunks;
  };

  [[nodiscard]] int step_rows() const { return static_cast<int>(step_.tokens.size()); }
  [[nodiscard]] int step_outputs() const { return static_cast<int>(step_.output_rows.size()); }
  Activations prepare(Tensor input, const Norm* norm, const int* row_indices, int rows, bool quantized, bool floats);
  [[nodiscard]] std::int64_t panel_grain(const PackedMatrix& matrix, std::int64_t panels, int rows) const;
  const float* angles(const Rope& rope, int head_dim);
  [[nodiscard]] TilePlace place_tile(const AttentionCall& call, std::int64_t index) const;
  void attend_by_tile(const AttentionCall& call, std::int64_t tiles);
  void attend_by_chunk(const AttentionCall& call, std::int64_t tiles);

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
  ScratchArray<AttentionState> worker_states_;  ///< two per worker: the running total and one chunk
  ScratchArray<AttentionState> tile_states_;    ///< running totals of tiles with split contexts
  ScratchArray<AttentionState> partials_;       ///< their chunks
  std::vector<TilePlace> split_tiles_;
  std::vector<std::int64_t> split_begin_;  ///< first work item of every split tile
  std::unique_ptr<Sampler> sampler_;

  // The step.
  StepRows step_;
  KvArena arena_;
  std::vector<int> row_segment_;            ///< [rows] index of the segment
  std::vector<std::int64_t> segment_tile_;  ///< [segments + 1] first tile of a segment, per key/value head
};

// --- weights -----------------------------------------------------------------------------------------------------

std::unique_ptr<Weight> CpuBackend::create_weight(WeightType type, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (rows <= 0 || columns <= 0 || rows > kMost || columns > kMost || columns % block_columns(type) != 0) {
    throw std::invalid_argument("weight [" + std::to_string(rows) + ", " + std::to_string(columns) + "] of type " +
                                weight_type_name(type) + ": rows and columns must be positive, columns a multiple of " +
                                std::to_string(block_columns(type)));
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
  return std::size_t{kPageSize} * static_cast<std::size_t>(heads) * static_cast<std::size_t>(head_dim) *
         (type == KvType::f16 ? 2 : 4);
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
  const std::int64_t threads = pool_.size();
  worker_states_.resize(2 * threads);
  tile_states_.resize(kTilesPerThread * threads);
  partials_.resize(kPartialsPerThread * threads);
  split_tiles_.resize(static_cast<std::size_t>(kTilesPerThread * threads));
  split_begin_.resize(split_tiles_.size() + 1);
  row_segment_.resize(static_cast<std::size_t>(max_rows));
  segment_tile_.resize(static_cast<std::size_t>(max_rows) + 1);
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
  const std::size_t head_bytes = kv_bytes(1, head_dim, kv.type);
  // Rows of one page write to the same cache lines, so a piece is about a page's worth of them, more for small heads.
  const std::int64_t grain = std::max<std::int64_t>(kElementsPerPiece / query.columns, kPageSize / 2);
  pool_.parallel_for(step_rows(), grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* cosine = step_angles + r * head_dim;
      const float* sine = cosine + head_dim / 2;
      for (int h = 0; h < query_heads; ++h) {
        float* q = row_of(query, r) + h * head_dim;
        layer_.rms_norm(q, query_norm.scale, query_norm.epsilon, head_dim, q);
        layer_.rotate(q, cosine, sine, head_dim);
      }
      const Segment& segment = step_.segments[static_cast<std::size_t>(row_segment_[static_cast<std::size_t>(r)])];
      const std::int64_t position = step_.positions[static_cast<std::size_t>(r)];
      const int slot = static_cast<int>(position % kPageSize);
      std::byte* page = arena_.base + std::size_t{segment.pages[kv.table][position / kPageSize]} * kPageUnit;
      for (int h = 0; h < kv.heads; ++h) {
        float* k = row_of(key, r) + h * head_dim;
        layer_.rms_norm(k, key_norm.scale, key_norm.epsilon, head_dim, k);
        layer_.rotate(k, cosine, sine, head_dim);
        layer_.store_key(k, head_dim, kv.type, slot, page + kv.key_offset + h * head_bytes);
        layer_.store_value(row_of(value, r) + h * head_dim, head_dim, kv.type, slot,
                           page + kv.value_offset + h * head_bytes);
      }
    }
  });
}

/// Tile number `index`: tiles run over segments, within a segment over key/value heads, within a head over its queries
/// (row-major: all query heads of a row that share the head, then the next row).
CpuBackend::TilePlace CpuBackend::place_tile(const AttentionCall& call, std::int64_t index) const {
  const KvLayer& kv = *call.kv;
  const auto first_tile = segment_tile_.begin();
  const auto after =
      std::upper_bound(first_tile, first_tile + static_cast<std::ptrdiff_t>(step_.segments.size()), index / kv.heads);
  const std::ptrdiff_t s = after - first_tile - 1;
  const Segment& segment = step_.segments[static_cast<std::size_t>(s)];
  const std::int64_t tiles =
      segment_tile_[static_cast<std::size_t>(s) + 1] - segment_tile_[static_cast<std::size_t>(s)];
  const std::int64_t local = index - segment_tile_[static_cast<std::size_t>(s)] * kv.heads;
  const std::int64_t kv_head = local / tiles;
  const std::int64_t first_query = local % tiles * kQueryTile;

  TilePlace place;
  const std::size_t head_bytes = kv_bytes(1, kv.head_dim, kv.type);
  place.kv = {arena_.base,
              segment.pages[kv.table],
              kv.key_offset + static_cast<std::size_t>(kv_head) * head_bytes,
              kv.value_offset + static_cast<std::size_t>(kv_head) * head_bytes,
              kv.head_dim,
              kv.type};
  QueryTile& tile = place.tile;
  tile.count =
      static_cast<int>(std::min<std::int64_t>(kQueryTile, std::int64_t{segment.rows} * call.group - first_query));
  for (int i = 0; i < tile.count; ++i) {
    const std::int64_t row = segment.first_row + (first_query + i) / call.group;
    const std::int64_t head = kv_head * call.group + (first_query + i) % call.group;
    tile.query[i] = row_of(call.query, row) + head * kv.head_dim;
    place.outputs[i] = row_of(call.output, row) + head * kv.head_dim;
    tile.last[i] = step_.positions[static_cast<std::size_t>(row)];
    tile.first[i] = call.window > 0 ? std::max<std::int64_t>(tile.last[i] - call.window + 1, 0) : 0;
  }
  place.first_chunk = tile.first[0] / kAttentionChunk;
  place.chunks = tile.last[tile.count - 1] / kAttentionChunk - place.first_chunk + 1;
  return place;
}

void CpuBackend::attend(Tensor query, int query_heads, const KvLayer& kv, int window, float scale, Tensor output) {
  require(kv.heads > 0 && query_heads % kv.heads == 0 && query.columns == query_heads * kv.head_dim &&
              output.columns == query.columns,
          "matching head shapes");
  require(kv.head_dim % 16 == 0 && kv.head_dim <= kMaxHeadDim, "head_dim a multiple of 16 up to 512");
  const AttentionCall call{query, output, &kv, query_heads, query_heads / kv.heads, window, scale};
  std::int64_t tiles = 0;
  for (std::size_t s = 0; s < step_.segments.size(); ++s) {
    segment_tile_[s] = tiles;
    tiles += (std::int64_t{step_.segments[s].rows} * call.group + kQueryTile - 1) / kQueryTile;
  }
  segment_tile_[step_.segments.size()] = tiles;
  tiles *= kv.heads;
  // Both ways do the same arithmetic in the same order.
  if (tiles >= kTilesPerThread * pool_.size()) {
    attend_by_tile(call, tiles);
  } else {
    attend_by_chunk(call, tiles);
  }
}

/// Many rows: a worker takes a tile through all of its chunks.
void CpuBackend::attend_by_tile(const AttentionCall& call, std::int64_t tiles) {
  pool_.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end, int worker) {
    AttentionState& total = worker_states_[2 * worker];
    AttentionState& part = worker_states_[2 * worker + 1];
    for (std::int64_t index = begin; index < end; ++index) {
      const TilePlace place = place_tile(call, index);
      for (std::int64_t c = place.first_chunk; c < place.first_chunk + place.chunks; ++c) {
        layer_.attend_chunk(place.tile, place.kv, c, call.scale, part);
        layer_.merge_chunk(place.tile, c, call.kv->head_dim, part, total);
      }
      layer_.finish_attention(place.tile, call.kv->head_dim, total, place.outputs);
    }
  });
}

/// Few rows: workers share the chunks of a tile, which are merged in order afterwards.
void CpuBackend::attend_by_chunk(const AttentionCall& call, std::int64_t tiles) {
  std::int64_t items = 0;
  for (std::int64_t t = 0; t < tiles; ++t) {
    split_tiles_[static_cast<std::size_t>(t)] = place_tile(call, t);
    split_begin_[static_cast<std::size_t>(t)] = items;
    items += split_tiles_[static_cast<std::size_t>(t)].chunks;
  }
  split_begin_[static_cast<std::size_t>(tiles)] = items;
  const std::int64_t wave = kPartialsPerThread * pool_.size();
  for (std::int64_t first = 0; first < items; first += wave) {
    const std::int64_t last = std::min(first + wave, items);
    pool_.parallel_for(last - first, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t item = first + begin; item < first + end; ++item) {
        const auto after = std::upper_bound(split_begin_.begin(), split_begin_.begin() + tiles, item);
        const std::ptrdiff_t t = after - split_begin_.begin() - 1;
        const TilePlace& place = split_tiles_[static_cast<std::size_t>(t)];
        const std::int64_t chunk = place.first_chunk + item - split_begin_[static_cast<std::size_t>(t)];
        layer_.attend_chunk(place.tile, place.kv, chunk, call.scale, partials_[item - first]);
      }
    });
    pool_.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const TilePlace& place = split_tiles_[static_cast<std::size_t>(t)];
        const std::int64_t tile_begin = split_begin_[static_cast<std::size_t>(t)];
        const std::int64_t tile_end = split_begin_[static_cast<std::size_t>(t) + 1];
        for (std::int64_t item = std::max(first, tile_begin); item < std::min(last, tile_end); ++item) {
          layer_.merge_chunk(place.tile, place.first_chunk + item - tile_begin, call.kv->head_dim,
                             partials_[item - first], tile_states_[t]);
        }
        if (tile_end > first && tile_end <= last) {
          layer_.finish_attention(place.tile, call.kv->head_dim, tile_states_[t], place.outputs);
        }
      }
    });
  }
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
