#include "drafting/mtp.h"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "drafting/draft_tree.h"

namespace draftwerk {
namespace {

class MtpDrafter final : public Drafter {
 public:
  explicit MtpDrafter(MtpModel& model) : model_(model), max_rows_(model.target().max_outputs()) {
    const auto rows = static_cast<std::size_t>(max_rows_);
    drafting_.resize(rows);
    jobs_.reserve(rows);
    states_.reserve(rows);
    before_.reserve(rows);
    tokens_.reserve(rows);
    positions_.reserve(rows);
    segments_.reserve(rows);
    outputs_.reserve(rows);
    rows_.reserve(rows);
    candidates_.resize(rows * kDraftBranches);
    for (int i = 0; i < max_rows_; ++i) outputs_.push_back(i);
  }

  [[nodiscard]] const char* name() const override { return "mtp"; }
  std::unique_ptr<DraftState> open() override { return nullptr; }
  // The last token's own position has no K/V yet: the window starts one further back.
  [[nodiscard]] int look_back() const override { return model_.reach() + 1; }

  DraftOutlook outlook(const DraftContext& context, int limit) override {
    return {.available = context.target_row < 0 ? 0 : limit, .confidence = kTreeConfidence};
  }

  int propose(std::span<DraftJob> jobs) override {
    start(jobs);
    int passes = 0;
    for (; !tokens_.empty(); ++passes) {
      const StepRows step{tokens_, positions_, segments_, std::span(outputs_).first(tokens_.size())};
      const KvArena arena = jobs_.front()->context.arena;
      if (passes == 0) {
        model_.first(step, states_, arena);
      } else {
        model_.next(step, before_, arena);
      }
      model_.target().backend().propose(rows_, kDraftBranches, candidates_);
      grow();
    }
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      const DraftTree::Size size = drafting_[j].tree.take(jobs_[j]->drafts, jobs_[j]->parents);
      jobs_[j]->produced = size.drafts;
      jobs_[j]->promised = size.promised;
    }
    return passes;
  }

 private:
  /// A job's tree, and its rows in the pass.
  struct Drafting {
    DraftTree tree;
    int first_row = 0;
    int rows = 0;
  };

  /// The first pass: a row for each job.
  void start(std::span<DraftJob> jobs) {
    jobs_.clear();
    for (DraftJob& job : jobs) {
      job.produced = 0;
      if (job.count > 0 && job.context.target_row >= 0) jobs_.push_back(&job);
    }
    clear_rows();
    states_.clear();
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      const DraftJob& job = *jobs_[j];
      Drafting& drafting = drafting_[j];
      drafting.tree.start(job.count, job.row_prices, job.pass_price);
      drafting.first_row = static_cast<int>(tokens_.size());
      drafting.rows = 1;
      states_.push_back(job.context.target_row);
      add_row(job.context, job.context.tokens.back(), {});
    }
  }

  /// Takes what was found into the trees, and lays out the next pass.
  void grow() {
    const int width = std::max(max_rows_ / static_cast<int>(jobs_.size()), 1);
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      Drafting& drafting = drafting_[j];
      for (int r = 0; r < drafting.rows; ++r) {
        const auto first = static_cast<std::size_t>(drafting.first_row + r) * kDraftBranches;
        const std::span<const Candidate> found = std::span(candidates_).subspan(first, kDraftBranches);
        drafting.tree.add(r, found, choice_probabilities(found, jobs_[j]->context.sampling->temperature <= 0.0F));
      }
    }
    clear_rows();
    before_.clear();
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      Drafting& drafting = drafting_[j];
      const int first_before = std::exchange(drafting.first_row, static_cast<int>(tokens_.size()));
      if (std::exchange(drafting.rows, 0) == 0 || !drafting.tree.advance(width)) continue;
      drafting.rows = drafting.tree.frontier_size();
      for (int r = 0; r < drafting.rows; ++r) {
        before_.push_back(first_before + drafting.tree.before(r));
        add_row(jobs_[j]->context, drafting.tree.token(r), drafting.tree.path(r));
      }
    }
  }

  void clear_rows() {
    tokens_.clear();
    positions_.clear();
    segments_.clear();
    rows_.clear();
  }

  void add_row(const DraftContext& context, TokenId token, std::span<const TokenId> drafts) {
    const auto length = static_cast<std::int64_t>(context.tokens.size());
    tokens_.push_back(token);
    positions_.push_back(length - 1);
    segments_.push_back({static_cast<int>(segments_.size()), 1, length - 1, {context.pages[0], context.pages[1]}, {}});
    rows_.push_back({drafts, length, context.sampling, context.history, context.banned, context.banned_tokens});
  }

  MtpModel& model_;
  int max_rows_;
  // Of a round.
  std::vector<DraftJob*> jobs_;
  std::vector<Drafting> drafting_;  ///< of each job
  // Of a pass, row by row.
  std::vector<int> states_;
  std::vector<int> before_;
  std::vector<TokenId> tokens_;
  std::vector<std::int64_t> positions_;
  std::vector<Segment> segments_;
  std::vector<int> outputs_;
  std::vector<ProposeRow> rows_;
  std::vector<Candidate> candidates_;  ///< kDraftBranches of each
};

}  // namespace

std::unique_ptr<Drafter> make_mtp_drafter(MtpModel& model) { return std::make_unique<MtpDrafter>(model); }

}  // namespace draftwerk
