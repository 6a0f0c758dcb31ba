// Engines on small models of each kind of Gemma 4, with their MTP drafters.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/evaluation.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::collect;
using testing::Outcome;
using testing::run_all;
using testing::TinyModel;

enum class Kind : std::uint8_t { gemma3, edge, dense, experts };

constexpr const char* kKindNames[] = {"gemma3", "edge", "dense", "experts"};

ModelConfig config_of(Kind kind) {
  switch (kind) {
    case Kind::edge:
      return testing::tiny_edge_config();
    case Kind::dense:
      return testing::tiny_dense_config();
    case Kind::experts:
      return testing::tiny_experts_config();
    case Kind::gemma3:
      break;
  }
  return testing::tiny_config();
}

/// Prompts shorter and longer than the window, some sharing a prefix, under alternating sampling parameters.
std::vector<Request> requests() {
  std::mt19937 random(5);
  std::vector<Request> all;
  const std::vector<TokenId> shared = testing::random_prompt(random, 45, 300);
  const bool few = !testing::test_backend_is_cpu();
  for (int i = 0; i < (few ? 4 : 6); ++i) {
    Request request;
    if (i % 2 == 0) request.prompt = shared;
    const auto tail = testing::random_prompt(random, 1 + 13 * i, 300);
    request.prompt.insert(request.prompt.end(), tail.begin(), tail.end());
    request.max_tokens = !few ? 24 + i : i % 2 == 0 ? 12 : 4;
    request.sampling.seed = static_cast<std::uint64_t>(i) * 77U;
    if (i % 3 == 1) {
      request.sampling.temperature = 0.8F;
      request.sampling.top_k = 20;
      request.sampling.top_p = 0.95F;
    }
    if (i % 3 == 2) request.sampling.repetition_penalty = 1.3F;
    // Few tokens to choose from, and noise that says more than the logits: target and drafter, both random, often
    // agree.
    if (i % 2 == 0) {
      request.sampling.temperature = 20.0F;
      request.sampling.logit_bias = {{5, 600.0F}, {9, 600.0F}, {17, 600.0F}};
    }
    all.push_back(request);
  }
  return all;
}

/// The specification: one request at a time, nothing drafted, nothing cached, one thread.
std::vector<std::vector<TokenId>> expected_tokens(Kind kind, WeightType type) {
  TinyModel tiny(type, 1, 128, config_of(kind));
  EngineOptions options = testing::small_options();
  options.prefix_cache = false;
  Engine engine(tiny.model(), options, {}, {});
  std::vector<std::vector<TokenId>> expected;
  for (const Request& request : requests()) expected.push_back(run_all(engine, {request}).front());
  return expected;
}

struct Variant {
  const char* drafters;
  int clusters;
  int draft_vocabulary;
  int draft_length;
  int prefill_chunk;
  int threads;
  int max_sequences;
};

class Gemma4Promise : public ::testing::TestWithParam<std::tuple<Kind, WeightType, Variant>> {};

TEST_P(Gemma4Promise, TokensDoNotDependOnHowTheyAreComputed) {
  const auto& [kind, type, variant] = GetParam();
  static std::map<std::pair<Kind, WeightType>, std::vector<std::vector<TokenId>>> expected;
  auto& tokens = expected[{kind, type}];
  if (tokens.empty()) tokens = expected_tokens(kind, type);

  TinyModel tiny(type, variant.threads, 128, config_of(kind));
  EngineOptions options = testing::small_options();
  options.draft_length = variant.draft_length;
  options.prefill_chunk = variant.prefill_chunk;
  options.max_sequences = variant.max_sequences;
  Engine engine(tiny.model(), options, tiny.drafters(variant.drafters, variant.clusters, variant.draft_vocabulary), {});
  EXPECT_EQ(run_all(engine, requests()), tokens);
  EXPECT_EQ(run_all(engine, requests()), tokens) << "with a warm prefix cache";
  // Few clusters of few tokens seldom hold what the target chooses: of few texts nothing may be accepted.
  const bool seldom = variant.clusters > 0 && variant.draft_vocabulary > 0 && !testing::test_backend_is_cpu();
  if (variant.draft_length > 0 && !seldom) {
    EXPECT_GT(engine.statistics().accepted, 0);
  }
}

