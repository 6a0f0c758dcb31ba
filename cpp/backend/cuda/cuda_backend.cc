#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "backend/backend_checks.h"
#include "backend/cpu/worker_pool.h"
#include "backend/cuda/cuda_backend_impl.h"
#include "backend/cuda/device_table.h"
#include "backend/cuda/device_weight.h"
#include "backend/cuda/embed.h"
#include "backend/cuda/growth.h"
#include "backend/cuda/kv.h"
#include "backend/cuda/rows.h"

namespace draftwerk {
namespace cuda {
namespace {

// Graphs of pieces of steps: some tens of kilobytes each, on either side.
constexpr std::size_t kGraphs = 1024;
// Launches of a step's first piece. They keep a device busy for 50 us or more, in which the host records several times
// as many.
constexpr std::size_t kFirstPiece = 32;
// Partial results of attention, for each multiprocessor: 12 rows of 32 heads of 512 at position 128k take 107 MB in
// all.
constexpr std::size_t kAttentionScratch = std::size_t{2} << 20;

constexpr const char* kName = "cuda backend";

/// Device memory of a Buffer, zeroed.
class DeviceBuffer final : public Buffer {
 public:
  DeviceBuffer(std::size_t bytes, cudaStream_t stream) : memory_(DeviceMemory::of(bytes)), bytes_(bytes) {
    check(cudaMemsetAsync(memory_.get(), 0, bytes, stream), "clearing memory");
  }
  [[nodiscard]] void* data() const override { return memory_.get(); }
  [[nodiscard]] std::size_t bytes() const override { return bytes_; }

 private:
  DeviceMemory memory_;
  std::size_t bytes_;
};

ProductDevice product_device(const DeviceInfo& device) {
  return {device.shared_bytes, device.multiprocessors, device.warpgroups};
}

}  // namespace

CudaBackend::CudaBackend(DeviceInfo device)
    : device_(std::move(device)),
      stream_(Stream::create()),
      piece_(kFirstPiece),
      graphs_(kGraphs, launch_mode()),
      projections_(product_device(device_)),
      experts_(product_device(device_)),
      attention_(device_.multiprocessors, static_cast<std::size_t>(device_.multiprocessors) * kAttentionScratch) {}

CudaBackend::~CudaBackend() {
  // Whatever still runs reads memory that is about to go. An error has been reported where it was found.
  static_cast<void>(cudaStreamSynchronize(stream_.get()));
}

std::string CudaBackend::description() const {
  const LaunchMode mode = graphs_.mode();
  const std::string launches = mode == LaunchMode::early ? "" : ", launches " + std::string(launch_mode_name(mode));
  return "cuda sm_" + std::to_string(device_.major * 10 + device_.minor) + ", " + device_.name + launches;
}

std::optional<MemoryInfo> CudaBackend::memory() const {
  use_device();
  MemoryInfo memory;
  check(cudaMemGetInfo(&memory.free, &memory.total), "asking for the memory of the GPU");
  return memory;
}

// --- memory ------------------------------------------------------------------------------------------------------

// Which GPU is meant is a property of the calling thread, and an engine has one of its own.
void CudaBackend::use_device() const { check(cudaSetDevice(device_.number), "choosing a GPU"); }

std::unique_ptr<Buffer> CudaBackend::allocate(std::size_t bytes) {
  use_device();
  return std::make_unique<DeviceBuffer>(std::max<std::size_t>(bytes, 1), stream_.get());
}

std::unique_ptr<Buffer> CudaBackend::constants(std::span<const std::byte> values) {
  std::unique_ptr<Buffer> buffer = allocate(values.size());
  check(cudaMemcpyAsync(buffer->data(), values.data(), values.size(), cudaMemcpyHostToDevice, stream_.get()),
        "copying constants");
  check(cudaStreamSynchronize(stream_.get()), "copying constants");  // the values are the caller's
  return buffer;
}

Uploader& CudaBackend::uploader() {
  use_device();
  if (uploader_ == nullptr) uploader_ = std::make_unique<Uploader>(cpu::default_threads());
  return *uploader_;
}

std::unique_ptr<Weight> CudaBackend::create_weight(WeightType type, std::int64_t rows, std::int64_t columns) {
  return std::make_unique<DeviceWeight>(type, rows, columns, uploader());
}

void CudaBackend::upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                              const std::byte* source) {
  static_cast<DeviceWeight&>(weight).upload(first_row, count, source_type, source, uploader());
}

std::unique_ptr<RowTable> CudaBackend::map_table(WeightType type, std::int64_t rows, std::int64_t columns,
                                                 const std::byte* data, std::shared_ptr<const void>) {
  return std::make_unique<DeviceTable>(type, rows, columns, data, uploader());
}

void CudaBackend::reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) {
  check_sizes(kName, max_rows, max_outputs, max_columns, vocabulary, vocabulary_);
  use_device();
  wait();
  max_rows_ = std::max(max_rows_, max_rows);
  max_outputs_ = std::max(max_outputs_, max_outputs);
  vocabulary_ = vocabulary;
  const int rows = padded_count(std::max(max_rows_, max_outputs_));
  const int outputs = padded_count(max_outputs_);
  upload_.reserve(rows, outputs);
  projections_.reserve(rows, outputs, max_columns, vocabulary);
  sampler_.reserve(outputs, vocabulary);
  graphs_.clear();
  forget_step();
  logits_ = {};
}

