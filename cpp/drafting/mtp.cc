#include "drafting/mtp.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace draftwerk {
namespace {

class MtpDrafter final : public Drafter {
 public:
  explicit MtpDrafter(MtpModel& model) : model_(model) {
    const auto sequences = static_cast<std::size_t>(model.target().max_outputs());
    jobs_.reserve(sequences);
    states_.reserve(sequences);
    tokens_.reserve(sequences);
    positions_.reserve(sequences);
    segments_.reserve(sequences);
    outputs_.reserve(sequences);
    rows_.reserve(sequences);
    candidates_.resize(sequences);
    for (std::size_t i = 0; i < sequences; ++i) outputs_.push_back(static_cast<int>(i));
  }

  [[nodiscard]] const char* name() const override { return "mtp"; }
  std::unique_ptr<DraftState> open() override { return nullptr; }
  // The last token's own position has no K/V yet: the window starts one further back.
  [[nodiscard]] int look_back() const override { return model_.reach() + 1; }

  DraftOutlook outlook(const DraftContext& context, int limit) override {
    return {.available = context.target_row < 0 ? 0 : limit, .confidence = kModelConfidence};
  }

  void propose(std::span<DraftJob> jobs) override {
    start(jobs);
    for (std::size_t depth = 0; !jobs_.empty(); ++depth) {
      const StepRows rows{tokens_, positions_, segments_, std::span(outputs_).first(jobs_.size())};
      const KvArena arena = jobs_.front()->context.arena;
      if (depth == 0) {
        model_.first(rows, states_, arena);
      } else {
        model_.next(rows, arena);
      }
      model_.target().backend().propose(rows_, 1, candidates_);
      take_drafts(depth);
    }
  }

 private:
  /// A row for each job, longest first: those that want one draft more are then the first rows of the next pass.
  void start(std::span<DraftJob> jobs) {
    jobs_.clear();
    for (DraftJob& job : jobs) {
      job.produced = 0;
      if (job.count > 0 && job.context.target_row >= 0) jobs_.push_back(&job);
    }
    // Sorted in place: std::stable_sort would allocate.
    std::sort(jobs_.begin(), jobs_.end(),
              [](const DraftJob* a, const DraftJob* b) { return a->count != b->count ? a->count > b->count : a < b; });
    states_.clear();
    tokens_.clear();
    positions_.clear();
    segments_.clear();
    rows_.clear();
    for (const DraftJob* job : jobs_) {
      const DraftContext& context = job->context;
      const auto length = static_cast<std::int64_t>(context.tokens.size());
      states_.push_back(context.target_row);
      tokens_.push_back(context.tokens.back());
      positions_.push_back(length - 1);
      segments_.push_back({static_cast<int>(segments_.size()), 1, length - 1, {context.pages[0], context.pages[1]}});
      rows_.push_back({{}, length, context.sampling, context.history, context.banned, context.banned_tokens});
    }
  }

  /// Hands out the drafts in candidates_ and lets go of the sequences that want no more.
  void take_drafts(std::size_t depth) {
    for (std::size_t r = 0; r < jobs_.size(); ++r) {
      DraftJob& job = *jobs_[r];
      tokens_[r] = candidates_[r].token;
      job.drafts[depth] = tokens_[r];
      ++job.produced;
      rows_[r].drafts = {job.drafts, depth + 1};
    }
    while (!jobs_.empty() && jobs_.back()->produced == jobs_.back()->count) {
      jobs_.pop_back();
      tokens_.pop_back();
      positions_.pop_back();
      segments_.pop_back();
      rows_.pop_back();
    }
  }

  MtpModel& model_;
  // Of a round, row by row.
  std::vector<DraftJob*> jobs_;
  std::vector<int> states_;
  std::vector<TokenId> tokens_;
  std::vector<std::int64_t> positions_;
  std::vector<Segment> segments_;
  std::vector<int> outputs_;
  std::vector<ProposeRow> rows_;
  std::vector<Candidate> candidates_;
};

}  // namespace

std::unique_ptr<Drafter> make_mtp_drafter(MtpModel& model) { return std::make_unique<MtpDrafter>(model); }

}  // namespace draftwerk
