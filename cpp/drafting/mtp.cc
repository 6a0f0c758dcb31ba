#include "drafting/mtp.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>
#include <vector>

#include "drafting/draft_tree.h"

namespace draftwerk {
namespace {

class MtpDrafter final : public Drafter {
 public:
  explicit MtpDrafter(MtpModel& model)
      : model_(model), backend_(model.target().backend()), max_rows_(model.target().max_outputs()) {
    reach_.fill(1.0F);
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
    candidates_.resize(rows * kDraftBranches *
                       static_cast<std::size_t>(std::min(backend_.passes_ahead(), kDeepestDraft)));
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
    passes_ahead_ = 0;
    if (tokens_.empty()) return 0;
    if (may_go_ahead()) return draft_ahead();
    const int passes = draft_by_pass();
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      const DraftTree::Size size = drafting_[j].tree.take(jobs_[j]->drafts, jobs_[j]->parents);
      jobs_[j]->produced = size.drafts;
      jobs_[j]->promised = size.promised;
    }
    return passes;
  }

  // The tree that the device has grown, once more: what it took is not told, but how likely it was.
  double settle() override {
    if (passes_ahead_ == 0) return 0.0;
    backend_.proposed(rows_, kDraftBranches, candidates_);
    for (std::size_t j = 0; j < jobs_.size(); ++j) drafting_[j].tree.start(jobs_[j]->produced, {}, 0.0);
    std::span<const Candidate> found = candidates_;
    for (int pass = 0; pass < passes_ahead_; ++pass) {
      double reached = 0.0;
      for (std::size_t j = 0; j < jobs_.size(); ++j, found = found.subspan(kDraftBranches)) {
        DraftTree& tree = drafting_[j].tree;
        if (pass > 0 && tree.frontier_size() == 0) continue;
        const bool greedy = jobs_[j]->context.sampling->temperature <= 0.0F;
        tree.add(0, found.first(kDraftBranches), choice_probabilities(found.first(kDraftBranches), greedy));
        tree.advance_ahead();
        reached += tree.reach();
      }
      note_reach(pass, static_cast<float>(reached / static_cast<double>(jobs_.size())));
    }
    note_reach_beyond(passes_ahead_);
    passes_ahead_ = 0;
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      DraftJob& job = *jobs_[j];
      const DraftTree::Size size = drafting_[j].tree.take(job.drafts, job.parents);
      job.promised = size.promised;
      for (int d = size.drafts; d < job.produced; ++d) job.parents[d] = -1;  // where less was found
    }
    return backend_.proposing_seconds();
  }

 private:
  /// Every pass is for what those before it found.
  int draft_by_pass() {
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      drafting_[j].tree.start(jobs_[j]->count, jobs_[j]->row_prices, jobs_[j]->pass_price);
    }
    int passes = 0;
    for (; !tokens_.empty(); ++passes) {
      if (passes == 0) {
        model_.first(step(), states_, jobs_.front()->context.arena);
      } else {
        model_.next(step(), before_, jobs_.front()->context.arena);
      }
      backend_.propose(rows_, kDraftBranches, candidates_);
      grow();
    }
    return passes;
  }

  /// On a device that is far away: a number of passes that is settled beforehand, each for the best draft of the one
  /// before it, and a number of drafts, which the device chooses from what they find.
  int draft_ahead() {
    passes_ahead_ = worthwhile_passes();
    model_.first(step(), states_, jobs_.front()->context.arena);
    backend_.propose_ahead(rows_, kDraftBranches);
    for (int pass = 1; pass < passes_ahead_; ++pass) {
      model_.follow(step().output_rows);
      backend_.propose_ahead(rows_, kDraftBranches);
    }
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      DraftJob& job = *jobs_[j];
      job.proposed = static_cast<int>(j);
      job.produced = std::min(counted_on(job), passes_ahead_ * kDraftBranches);
      for (int d = 0; d < job.produced; ++d) {
        job.drafts[d] = 0;
        job.parents[d] = d - 1;
      }
    }
    return passes_ahead_;
  }

  static int counted_on(const DraftJob& job) { return job.planned > 0 ? job.planned : job.count; }

  /// Whether all passes are alike but for the tokens: whatever depends on the drafts before it needs the host.
  [[nodiscard]] bool may_go_ahead() const {
    return backend_.passes_ahead() > 1 && std::all_of(jobs_.begin(), jobs_.end(), [this](const DraftJob* job) {
             const DraftContext& context = job->context;
             return !context.sampling->needs_history() && (context.banned.empty() || context.banned_tokens <= 0 ||
                                                           context.banned_tokens >= backend_.passes_ahead());
           });
  }

  /// Passes whose drafts, as drafts went so far, are accepted more often than a pass costs.
  [[nodiscard]] int worthwhile_passes() const {
    int wanted = 1;
    double price = 1.0;
    for (const DraftJob* job : jobs_) {
      wanted = std::max(wanted, counted_on(*job));
      price = std::min(price, job->pass_price);
    }
    wanted = std::min({wanted, kDeepestDraft, backend_.passes_ahead()});
    int passes = 1;
    while (passes < wanted && reach_[static_cast<std::size_t>(passes) - 1] > price) ++passes;
    return passes;
  }

  /// Remembers how likely the chain was, on average, to be accepted up to the draft of this pass.
  void note_reach(int pass, float reach) {
    float& usual = reach_[static_cast<std::size_t>(pass)];
    usual += (reach - usual) * kNoted;
  }
  /// What was not tried comes to be thought as likely as what was, so that it is tried again some time.
  void note_reach_beyond(int passes) {
    for (auto p = static_cast<std::size_t>(passes); p < reach_.size(); ++p) {
      reach_[p] += (reach_[p - 1] - reach_[p]) * kForgotten;
    }
  }

  [[nodiscard]] StepRows step() const {
    return {tokens_, positions_, segments_, std::span(outputs_).first(tokens_.size())};
  }

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
      job.proposed = -1;
      if (job.count > 0 && job.context.target_row >= 0) jobs_.push_back(&job);
    }
    clear_rows();
    states_.clear();
    for (std::size_t j = 0; j < jobs_.size(); ++j) {
      const DraftJob& job = *jobs_[j];
      Drafting& drafting = drafting_[j];
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

  static constexpr float kNoted = 1.0F / 16.0F;
  static constexpr float kForgotten = 1.0F / 64.0F;

  MtpModel& model_;
  Backend& backend_;
  int max_rows_;
  std::array<float, kDeepestDraft> reach_{};  ///< by pass, of chains that were drafted ahead
  // Of a round.
  int passes_ahead_ = 0;  ///< whose drafts nobody has looked at yet
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