void CudaBackend::reserve_head(const SparseHead& head) {
  use_device();
  wait();
  sparse_.reserve(padded_count(max_outputs_), head);
  graphs_.clear();
}

void CudaBackend::reserve_experts(int max_rows, int chosen, const Experts& experts) {
  check_experts(kName, max_rows, chosen, experts);
  use_device();
  wait();
  experts_.reserve(padded_count(max_rows), chosen, experts);
  graphs_.clear();
}

std::size_t CudaBackend::kv_bytes(int heads, int head_dim, KvType type) const {
  return cuda::kv_bytes(heads, head_dim, type);
}

// --- the step ----------------------------------------------------------------------------------------------------

void CudaBackend::begin(const StepRows& rows, KvArena arena) {
  check_step(kName, rows, max_rows_, max_outputs_);
  for (const Segment& segment : rows.segments) {
    require(segment.parents.size() < kMaxPath, "a tree of fewer drafts than there is room for in a path");
  }
  use_device();
  if (uploader_ != nullptr) {
    uploader_->wait();
    uploader_.reset();
  }
  // The step before may have passes that nobody has waited for: this one follows them at once. They have memory of
  // their own, two steps' worth.
  const bool follows = passes_ > 0 && !in_flight_ && upload_.has_room(rows);
  if (passes_ > 0) {
    run_passes();
  } else {
    found_ = {};
    run();  // a step that nobody has asked anything of
  }
  if (follows) check(cudaEventRecord(found_at_.get(), stream_.get()), "measuring time");
  if (in_flight_ && !follows) wait();
  unwaited_ = follows;
  projections_.begin();
  upload_.fill(rows, arena, found_);
  copies_in_.clear();
  copies_out_.clear();
  step_outputs_ = static_cast<int>(rows.output_rows.size());
  verifying_ = false;
  logits_ = {};
  grows_ = !rows.growths.empty();
  if (!grows_) return;
  for (const Growth& growth : rows.growths) {
    require(growth.proposed < found_.outputs, "trees that grow from passes of the step before");
  }
  grow_trees(list_for_others(), upload_, sampler_.proposed(), sampler_.proposing());
}

void CudaBackend::wait() {
  stream_.wait();
  in_flight_ = false;
  moves_.done();
}

// A device that waited until a step of 500 launches was recorded would have nothing to do for 60 us and more. So it
// gets a step in pieces, each twice as long as the one before, and computes one while the next is recorded.
LaunchList& CudaBackend::list_for_product() {
  if (launches_.size() >= piece_) {
    run_piece();
    piece_ *= 2;
  }
  return launches_;
}

LaunchList& CudaBackend::list_for_others() {
  LaunchList& list = list_for_product();
  projections_.settle(list);
  return list;
}

void CudaBackend::run_piece() {
  // What failed must not run once more in front of the next step.
  struct Forgotten {
    CudaBackend& backend;
    bool failed = true;
    ~Forgotten() {
      if (failed) backend.forget_step();
    }
  };
  Forgotten at_the_end{*this};
  if (!begun_ && !unwaited_) check(cudaEventRecord(proposing_.get(), stream_.get()), "measuring time");
  begun_ = true;
  upload_.collect(copies_in_);
  for (const Copy& copy : copies_in_) {
    check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyHostToDevice, stream_.get()), "copying a step");
  }
  graphs_.run(launches_, stream_.get());
  launches_.clear();
  copies_in_.clear();
  at_the_end.failed = false;
}

void CudaBackend::forget_step() {
  launches_.clear();
  copies_in_.clear();
  copies_out_.clear();
  projections_.begin();
  piece_ = kFirstPiece;
  begun_ = false;
  passes_ = 0;
}

