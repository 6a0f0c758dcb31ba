#include "backend/cuda/sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cpu/choosing.h"
#include "backend/cuda/growth.h"

namespace draftwerk::cuda {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

SampledRow padding() {
  SampledRow row{};
  row.way = Way::none;
  row.logprobs = -1;
  row.originals = -1;
  return row;
}

/// A logit's log-probability; NaN counts as minus infinity, as does every token of a row without a finite logit.
float log_probability(float logit, double normalizer) {
  const double difference = static_cast<double>(std::min(logit, FLT_MAX)) - normalizer;
  return std::isnan(difference) ? kMinusInfinity : static_cast<float>(difference);
}

}  // namespace

void Sampler::reserve(int max_outputs, int vocabulary) {
  vocabulary_ = vocabulary;
  const auto outputs = static_cast<std::size_t>(max_outputs);
  const std::size_t chunks = outputs * static_cast<std::size_t>(sampler_chunks(vocabulary));
  best_.reserve(chunks * sizeof(std::uint64_t));
  winners_.reserve(chunks * sizeof(std::uint64_t));
  masses_.reserve(outputs * static_cast<std::size_t>(sampler_mass_blocks(vocabulary)) * sizeof(std::uint64_t));
  chosen_.reserve(outputs * sizeof(std::int32_t));
  constexpr std::size_t kUsualAdjustments = 64;  // of a row
  for (MirroredMemory* staged : {&verifying_, &proposing_}) {
    staged->reserve(outputs * (sizeof(SampledRow) + kUsualAdjustments * sizeof(Adjustment)));
  }
  verified_.reserve(outputs * (sizeof(AcceptedToken) + sizeof(RowLogprobs)));
  proposed_.reserve(outputs * kMostPassesAhead * sizeof(ProposedRow));
  rows_.reserve(outputs);
}

void Sampler::begin_staging(int outputs) {
  rows_.assign(static_cast<std::size_t>(outputs), padding());
  adjustments_.clear();
  originals_count_ = 0;
  needs_ = {};
}

/// What all rows of a group have in common. `drafts` are those that any of its rows stands behind: its rows differ only
/// in how many of them they count. `count`: candidates of a row.
SampledRow Sampler::make_row(const ProposeRow& group, std::span<const TokenId> drafts, int count) {
  const SamplingParams& sampling = *group.sampling;
  const bool greedy = sampling.temperature <= 0.0F;
  SampledRow row = padding();
  row.seed = sampling.seed;
  row.scale = greedy ? 1.0F : 1.0F / sampling.temperature;
  row.limit = greedy ? std::numeric_limits<float>::infinity() : FLT_MAX;
  row.top_p = sampling.top_p;
  row.log_min_p = sampling.min_p > 0.0F ? std::log(sampling.min_p) : kMinusInfinity;
  row.top_k = sampling.top_k < vocabulary_ ? sampling.top_k : 0;
  const bool listed = row.top_k > 0 && row.top_k <= kListCapacity - count + 1;
  row.way = greedy ? Way::greedy : listed ? Way::listed : Way::whole;
  row.needs_mass = row.way == Way::whole && row.top_p < 1.0F && row.top_k == 0 ? 1 : 0;
  row.repetition_penalty = sampling.repetition_penalty;
  row.presence_penalty = sampling.presence_penalty;
  row.frequency_penalty = sampling.frequency_penalty;

  row.penalties = next_adjustment();
  if (sampling.needs_history()) add_penalties(group, drafts);
  row.biases = next_adjustment();
  for (const auto& [token, bias] : sampling.logit_bias) add_adjustment(token, std::bit_cast<std::int32_t>(bias));
  const auto by_token = [](const Adjustment& a, const Adjustment& b) { return a.token < b.token; };
  std::stable_sort(adjustments_.begin() + row.biases, adjustments_.end(), by_token);
  row.bans = next_adjustment();
  for (const TokenId token : group.banned) add_adjustment(token, 0);
  std::sort(adjustments_.begin() + row.bans, adjustments_.end(), by_token);
  const auto same_token = [](const Adjustment& a, const Adjustment& b) { return a.token == b.token; };
  adjustments_.erase(std::unique(adjustments_.begin() + row.bans, adjustments_.end(), same_token), adjustments_.end());
  row.adjustments_end = next_adjustment();
  return row;
}

/// Where drafts are counted, every one of them needs an entry, also those that the history lacks.
void Sampler::add_penalties(const ProposeRow& group, std::span<const TokenId> drafts) {
  const auto drafted = [&](TokenId token) { return std::find(drafts.begin(), drafts.end(), token) != drafts.end(); };
  if (group.history != nullptr) {
    const bool prompt_counts = group.sampling->repetition_penalty != 1.0F;
    for (const auto& [token, count] : *group.history) {
      if (!(count.in_prompt && prompt_counts) && count.in_output == 0 && !drafted(token)) continue;
      add_adjustment(token, count.in_output * 2 + (count.in_prompt ? 1 : 0));
    }
  }
  for (std::size_t i = 0; i < drafts.size(); ++i) {
    if (std::find(drafts.begin(), drafts.begin() + static_cast<std::ptrdiff_t>(i), drafts[i]) !=
        drafts.begin() + static_cast<std::ptrdiff_t>(i)) {
      continue;
    }
    if (group.history == nullptr || !group.history->contains(drafts[i])) add_adjustment(drafts[i], 0);
  }
}

