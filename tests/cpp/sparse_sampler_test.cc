// Choosing among the tokens of a sparse head against the specification (reference_sampler) on the whole row.
#include "backend/cpu/sparse_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/worker_pool.h"
#include "backend/reference_sampler.h"
#include "sparse_place.h"

namespace draftwerk {
namespace {

using cpu::Isa;
using cpu::SparseLogitRows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class SparseSamplerOnIsa : public ::testing::TestWithParam<Isa> {
 protected:
  int below(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }

  /// Chooses `count` candidates from `values`, those of `tokens` in a vocabulary, and from the row that they stand for.
  void expect_reference(int vocabulary, const std::vector<std::int32_t>& tokens, const std::vector<float>& values,
                        const ProposeRow& row, int count, const std::string& what) {
    std::vector<float> whole(static_cast<std::size_t>(vocabulary), -kInfinity);
    std::vector<std::int32_t> row_of(whole.size(), -1);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      whole[static_cast<std::size_t>(tokens[i])] = values[i];
      row_of[static_cast<std::size_t>(tokens[i])] = static_cast<std::int32_t>(i);
    }
    const std::vector<Candidate> want = reference_propose(whole, row, count);
    std::vector<float> overwritten = values;
    const SparseLogitRows logits{.values = overwritten.data(),
                                 .stride = static_cast<std::int64_t>(values.size()),
                                 .tokens = tokens.data(),
                                 .count = static_cast<int>(tokens.size()),
                                 .row_of = row_of.data(),
                                 .vocabulary = vocabulary};
    std::vector<Candidate> candidates(want.size());
    propose_sparse(cpu::sampler_kernels(GetParam()), logits, std::span(&row, 1), count, candidates, pool_);
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(candidates[i].token, want[i].token) << what << " candidate " << i;
      ASSERT_EQ(candidates[i].value, want[i].value) << what << " candidate " << i;
    }
  }

  std::vector<std::int32_t> some_tokens(int vocabulary, int count) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(vocabulary));
    std::iota(tokens.begin(), tokens.end(), 0);
    std::shuffle(tokens.begin(), tokens.end(), random_);
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }

  std::mt19937 random_{11};
  cpu::WorkerPool pool_{1};
};

TEST_P(SparseSamplerOnIsa, ChoosesWhatTheSpecificationChooses) {
  constexpr int kVocabulary = 700;
  for (int trial = 0; trial < 3000; ++trial) {
    const int count = 1 + below(trial % 3 == 0 ? 20 : 600);
    const std::vector<std::int32_t> tokens = some_tokens(kVocabulary, count);
    // Of few values, so that many are equal; some of them no numbers at all.
    const bool equals = trial % 2 == 0;
    std::vector<float> values(tokens.size());
    std::normal_distribution<float> normal(0.0F, 3.0F);
    for (float& v : values) v = equals ? static_cast<float>(below(4)) : normal(random_);
    if (trial % 5 == 0) {
      for (float& v : values) {
        if (below(6) == 0)
          v = std::vector{-kInfinity, kInfinity, std::numeric_limits<float>::quiet_NaN()}[random_() % 3];
      }
    }
    const testing::SparsePlace place(random_, kVocabulary, count, trial * 7);
    expect_reference(kVocabulary, tokens, values, place.row(), 1 + below(8), "trial " + std::to_string(trial));
    if (HasFatalFailure()) return;
  }
}

TEST_P(SparseSamplerOnIsa, ChoosesAmongManyAsTheSpecificationDoes) {
  constexpr int kVocabulary = 40000;
  for (int trial = 0; trial < 12; ++trial) {
    const std::vector<std::int32_t> tokens = some_tokens(kVocabulary, 16384);
    std::vector<float> values(tokens.size());
    std::normal_distribution<float> normal(0.0F, 4.0F);
    for (float& v : values) v = normal(random_);
    SamplingParams sampling;
    sampling.temperature = trial % 4 == 0 ? 0.0F : 1.0F;
    sampling.top_k = trial % 3 == 0 ? 0 : trial % 3 == 1 ? 64 : 5000;
    sampling.top_p = trial % 2 == 0 ? 1.0F : 0.95F;
    sampling.seed = random_();
    const ProposeRow row{{}, trial, &sampling, nullptr, {}, 0};
    expect_reference(kVocabulary, tokens, values, row, 1 + trial % 5, "trial " + std::to_string(trial));
  }
}

TEST_P(SparseSamplerOnIsa, NoFiniteLogitGivesTokenZero) {
  for (const float nothing : {-kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const float temperature : {0.0F, 1.0F}) {
      SamplingParams sampling;
      sampling.temperature = temperature;
      sampling.top_k = 5;
      sampling.top_p = 0.9F;
      const ProposeRow row{{}, 3, &sampling, nullptr, {}, 0};
      expect_reference(100, some_tokens(100, 30), std::vector<float>(30, nothing), row, 2, "nothing");
    }
  }
}

TEST_P(SparseSamplerOnIsa, FindsTheLogitsOfChosenClusters) {
  // Rows 0 .. 11 of the head in clusters of three, of which a row of the step has two.
  const std::vector<std::int32_t> head_tokens = {7, 1, 9, 0, 4, 2, 15, 12, 3, 8, 11, 6};
  std::vector<std::int32_t> row_of(16, -1);
  for (std::size_t i = 0; i < head_tokens.size(); ++i) {
    row_of[static_cast<std::size_t>(head_tokens[i])] = static_cast<std::int32_t>(i);
  }
  const std::vector<std::int32_t> chosen = {0, 3, 1, 2};
  std::vector<std::int32_t> tokens = {7, 1, 9, 8, 11, 6, -1, 0, 4, 2, 15, 12, 3, -1};
  std::vector<float> values(14);
  const SparseLogitRows logits{.values = values.data(),
                               .stride = 7,
                               .tokens = tokens.data(),
                               .token_stride = 7,
                               .count = 6,
                               .row_of = row_of.data(),
                               .vocabulary = 16,
                               .chosen = chosen.data(),
                               .clusters = 2,
                               .cluster_size = 3};
  for (int output = 0; output < 2; ++output) {
    for (TokenId token = -2; token < 20; ++token) {
      const auto* first = logits.tokens_of(output);
      const auto* at = std::find(first, first + 6, token);
      EXPECT_EQ(logits.find(output, token), at == first + 6 ? nullptr : logits.values_of(output) + (at - first))
          << token;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SparseSamplerOnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::isa_name(info.param)); });

}  // namespace
}  // namespace draftwerk
