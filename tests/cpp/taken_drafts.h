// What tests take out of a tree of drafts.
#pragma once

#include <cstdint>
#include <vector>

#include "drafting/draft_tree.h"

namespace draftwerk::testing {

struct Taken {
  std::vector<TokenId> drafts;
  std::vector<std::int32_t> parents;
};

inline Taken take(DraftTree& tree, int count) {
  Taken taken{std::vector<TokenId>(static_cast<std::size_t>(count)),
              std::vector<std::int32_t>(static_cast<std::size_t>(count))};
  const auto size = static_cast<std::size_t>(tree.take(taken.drafts.data(), taken.parents.data()).drafts);
  taken.drafts.resize(size);
  taken.parents.resize(size);
  return taken;
}

}  // namespace draftwerk::testing
