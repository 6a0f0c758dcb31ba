#include "engine/engine.h"

#include <algorithm>
#include <exception>
#include <ranges>
#include <utility>

#include "backend/floating_point.h"

namespace draftwerk {
namespace {

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Adds the time between its construction and destruction to a total.
class PhaseTimer {
 public:
  explicit PhaseTimer(double& total) : total_(total), start_(Clock::now()) {}
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;
  PhaseTimer(PhaseTimer&&) = delete;
  PhaseTimer& operator=(PhaseTimer&&) = delete;
  ~PhaseTimer() { total_ += seconds_since(start_); }

 private:
  double& total_;
  Clock::time_point start_;
};

KvShape kv_shape(const Gemma& model, std::span<const std::unique_ptr<Drafter>> drafters) {
  KvShape shape{};
  const KvPageShape pages = model.kv_page_shape();
  std::copy(std::begin(pages.page_bytes), std::end(pages.page_bytes), std::begin(shape.page_bytes));
  shape.window = model.config().window;
  for (const auto& drafter : drafters) shape.window = std::max(shape.window, drafter->look_back());
  return shape;
}

EngineOptions checked(EngineOptions options, const Gemma& model) {
  const auto require = [](bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument("engine options: " + what);
  };
  const std::int64_t longest = model.config().max_positions;
  if (options.max_context == 0) options.max_context = longest;
  require(options.max_context >= 2 && options.max_context <= longest,
          "max_context is " + std::to_string(options.max_context) + ", must be 2 to " + std::to_string(longest));
  require(options.max_sequences >= 1 && options.max_sequences <= model.max_outputs() &&
              options.max_sequences < model.max_rows(),
          "max_sequences is " + std::to_string(options.max_sequences) + ", must be 1 to " +
              std::to_string(std::min(model.max_outputs(), model.max_rows() - 1)));
  require(options.prefill_chunk >= 1,
          "prefill_chunk is " + std::to_string(options.prefill_chunk) + ", must be at least 1");
  options.prefill_chunk = std::min(options.prefill_chunk, model.max_rows());
  require(options.max_draft_length >= 0 && options.max_draft_length <= 64,
          "max_draft_length is " + std::to_string(options.max_draft_length) + ", must be 0 to 64");
  require(options.draft_length >= -1 && options.draft_length <= options.max_draft_length,
          "draft_length is " + std::to_string(options.draft_length) + ", must be -1 to max_draft_length (" +
              std::to_string(options.max_draft_length) + ")");
  require(options.max_queued_tokens >= 1, "max_queued_tokens must be at least 1");
  return options;
}

std::vector<TokenId> sorted_stop_tokens(const Request& request, const std::vector<TokenId>& eos) {
  std::vector<TokenId> tokens = request.stop_token_ids;
  if (!request.ignore_eos) tokens.insert(tokens.end(), eos.begin(), eos.end());
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

}  // namespace

RequestError::RequestError(FieldError error)
    : std::invalid_argument(error.field + " is " + error.value + "; allowed: " + error.allowed),
      field_(std::move(error)) {}

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::none:
      return "";
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::error:
      return "error";
  }
  return "";
}

Engine::Engine(Gemma& model, EngineOptions options, std::vector<std::unique_ptr<Drafter>> drafters,
               TokenBytes token_bytes)
    : model_(model),
      options_(checked(std::move(options), model)),
      token_bytes_(std::move(token_bytes)),
      limits_{model.config().vocabulary, options_.max_context, options_.max_draft_length, !token_bytes_.empty()},
      kv_(kv_shape(model, drafters), options_.kv_memory_bytes, options_.prefix_cache),
      arena_(model.backend().allocate(kv_.arena_bytes())),
      parked_(kv_),
      scheduler_({options_.max_sequences, model.max_rows(), model.max_outputs(), options_.prefill_chunk}, kv_, parked_),
      drafts_(std::move(drafters), {options_.draft_length, options_.max_draft_length, scheduler_.limits()}, parked_,
              {static_cast<std::byte*>(arena_->data())}) {
  publish_statistics();
  thread_ = std::thread(&Engine::run, this);
}

Engine::~Engine() { close(); }

// --- from any thread ---------------------------------------------------------------------------------------------

