// The device: a small set of fused operations on device tensors. The model is written once against this interface;
// cpu/ (and later cuda/) implement it.
//
// Operations are enqueued in program order and may run later; verify() is the one call that waits, and accepted
// tokens are the only thing that comes back from it. Nothing is allocated between begin() and verify().
//
// Row invariance: what an operation computes for a row is a function of that row (and of the KV pages it can see)
// alone. An implementation fixes the order of every reduction from the row's own shape and absolute position, never
// from the other rows, their number, the number of threads or the way a prompt was cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/sampling.h"
#include "backend/weight_type.h"

namespace draftwerk {

/// Positions in one KV page, for every layer type.
inline constexpr int kPageSize = 16;
/// Layer types, each with a page table of its own: 0 sliding attention, 1 full attention.
inline constexpr int kPageTables = 2;

/// A page's place in the KV arena, in units of kPageUnit bytes.
using PageId = std::uint32_t;
inline constexpr std::size_t kPageUnit = 256;
inline constexpr PageId kNoPage = 0xFFFFFFFFU;

/// Element type of the KV cache.
enum class KvType : std::uint8_t { f16, f32 };

/// A matrix [rows, columns] in the backend's own layout; y = W x has `rows` outputs.
class Weight {
 public:
  Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  Weight(Weight&&) = delete;
  Weight& operator=(Weight&&) = delete;
  virtual ~Weight() = default;
  [[nodiscard]] virtual WeightType type() const = 0;
  [[nodiscard]] virtual std::int64_t rows() const = 0;
  [[nodiscard]] virtual std::int64_t columns() const = 0;
  /// Bytes that it occupies on the device.
  [[nodiscard]] virtual std::size_t bytes() const = 0;
};

/// A table [rows, columns] that is read by row only and stays where its bytes are, in a mapped file for instance: its
/// pages become resident as rows are read, and it takes no device memory of its own.
class RowTable {
 public:
  RowTable() = default;
  RowTable(const RowTable&) = delete;
  RowTable& operator=(const RowTable&) = delete;
  RowTable(RowTable&&) = delete;
  RowTable& operator=(RowTable&&) = delete;
  virtual ~RowTable() = default;
  [[nodiscard]] virtual WeightType type() const = 0;
  [[nodiscard]] virtual std::int64_t rows() const = 0;
  [[nodiscard]] virtual std::int64_t columns() const = 0;
};

/// Device memory, released with the object.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  virtual ~Buffer() = default;
  [[nodiscard]] virtual void* data() const = 0;
  [[nodiscard]] virtual std::size_t bytes() const = 0;
};

/// Activations [rows of the step, columns], row-major, in the backend's own activation type (float32 on the CPU).
/// A view: the memory belongs to a Buffer.
struct Tensor {
  void* data = nullptr;
  int columns = 0;
  int stride = 0;  ///< elements from row to row; 0: `columns`, rows follow each other

  [[nodiscard]] int row_stride() const { return stride == 0 ? columns : stride; }
};

/// RMSNorm: x * rsqrt(mean(x^2) + epsilon) * scale, in float32. `scale` is a device pointer to
/// [columns] float32 that already holds 1 + w where the checkpoint's convention is that, and ones where a norm has no
/// weight (multiplying by one is exact).
struct Norm {
  const float* scale = nullptr;
  float epsilon = 1e-6F;
};

/// One output of project(): output = weight * input.
struct Projection {
  const Weight* weight = nullptr;
  Tensor output;
};

/// Rotary embedding over pairs (i, i + head_dim / 2): angle = position * inverse_frequency[i], 0 <= i < head_dim / 2.
struct Rope {
  const float* inverse_frequency = nullptr;
};

/// Mixture of experts: which experts a row goes to, and with which weights.
/// The scores are W * norm(input), [experts]; their softmax is taken in float32; the `chosen` largest (ties: lower
/// expert first) are divided by their sum and multiplied by expert_scale.
struct Router {
  const Weight* weight = nullptr;  ///< [experts, hidden]
  Norm norm;
  const float* expert_scale = nullptr;  ///< [experts], device pointer
  int chosen = 0;                       ///< experts per row
};

