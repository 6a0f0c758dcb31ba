#include "engine/evaluation.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "drafting/mtp.h"
#include "engine/single_sequence_kv.h"

namespace draftwerk {
namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

void require_in_vocabulary(const Gemma& model, std::span<const TokenId> tokens) {
  const int vocabulary = model.config().vocabulary;
  for (const TokenId token : tokens) {
    require(token >= 0 && token < vocabulary,
            "token id " + std::to_string(token) + " is out of range, allowed: 0 to " + std::to_string(vocabulary - 1));
  }
}

int checked_chunk(int chunk, int largest) {
  require(chunk >= 0, "chunk is " + std::to_string(chunk) + ", must not be negative");
  return chunk == 0 ? largest : std::min(chunk, largest);
}

const SamplingParams kGreedy;

/// So many tokens of a text over and over.
std::vector<TokenId> repeated(std::span<const TokenId> text, std::size_t count) {
  std::vector<TokenId> tokens(count);
  for (std::size_t i = 0; i < count; ++i) tokens[i] = text[i % text.size()];
  return tokens;
}

/// A pass over tokens[first, first + rows) with logits of the last `outputs` rows, to be run any number of times. Of
/// `tokens` and `kv` it keeps references.
class Pass {
 public:
  Pass(Gemma& model, const SingleSequenceKv& kv, std::span<const TokenId> tokens, std::int64_t first, int rows,
       int outputs, const SamplingParams& sampling = kGreedy)
      : model_(model),
        arena_(kv.arena()),
        tokens_(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows))),
        segment_(kv.segment(rows, first)),
        positions_(static_cast<std::size_t>(rows)),
        output_rows_(static_cast<std::size_t>(outputs)) {
    std::iota(positions_.begin(), positions_.end(), first);
    std::iota(output_rows_.begin(), output_rows_.end(), rows - outputs);
    // Verification against the text itself: what a step of the engine does with these rows.
    group_.drafts = tokens_.last(static_cast<std::size_t>(outputs) - 1);
    group_.position = first + rows - outputs + 1;
    group_.sampling = &sampling;
  }
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;
  Pass(Pass&&) = delete;
  Pass& operator=(Pass&&) = delete;
  ~Pass() = default;

  void forward() { model_.forward({tokens_, positions_, std::span(&segment_, 1), output_rows_}, arena_); }
  void run() {
    forward();
    model_.backend().verify(std::span(&group_, 1), std::span(&result_, 1));
  }

  /// What the last row chose, if all rows before it agreed.
  [[nodiscard]] TokenId chosen() const { return result_.tokens.back(); }

 private:
  Gemma& model_;
  const KvArena arena_;
  const std::span<const TokenId> tokens_;
  const Segment segment_;
  std::vector<std::int64_t> positions_;
  std::vector<int> output_rows_;
  VerifyGroup group_;
  VerifyResult result_;
};

}  // namespace

void score(Gemma& model, std::span<const TokenId> tokens, int chunk, std::span<float> out) {
  const int vocabulary = model.config().vocabulary;
  const auto length = static_cast<std::int64_t>(tokens.size());
  require(length >= 1 && length <= model.config().max_positions, "token_ids has " + std::to_string(length) +
                                                                     " tokens, allowed: 1 to " +
                                                                     std::to_string(model.config().max_positions));
  require_in_vocabulary(model, tokens);
  require(out.size() == tokens.size() * static_cast<std::size_t>(vocabulary), "logits: wrong size of the output");
  chunk = checked_chunk(chunk, std::min(model.max_rows(), model.max_outputs()));

  const SingleSequenceKv kv(model, length);
  for (std::int64_t first = 0; first < length; first += chunk) {
    const auto rows = static_cast<int>(std::min<std::int64_t>(chunk, length - first));
    Pass pass(model, kv, tokens, first, rows, rows);
    pass.forward();
    model.backend().read_logits(out.subspan(static_cast<std::size_t>(first * vocabulary),
                                            static_cast<std::size_t>(rows) * static_cast<std::size_t>(vocabulary)));
  }
}

std::vector<TokenId> written_text(Gemma& model) {
  const auto count = static_cast<int>(std::min<std::int64_t>(32, model.config().max_positions));
  SamplingParams sampling;
  sampling.temperature = 1.0F;
  sampling.top_k = 64;
  sampling.top_p = 0.95F;
  const SingleSequenceKv kv(model, count);
  std::vector<TokenId> text(static_cast<std::size_t>(count), 2 % model.config().vocabulary);
  for (int i = 0; i + 1 < count; ++i) {
    Pass pass(model, kv, text, i, 1, 1, sampling);
    pass.run();
    text[static_cast<std::size_t>(i) + 1] = pass.chosen();
  }
  return text;
}