// What is wrong with a request that the KV memory could not hold.
FieldError Engine::too_long(const Request& request) const {
  const auto prompt_tokens = static_cast<std::int64_t>(request.prompt.size());
  const std::string memory = " the KV memory of " + std::to_string(options_.kv_memory_bytes >> 10) + " KiB";
  const auto lengths = std::views::iota(std::int64_t{1}, prompt_tokens + request.max_tokens + 1);
  const std::int64_t most = *std::ranges::partition_point(lengths, [this](std::int64_t length) {
    return kv_.fits(length, model_.max_rows());
  }) - 1;
  if (most <= prompt_tokens) {
    return {"prompt", std::to_string(prompt_tokens) + " tokens",
            "at most " + std::to_string(most - 1) + " tokens: more exceed" + memory};
  }
  return {"max_tokens", std::to_string(request.max_tokens),
          "at most " + std::to_string(most - prompt_tokens) + ": with the prompt of " + std::to_string(prompt_tokens) +
              " tokens more exceed" + memory};
}

RequestId Engine::submit(Request request) {
  if (auto error = validate(request, limits_)) throw RequestError(*std::move(error));
  const auto prompt_tokens = static_cast<std::int64_t>(request.prompt.size());
  if (!kv_.fits(prompt_tokens + request.max_tokens, model_.max_rows())) throw RequestError(too_long(request));
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = request.prompt;
  sequence->tokens.reserve(static_cast<std::size_t>(prompt_tokens + request.max_tokens));
  sequence->stop_tokens = sorted_stop_tokens(request, options_.eos_token_ids);
  if (request.min_tokens > 0) sequence->banned = sequence->stop_tokens;
  sequence->stop_strings = StopStringMatcher(request.stop_strings);
  if (request.sampling.needs_history()) {
    for (const TokenId token : request.prompt) sequence->history[token].in_prompt = true;
  }
  if (request.drafting) drafts_.open(*sequence);
  sequence->statistics.prompt_tokens = prompt_tokens;
  sequence->submitted = Clock::now();
  sequence->request = std::move(request);

  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (closing_) throw EngineClosed("the engine is closed");
    if (!failure_.empty()) throw DeviceFailure(failure_);
    const bool overfull = queued_tokens_ > 0 && queued_tokens_ + prompt_tokens > options_.max_queued_tokens;
    if (overfull && !sequence->request.continues) {
      throw QueueFull("the queue holds " + std::to_string(queued_tokens_) + " prompt tokens and takes at most " +
                      std::to_string(options_.max_queued_tokens) + ": try again when requests have finished");
    }
    queued_tokens_ += prompt_tokens;
    id = sequence->id = next_id_++;
    commands_.emplace_back(Submit{std::move(sequence)});
  }
  wake_.notify_one();
  return id;
}

void Engine::cancel(RequestId id) { post(Cancel{id}); }
void Engine::pause(RequestId id) { post(Pause{id}); }
void Engine::resume(RequestId id) { post(Resume{id}); }
void Engine::close_conversation(ConversationId id) { post(CloseConversation{id}); }

ConversationId Engine::open_conversation() {
  const std::lock_guard lock(mutex_);
  if (closing_) throw EngineClosed("the engine is closed");
  const ConversationId id = next_id_++;
  commands_.emplace_back(OpenConversation{id});
  return id;  // wakes nobody: the engine thread has nothing to do for it before its first request
}

void Engine::post(Command command) {
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    commands_.push_back(std::move(command));
  }
  wake_.notify_one();
}

EngineStatistics Engine::statistics() const {
  const std::lock_guard lock(mutex_);
  EngineStatistics statistics = published_;
  statistics.queued_tokens = queued_tokens_;
  for (const Command& command : commands_) {
    if (std::holds_alternative<Submit>(command)) ++statistics.waiting;
    if (std::holds_alternative<OpenConversation>(command)) ++statistics.conversations;
  }
  return statistics;
}

std::string Engine::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

double Engine::step_seconds() const {
  const Clock::rep began = step_began_.load();
  return began == 0 ? 0.0 : seconds_since(Clock::time_point(Clock::duration(began)));
}

void Engine::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) {
    thread_.join();
    arena_.reset();  // the owner may keep the engine for its statistics
  }
  events_.close();
}

// --- the engine thread -------------------------------------------------------------------------------------------

void Engine::run() {
  const DefaultFloatingPoint environment;
  while (take_commands()) {
    step_began_.store(Clock::now().time_since_epoch().count());
    try {
      step();
    } catch (const DeviceFailure& error) {
      {
        const std::lock_guard lock(mutex_);
        failure_ = error.what();
      }
      abort_all(FinishReason::error, error.what());
    } catch (const std::exception& error) {
      // Memory has run out, or a call of the device's has failed. The callers hear of it and the engine goes on.
      abort_all(FinishReason::error, error.what());
    }
    step_began_.store(0);
    // Where a device computes by itself, the next step tells of this one: the device need not wait for that.
    if (!model_.backend().asynchronous() || scheduler_.idle()) publish();
  }
}