/// The experts themselves, one below the other: expert e is the gated MLP down_e * (gelu_tanh(gate_e x) * (up_e x)).
struct Experts {
  const Weight* gate_up = nullptr;  ///< [experts * 2 * mlp, hidden]; of each expert first the rows of gate, then of up
  const Weight* down = nullptr;     ///< [experts * hidden, mlp]
  int count = 0;
  int mlp = 0;  ///< a multiple of 16, like hidden
};

/// A head that scores some tokens only, in drafting; all others have the logit minus infinity. Row i of `weight` is
/// that of tokens[i]. With centroids it scores clusters of tokens first, and only those of the `chosen` best (ties:
/// lower cluster first) get logits: row i belongs to cluster i / (rows / clusters).
struct SparseHead {
  const Weight* weight = nullptr;        ///< [rows, columns]
  const std::int32_t* tokens = nullptr;  ///< [rows], device pointer: distinct tokens
  const std::int32_t* row_of = nullptr;  ///< [vocabulary], likewise: the row of each token, -1 where it has none
  const Weight* centroids = nullptr;     ///< [clusters, columns]; null: there are no clusters
  int chosen = 0;                        ///< clusters
  float softcap = 0.0F;                  ///< as of a dense head
};

/// Where one layer keeps its keys and values inside the pages of its layer type.
struct KvLayer {
  int table = 0;                 ///< which page table
  std::size_t key_offset = 0;    ///< bytes from the start of a page; a multiple of 64
  std::size_t value_offset = 0;  ///< likewise
  int heads = 0;
  int head_dim = 0;
  KvType type = KvType::f16;
};

/// Which positions a row at position p sees: the last `window` of 0 .. p (all of them when window is 0). Where its own
/// position has no key and value, as in drafting, the last of 0 .. p - 1, with p > 0: one position earlier than with
/// its own, so the page table must still have that one.
struct Visibility {
  int window = 0;
  bool own = true;
};

/// The whole KV cache as the device sees it.
struct KvArena {
  std::byte* base = nullptr;
};

/// Consecutive rows of one sequence: a chain, row i at position first_position + i, or a tree of drafts, whose first
/// row is the last known token's and whose others each follow an earlier one.
struct Segment {
  int first_row = 0;
  int rows = 0;
  std::int64_t first_position = 0;  ///< absolute position of first_row
  /// Page tables by layer type, indexed by position / kPageSize. Entries of a sliding layer that lie wholly before
  /// the window of first_position may be kNoPage and are not read.
  const PageId* pages[kPageTables] = {nullptr, nullptr};
  /// [rows - 1], or empty for a chain: which row of this segment row i + 1 follows, at the position behind it, as in
  /// VerifyGroup::parents (-1: the first row; j < i: row j + 1). Row i writes its K/V where a chain's row i would, at
  /// first_position + i, and sees the positions before first_position, the rows that it descends from and itself.
  std::span<const std::int32_t> parents = {};
};

/// A segment whose drafts nobody knows yet: the device chooses them from what propose_ahead() has found in the step
/// before, while that may still run. They are a tree: the first candidate of a pass follows that of the pass before,
/// and the others stand beside it; of all these the likeliest, by draft_choice.h, are the drafts, likeliest first. What
/// the step and its VerifyGroup say of their tokens, positions and parents stands for as many drafts in a chain.
struct Growth {
  int segment = 0;   ///< of this step; its first row is the last known token's, all others are drafts
  int proposed = 0;  ///< output row of the step before whose candidates, kDraftBranches in every pass, they come from
};

/// What one step computes. The spans stay valid until verify(), or the last propose(), returns.
struct StepRows {
  std::span<const TokenId> tokens;          ///< [rows]
  std::span<const std::int64_t> positions;  ///< [rows], absolute
  std::span<const Segment> segments;        ///< cover the rows in order, without gap or overlap
  std::span<const int> output_rows;         ///< rows whose logits are wanted, ascending
  std::span<const Growth> growths = {};     ///< of some of the segments
};