/// Tokens outside of the vocabulary are ignored.
void Sampler::add_adjustment(TokenId token, std::int32_t value) {
  if (token >= 0 && token < vocabulary_) adjustments_.push_back({token, value});
}

std::int32_t Sampler::next_adjustment() const { return static_cast<std::int32_t>(adjustments_.size()); }

/// One of a group's rows, behind `depth` drafts.
void Sampler::stage_row(int output, SampledRow row, const ProposeRow& group, int depth) {
  row.position = group.position + depth;
  if (depth >= group.banned_tokens) row.adjustments_end = row.bans;
  const std::int32_t adjustments = row.adjustments_end - row.penalties;
  if (row.logprobs >= 0 && adjustments > 0) {
    row.originals = static_cast<std::int32_t>(originals_count_);
    originals_count_ += static_cast<std::size_t>(adjustments);
  }
  needs_.logprobs = needs_.logprobs || row.logprobs >= 0;
  needs_.adjustments = needs_.adjustments || adjustments > 0;
  needs_.passes = needs_.passes || row.way == Way::whole || row.needs_mass != 0;
  rows_[static_cast<std::size_t>(output)] = row;
}

/// Moves what was staged to pinned memory.
void Sampler::finish_staging(MirroredMemory& memory, std::vector<Copy>& in) {
  const std::size_t row_bytes = rows_.size() * sizeof(SampledRow);
  const std::size_t adjustment_bytes = adjustments_.size() * sizeof(Adjustment);
  memory.reserve_more(row_bytes + adjustment_bytes);
  std::memcpy(memory.host(), rows_.data(), row_bytes);
  if (adjustment_bytes > 0) std::memcpy(memory.host() + row_bytes, adjustments_.data(), adjustment_bytes);
  in.push_back(memory.to_device(row_bytes + adjustment_bytes));
  if (originals_count_ > 0) originals_.reserve(std::bit_ceil(originals_count_) * sizeof(float));
}

SamplerView Sampler::view(const LogitRows& logits, const MirroredMemory& staged, int outputs) const {
  SamplerView view{};
  view.logits = logits;
  view.rows = reinterpret_cast<const SampledRow*>(staged.device());
  view.adjustments = reinterpret_cast<const Adjustment*>(view.rows + outputs);
  view.best = static_cast<std::uint64_t*>(best_.get());
  view.winners = static_cast<std::uint64_t*>(winners_.get());
  view.masses = static_cast<std::uint64_t*>(masses_.get());
  view.originals = static_cast<float*>(originals_.get());
  view.chosen = static_cast<std::int32_t*>(chosen_.get());
  return view;
}

// --- verification -------------------------------------------------------------------------------------------------

void Sampler::stage_verify(std::span<const VerifyGroup> groups, int outputs, std::vector<Copy>& in) {
  begin_staging(outputs);
  for (const VerifyGroup& group : groups) {
    const auto drafts = static_cast<int>(group.drafts.size());
    const ProposeRow common{{}, group.position, group.sampling, group.history, group.banned, group.banned_tokens};
    SampledRow shared = make_row(common, group.drafts, 1);
    shared.logprobs = group.sampling->logprobs;
    const bool counts = group.sampling->needs_history();
    depths_.assign(static_cast<std::size_t>(drafts) + 1, 0);
    std::int32_t chain = next_adjustment();
    if (counts && group.parents.empty()) {
      for (const TokenId token : group.drafts) adjustments_.push_back({token, 0});
    }
    for (int row = 0; row <= drafts; ++row) {
      SampledRow own = shared;
      int& depth = depths_[static_cast<std::size_t>(row)];
      if (row == 0) {
        own.group_rows = drafts + 1;
      } else {
        const auto draft = static_cast<std::size_t>(row) - 1;
        own.parent = group.parents.empty() ? row - 1 : group.parents[draft] + 1;
        own.draft = group.drafts[draft];
        depth = depths_[static_cast<std::size_t>(own.parent)] + 1;
      }
      if (counts) {
        own.path = chain;
        own.path_length = depth;
        if (!group.parents.empty()) {
          own.path = next_adjustment();
          for (int draft = row - 1; draft >= 0; draft = group.parents[static_cast<std::size_t>(draft)]) {
            adjustments_.push_back({group.drafts[static_cast<std::size_t>(draft)], 0});
          }
        }
      }
      stage_row(group.first_output + row, own, common, depth);
    }
  }
  finish_staging(verifying_, in);
}