// Waits while there is nothing to do; false when the engine closes.
bool Engine::take_commands() {
  std::vector<Command> commands;
  bool closing = false;
  {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return closing_ || !commands_.empty() || !scheduler_.idle(); });
    commands.swap(commands_);
    closing = closing_;
  }
  for (Command& command : commands) {
    std::visit([this](auto& c) { execute(c); }, command);
  }
  if (closing) {
    abort_all(FinishReason::cancelled, "");
    parked_.clear();
    publish();
  }
  return !closing;
}

void Engine::execute(Submit& command) {
  ++totals_.requests;
  scheduler_.add(std::move(command.sequence));
}

void Engine::execute(const Cancel& command) { abort(command.id, FinishReason::cancelled, ""); }

void Engine::execute(const Pause& command) {
  if (Sequence* const sequence = scheduler_.pause(command.id)) release_queue_tokens(*sequence);
}

void Engine::execute(const Resume& command) { scheduler_.resume(command.id); }
void Engine::execute(const OpenConversation& command) { parked_.open_conversation(command.id); }
void Engine::execute(const CloseConversation& command) { parked_.close_conversation(command.id); }

// The loop of speculative decoding: plan, draft, verify in one pass of the target, accept.
void Engine::step() {
  const StepPlan* plan = nullptr;
  {
    const PhaseTimer timer(totals_.schedule_seconds);
    plan = &scheduler_.plan();
  }
  if (plan->sequences.empty()) {
    // submit() has made sure that each request fits alone, so this is not reached while any is left; if it were, one
    // request would have to end, for the loop to get on.
    if (!scheduler_.idle()) abort(scheduler_.ids().front(), FinishReason::error, "no KV memory for this request");
    return publish();
  }
  std::span<const ProposedDrafts> proposed;
  {
    const PhaseTimer timer(totals_.draft_seconds);
    proposed = drafts_.propose(*plan, totals_.steps);
  }
  {
    const PhaseTimer timer(totals_.schedule_seconds);
    batch_.assemble(*plan, proposed);
  }
  const StepRows rows = batch_.rows();
  const Clock::time_point start = Clock::now();
  model_.forward(rows, {static_cast<std::byte*>(arena_->data())});
  if (model_.backend().asynchronous()) publish();  // what the step before gave
  if (results_.size() < batch_.groups().size()) results_.resize(batch_.groups().size());
  model_.backend().begin_verify(batch_.groups());
  const double drafting = drafts_.settle();  // a device is at the target's pass meanwhile
  model_.backend().verify(batch_.groups(), std::span(results_).first(batch_.groups().size()));
  const double seconds = std::max(seconds_since(start) - drafting, 0.0);

  totals_.draft_seconds += drafting;
  totals_.target_seconds += seconds;
  ++totals_.steps;
  totals_.rows += static_cast<std::int64_t>(rows.tokens.size());
  totals_.prefill_rows += plan->prefill_rows;
  if (plan->prefill_rows == 0) drafts_.observe_step(static_cast<int>(rows.tokens.size()), seconds);
  const PhaseTimer timer(totals_.commit_seconds);
  commit(*plan);
}

// Accepts what was verified, advances the prompts, hands out events, frees what has ended.
void Engine::commit(const StepPlan& plan) {
  for (const PlannedSequence& planned : plan.sequences) {
    if (!planned.decides) planned.sequence->computed += planned.rows;
  }
  moves_.clear();
  for (std::size_t g = 0; g < batch_.groups().size(); ++g) {
    const std::size_t index = batch_.group_sequences()[g];
    Sequence& sequence = *plan.sequences[index].sequence;
    const std::vector<int>& path = results_[g].drafts;
    drafts_.observe(index, sequence, results_[g]);
    for (int d = 0; d < static_cast<int>(path.size()); ++d) {
      if (path[d] == d) continue;
      const std::int64_t first = sequence.length();
      moves_.push_back({{sequence.kv.table(0), sequence.kv.table(1)}, first + path[d], first + d});
    }
    sequence.target_row = batch_.groups()[g].first_output + (path.empty() ? 0 : path.back() + 1);
    sequence.target_step = totals_.steps;
    accept(sequence, results_[g]);
  }
  if (!moves_.empty()) model_.move_kv(moves_);
  ended_.clear();
  for (const PlannedSequence& planned : plan.sequences) {
    Sequence& sequence = *planned.sequence;
    kv_.commit(sequence.kv, std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed)));
    if (sequence.finish_reason != FinishReason::none) ended_.push_back(sequence.id);
  }
  for (const RequestId id : ended_) retire(id);
}

