#include "drafting/lookup.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

namespace draftwerk {
namespace {

using Position = std::int32_t;
constexpr Position kNone = -1;

/// n-gram lengths that are indexed. Each is twice the one before: the longest match then lies within a factor of two
/// of the longest indexed n-gram that recurs, and is found among that one's occurrences.
constexpr std::array<int, 4> kOrders = {16, 8, 4, 2};
static_assert(kOrders.back() == kLookupShortestMatch);

/// Slots that are tried for one n-gram. At most half of the table is in use, so this is practically never reached
/// unless somebody crafts tokens that collide; what finds no slot is not indexed.
constexpr std::size_t kProbes = 64;
constexpr std::size_t kFirstSlots = 64;

constexpr std::uint64_t kHashBase = 0x9E3779B97F4A7C15ULL;

/// Polynomial hash over the last `order` tokens, modulo 2^64.
class RollingHash {
 public:
  explicit RollingHash(int order) {
    for (int i = 0; i < order; ++i) leaving_weight_ *= kHashBase;
  }
  void push(TokenId token) { value_ = value_ * kHashBase + term(token); }
  void drop_oldest(TokenId token) { value_ -= leaving_weight_ * term(token); }
  [[nodiscard]] std::uint64_t value() const { return value_; }

 private:
  static std::uint64_t term(TokenId token) { return static_cast<std::uint32_t>(token) + 1ULL; }
  std::uint64_t value_ = 0;
  std::uint64_t leaving_weight_ = 1;
};

/// Where each n-gram of one order ended: the most recent place in a hash table that holds no key of its own (the
/// tokens at that place are the key), the earlier ones in a chain.
class NgramIndex {
 public:
  explicit NgramIndex(int order) : order_(order), hash_(order), slots_(kFirstSlots, kNone) {}

  /// Takes in tokens[position], and indexes the n-gram that ends just before it: the one that ends with the sequence
  /// must not be found as its own earlier occurrence.
  void append(const TokenId* tokens, Position position) {
    if (position > 0) {
      earlier_.push_back(kNone);
      if (position >= order_) insert(tokens, position - 1);
    }
    hash_.push(tokens[position]);
    if (position >= order_) hash_.drop_oldest(tokens[position - order_]);
  }

  /// The most recent indexed occurrence (its last position) of the n-gram that ends with tokens[end], which is the
  /// token appended last.
  [[nodiscard]] Position find(const TokenId* tokens, Position end) const {
    if (end + 1 < order_) return kNone;
    const std::size_t slot = locate(tokens, end, hash_.value());
    return slot == slots_.size() ? kNone : slots_[slot];
  }
  /// The occurrence before this one.
  [[nodiscard]] Position earlier(Position end) const { return earlier_[static_cast<std::size_t>(end)]; }
  [[nodiscard]] int order() const { return order_; }

 private:
  /// The slot that holds the n-gram ending at `end` or, if none does, the empty one where it belongs; slots_.size()
  /// if neither is within kProbes.
  [[nodiscard]] std::size_t locate(const TokenId* tokens, Position end, std::uint64_t hash) const {
    const std::size_t mask = slots_.size() - 1;
    // Low bits of a hash modulo 2^64 depend on low bits of the tokens alone; fold the high ones in.
    std::size_t slot = ((hash ^ (hash >> 32)) * kHashBase >> 20) & mask;
    for (std::size_t probe = 0; probe < kProbes; ++probe, slot = (slot + 1) & mask) {
      const Position held = slots_[slot];
      if (held == kNone || std::equal(tokens + end + 1 - order_, tokens + end + 1, tokens + held + 1 - order_)) {
        return slot;
      }
    }
    return slots_.size();
  }

  void insert(const TokenId* tokens, Position end) {
    if (used_ * 2 >= slots_.size()) grow(tokens);
    const std::size_t slot = locate(tokens, end, hash_.value());
    if (slot == slots_.size()) return;
    if (slots_[slot] == kNone) ++used_;
    earlier_[static_cast<std::size_t>(end)] = slots_[slot];
    slots_[slot] = end;
  }

  void grow(const TokenId* tokens) {
    std::vector<Position> old(slots_.size() * 2, kNone);
    old.swap(slots_);
    used_ = 0;
    for (const Position end : old) {
      if (end == kNone) continue;
      RollingHash hash(order_);
      for (Position at = end + 1 - order_; at <= end; ++at) hash.push(tokens[at]);
      const std::size_t slot = locate(tokens, end, hash.value());
      if (slot == slots_.size()) continue;
      slots_[slot] = end;
      ++used_;
    }
  }