/// Beside the processor, those of Gemma 4 alone.
std::vector<Kind> kinds() {
  if (!testing::test_backend_is_cpu()) return {Kind::edge, Kind::dense, Kind::experts};
  return {Kind::gemma3, Kind::edge, Kind::dense, Kind::experts};
}

std::string name_of(const ::testing::TestParamInfo<Gemma4Promise::ParamType>& tested) {
  const auto& [kind, type, variant] = tested.param;
  std::string name = std::string(kKindNames[static_cast<int>(kind)]) + "_" + weight_type_name(type) + "_" +
                     variant.drafters + "_" + std::to_string(variant.clusters) + "_clusters_of_" +
                     std::to_string(variant.draft_vocabulary);
  std::ranges::replace(name, '+', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(
    Variants, Gemma4Promise,
    ::testing::Combine(::testing::ValuesIn(kinds()), ::testing::Values(WeightType::f32, WeightType::q8_0),
                       ::testing::Values(Variant{"none", 0, 0, -1, 7, 2, 16}, Variant{"mtp", 0, 0, 3, 64, 2, 16},
                                         Variant{"mtp", 60, 0, 8, 16, 1, 3}, Variant{"mtp", 0, 150, 4, 64, 2, 16},
                                         Variant{"mtp", 40, 280, 8, 16, 1, 3},
                                         Variant{"mtp+lookup", 60, 0, -1, 64, 2, 16},
                                         Variant{"random", 0, 0, 4, 33, 2, 16})),
    name_of);

TEST(MtpDrafter, DraftsDoNotDependOnTheSequencesBesideIt) {
  for (const auto& [clusters, draft_vocabulary] : {std::pair(0, 0), {60, 0}, {0, 150}, {25, 150}}) {
    TinyModel tiny(WeightType::q8_0, 2, 128, testing::tiny_edge_config());
    MtpModel& mtp = tiny.mtp(clusters, draft_vocabulary);
    const Request request = requests()[1];
    const std::vector<TokenId> alone = draft(mtp, request.prompt, 5, request.sampling, 0).tokens;
    EXPECT_EQ(draft(mtp, request.prompt, 5, request.sampling, 3).tokens, alone) << "prompt in chunks";
    const std::vector<TokenId> fewer = draft(mtp, request.prompt, 2, request.sampling, 0).tokens;
    EXPECT_EQ(fewer, std::vector<TokenId>(alone.begin(), alone.begin() + 2));
  }
}

// Whatever was accepted before, and wherever in a tree, the engine's rounds begin as the same text's do from scratch.
TEST(MtpDrafter, ReadsTheStateOfTheRowThatChoseTheToken) {
  const bool few = !testing::test_backend_is_cpu();
  for (const int drafts : few ? std::vector{4} : std::vector{1, 4, 8}) {
    TinyModel tiny(WeightType::f32, 1, 128, testing::tiny_edge_config());
    EngineOptions options = testing::small_options();
    options.draft_length = drafts;
    Engine engine(tiny.model(), options, tiny.drafters("mtp"), {});
    Request request = requests()[0];
    request.max_tokens = few ? 20 : 60;
    const RequestId id = engine.submit(request);
    const Outcome outcome = collect(engine, {id})[id];
    engine.close();
    // The same rounds, one by one, outside of the engine; of a tree, its likeliest first draft.
    std::vector<TokenId> text = request.prompt;
    std::size_t done = 0;
    int agreed = 0;
    text.push_back(outcome.token_ids[done++]);
    while (done < outcome.token_ids.size()) {
      const bool may_draft = done + 1 < outcome.token_ids.size();
      const bool right =
          may_draft && draft(tiny.mtp(), text, 1, request.sampling, 0).tokens[0] == outcome.token_ids[done];
      if (right || drafts == 1) {
        EXPECT_EQ(outcome.drafted[done], right) << "token " << done << ", drafts " << drafts;
      }
      agreed += right ? 1 : 0;
      while (outcome.drafted[done]) text.push_back(outcome.token_ids[done++]);
      text.push_back(outcome.token_ids[done++]);
    }
    EXPECT_GT(agreed, few ? 1 : 5);
    EXPECT_GE(outcome.statistics.accepted, agreed);
    EXPECT_LT(outcome.statistics.accepted, outcome.statistics.drafted);
  }
}

TEST(MtpDrafter, IsRefusedIfItDoesNotFit) {
  TinyModel tiny(WeightType::f32, 1, 16, testing::tiny_edge_config());
  auto backend = testing::make_test_backend(1);
  Weights weights(*backend);
  const auto message = [&](const MtpConfig& config) -> std::string {
    try {
      const MtpModel model(tiny.model(), config, weights);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const MtpConfig fitting = testing::tiny_mtp_config(tiny.model().config(), 0);
  MtpConfig config = fitting;
  config.target_hidden = 80;
  EXPECT_EQ(message(config),
            "the drafter does not fit the target: the target's hidden size is 80 in the drafter and 64 in the target");
  config = fitting;
  config.text.vocabulary = 301;
  EXPECT_EQ(message(config),
            "the drafter does not fit the target: the vocabulary size is 301 in the drafter and 300 in the target");
  config = fitting;
  config.text.layers[1].head_dim = 128;
  EXPECT_EQ(message(config),
            "the drafter does not fit the target: the head size of full layers is 128 in the drafter and 64 in the "
            "target");
  config = fitting;
  config.text.layers[0].kv_heads = 4;
  EXPECT_EQ(message(config),
            "the drafter does not fit the target: the number of key-value heads of sliding layers is 4 in the drafter "
            "and 2 in the target");
  config = fitting;
  config.text.window = 25;
  EXPECT_EQ(message(config),
            "the drafter does not fit the target: the sliding window is 25 in the drafter and 24 in the target");
}

TEST(MtpDrafter, NamesWhatIsWrongWithItsHead) {
  TinyModel tiny(WeightType::f32, 1, 16);
  const auto message = [&](MtpConfig config, const std::vector<std::int32_t>& tokens) -> std::string {
    Weights weights(tiny.model().backend());
    MtpConfig made = config;
    made.draft_vocabulary = 0;  // the other tensors, and a head of its own
    made.clusters = 0;
    testing::TensorMaker(weights, WeightType::f32, 8).drafter(made);
    if (!tokens.empty()) weights.set_indices("draft_token_ids", tokens);
    try {
      const MtpModel model(tiny.model(), std::move(config), weights);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const MtpConfig fitting = testing::tiny_mtp_config(tiny.model().config(), 0);
  EXPECT_EQ(message(fitting, {}), "");
  MtpConfig config = fitting;
  config.draft_vocabulary = 301;
  EXPECT_EQ(message(config, {}), "model config: draft_vocab_size is 301, must be 0 to 300");
  config.draft_vocabulary = 100;
  EXPECT_EQ(message(config, {}), "tensor lm_head.weight has shape [300, 32], the config asks for [100, 64]");
  config.clusters = 7;
  config.chosen_clusters = 1;
  EXPECT_EQ(message(config, {}), "model config: draft_vocab_size (100) is not a multiple of num_centroids (7)");
  config.draft_vocabulary = 0;
  EXPECT_EQ(message(config, {}), "model config: vocab_size (300) is not a multiple of num_centroids (7)");
}

TEST(MtpDrafter, TakesNothingFromTheKvBudget) {
  TinyModel tiny(WeightType::f32, 1, 128, testing::tiny_edge_config());
  const KvPageShape before = tiny.model().kv_page_shape();
  tiny.mtp();
  const KvPageShape after = tiny.model().kv_page_shape();
  for (int t = 0; t < kPageTables; ++t) EXPECT_EQ(before.page_bytes[t], after.page_bytes[t]);
  // Two of three sliding layers own K/V of 2 heads of 32, two of three full ones of 1 head of 64: the last two share.
  EXPECT_EQ(before.page_bytes[0], 2U * 2 * 2 * 32 * kPageSize * sizeof(float));
  EXPECT_EQ(before.page_bytes[1], 2U * 2 * 1 * 64 * kPageSize * sizeof(float));
}

}  // namespace
}  // namespace draftwerk
