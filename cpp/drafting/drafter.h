// The drafter: guesses the next tokens of a sequence, cheaply, for the target to verify in one pass. Nothing that it
// does can change a token of the output; it only decides how many of them a step yields.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "backend/sampling.h"

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

/// Classes of confidence, 0 the least. What a class means is the drafter's affair; the draft budget learns how often
/// drafts of each class are accepted.
inline constexpr int kConfidenceClasses = 8;

/// What a drafter could propose now, known before paying for it.
struct DraftOutlook {
  int available = 0;   ///< at most this many drafts, 0 <= available <= the limit asked about
  int confidence = 0;  ///< 0 .. kConfidenceClasses - 1
};

/// One sequence's part of a proposal.
struct DraftJob {
  DraftState* state = nullptr;
  std::span<const TokenId> tokens;  ///< the whole sequence so far, prompt and output
  int count = 0;                    ///< drafts wanted, >= 0
  TokenId* drafts = nullptr;        ///< out: room for `count` tokens, the first one guesses position tokens.size()
  int produced = 0;                 ///< out: 0 .. count
  std::uint64_t sequence_seed = 0;  ///< the sequence's sampling seed
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
  /// The state of a new sequence. Any thread, at any time.
  virtual std::unique_ptr<DraftState> open() = 0;
  /// What could be proposed after `tokens`, at most `limit` drafts. Cheap.
  virtual DraftOutlook outlook(DraftState& state, std::span<const TokenId> tokens, int limit) = 0;
  /// Fills drafts and produced of every job. Does not need a preceding outlook().
  virtual void propose(std::span<DraftJob> jobs) = 0;
};

}  // namespace draftwerk
