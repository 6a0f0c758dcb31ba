#include "drafting/draft_tree.h"

#include <algorithm>
#include <cstddef>

namespace draftwerk {
namespace {

constexpr std::size_t kMostNodes = std::size_t{kDeepestDraft} * kDraftWidth * kDraftBranches;

}  // namespace

std::array<float, kDraftBranches> choice_probabilities(std::span<const Candidate> candidates, bool greedy) {
  std::array<float, kDraftBranches> values{};
  std::array<float, kDraftBranches> probabilities{};
  int count = 0;
  for (const Candidate& candidate : candidates.first(std::min<std::size_t>(candidates.size(), kDraftBranches))) {
    if (candidate.token < 0) break;
    values[static_cast<std::size_t>(count)] = candidate.value;
    probabilities[static_cast<std::size_t>(count++)] = candidate.probability;
  }
  std::array<float, kDraftBranches> chances{};
  draft_chances(values.data(), probabilities.data(), count, greedy, chances.data());
  return chances;
}

DraftTree::DraftTree() {
  nodes_.reserve(kMostNodes);
  ranked_.reserve(kMostNodes);
  place_.reserve(kMostNodes);
  frontier_.reserve(kDraftWidth);
  paths_.reserve(kDraftWidth);
}

void DraftTree::start(int count, std::span<const double> row_prices, double pass_price) {
  count_ = count;
  row_prices_ = row_prices;
  pass_price_ = pass_price;
  depth_ = 0;
  best_onward_ = 0.0F;
  nodes_.clear();
  ranked_.clear();
  frontier_.clear();
}

void DraftTree::add(int index, std::span<const Candidate> candidates, std::span<const float> probabilities) {
  const int parent = frontier_.empty() ? -1 : frontier_[static_cast<std::size_t>(index)];
  const float reach = parent < 0 ? 1.0F : nodes_[static_cast<std::size_t>(parent)].reach;
  best_onward_ += probabilities[0] / static_cast<float>(std::max<std::size_t>(frontier_.size(), 1));
  for (std::size_t i = 0; i < probabilities.size() && i < candidates.size(); ++i) {
    if (candidates[i].token < 0) break;
    nodes_.push_back({candidates[i].token, parent, depth_ + 1, index, reach * probabilities[i]});
  }
}

/// Puts the likeliest nodes in order. One is never likelier than the one that it follows, and found later: so that one
/// is among them too, and before it.
void DraftTree::rank() {
  ranked_.resize(nodes_.size());
  for (std::size_t i = 0; i < nodes_.size(); ++i) ranked_[i] = static_cast<int>(i);
  const auto most = std::min<std::ptrdiff_t>(count_, static_cast<std::ptrdiff_t>(ranked_.size()));
  std::partial_sort(ranked_.begin(), ranked_.begin() + most, ranked_.end(), [this](int a, int b) {
    const float reach_a = nodes_[static_cast<std::size_t>(a)].reach;
    const float reach_b = nodes_[static_cast<std::size_t>(b)].reach;
    return reach_a != reach_b ? reach_a > reach_b : a < b;
  });
  ranked_.resize(static_cast<std::size_t>(most));
}

/// Of one draft more beside so many.
double DraftTree::row_price(int drafts) const {
  if (row_prices_.empty()) return 0.0;
  return row_prices_[static_cast<std::size_t>(drafts) + 1] - row_prices_[static_cast<std::size_t>(drafts)];
}

/// How many of the ranked drafts promise most beyond what their rows cost.
int DraftTree::best_size() const {
  int best = 0;
  double best_surplus = 0.0;
  double surplus = 0.0;
  for (std::size_t i = 0; i < ranked_.size(); ++i) {
    surplus += nodes_[static_cast<std::size_t>(ranked_[i])].reach - row_price(static_cast<int>(i));
    if (surplus <= best_surplus) continue;
    best = static_cast<int>(i) + 1;
    best_surplus = surplus;
  }
  return best;
}

bool DraftTree::advance(int width) {
  rank();
  ++depth_;
  frontier_.clear();
  // What follows the likeliest drafts takes another row, or the place of the least likely of those that have one.
  double gain = 0.0;
  const int size = best_size();
  int rows = size;
  int displaced = size;
  for (const int node : ranked_) {
    const Node& n = nodes_[static_cast<std::size_t>(node)];
    if (n.depth != depth_ || static_cast<int>(frontier_.size()) == std::min(width, kDraftWidth)) continue;
    const double onward = n.reach * best_onward_;
    const double row = rows < count_ ? row_price(rows) : 1.0;
    const double place = displaced > 0 ? nodes_[static_cast<std::size_t>(ranked_[displaced - 1])].reach : 1.0;
    if (onward <= std::min(row, place)) break;
    gain += onward - std::min(row, place);
    if (row < place) {
      ++rows;
    } else {
      --displaced;
    }
    frontier_.push_back(node);
  }
  best_onward_ = 0.0F;
  if (depth_ == kDeepestDraft || gain <= pass_price_) frontier_.clear();
  paths_.resize(frontier_.size());
  for (std::size_t f = 0; f < frontier_.size(); ++f) {
    int at = frontier_[f];
    for (int d = depth_ - 1; d >= 0; --d) {
      paths_[f][static_cast<std::size_t>(d)] = nodes_[static_cast<std::size_t>(at)].token;
      at = nodes_[static_cast<std::size_t>(at)].parent;
    }
  }
  return !frontier_.empty();
}

bool DraftTree::advance_ahead() {
  ++depth_;
  frontier_.clear();
  best_onward_ = 0.0F;
  std::size_t first = nodes_.size();
  while (first > 0 && nodes_[first - 1].depth == depth_) --first;
  if (first == nodes_.size() || depth_ == kDeepestDraft) return false;
  frontier_.push_back(static_cast<int>(first));
  return true;
}

float DraftTree::reach() const {
  return frontier_.empty() ? 0.0F : nodes_[static_cast<std::size_t>(frontier_[0])].reach;
}

TokenId DraftTree::token(int index) const {
  return nodes_[static_cast<std::size_t>(frontier_[static_cast<std::size_t>(index)])].token;
}

std::span<const TokenId> DraftTree::path(int index) const {
  return std::span(paths_[static_cast<std::size_t>(index)]).first(static_cast<std::size_t>(depth_));
}

int DraftTree::before(int index) const {
  return nodes_[static_cast<std::size_t>(frontier_[static_cast<std::size_t>(index)])].row;
}

DraftTree::Size DraftTree::take(TokenId* drafts, std::int32_t* parents) {
  rank();  // a chain that went ahead was not ranked before
  place_.assign(nodes_.size(), -1);
  Size size;
  size.drafts = best_size();
  for (std::size_t i = 0; i < static_cast<std::size_t>(size.drafts); ++i) {
    const Node& node = nodes_[static_cast<std::size_t>(ranked_[i])];
    size.promised += node.reach;
    place_[static_cast<std::size_t>(ranked_[i])] = static_cast<std::int32_t>(i);
    drafts[i] = node.token;
    parents[i] = node.parent < 0 ? -1 : place_[static_cast<std::size_t>(node.parent)];
  }
  return size;
}

}  // namespace draftwerk
