// The drafter: guesses the next tokens of a sequence, cheaply, for the target to verify in one pass. Nothing that it
// does can change a token of the output; it only decides how many of them a step yields.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "backend/backend.h"

namespace draftwerk {

/// What a drafter keeps per sequence; made by Drafter::open() and used with that drafter only. A sequence grows by
/// appending alone: from one call to the next, `tokens` keeps the prefix that the state has seen.
class DraftState {
 public:
  DraftState() = default;
  DraftState(const DraftState&) = delete;
  DraftState& operator=(const DraftState&) = delete;
  DraftState(DraftState&&) = delete;
  DraftState& operator=(DraftState&&) = delete;
  virtual ~DraftState() = default;
};

/// Classes of confidence. What the classes 0 .. 7 mean is the affair of a drafter that knows before it drafts how good
/// its drafts will be, 0 the least; kModelConfidence is for drafts of a model, which it does not know that of. In all
/// of these each draft follows the one before. kTreeConfidence is for drafts of a model that form a tree, likeliest
/// first. The draft budget learns how often drafts of each class are accepted.
inline constexpr int kConfidenceClasses = 10;
inline constexpr int kModelConfidence = 8;
inline constexpr int kTreeConfidence = 9;

/// Drafters that one engine may have; each sequence of a step drafts with the one that pays best there.
inline constexpr int kMaxDrafters = 2;

/// What a drafter could propose now, known before paying for it.
struct DraftOutlook {
  int available = 0;   ///< at most this many drafts, 0 <= available <= the limit asked about
  int confidence = 0;  ///< 0 .. kConfidenceClasses - 1
};

/// One sequence as a drafter sees it.
struct DraftContext {
  DraftState* state = nullptr;
  std::span<const TokenId> tokens;  ///< the whole sequence so far, prompt and output
  /// Output row of the target's last pass that chose the last token, whose hidden state is still there; -1: none is.
  int target_row = -1;
  const PageId* pages[kPageTables] = {nullptr, nullptr};  ///< K/V of every position but that of the last token
  KvArena arena;                                          ///< where the pages lie
  const SamplingParams* sampling = nullptr;               ///< how the target chooses this sequence's tokens
  const TokenHistory* history = nullptr;                  ///< null when no penalty is asked for
  std::span<const TokenId> banned;                        ///< excluded from the next `banned_tokens` tokens
  int banned_tokens = 0;
};

/// One sequence's part of a proposal.
struct DraftJob {
  DraftContext context;
  int count = 0;  ///< drafts wanted, >= 0
  // Prices, in drafts that are accepted, for those whose drafts form a tree.
  std::span<const double> row_prices = {};  ///< [count + 1]: to verify so many drafts; empty: nothing
  double pass_price = 0.0;                  ///< of another pass
  int planned = 0;  ///< of them how many are counted on, for who cannot tell which ones pay: 0 .. count; 0: all
  TokenId* drafts = nullptr;  ///< out: room for `count` tokens; the first one guesses position tokens.size()
  /// Out, where drafts form a tree: of each the draft, before it in the list, that it follows; -1: the last token.
  /// Those that follow the same one differ.
  std::int32_t* parents = nullptr;
  int produced = 0;       ///< out: 0 .. count
  double promised = 0.0;  ///< out, with parents: how many of them are expected to be accepted
  /// Out: where the device is still choosing the drafts, the output row of Backend::propose_ahead() that has them
  /// (Growth); -1: they are here. Until settle() they stand for a chain.
  int proposed = -1;
};

/// Used from the engine thread alone, but for open(). Throws nothing but std::bad_alloc, and allocates only as
/// sequences grow.
class Drafter {
 public:
  Drafter() = default;
  Drafter(const Drafter&) = delete;
  Drafter& operator=(const Drafter&) = delete;
  Drafter(Drafter&&) = delete;
  Drafter& operator=(Drafter&&) = delete;
  virtual ~Drafter() = default;

  /// As in `--drafter NAME`.
  [[nodiscard]] virtual const char* name() const = 0;
  /// The state of a new sequence; null if the drafter keeps none. Any thread, at any time.
  virtual std::unique_ptr<DraftState> open() = 0;
  /// What could be proposed for the sequence, at most `limit` drafts. Cheap.
  virtual DraftOutlook outlook(const DraftContext& context, int limit) = 0;
  /// Fills drafts and produced of every job, and parents where its confidence is kTreeConfidence. Does not need a
  /// preceding outlook(). Returns the passes that it took; 0 if it does not work in passes.
  virtual int propose(std::span<DraftJob> jobs) = 0;
  /// Fills what the last propose() could not know yet, once verification of the step that its drafts are for has begun;
  /// its jobs are still where they were. Without such a step it waits for the drafts. Returns the seconds that the
  /// device took for what the host did not wait for.
  virtual double settle() { return 0.0; }
  /// How many of the last positions, that of the last token included, must keep their K/V in sliding layers for it; 0:
  /// it reads none.
  [[nodiscard]] virtual int look_back() const { return 0; }
};

}  // namespace draftwerk