/// Verification of one sequence: its draft tokens against the target's own choices.
struct VerifyGroup {
  int first_output = 0;             ///< index in StepRows::output_rows of the row of its last known token
  std::span<const TokenId> drafts;  ///< k drafts; rows first_output .. first_output + k are this group's
  /// [k], or empty where each draft follows the one before: the draft that each one follows, an earlier one, or -1, the
  /// last known token. Those that follow the same one differ.
  std::span<const std::int32_t> parents;
  std::int64_t position = 0;  ///< absolute position of the first token to choose
  const SamplingParams* sampling = nullptr;
  const TokenHistory* history = nullptr;  ///< tokens before `position`; null when no penalty is asked for
  std::span<const TokenId> banned;        ///< excluded from the first `banned_tokens` choices of this group
  int banned_tokens = 0;
};

/// Where to choose drafts for one sequence.
struct ProposeRow {
  std::span<const TokenId> drafts;  ///< those before it in this round: what is chosen is at `position` + drafts.size()
  std::int64_t position = 0;        ///< absolute position of the round's first draft
  const SamplingParams* sampling = nullptr;
  const TokenHistory* history = nullptr;  ///< as in VerifyGroup, as the next two
  std::span<const TokenId> banned;
  int banned_tokens = 0;
};

/// A token that may be chosen.
struct Candidate {
  TokenId token = -1;  ///< -1: there is none
  /// What it was chosen by: its logit after step 3 of sampling.h where the choice is greedy, otherwise z + gumbel of
  /// step 9; minus infinity if nothing has a finite logit.
  float value = 0.0F;
  /// Its share of softmax(z), of the logits after step 3 where the choice is greedy, over all tokens that the head
  /// scores.
  float probability = 0.0F;
};

/// Takes keys and values of one sequence from one position to another.
struct KvMove {
  const PageId* pages[kPageTables] = {nullptr, nullptr};  ///< as in Segment
  std::int64_t from = 0;
  std::int64_t to = 0;  ///< <= from
};

/// What a verification accepted: the agreeing drafts and one token of the target's own.
struct VerifyResult {
  std::vector<TokenId> tokens;                 ///< 1 .. k + 1 tokens; all but the last were drafted
  std::vector<int> drafts;                     ///< which drafts those are, in their order: ascending
  std::vector<float> logprobs;                 ///< of each token, if asked for
  std::vector<std::vector<TokenLogprob>> top;  ///< the n most probable at each token, descending, if asked for
};

/// The device has failed and computes nothing any more, after an illegal access or a fault of the hardware for
/// instance: only a new process helps.
class DeviceFailure : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Bytes of a device's memory.
struct MemoryInfo {
  std::size_t free = 0;
  std::size_t total = 0;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  Backend(Backend&&) = delete;
  Backend& operator=(Backend&&) = delete;
  virtual ~Backend() = default;

  /// For people: "cpu avx512, 2 threads". What stands before the first comma says how it rounds: others may choose
  /// other tokens.
  [[nodiscard]] virtual std::string description() const = 0;
  /// Memory of the device's own; nothing where the device computes in the memory of the machine.
  [[nodiscard]] virtual std::optional<MemoryInfo> memory() const = 0;