void CudaBackend::run() {
  projections_.settle(launches_);
  if (launches_.empty() && !begun_) return;
  in_flight_ = true;
  run_piece();
  begun_ = false;
  piece_ = kFirstPiece;
  const std::vector<Copy> results = std::exchange(copies_out_, {});
  for (const Copy& copy : results) {
    check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDeviceToHost, stream_.get()), "copying results");
  }
}

void CudaBackend::embed(const Weight& table, float scale, Tensor out) {
  cuda::embed(list_for_others(), upload_.view(), table, scale, out);
}

void CudaBackend::mix_token_rows(const RowTable& table, float table_scale, const Norm& norm, int width, float scale,
                                 Tensor inout) {
  cuda::mix_token_rows(list_for_others(), upload_.view(), static_cast<const DeviceTable&>(table).view(), table_scale,
                       norm, width, scale, inout);
}

void CudaBackend::gather(Tensor source, std::span<const int> rows, Tensor out) {
  const int padded = padded_count(static_cast<int>(rows.size()));
  cuda::gather(list_for_others(), source, upload_.add_rows(rows, padded), padded, out);
}

void CudaBackend::project(Tensor input, const Norm* norm, std::span<const Projection> outputs) {
  projections_.project(list_for_product(), rows(), input, norm, outputs);
}

void CudaBackend::project_geglu(Tensor input, const Norm& norm, const Weight& gate, const Weight& up, Tensor output) {
  projections_.project_geglu(list_for_product(), rows(), input, norm, gate, up, output);
}

void CudaBackend::project_gelu(Tensor input, const Weight& weight, Tensor factor, Tensor output) {
  projections_.project_gelu(list_for_product(), rows(), input, weight, factor, output);
}

void CudaBackend::project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual, float scale) {
  projections_.project_add(list_for_product(), rows(), input, weight, norm, residual, scale);
}

void CudaBackend::experts(Tensor input, const Router& router, const Norm& norm, const Experts& experts, Tensor output) {
  experts_.run(list_for_others(), upload_.view(), input, router, norm, experts, output);
}

void CudaBackend::add_normed(Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b, const Norm& norm,
                             Tensor residual, float scale) {
  cuda::add_normed(list_for_others(), upload_.view(), a, norm_a, b, norm_b, norm, residual, scale);
}

void CudaBackend::append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm,
                            const Norm& key_norm, const Norm* value_norm, const Rope& rope, const KvLayer& kv) {
  cuda::append_kv(list_for_others(), upload_.view(), query, key, value, query_heads, query_norm, key_norm, value_norm,
                  rope, kv);
}

void CudaBackend::prepare_queries(Tensor query, int query_heads, const Norm& query_norm, const Rope& rope) {
  cuda::prepare_queries(list_for_others(), upload_.view(), query, query_heads, query_norm, rope);
}

void CudaBackend::attend(Tensor query, int query_heads, const KvLayer& kv, const Visibility& sees, float scale,
                         Tensor output) {
  LaunchList& list = list_for_others();
  attention_.attend(list, upload_.view(), query, query_heads, kv, sees, scale, output, projections_.sink(output));
  projections_.left(list, output);
}

void CudaBackend::gather_outputs(Tensor hidden, const Norm& norm, Tensor states) {
  cuda::gather_outputs(list_for_others(), upload_.view(), hidden, norm, states);
}

// --- logits ------------------------------------------------------------------------------------------------------

void CudaBackend::head(Tensor states, const Weight& weight, float softcap) {
  projections_.head(list_for_product(), outputs(), states, weight, softcap);
  const Tensor logits = projections_.logits();
  logits_ = {};
  logits_.values = static_cast<float*>(logits.data);
  logits_.stride = logits.row_stride();
  logits_.columns = logits_.vocabulary = vocabulary_;
}

void CudaBackend::head(Tensor states, const SparseHead& head) {
  logits_ = sparse_.record(list_for_others(), projections_, outputs(), states, head, vocabulary_);
}

void CudaBackend::begin_verify(std::span<const VerifyGroup> groups) {
  check_groups(kName, groups);
  if (!groups.empty()) {
    require(logits_.values != nullptr && logits_.tokens == nullptr, "a head of all tokens before a choice is verified");
    sampler_.stage_verify(groups, outputs(), copies_in_);
    sampler_.record_verify(list_for_others(), logits_, outputs(), grows_ ? &upload_.view() : nullptr, copies_out_);
  }
  run();
  verifying_ = true;
}