std::vector<double> time_passes(Gemma& model, std::span<const TokenId> text, int rows, int repeats, int context) {
  require(rows >= 1 && rows <= model.max_rows(),
          "rows is " + std::to_string(rows) + ", allowed: 1 to " + std::to_string(model.max_rows()));
  require(repeats >= 1 && repeats <= 100000, "repeats is " + std::to_string(repeats) + ", allowed: 1 to 100000");
  require(context >= 0 && context + rows <= model.config().max_positions,
          "context is " + std::to_string(context) + ", allowed: 0 to " +
              std::to_string(model.config().max_positions - rows));
  const std::vector<TokenId> tokens = repeated(text, static_cast<std::size_t>(context + rows));
  const SingleSequenceKv kv(model, context + rows);
  for (int first = 0; first < context; first += model.max_rows()) {
    Pass(model, kv, tokens, first, std::min(model.max_rows(), context - first), 1).run();
  }
  const int outputs = rows <= model.max_outputs() ? rows : 1;
  Pass pass(model, kv, tokens, context, rows, outputs);
  std::vector<double> seconds;
  seconds.reserve(static_cast<std::size_t>(repeats));
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass.run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

DraftRound draft(MtpModel& model, std::span<const TokenId> tokens, int count, const SamplingParams& sampling,
                 int chunk) {
  Gemma& target = model.target();
  const auto known = static_cast<std::int64_t>(tokens.size()) - 1;
  require(known >= 1 && known < target.config().max_positions, "token_ids has " + std::to_string(tokens.size()) +
                                                                   " tokens, allowed: 2 to " +
                                                                   std::to_string(target.config().max_positions));
  require(count >= 1 && count <= 64, "count is " + std::to_string(count) + ", allowed: 1 to 64");
  require_in_vocabulary(target, tokens);
  chunk = checked_chunk(chunk, target.max_rows());
  const SingleSequenceKv kv(target, known + 1);
  for (std::int64_t first = 0; first < known; first += chunk) {
    Pass(target, kv, tokens, first, static_cast<int>(std::min<std::int64_t>(chunk, known - first)), 1).run();
  }

  const auto width = static_cast<std::size_t>(target.config().vocabulary);
  DraftRound round;
  round.logits.resize(static_cast<std::size_t>(count) * width);
  TokenId token = tokens.back();
  const std::int64_t position = known;
  const int row = 0;
  const Segment segment = kv.segment(1, position);
  const StepRows rows{std::span(&token, 1), std::span(&position, 1), std::span(&segment, 1), std::span(&row, 1)};
  for (int i = 0; i < count; ++i) {
    if (i == 0) {
      model.first(rows, std::span(&row, 1), kv.arena());
    } else {
      model.next(rows, std::span(&row, 1), kv.arena());
    }
    target.backend().read_logits(std::span(round.logits).subspan(static_cast<std::size_t>(i) * width, width));
    const ProposeRow choice{round.tokens, position + 1, &sampling, nullptr, {}, 0};
    Candidate best;
    target.backend().propose(std::span(&choice, 1), 1, std::span(&best, 1));
    token = best.token;
    round.tokens.push_back(token);
  }
  return round;
}

std::vector<double> time_drafts(MtpModel& model, std::span<const TokenId> text, int sequences, int count, int repeats,
                                int context) {
  Gemma& target = model.target();
  require(sequences >= 1 && sequences <= target.max_outputs(),
          "sequences is " + std::to_string(sequences) + ", allowed: 1 to " + std::to_string(target.max_outputs()));
  require(count >= 1 && count <= 64, "count is " + std::to_string(count) + ", allowed: 1 to 64");
  require(repeats >= 1 && repeats <= 100000, "repeats is " + std::to_string(repeats) + ", allowed: 1 to 100000");
  require(
      context >= 1 && context < target.config().max_positions,
      "context is " + std::to_string(context) + ", allowed: 1 to " + std::to_string(target.config().max_positions - 1));
  const std::vector<TokenId> tokens = repeated(text, static_cast<std::size_t>(context) + 1);
  const SingleSequenceKv kv(target, context + 1);
  for (int first = 0; first < context; first += target.max_rows()) {
    Pass(target, kv, tokens, first, std::min(target.max_rows(), context - first), 1).run();
  }
  const SamplingParams greedy;
  std::vector<TokenId> drafts(static_cast<std::size_t>(sequences) * static_cast<std::size_t>(count));
  std::vector<std::int32_t> parents(drafts.size());
  std::vector<DraftJob> jobs;
  for (int s = 0; s < sequences; ++s) {
    DraftContext job;
    job.tokens = tokens;
    job.target_row = 0;
    for (int t = 0; t < kPageTables; ++t) job.pages[t] = kv.pages(t);
    job.arena = kv.arena();
    job.sampling = &greedy;
    const std::size_t first = static_cast<std::size_t>(s) * static_cast<std::size_t>(count);
    jobs.push_back({.context = job, .count = count, .drafts = &drafts[first], .parents = &parents[first]});
  }
  const std::unique_ptr<Drafter> drafter = make_mtp_drafter(model);
  std::vector<double> seconds;
  seconds.reserve(static_cast<std::size_t>(repeats));
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    drafter->propose(jobs);
    drafter->settle();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

}  // namespace draftwerk