  // --- memory, at load time only -----------------------------------------------------------------------------
  /// Zeroed device memory, aligned to 4096 bytes, for the backend's operations alone. On the CPU, pages of it that are
  /// never touched cost nothing.
  virtual std::unique_ptr<Buffer> allocate(std::size_t bytes) = 0;
  /// Device memory, aligned as that, that holds these values, for the backend's operations alone.
  virtual std::unique_ptr<Buffer> constants(std::span<const std::byte> values) = 0;
  /// Rows that a step of up to `rows` rows may be computed as: activations need room for so many. At least `rows`.
  [[nodiscard]] virtual int padded_rows(int rows) const = 0;
  /// An empty matrix to be filled by upload_rows. `columns` is a multiple of 32 (of 256 for q4_k and q6_k) for the
  /// types of blocks and free for the others.
  virtual std::unique_ptr<Weight> create_weight(WeightType type, std::int64_t rows, std::int64_t columns) = 0;
  /// Stores rows [first_row, first_row + count) from `source`, which holds them contiguously in `source_type`;
  /// source_type is the weight's type, or f32/f16/bf16 for a q8_0, q4_0, f8_e4m3, f32, f16 or bf16 weight, converted on
  /// the way. first_row is a multiple of 16, count too unless the range ends with the last row.
  virtual void upload_rows(Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type,
                           const std::byte* source) = 0;
  /// A table of `rows` rows of `columns` values as a file stores them in `type`, contiguous at `data`, which `owner`
  /// keeps valid. `columns` as for create_weight.
  virtual std::unique_ptr<RowTable> map_table(WeightType type, std::int64_t rows, std::int64_t columns,
                                              const std::byte* data, std::shared_ptr<const void> owner) = 0;
  /// Makes room for steps of this size and allocates every scratch space for them; several calls (a target, its
  /// drafter) make room for the largest of each. `max_columns` is the widest input or output of any projection but the
  /// heads', `vocabulary` the rows of the head, the same in all calls.
  virtual void reserve(int max_rows, int max_outputs, int max_columns, int vocabulary) = 0;
  /// Makes room for head() with a head that scores some tokens only, for as many outputs as reserve() was last told.
  virtual void reserve_head(const SparseHead& head) = 0;
  /// Lets verify() choose without computing all logits of this head of the whole vocabulary, where that is faster and
  /// gives the same tokens; `norm` is that of the states it is multiplied with. After reserve(), before the first step.
  /// The weight's values stay what they are; embed() and head() alone take it from then on, which it has to outlive. Of
  /// several heads the first counts.
  virtual void screen_head(const Weight& /*head*/, const Norm& /*norm*/) {}
  /// Makes room for experts() in steps of up to max_rows rows.
  virtual void reserve_experts(int max_rows, int chosen, const Experts& experts) = 0;
  /// Bytes that a layer's keys (and as many again for its values) take in a page.
  [[nodiscard]] virtual std::size_t kv_bytes(int heads, int head_dim, KvType type) const = 0;
  /// Bytes of one activation element.
  [[nodiscard]] virtual std::size_t activation_bytes() const = 0;