  int order_;
  RollingHash hash_;
  std::vector<Position> slots_;    ///< a power of two of them
  std::vector<Position> earlier_;  ///< by the last position of an occurrence
  std::size_t used_ = 0;
};

/// The occurrence to copy from.
struct Match {
  Position end = kNone;  ///< its last position
  int length = 0;        ///< tokens before and at `end` that equal the end of the sequence, up to kLookupLongestMatch
};

/// Tokens up to tokens[a] and up to tokens[b], a < b, that are equal, at most kLookupLongestMatch.
int common_suffix(const TokenId* tokens, Position a, Position b) {
  const int most = std::min(a + 1, kLookupLongestMatch);
  int length = 0;
  while (length < most && tokens[a - length] == tokens[b - length]) ++length;
  return length;
}

class LookupState final : public DraftState {
 public:
  /// The match at the end of `tokens`.
  const Match& update(std::span<const TokenId> tokens) {
    const auto size = static_cast<Position>(tokens.size());
    if (size < indexed_) {
      // Shorter than before, against the contract: index it anew rather than read past its end.
      indexes_ = empty_indexes();
      indexed_ = 0;
      match_ = {};
    }
    if (size != indexed_) {
      for (NgramIndex& index : indexes_) {
        for (Position position = indexed_; position < size; ++position) index.append(tokens.data(), position);
      }
      indexed_ = size;
      match_ = longest_match(tokens.data(), size - 1);
    }
    return match_;
  }

 private:
  using Indexes = std::array<NgramIndex, kOrders.size()>;

  static Indexes empty_indexes() {
    return {NgramIndex(kOrders[0]), NgramIndex(kOrders[1]), NgramIndex(kOrders[2]), NgramIndex(kOrders[3])};
  }

  [[nodiscard]] Match longest_match(const TokenId* tokens, Position end) const {
    Match best;
    for (const NgramIndex& index : indexes_) {
      Position candidate = index.find(tokens, end);
      for (int seen = 0; candidate != kNone && seen < kLookupCandidates; ++seen, candidate = index.earlier(candidate)) {
        const int length = common_suffix(tokens, candidate, end);
        if (length > best.length) best = {.end = candidate, .length = length};
        if (length == kLookupLongestMatch) break;
      }
      if (best.length > 0) break;
    }
    return best;
  }

  Indexes indexes_ = empty_indexes();
  Position indexed_ = 0;
  Match match_;
};

int confidence_class(int match_length) {
  constexpr std::array kFirstOfNext = {3, 4, 5, 7, 10, 16, 32};
  static_assert(kFirstOfNext.size() < kModelConfidence);
  return static_cast<int>(
      std::distance(kFirstOfNext.begin(), std::upper_bound(kFirstOfNext.begin(), kFirstOfNext.end(), match_length)));
}

class LookupDrafter final : public Drafter {
 public:
  [[nodiscard]] const char* name() const override { return "lookup"; }
  std::unique_ptr<DraftState> open() override { return std::make_unique<LookupState>(); }

  DraftOutlook outlook(const DraftContext& context, int limit) override {
    const Match& match = match_at_end(context);
    if (match.length == 0) return {};
    return {.available = limit, .confidence = confidence_class(match.length)};
  }

  int propose(std::span<DraftJob> jobs) override {
    for (DraftJob& job : jobs) {
      const Match& match = match_at_end(job.context);
      const std::span<const TokenId> tokens = job.context.tokens;
      job.produced = match.length == 0 ? 0 : job.count;
      for (int i = 0; i < job.produced; ++i) {
        const std::size_t source = static_cast<std::size_t>(match.end) + 1 + static_cast<std::size_t>(i);
        job.drafts[i] = source < tokens.size() ? tokens[source] : job.drafts[source - tokens.size()];
      }
    }
    return 0;
  }

 private:
  static const Match& match_at_end(const DraftContext& context) {
    return static_cast<LookupState&>(*context.state).update(context.tokens);
  }
};

}  // namespace

std::unique_ptr<Drafter> make_lookup_drafter() { return std::make_unique<LookupDrafter>(); }

}  // namespace draftwerk
