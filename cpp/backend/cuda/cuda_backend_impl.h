// The class behind make_cuda_backend. Operations are recorded by the parts that they belong to (projections.h, rows.h,
// kv.h, attention.h, experts.h, sampler.h); what was recorded runs piece by piece, and verify(), propose() and
// read_logits() wait for it.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/devices.h"
#include "backend/cuda/experts.h"
#include "backend/cuda/graph_cache.h"
#include "backend/cuda/handles.h"
#include "backend/cuda/kv_moves.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/projections.h"
#include "backend/cuda/sampler.h"
#include "backend/cuda/sparse_logits.h"
#include "backend/cuda/step_upload.h"
#include "backend/cuda/uploader.h"

namespace draftwerk::cuda {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(DeviceInfo device);
  ~CudaBackend() override;

  [[nodiscard]] std::string description() const override;
  [[nodiscard]] std::optional<MemoryInfo> memory() const override;

  std::unique_ptr<Buffer> allocate(std::size_t bytes) override;
  std::unique_ptr<Buffer> constants(std::span<const std::byte> values) override;
  [[nodiscard]] int padded_rows(int rows) const override { return padded_count(rows); }
  std::unique_ptr<Weight> create_weight(WeightType type, std::int64_t rows, std::int64_t columns) override;
  void upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                   const std::byte* source) override;
  std::unique_ptr<RowTable> map_table(WeightType type, std::int64_t rows, std::int64_t columns, const std::byte* data,
                                      std::shared_ptr<const void> owner) override;
  void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) override;
  void reserve_head(const SparseHead& head) override;
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
  void begin_verify(std::span<const VerifyGroup> groups) override;
  void verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) override;
  void propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) override;
  [[nodiscard]] bool asynchronous() const override { return true; }
  [[nodiscard]] int passes_ahead() const override { return kMostPassesAhead; }
  void propose_ahead(std::span<const ProposeRow> rows, int count) override;
  void proposed(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) override;
  [[nodiscard]] double proposing_seconds() const override;
  void move_kv(std::span<const KvLayer> layers, std::span<const KvMove> moves) override;
  void read_logits(std::span<float> out) override;

 private:
  [[nodiscard]] int rows() const { return upload_.view().rows; }
  [[nodiscard]] int outputs() const { return upload_.view().outputs; }
  void use_device() const;
  void check_proposal(std::span<const ProposeRow> rows, int count, std::size_t room) const;
  [[nodiscard]] Uploader& uploader();
  /// Where the next operation of projections_ is recorded, and where any other is.
  [[nodiscard]] LaunchList& list_for_product();
  [[nodiscard]] LaunchList& list_for_others();
  /// Runs what was recorded since the last piece.
  void run_piece();
  /// As if nothing had been recorded.
  void forget_step();
  /// Runs what is left of what was recorded, if that was anything; does not wait.
  void run();
  /// The same of a step's passes, so that what they find is copied back.
  void run_passes();
  void wait();

  DeviceInfo device_;
  Stream stream_;
  std::unique_ptr<Uploader> uploader_;  ///< while weights are loaded

  int max_rows_ = 0;
  int max_outputs_ = 0;
  int vocabulary_ = 0;

  // The step.
  StepUpload upload_;
  std::vector<Copy> copies_in_;
  std::vector<Copy> copies_out_;
  LaunchList launches_;  ///< since the last piece
  std::size_t piece_;    ///< launches after which it is run
  bool begun_ = false;   ///< pieces of what is recorded have been run
  GraphCache graphs_;
  int step_outputs_ = 0;              ///< without padding
  int passes_ = 0;                    ///< of propose_ahead(), in this step
  FoundDrafts found_;                 ///< by the last passes that were run
  bool grows_ = false;                ///< trees of drafts, in this step
  bool verifying_ = false;            ///< verification has begun
  bool in_flight_ = false;            ///< what run() began may not be done yet
  bool unwaited_ = false;             ///< found_ was in flight when this step began
  Event proposing_ = Event::timed();  ///< before the passes, while they are unwaited, and after them
  Event found_at_ = Event::timed();
  LogitRows logits_;  ///< of the last head(); no values: there was none

  Projections projections_;
  ExpertMixture experts_;
  Attention attention_;
  SparseLogits sparse_;
  Sampler sampler_;
  KvMoves moves_;
};

}  // namespace draftwerk::cuda
