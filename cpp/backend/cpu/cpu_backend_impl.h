// The class behind make_cpu_backend. Its operations are defined by theme: cpu_backend.cc (weights, memory, steps),
// cpu_backend_rows.cc (what is not a product with a matrix), cpu_backend_projections.cc, cpu_backend_attention.cc and
// cpu_backend_logits.cc; experts.h has those of the experts.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/activations.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/experts.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/pieces.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/screened_head.h"
#include "backend/cpu/sparse_head.h"
#include "backend/cpu/sparse_sampler.h"
#include "backend/cpu/worker_pool.h"

namespace draftwerk::cpu {

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, Isa isa, Screening screening = Screening::where_it_pays);

  [[nodiscard]] std::string description() const override;
  [[nodiscard]] std::optional<MemoryInfo> memory() const override { return std::nullopt; }

  std::unique_ptr<Buffer> allocate(std::size_t bytes) override;
  std::unique_ptr<Buffer> constants(std::span<const std::byte> values) override;
  [[nodiscard]] int padded_rows(int rows) const override { return rows; }
  std::unique_ptr<Weight> create_weight(WeightType type, std::int64_t rows, std::int64_t columns) override;
  void upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                   const std::byte* source) override;
  std::unique_ptr<RowTable> map_table(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data,
                                      std::shared_ptr<const void> owner) override;
  void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) override;
  void reserve_head(const SparseHead&) override {}  // as large as a vocabulary's logits, at most
  void screen_head(const Weight& head, const Norm& norm) override;
  void reserve_experts(int max_rows, int chosen, const Experts& experts) override;
  [[nodiscard]] std::size_t kv_bytes(int heads, int head_dim, KvType type) const override;
  [[nodiscard]] std::size_t activation_bytes() const override { return sizeof(float); }

  void begin(const StepRows& rows, KvArena arena) override;
  void embed(const Weight& table, float scale, Tensor out) override;
  void mix_token_rows(const RowTable& table, float table_scale, const Norm& norm, int width, float scale,
                      Tensor inout) override;
  void gather(Tensor source, std::span<const int> rows, Tensor out) override;
  void project(Tensor input, const Norm* norm, std::span<const Projection> outputs) override;
  void project_geglu(Tensor input, const Norm& norm, const Weight& gate, const Weight& up, Tensor output) override;
  void project_gelu(Tensor input, const Weight& weight, Tensor factor, Tensor output) override;
  void project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual, float scale) override;
  void experts(Tensor input, const Router& router, const Norm& norm, const Experts& experts, Tensor output) override;
  void add_normed(Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b, const Norm& norm, Tensor residual,
                  float scale) override;
  void append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm, const Norm& key_norm,
                 const Norm* value_norm, const Rope& rope, const KvLayer& kv) override;
  void prepare_queries(Tensor query, int query_heads, const Norm& query_norm, const Rope& rope) override;
  void attend(Tensor query, int query_heads, const KvLayer& kv, const Visibility& sees, float scale,
              Tensor output) override;
  void gather_outputs(Tensor hidden, const Norm& norm, Tensor states) override;
  void head(Tensor states, const Weight& weight, float softcap) override;
  void head(Tensor states, const SparseHead& head) override;
  void verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) override;
  void propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) override;
  void move_kv(std::span<const KvLayer> layers, std::span<const KvMove> moves) override;
  void read_logits(std::span<float> out) override;

  /// Steps whose tokens were chosen without all of their logits since the last reserve(), see ScreenedHead.
  [[nodiscard]] std::int64_t screened_steps() const { return screened_ == nullptr ? 0 : screened_->steps(); }

 private:
  /// Angles of one rotary embedding for every row of the step: cosines, then sines, [head_dim / 2] each.
  struct RopeSlot {
    const float* inverse_frequency = nullptr;
    int head_dim = 0;
    ScratchArray<float> angles;  ///< [max_rows, kMaxHeadDim]
  };
  /// What head() was told of a split head: verify() says how much of it is needed.
  struct PendingHead {
    Tensor states;
    float softcap = 0.0F;
  };
  // Distinct rotary embeddings (one per layer type) whose angles are kept during a step.
  static constexpr int kRopeSlots = 4;

  [[nodiscard]] int step_rows() const { return static_cast<int>(step_.tokens.size()); }
  [[nodiscard]] int step_outputs() const { return static_cast<int>(step_.output_rows.size()); }
  /// Runs body(row) for `rows` rows of a cheap operation on `columns` elements each.
  template <typename Body>
  void for_each_row(std::int64_t rows, std::int64_t columns, Body&& body) {
    pool_.parallel_for(rows, grain_of_rows(columns), [&](std::int64_t begin, std::int64_t end, int worker) {
      for (std::int64_t row = begin; row < end; ++row) body(row, worker);
    });
  }
  Activations prepare(Tensor input, const Norm* norm, int rows, bool quantized, bool floats);
  Activations prepare_split(Tensor states);
  LogitRows logit_rows() const;
  void compute_pending();
  [[nodiscard]] std::int64_t panel_grain(const PackedMatrix& matrix, std::int64_t panels, int rows) const;
  const float* angles(const Rope& rope, int head_dim);
  void prepare_query(Tensor query, std::int64_t row, int heads, const Norm& norm, int head_dim, const float* angles);
  void append_row(Tensor key, Tensor value, std::int64_t row, const Norm& key_norm, const Norm* value_norm,
                  const KvLayer& kv, const float* angles);

  Isa isa_;
  Screening screening_;
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
  ActivationScratch inputs_;          ///< [rows, columns], of a product
  ScratchArray<float> product_;       ///< [rows, columns]
  ScratchArray<float> logits_;        ///< [outputs, logit_stride_]
  ScratchArray<float> logit_maxima_;  ///< [outputs, logit_chunks_]
  std::int64_t table_columns_ = 0;
  ScratchArray<float> table_rows_;  ///< [workers, table_columns_]
  RopeSlot ropes_[kRopeSlots];
  int ropes_used_ = 0;
  std::unique_ptr<Attention> attention_;
  std::unique_ptr<SparseLogits> sparse_;
  std::unique_ptr<Sampler> sampler_;
  std::unique_ptr<SplitHead> split_head_;
  std::unique_ptr<ScreenedHead> screened_;  ///< null where split_head_ is
  ExpertMixture experts_;

  // The step.
  StepRows step_;
  KvArena arena_;
  std::vector<int> row_segment_;  ///< [rows] index of the segment
  /// What the last head() computed, or would have to.
  std::variant<std::monostate, LogitRows, SparseLogitRows, PendingHead> head_logits_;
};

}  // namespace draftwerk::cpu