void CudaBackend::verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) {
  if (!verifying_) begin_verify(groups);
  verifying_ = false;
  wait();
  if (!groups.empty()) sampler_.finish_verify(groups, outputs(), results);
}

void CudaBackend::propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) {
  check_proposal(rows, count, candidates.size());
  if (in_flight_) wait();
  sampler_.stage_propose(rows, count, outputs(), copies_in_);
  sampler_.record_propose(list_for_others(), logits_, count, outputs(), 0, nullptr);
  sampler_.collect(1, outputs(), copies_out_);
  run();
  wait();
  sampler_.finish_propose(rows, count, outputs(), 0, candidates);
}

// The passes of a step follow each other without the host: the token of a pass is where that of the one before was, and
// nothing else of the step changes.
void CudaBackend::propose_ahead(std::span<const ProposeRow> rows, int count) {
  require(passes_ < kMostPassesAhead, "no more passes ahead than there is room for");
  check_proposal(rows, count, rows.size() * static_cast<std::size_t>(count));
  if (passes_ == 0) {
    if (in_flight_) wait();  // of a step whose own passes nobody asked for: its rows may still be read
    sampler_.stage_propose(rows, count, outputs(), copies_in_);
  }
  sampler_.record_propose(list_for_others(), logits_, count, outputs(), passes_++, &upload_);
}

void CudaBackend::run_passes() {
  sampler_.collect(passes_, outputs(), copies_out_);
  found_ = {passes_, outputs()};
  passes_ = 0;
  run();
}

void CudaBackend::proposed(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) {
  if (passes_ > 0) {
    run_passes();
    wait();
  } else if (unwaited_) {
    check(cudaEventSynchronize(found_at_.get()), "waiting for drafts");
  }  // else begin() has waited for them
  const std::size_t of_pass = rows.size() * static_cast<std::size_t>(count);
  require(static_cast<int>(rows.size()) <= found_.outputs &&
              candidates.size() >= static_cast<std::size_t>(found_.passes) * of_pass,
          "room for the candidates of all passes");
  for (int pass = 0; pass < found_.passes; ++pass) {
    sampler_.finish_propose(rows, count, found_.outputs, pass,
                            candidates.subspan(static_cast<std::size_t>(pass) * of_pass, of_pass));
  }
}

double CudaBackend::proposing_seconds() const {
  if (!unwaited_) return 0.0;
  float milliseconds = 0.0F;
  check(cudaEventElapsedTime(&milliseconds, proposing_.get(), found_at_.get()), "measuring time");
  return static_cast<double>(milliseconds) * 1e-3;
}

void CudaBackend::check_proposal(std::span<const ProposeRow> rows, int count, std::size_t room) const {
  require(logits_.values != nullptr, "a head before a draft is proposed");
  require(static_cast<int>(rows.size()) == step_outputs_ && count >= 1 && count <= kMaxCandidates &&
              room >= rows.size() * static_cast<std::size_t>(count),
          "a row to propose for and room for its few candidates for every output");
}

void CudaBackend::move_kv(std::span<const KvLayer> layers, std::span<const KvMove> moves) {
  run();
  moves_.run(layers, moves, {upload_.view().arena}, stream_.get());
}

void CudaBackend::read_logits(std::span<float> out) {
  require(logits_.values != nullptr, "a head before its logits are read");
  const auto columns = static_cast<std::size_t>(vocabulary_);
  require(out.size() >= static_cast<std::size_t>(step_outputs_) * columns, "room for the logits of every output");
  run();
  wait();
  std::vector<float> row(static_cast<std::size_t>(logits_.columns));
  for (int r = 0; r < step_outputs_; ++r) {
    check(
        cudaMemcpy(row.data(), logits_.values + r * logits_.stride, row.size() * sizeof(float), cudaMemcpyDeviceToHost),
        "reading logits");
    const std::span<float> to = out.subspan(static_cast<std::size_t>(r) * columns, columns);
    if (logits_.tokens == nullptr) {
      std::copy_n(row.begin(), columns, to.begin());
      continue;
    }
    std::fill(to.begin(), to.end(), -std::numeric_limits<float>::infinity());
    const std::vector<std::int32_t> tokens = sparse_.tokens(logits_, r);
    for (std::size_t i = 0; i < row.size(); ++i) to[static_cast<std::size_t>(tokens[i])] = row[i];
  }
}

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(int device) {
  return std::make_unique<cuda::CudaBackend>(cuda::use_device(device));
}

}  // namespace draftwerk
