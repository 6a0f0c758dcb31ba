#include "drafting/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>

namespace draftwerk {
namespace {

/// Sets these draws apart from the sampling noise, whose counters end in 0, and from those of the random drafter.
constexpr std::uint32_t kStream = 2;

using Recording = std::vector<TokenId>;

bool begins_with(std::span<const TokenId> text, std::span<const TokenId> beginning) {
  return text.size() >= beginning.size() && std::equal(beginning.begin(), beginning.end(), text.begin());
}

/// Recordings in lexicographic order, so that the one that begins with a text is the first that is not less than it.
class Recordings {
 public:
  explicit Recordings(std::vector<Recording> recordings) : sorted_(std::move(recordings)) {
    std::sort(sorted_.begin(), sorted_.end());
    // What is only the beginning of another (which then is the next) would end that one's drafts too early.
    const auto covered = [](const Recording& longer, const Recording& shorter) { return begins_with(longer, shorter); };
    const auto last = std::unique(sorted_.rbegin(), sorted_.rend(), covered);
    sorted_.erase(sorted_.begin(), last.base());
  }

  /// Null if none begins with `tokens`.
  [[nodiscard]] const Recording* find(std::span<const TokenId> tokens) const {
    const auto less = [](const Recording& recording, std::span<const TokenId> text) {
      return std::lexicographical_compare(recording.begin(), recording.end(), text.begin(), text.end());
    };
    const auto found = std::lower_bound(sorted_.begin(), sorted_.end(), tokens, less);
    return found != sorted_.end() && begins_with(*found, tokens) ? &*found : nullptr;
  }

 private:
  std::vector<Recording> sorted_;
};

class SyntheticState final : public DraftState {
 public:
  explicit SyntheticState(std::unique_ptr<DraftState> of_costing) : costing(std::move(of_costing)) {}

  /// What follows `tokens` in the recording, empty without one.
  std::span<const TokenId> rest(const Recordings& recordings, std::span<const TokenId> tokens) {
    if (tokens.size() < matched_) {
      // Shorter than before, against the contract: begin anew.
      matched_ = 0;
      lost_ = false;
      recording_ = nullptr;
    }
    if (lost_) return {};
    // A sequence may leave the recording for another one that says the same up to here.
    if (recording_ == nullptr || !begins_with(std::span(*recording_).subspan(matched_), tokens.subspan(matched_))) {
      recording_ = recordings.find(tokens);
    }
    matched_ = tokens.size();
    lost_ = recording_ == nullptr;
    return lost_ ? std::span<const TokenId>() : std::span(*recording_).subspan(matched_);
  }

  const std::unique_ptr<DraftState> costing;

 private:
  const Recording* recording_ = nullptr;
  std::size_t matched_ = 0;  ///< tokens of the sequence that were seen, and agree with the recording if there is one
  bool lost_ = false;        ///< no recording begins with them, and so none ever will
};

class SyntheticDrafter final : public Drafter {
 public:
  SyntheticDrafter(std::vector<Recording> recordings, double acceptance, std::uint64_t seed, int vocabulary,
                   std::unique_ptr<Drafter> costing)
      : recordings_(std::move(recordings)),
        right_below_(static_cast<std::uint64_t>(std::ldexp(std::clamp(acceptance, 0.0, 1.0), 32))),
        seed_(seed),
        vocabulary_(static_cast<std::uint32_t>(vocabulary)),
        costing_(std::move(costing)) {}

  [[nodiscard]] const char* name() const override { return "synthetic"; }
  std::unique_ptr<DraftState> open() override {
    return std::make_unique<SyntheticState>(costing_ ? costing_->open() : nullptr);
  }
  [[nodiscard]] int look_back() const override { return costing_ ? costing_->look_back() : 0; }

  DraftOutlook outlook(const DraftContext& context, int limit) override {
    const int known = std::min<int>(limit, static_cast<int>(rest(context).size()));
    const int offered = costing_ && known > 0 ? costing_->outlook(for_costing(context), known).available : known;
    return {.available = offered, .confidence = kModelConfidence};
  }

  int propose(std::span<DraftJob> jobs) override {
    for (DraftJob& job : jobs) job.produced = std::min<int>(job.count, static_cast<int>(rest(job.context).size()));
    const int passes = costing_ ? run_costing(jobs) : 0;
    for (const DraftJob& job : jobs) {
      const std::span<const TokenId> truth = rest(job.context);
      for (int i = 0; i < job.produced; ++i) {
        const auto ahead = static_cast<std::size_t>(i);
        job.drafts[i] = draft(truth[ahead], job.context.tokens.size() + ahead);
      }
    }
    return passes;
  }

 private:
  static SyntheticState& state_of(const DraftContext& context) { return static_cast<SyntheticState&>(*context.state); }

  [[nodiscard]] std::span<const TokenId> rest(const DraftContext& context) const {
    return state_of(context).rest(recordings_, context.tokens);
  }

  static DraftContext for_costing(DraftContext context) {
    context.state = state_of(context).costing.get();
    return context;
  }

  /// Has the other drafter propose what `jobs` will, in the same place; returns its passes.
  int run_costing(std::span<DraftJob> jobs) {
    costing_jobs_.assign(jobs.begin(), jobs.end());
    for (DraftJob& job : costing_jobs_) {
      job.context = for_costing(job.context);
      job.count = job.produced;
    }
    const int passes = costing_->propose(costing_jobs_);
    costing_->settle();
    for (std::size_t j = 0; j < jobs.size(); ++j) jobs[j].produced = costing_jobs_[j].produced;
    return passes;
  }

  [[nodiscard]] TokenId draft(TokenId truth, std::uint64_t position) const {
    const PhiloxWords random =
        philox4x32(static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32), 0, kStream,
                   static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32));
    if (random.word[0] < right_below_) return truth;
    const std::uint32_t away = 1 + random.word[1] % (vocabulary_ - 1);
    return static_cast<TokenId>((static_cast<std::uint32_t>(truth) + std::uint64_t{away}) % vocabulary_);
  }

  const Recordings recordings_;
  const std::uint64_t right_below_;  ///< of 2^32
  const std::uint64_t seed_;
  const std::uint32_t vocabulary_;
  const std::unique_ptr<Drafter> costing_;
  std::vector<DraftJob> costing_jobs_;
};

}  // namespace

std::unique_ptr<Drafter> make_synthetic_drafter(std::vector<std::vector<TokenId>> recordings, double acceptance,
                                                std::uint64_t seed, int vocabulary, std::unique_ptr<Drafter> costing) {
  return std::make_unique<SyntheticDrafter>(std::move(recordings), acceptance, seed, vocabulary, std::move(costing));
}

}  // namespace draftwerk