// Appends the chosen tokens up to the sequence's end and writes their event.
void Engine::accept(Sequence& sequence, const VerifyResult& result) {
  Event event;
  event.request_id = sequence.id;
  event.position = sequence.length();
  std::size_t kept = 0;
  while (kept < result.tokens.size() && sequence.finish_reason == FinishReason::none) {
    append(sequence, result.tokens[kept++]);
  }
  // The rows of the last known token and of the accepted drafts left valid K/V; the newest token has none yet.
  sequence.computed = sequence.length() - 1;
  ++sequence.statistics.steps;
  totals_.generated_tokens += static_cast<std::int64_t>(kept);

  const auto count = static_cast<std::ptrdiff_t>(kept);
  event.token_ids.assign(result.tokens.begin(), result.tokens.begin() + count);
  event.drafted.assign(kept, true);
  if (kept == result.tokens.size()) event.drafted.back() = false;  // the target's own
  const int logprobs = sequence.request.sampling.logprobs;
  if (logprobs >= 0) event.logprobs.assign(result.logprobs.begin(), result.logprobs.begin() + count);
  if (logprobs > 0) event.top_logprobs.assign(result.top.begin(), result.top.begin() + count);
  event.finish_reason = sequence.finish_reason;
  event.text_bytes = sequence.text_bytes;
  if (sequence.finish_reason != FinishReason::none) event.statistics = final_statistics(sequence);
  step_events_.push_back(std::move(event));
}

// Adds one token to the sequence and sees whether that ends it.
void Engine::append(Sequence& sequence, TokenId token) {
  if (sequence.generated() == 0) {
    sequence.first_token = Clock::now();
    release_queue_tokens(sequence);
  }
  sequence.tokens.push_back(token);
  if (sequence.request.sampling.needs_history()) ++sequence.history[token].in_output;

  const bool may_end = sequence.generated() >= sequence.request.min_tokens;
  if (may_end && std::binary_search(sequence.stop_tokens.begin(), sequence.stop_tokens.end(), token)) {
    sequence.finish_reason = FinishReason::stop;
  } else if (const auto text = sequence.stop_strings.push(token_bytes_[token], may_end)) {
    sequence.finish_reason = FinishReason::stop;
    sequence.text_bytes = *text;
  } else if (sequence.generated() == sequence.request.max_tokens) {
    sequence.finish_reason = FinishReason::length;
  }
}

// --- the end of a sequence ---------------------------------------------------------------------------------------

// Takes a sequence out whose last event has been written.
void Engine::retire(RequestId id) {
  if (scheduler_.remove(id)) ++totals_.finished;
}

// Ends a sequence before its time, with an event that says why. Ids that have ended already are ignored.
void Engine::abort(RequestId id, FinishReason reason, const std::string& error) {
  const std::unique_ptr<Sequence> sequence = scheduler_.remove(id);
  if (!sequence) return;
  ++totals_.finished;
  release_queue_tokens(*sequence);
  Event event;
  event.request_id = id;
  event.position = sequence->length();
  event.finish_reason = reason;
  event.error = error;
  event.statistics = final_statistics(*sequence);
  step_events_.push_back(std::move(event));
}

void Engine::abort_all(FinishReason reason, const std::string& error) {
  for (const RequestId id : scheduler_.ids()) abort(id, reason, error);
}

RequestStatistics Engine::final_statistics(const Sequence& sequence) const {
  RequestStatistics statistics = sequence.statistics;
  statistics.generated_tokens = sequence.generated();
  if (sequence.generated() > 0) {
    using Seconds = std::chrono::duration<double>;
    statistics.time_to_first_token_seconds = Seconds(sequence.first_token - sequence.submitted).count();
    statistics.decode_seconds = seconds_since(sequence.first_token);
  }
  return statistics;
}

// At the first token, or when the sequence ends or is paused before it.
void Engine::release_queue_tokens(Sequence& sequence) {
  if (!std::exchange(sequence.in_queue, false)) return;
  const std::lock_guard lock(mutex_);
  queued_tokens_ -= sequence.prompt_length();
}

// Hands out the events of a step, and its statistics.
void Engine::publish() {
  publish_statistics();
  events_.publish(step_events_);
}

void Engine::publish_statistics() {
  totals_.preemptions = scheduler_.preemptions();
  totals_.running = scheduler_.running();
  totals_.waiting = scheduler_.waiting();
  totals_.paused = scheduler_.paused();
  totals_.conversations = parked_.conversations();
  totals_.kv = kv_.use();
  totals_.parked_bytes = parked_.bytes();
  static_cast<DraftCounts&>(totals_) = drafts_.totals();
  drafts_.report(totals_.drafters);
  const std::lock_guard lock(mutex_);
  published_ = totals_;
}

}  // namespace draftwerk