void Sampler::record_verify(LaunchList& list, const LogitRows& logits, int outputs, const StepView* grown,
                            std::vector<Copy>& out) const {
  if (grown != nullptr) tell_rows(list, *grown, reinterpret_cast<SampledRow*>(verifying_.device()));
  SamplerView verification = view(logits, verifying_, outputs);
  verification.accepted = reinterpret_cast<AcceptedToken*>(verified_.device());
  verification.logprobs = reinterpret_cast<RowLogprobs*>(verification.accepted + outputs);
  cuda::record_verify(list, verification, outputs, needs_);
  const std::size_t each = sizeof(AcceptedToken) + (needs_.logprobs ? sizeof(RowLogprobs) : 0);
  out.push_back(verified_.to_host(static_cast<std::size_t>(outputs) * each));
}

void Sampler::finish_verify(std::span<const VerifyGroup> groups, int outputs, std::span<VerifyResult> results) const {
  const auto* accepted = reinterpret_cast<const AcceptedToken*>(verified_.host());
  const auto* logprobs = reinterpret_cast<const RowLogprobs*>(accepted + outputs);
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const VerifyGroup& group = groups[g];
    VerifyResult& result = results[g];
    result.tokens.clear();
    result.drafts.clear();
    result.logprobs.clear();
    result.top.clear();
    const AcceptedToken* next = accepted + group.first_output;
    for (int row = 0; true; ++next) {
      result.tokens.push_back(next->token);
      if (group.sampling->logprobs >= 0) {
        const RowLogprobs& found = logprobs[group.first_output + row];
        const double normalizer = cpu::log_normalizer(found.largest, found.mass);
        result.logprobs.push_back(log_probability(found.chosen, normalizer));
        if (group.sampling->logprobs > 0) {
          std::vector<TokenLogprob>& top = result.top.emplace_back();
          for (int i = 0; i < found.count; ++i) {
            top.push_back({found.top[i].token, log_probability(found.top[i].z, normalizer)});
          }
        }
      }
      if (next->draft < 0) break;
      result.drafts.push_back(next->draft);
      row = next->draft + 1;
    }
  }
}

// --- drafts -------------------------------------------------------------------------------------------------------

void Sampler::stage_propose(std::span<const ProposeRow> rows, int count, int outputs, std::vector<Copy>& in) {
  begin_staging(outputs);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const ProposeRow& place = rows[i];
    SampledRow row = make_row(place, place.drafts, count);
    row.needs_mass = 1;
    if (place.sampling->needs_history()) {
      row.path = next_adjustment();
      row.path_length = static_cast<std::int32_t>(place.drafts.size());
      for (const TokenId token : place.drafts) adjustments_.push_back({token, 0});
    }
    stage_row(static_cast<int>(i), row, place, static_cast<int>(place.drafts.size()));
  }
  finish_staging(proposing_, in);
}

void Sampler::record_propose(LaunchList& list, const LogitRows& logits, int count, int outputs, int pass,
                             const StepUpload* ahead) const {
  SamplerView proposal = view(logits, proposing_, outputs);
  proposal.proposed = reinterpret_cast<ProposedRow*>(proposed_.device()) + std::ptrdiff_t{pass} * outputs;
  if (ahead != nullptr) {
    proposal.tokens = ahead->growing().tokens;
    proposal.output_rows = ahead->view().output_rows;
    proposal.passes_before = pass;
  }
  cuda::record_propose(list, proposal, outputs, count, needs_);
}

void Sampler::collect(int passes, int outputs, std::vector<Copy>& out) const {
  const auto rows = static_cast<std::size_t>(passes) * static_cast<std::size_t>(outputs);
  out.push_back(proposed_.to_host(rows * sizeof(ProposedRow)));
}

void Sampler::finish_propose(std::span<const ProposeRow> rows, int count, int outputs, int pass,
                             std::span<Candidate> candidates) const {
  const auto* proposed = reinterpret_cast<const ProposedRow*>(proposed_.host()) + std::ptrdiff_t{pass} * outputs;
  const auto each = static_cast<std::size_t>(count);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const ProposedRow& found = proposed[i];
    const std::span<Candidate> of_row = candidates.subspan(i * each, each);
    std::fill(of_row.begin(), of_row.end(), cpu::kNoCandidate);
    for (int j = 0; j < found.count; ++j) {
      of_row[static_cast<std::size_t>(j)] = {found.token[j], found.value[j]};
    }
    ProposeRow place = rows[i];
    place.position += pass;
    cpu::set_probabilities(cpu::portable::kSamplerKernels, place, cpu::log_normalizer(found.largest, found.mass),
                           of_row);
    if (of_row[0].token < 0) of_row[0].token = 0;
  }
}

const ProposedRow* Sampler::proposed() const { return reinterpret_cast<const ProposedRow*>(proposed_.device()); }

const SampledRow* Sampler::proposing() const { return reinterpret_cast<const SampledRow*>(proposing_.device()); }

}  // namespace draftwerk::cuda
