#include "engine/parked_kv.h"

#include <algorithm>
#include <utility>

namespace draftwerk {

void ParkedKv::close_conversation(ConversationId id) {
  conversations_.erase(id);
  if (const auto found = by_owner_.find(id); found != by_owner_.end()) close(found->second);
}

void ParkedKv::park(KvOwner owner, std::string_view salt, std::span<const TokenId> tokens, SequenceKv& kv) {
  if (const auto found = by_owner_.find(owner); found != by_owner_.end()) close(found->second);
  if (kv.positions() == 0) return kv_.close(kv);
  // A copy as long as it has to be: a sequence's own tokens have room for all of its output.
  const auto held = tokens.first(static_cast<std::size_t>(kv.positions()));
  entries_.push_back({owner, std::string(salt), {held.begin(), held.end()}, kv_.own_bytes(kv), kv_.held_bytes(kv), {}});
  by_owner_.emplace(owner, std::prev(entries_.end()));
  bytes_ += entries_.back().bytes;
  held_ += entries_.back().held;
  entries_.back().kv = std::move(kv);
}

SequenceKv ParkedKv::take(KvOwner owner, std::string_view salt, std::span<const TokenId> tokens) {
  const auto found = by_owner_.find(owner);
  if (found == by_owner_.end()) return {};
  const Entry& entry = *found->second;
  if (entry.salt == salt && entry.tokens.size() < tokens.size() &&
      std::equal(entry.tokens.begin(), entry.tokens.end(), tokens.begin())) {
    return unpark(found->second);
  }
  close(found->second);
  return {};
}

bool ParkedKv::reserve(SequenceKv& sequence, std::int64_t positions) {
  while (!kv_.reserve(sequence, positions)) {
    if (!give_up_oldest()) return false;
  }
  return true;
}

bool ParkedKv::give_up_oldest() {
  if (entries_.empty()) return false;
  close(entries_.begin());
  return true;
}

void ParkedKv::clear() {
  while (give_up_oldest()) {
  }
  conversations_.clear();
}

void ParkedKv::close(Position entry) {
  SequenceKv kv = unpark(entry);
  kv_.close(kv);
}

SequenceKv ParkedKv::unpark(Position entry) {
  SequenceKv kv = std::move(entry->kv);
  bytes_ -= entry->bytes;
  held_ -= entry->held;
  by_owner_.erase(entry->owner);
  entries_.erase(entry);
  return kv;
}

}  // namespace draftwerk