  // --- one step ----------------------------------------------------------------------------------------------
  // Tensors have a row for each row of the step unless it says otherwise.
  virtual void begin(const StepRows& rows, KvArena arena) = 0;
  /// out[r] = table[tokens[r]] * scale
  virtual void embed(const Weight& table, float scale, Tensor out) = 0;
  /// inout[r][i] = scale * (norm(inout[r][i]) + table_scale * table[tokens[r]][i]) for each run i of `width` columns:
  /// one run for each layer, all normalised by the same norm of `width` columns (Gemma's per-layer embeddings).
  virtual void mix_token_rows(const RowTable& table, float table_scale, const Norm& norm, int width, float scale,
                              Tensor inout) = 0;
  /// out[i] = source[rows[i]]; `out` has rows.size() rows.
  virtual void gather(Tensor source, std::span<const int> rows, Tensor out) = 0;
  /// outputs[i] = W_i * (norm ? norm(input) : input)
  virtual void project(Tensor input, const Norm* norm, std::span<const Projection> outputs) = 0;
  /// output = gelu_tanh(gate * norm(input)) * (up * norm(input)), elementwise product
  virtual void project_geglu(Tensor input, const Norm& norm, const Weight& gate, const Weight& up, Tensor output) = 0;
  /// output = gelu_tanh(W * input) * factor, elementwise product
  virtual void project_gelu(Tensor input, const Weight& weight, Tensor factor, Tensor output) = 0;
  /// residual = (residual + norm(W * input)) * scale
  virtual void project_add(Tensor input, const Weight& weight, const Norm& norm, Tensor residual, float scale) = 0;
  /// output = sum over the experts e that the router chooses, in ascending order, of weight_e * expert_e(norm(input)).
  /// The router has its own norm and sees `input` too.
  virtual void experts(Tensor input, const Router& router, const Norm& norm, const Experts& experts, Tensor output) = 0;
  /// residual = (residual + norm(norm_a(a) + norm_b(b))) * scale
  virtual void add_normed(Tensor a, const Norm& norm_a, Tensor b, const Norm& norm_b, const Norm& norm, Tensor residual,
                          float scale) = 0;
  /// Normalises queries and keys per head, rotates both, and writes keys and values to the rows' pages; queries in
  /// place. Values are normalised per head if there is a value_norm. `value` may be `key`: then the values are the
  /// projected keys as they come in.
  virtual void append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm,
                         const Norm& key_norm, const Norm* value_norm, const Rope& rope, const KvLayer& kv) = 0;
  /// Queries alone, normalised and rotated in place: for layers that read the keys and values of another one.
  virtual void prepare_queries(Tensor query, int query_heads, const Norm& query_norm, const Rope& rope) = 0;
  /// Attention of the rows over their own sequences. output[r] is [query_heads, head_dim].
  virtual void attend(Tensor query, int query_heads, const KvLayer& kv, const Visibility& sees, float scale,
                      Tensor output) = 0;
  /// states[i] = norm(hidden[output_rows[i]]); `states` has a row for each output row.
  virtual void gather_outputs(Tensor hidden, const Norm& norm, Tensor states) = 0;
  /// Logits of the output rows from their states, kept on the device for verify() or propose():
  /// softcap * tanh(W * states / softcap), or W * states when softcap is 0.
  virtual void head(Tensor states, const Weight& weight, float softcap) = 0;
  /// The same for some tokens only, for propose() alone, which takes time for these and not for the vocabulary.
  virtual void head(Tensor states, const SparseHead& head) = 0;
  /// Begins what verify() of the same groups, which is next, will give. Where operations are asynchronous the device
  /// has all of the step then, and the host has time to itself until it calls verify(), which reads nothing more of the
  /// groups' drafts and parents: from here on they may change. A backend of several passes_ahead() has its own.
  virtual void begin_verify(std::span<const VerifyGroup> /*groups*/) {}
  /// Chooses the target's token at every output row and accepts drafts while they agree. Begins what begin_verify() of
  /// these groups did not, if that was left out, and waits for the step.
  /// `results` has one entry per group; vectors in it are reused.
  virtual void verify(std::span<const VerifyGroup> groups, std::span<VerifyResult> results) = 0;
  /// Finds, for every output row, the `count` best drafts; `rows` has an entry for each output row, and `candidates`
  /// `count` for each. The first is what verify() would choose there, each further one what it would choose if those
  /// before it had no finite logit; where nothing is left, there is no candidate, but the first is token 0, as verify()
  /// has it. Waits. No log-probabilities are taken.
  virtual void propose(std::span<const ProposeRow> rows, int count, std::span<Candidate> candidates) = 0;
  /// Whether operations return before they are computed, so that the host has time to itself until it asks for results.
  [[nodiscard]] virtual bool asynchronous() const { return false; }
  /// Passes of a drafter that may follow each other in a step before the host looks at what they have found. 1 where
  /// looking costs next to nothing: then there is propose() alone.
  [[nodiscard]] virtual int passes_ahead() const { return 1; }
  /// propose() without waiting. What is found is kept for proposed(), and the first candidate of an output row is that
  /// row's token from now on: the operations that follow are the next pass over the same rows. `rows` and `count` are
  /// the same in all passes of a step; the rows have no drafts and need no history, and their bans hold for all passes
  /// or for none. Pass p chooses at `position` + p.
  virtual void propose_ahead(std::span<const ProposeRow> /*rows*/, int /*count*/) {
    throw std::logic_error("this backend does not draft ahead");
  }
  /// What the passes have found, `count` candidates for each row, pass by pass. Either at the end of their own step,
  /// for which it waits then; or in the next step, which may have grown trees of it meanwhile, from begin_verify() on:
  /// then it waits for the passes alone.
  virtual void proposed(std::span<const ProposeRow> /*rows*/, int /*count*/, std::span<Candidate> /*candidates*/) {
    throw std::logic_error("this backend does not draft ahead");
  }
  /// Seconds that the device took for passes which the host did not wait for, as the step that came next followed them
  /// at once. After proposed() alone.
  [[nodiscard]] virtual double proposing_seconds() const { return 0.0; }
  /// Moves keys and values of some layers, in the arena of the last begin(), in each layer one move after the other.
  virtual void move_kv(std::span<const KvLayer> layers, std::span<const KvMove> moves) = 0;

  // --- for tests and evaluation ------------------------------------------------------------------------------
  /// Copies the logits that the last head() computed to `out`, [outputs, vocabulary] float32. Waits. After verify() or
  /// propose() they are no longer what they were, if they are there at all.
  virtual void read_logits(std::span<float> out) = 0;
};

}  // namespace draftwerk
