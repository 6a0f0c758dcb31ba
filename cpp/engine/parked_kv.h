// K/V that stays open although nobody computes on it: between the requests of a conversation, and of paused sequences.
//
// It is a convenience and never a claim: whoever needs the pages has the least recently parked of it closed. Finished
// blocks then stay in the prefix cache for a while, and what is gone is computed again, to the same values.
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/request.h"
#include "kvcache/kv_cache.h"

namespace draftwerk {

/// Whom K/V is kept for: a conversation, or a request that does not run. Their ids never coincide.
using KvOwner = std::int64_t;

/// For the engine thread alone.
class ParkedKv {
 public:
  explicit ParkedKv(KvCache& kv) : kv_(kv) {}
  ParkedKv(const ParkedKv&) = delete;
  ParkedKv& operator=(const ParkedKv&) = delete;
  ParkedKv(ParkedKv&&) = delete;
  ParkedKv& operator=(ParkedKv&&) = delete;
  ~ParkedKv() { clear(); }

  void open_conversation(ConversationId id) { conversations_.insert(id); }
  /// Closes what is parked for it; nothing is parked for it from now on.
  void close_conversation(ConversationId id);
  [[nodiscard]] bool is_open(ConversationId id) const { return conversations_.contains(id); }

  /// Keeps `kv`, which holds the first kv.positions() of `tokens`, in place of what was parked for `owner` before.
  /// Leaves `kv` closed.
  void park(KvOwner owner, std::string_view salt, std::span<const TokenId> tokens, SequenceKv& kv);
  /// What is parked for `owner`, if it has the same salt and its positions are the beginning of `tokens`, one or more
  /// tokens short of all; else it is closed, as it is of no more use. A closed SequenceKv if there is none.
  SequenceKv take(KvOwner owner, std::string_view salt, std::span<const TokenId> tokens);
  /// KvCache::reserve, for which parked K/V is given up, the least recently parked first, until it succeeds or nothing
  /// is parked.
  [[nodiscard]] bool reserve(SequenceKv& sequence, std::int64_t positions);
  /// Whether reserve() might succeed. False: all that is parked would be given up in vain.
  [[nodiscard]] bool may_reserve(const SequenceKv& sequence, std::int64_t positions) const {
    return kv_.may_reserve(sequence, positions, held_);
  }
  /// Closes everything, conversations too.
  void clear();

  [[nodiscard]] int conversations() const { return static_cast<int>(conversations_.size()); }
  /// Bytes in pages that nobody but the parked held when they were parked, the prefix cache aside.
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  struct Entry {
    KvOwner owner = 0;
    std::string salt;
    std::vector<TokenId> tokens;
    std::size_t bytes = 0;
    std::size_t held = 0;
    SequenceKv kv;
  };
  using Position = std::list<Entry>::iterator;

  bool give_up_oldest();
  void close(Position entry);
  SequenceKv unpark(Position entry);

  KvCache& kv_;
  std::list<Entry> entries_;  // least recently parked first
  std::unordered_map<KvOwner, Position> by_owner_;
  std::unordered_set<ConversationId> conversations_;
  std::size_t bytes_ = 0;
  std::size_t held_ = 0;  // in all pages of all that is parked; one that is shared counts for each that holds it
};

}  // namespace draftwerk
