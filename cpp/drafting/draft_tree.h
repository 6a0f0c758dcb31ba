// The drafts of one sequence while a model proposes them: a tree that grows where the target is likeliest to go.
//
// Every draft has a reach, the estimated probability that the target chooses it and all before it. Of the drafts found
// so far the likeliest are kept, as many as are wanted, and those of them that were found last are followed up in the
// next pass, as long as that promises more than it costs. So a step that is hard to foretell gets several first tokens,
// and an easy one a long chain (the expand-and-rerank of Li et al., "EAGLE-2", arXiv:2406.16858, with a price on
// depth).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/draft_choice.h"

namespace draftwerk {

/// Drafts of one depth that are followed up.
inline constexpr int kDraftWidth = 4;
/// Deepest draft of a tree.
inline constexpr int kDeepestDraft = 16;

/// draft_chances() of the `candidates`, best first; at most kDraftBranches of them.
std::array<float, kDraftBranches> choice_probabilities(std::span<const Candidate> candidates, bool greedy);

class DraftTree {
 public:
  DraftTree();

  /// Begins a tree of up to `count` >= 1 drafts. `row_prices` and `pass_price` as in DraftJob; the former stay valid
  /// until take().
  void start(int count, std::span<const double> row_prices, double pass_price);
  /// Adds what may follow: of drafts in frontier(), by its index, or at first (index 0) of the last known token.
  void add(int index, std::span<const Candidate> candidates, std::span<const float> probabilities);
  /// Closes the pass: chooses at most `width` drafts to be followed up in the next one; false if none is worth it.
  bool advance(int width);
  /// The same where drafting went ahead: the first candidate of the pass was followed up, whatever else may be
  /// likelier. False if there was none.
  bool advance_ahead();
  /// Drafts to be followed up: for index 0 .. frontier_size() - 1 the token, the drafts up to and with it, and the
  /// index in the frontier before of the draft that it follows.
  [[nodiscard]] int frontier_size() const { return static_cast<int>(frontier_.size()); }
  [[nodiscard]] TokenId token(int index) const;
  [[nodiscard]] std::span<const TokenId> path(int index) const;
  [[nodiscard]] int before(int index) const;
  /// How likely the first of them is to be accepted with all before it; 0 if there is none.
  [[nodiscard]] float reach() const;

  /// Drafts that are worth their rows, and how many of them are expected to be accepted.
  struct Size {
    int drafts = 0;
    double promised = 0.0;
  };
  /// Writes the drafts, likeliest first, and their parents (DraftJob).
  Size take(TokenId* drafts, std::int32_t* parents);

 private:
  struct Node {
    TokenId token = 0;
    int parent = -1;  ///< among the nodes
    int depth = 0;
    int row = 0;  ///< in the frontier that found it
    float reach = 0.0F;
  };

  void rank();
  [[nodiscard]] int best_size() const;
  [[nodiscard]] double row_price(int drafts) const;

  int count_ = 0;
  std::span<const double> row_prices_;
  double pass_price_ = 0.0;
  int depth_ = 0;             ///< of the drafts found last
  float best_onward_ = 0.0F;  ///< how likely the best of what may follow was, on average, in the last pass
  std::vector<Node> nodes_;
  std::vector<int> ranked_;    ///< the likeliest nodes, at most count_, likeliest first
  std::vector<int> frontier_;  ///< nodes
  std::vector<std::array<TokenId, kDeepestDraft>> paths_;
  std::vector<std::int32_t> place_;  ///< of a node among the ranked ones
};

}  // namespace draftwerk
