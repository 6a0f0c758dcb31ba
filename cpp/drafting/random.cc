#include "drafting/random.h"

namespace draftwerk {
namespace {

/// Sets these draws apart from the sampling noise, whose counters end in 0.
constexpr std::uint32_t kStream = 1;

/// Maps a random word to 0 .. range - 1 (multiply-shift; the bias is below range / 2^32).
std::uint32_t scale_to(std::uint32_t word, std::uint32_t range) {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(word) * range) >> 32);
}

class RandomDrafter final : public Drafter {
 public:
  explicit RandomDrafter(int vocabulary) : vocabulary_(static_cast<std::uint32_t>(vocabulary)) {}

  [[nodiscard]] const char* name() const override { return "random"; }
  std::unique_ptr<DraftState> open() override { return nullptr; }
  DraftOutlook outlook(const DraftContext& /*context*/, int limit) override {
    return {.available = limit, .confidence = kTreeConfidence};
  }

  int propose(std::span<DraftJob> jobs) override {
    for (DraftJob& job : jobs) {
      const std::span<const TokenId> tokens = job.context.tokens;
      const std::uint64_t seed = job.context.sampling == nullptr ? 0 : job.context.sampling->seed;
      for (int i = 0; i < job.count; ++i) {
        const PhiloxWords random = words(seed, tokens.size() + static_cast<std::size_t>(i));
        job.drafts[i] = token(random, tokens);
        job.parents[i] = i - 1;
        if (random.word[3] % 3 != 0) continue;
        const auto parent = static_cast<std::int32_t>(scale_to(random.word[3], static_cast<std::uint32_t>(i) + 1)) - 1;
        if (!is_followed_by(job, i, parent)) job.parents[i] = parent;
      }
      job.produced = job.count;
      job.promised = 0.0;
    }
    return 0;
  }

 private:
  static PhiloxWords words(std::uint64_t seed, std::uint64_t position) {
    return philox4x32(static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32), 0, kStream,
                      static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  }

  [[nodiscard]] TokenId token(const PhiloxWords& random, std::span<const TokenId> tokens) const {
    if (tokens.empty() || random.word[0] % 2 == 0) {
      return static_cast<TokenId>(scale_to(random.word[1], vocabulary_));
    }
    return tokens[scale_to(random.word[2], static_cast<std::uint32_t>(tokens.size()))];
  }

  /// Whether a draft before draft `i` has its token and follows `parent`.
  static bool is_followed_by(const DraftJob& job, int i, std::int32_t parent) {
    for (int d = 0; d < i; ++d) {
      if (job.parents[d] == parent && job.drafts[d] == job.drafts[i]) return true;
    }
    return false;
  }

  std::uint32_t vocabulary_;
};

}  // namespace

std::unique_ptr<Drafter> make_random_drafter(int vocabulary) { return std::make_unique<RandomDrafter>(vocabulary); }

}  // namespace draftwerk
