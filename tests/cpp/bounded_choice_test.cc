#include "backend/cpu/bounded_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "backend/cpu/packing.h"
#include "backend/reference_sampler.h"
#include "sampler_fixture.h"

namespace draftwerk::cpu {
namespace {

using testing::chance;
using testing::draw;
using testing::fill_logits;
using testing::pick;
using testing::Random;
using testing::Rows;

// A row of bounds of known logits, which keeps count of what it is asked for.
class Bounds final : public PanelSource {
 public:
  Bounds(std::vector<float> logits, const std::vector<float>& slack)
      : logits_(std::move(logits)), rows_(1, static_cast<int>(logits_.size())) {
    for (std::size_t i = 0; i < logits_.size(); ++i) rows_.values[i] = logits_[i] + slack[i];
    view_ = rows_.view();
  }
  void compute(std::span<const std::int32_t> panels) override {
    for (const std::int32_t panel : panels) {
      EXPECT_TRUE(computed_.insert(panel).second) << "panel " << panel << " is known";
      const std::size_t first = static_cast<std::size_t>(panel) * kPanel;
      const std::size_t last = std::min(first + kPanel, logits_.size());
      std::copy(logits_.data() + first, logits_.data() + last, view_.values + first);
    }
  }
  [[nodiscard]] BoundedRow row() const { return {view_.values, view_.chunk_max}; }
  [[nodiscard]] std::size_t computed() const { return computed_.size(); }

 private:
  std::vector<float> logits_;
  Rows rows_;
  cpu::LogitRows view_;
  std::set<std::int32_t> computed_;
};

// How far bounds are off, one way or another.
std::vector<float> random_slack(Random& random, int vocabulary) {
  std::vector<float> slack(static_cast<std::size_t>(vocabulary), 0.0F);
  const float most = chance(random, 0.3) ? 0.01F : draw(random, 0.1F, 12.0F);
  const int kind = pick(random, 0, 3);
  for (float& one : slack) {
    if (kind == 0) one = most;
    if (kind == 1) one = draw(random, 0.0F, most);
    if (kind == 2 && chance(random, 0.1)) one = most;
  }
  return slack;
}

SamplingParams random_bounded_sampling(Random& random, int vocabulary) {
  SamplingParams sampling;
  constexpr float kTemperatures[] = {0.0F, 0.001F, 0.3F, 0.7F, 1.0F, 1.0F, 1.5F, 4.0F, 100.0F};
  sampling.temperature = kTemperatures[pick(random, 0, 8)];
  constexpr int kTopKs[] = {1, 2, 20, 64, 256};
  sampling.top_k = std::min(kTopKs[pick(random, 0, 4)], vocabulary - 1);
  if (chance(random, 0.7)) {
    const float choices[] = {1e-6F, 0.1F, 0.5F, 0.95F, 0.95F, 0.999F, draw(random, 0.001F, 1.0F)};
    sampling.top_p = choices[pick(random, 0, 6)];
  }
  if (chance(random, 0.3)) {
    const float choices[] = {1e-6F, 0.05F, 0.5F, 1.0F};
    sampling.min_p = choices[pick(random, 0, 3)];
  }
  sampling.seed = random();
  return sampling;
}

class BoundedChoices : public ::testing::TestWithParam<Isa> {
 protected:
  const SamplerKernels& kernels_ = sampler_kernels(GetParam());
  Random random_{1};
};

TEST_P(BoundedChoices, AreThoseOfAllLogits) {
  int chosen = 0;
  constexpr int kRounds = 3000;
  for (int round = 0; round < kRounds; ++round) {
    const int vocabulary = pick(random_, 2, 3000);
    std::vector<float> logits(static_cast<std::size_t>(vocabulary));
    fill_logits(random_, logits.data(), vocabulary);
    const SamplingParams sampling = random_bounded_sampling(random_, vocabulary);
    const std::int64_t position = pick(random_, 0, 1000);
    Bounds bounds(logits, random_slack(random_, vocabulary));
    BoundedChoice choice(kernels_, vocabulary);
    const auto got = choice.choose(bounds.row(), sampling, {sampling.seed, position}, bounds);
    if (!got) continue;  // there may be nothing to choose from
    ++chosen;
    ASSERT_EQ(*got, reference_choose(logits, sampling, position, {}, {}).token)
        << "round " << round << ", temperature " << sampling.temperature << ", top_k " << sampling.top_k << ", top_p "
        << sampling.top_p << ", min_p " << sampling.min_p << ", vocabulary " << vocabulary;
  }
  EXPECT_GT(chosen, kRounds / 2);
}

// The flatter the distribution, the more tokens have to be known before it is certain that top_k and top_p keep one.
TEST_P(BoundedChoices, AreThoseOfFlatDistributions) {
  for (int round = 0; round < 2000; ++round) {
    const int vocabulary = 2000;
    std::vector<float> logits(vocabulary);
    const float width = draw(random_, 0.5F, 4.0F);
    for (float& logit : logits) logit = draw(random_, -width, width);
    std::vector<float> slack(vocabulary);
    for (float& one : slack) one = draw(random_, 0.0F, 0.3F);
    SamplingParams sampling;
    sampling.temperature = draw(random_, 0.5F, 2.0F);
    sampling.top_k = pick(random_, 2, 64);
    sampling.top_p = draw(random_, 0.3F, 1.0F);
    sampling.min_p = chance(random_, 0.3) ? draw(random_, 0.0F, 1.0F) : 0.0F;
    sampling.seed = random_();
    Bounds bounds(logits, slack);
    BoundedChoice choice(kernels_, vocabulary);
    const auto got = choice.choose(bounds.row(), sampling, {sampling.seed, 5}, bounds);
    ASSERT_TRUE(got.has_value());
    ASSERT_EQ(*got, reference_choose(logits, sampling, 5, {}, {}).token) << "round " << round;
  }
}

TEST_P(BoundedChoices, TakeRowAfterRowAndFewPanels) {
  constexpr int kVocabulary = 100'000;
  BoundedChoice choice(kernels_, kVocabulary);
  std::size_t computed = 0;
  for (int round = 0; round < 20; ++round) {
    std::vector<float> logits(kVocabulary);
    std::normal_distribution<float> normal(0.0F, 3.0F);
    for (float& logit : logits) logit = normal(random_);
    logits[static_cast<std::size_t>(pick(random_, 0, kVocabulary - 1))] = 25.0F;
    SamplingParams sampling;
    sampling.temperature = round % 2 == 0 ? 0.0F : 1.0F;
    sampling.top_k = 64;
    sampling.top_p = 0.95F;
    sampling.seed = random_();
    Bounds bounds(logits, std::vector<float>(kVocabulary, 5.0F));
    const auto got = choice.choose(bounds.row(), sampling, {sampling.seed, 5}, bounds);
    ASSERT_TRUE(got.has_value());
    EXPECT_EQ(*got, reference_choose(logits, sampling, 5, {}, {}).token);
    EXPECT_EQ(static_cast<std::size_t>(choice.panels()), bounds.computed());
    computed += bounds.computed();
  }
  // Of 125,000; the first 64 of the sampled ones, and what little might be more.
  EXPECT_LT(computed, 2000U);
}

TEST_P(BoundedChoices, AreNotMadeOfTooMuch) {
  constexpr int kVocabulary = 100'000;  // more than can be known
  std::vector<float> logits(kVocabulary, 1.0F);
  for (const float temperature : {0.0F, 1.0F}) {
    SamplingParams sampling;
    sampling.temperature = temperature;
    sampling.top_k = 64;
    Bounds bounds(logits, std::vector<float>(kVocabulary, 1.0F));
    BoundedChoice choice(kernels_, kVocabulary);
    EXPECT_FALSE(choice.choose(bounds.row(), sampling, {1, 5}, bounds).has_value());
    // The next row is not affected.
    std::vector<float> one = logits;
    one[77'777] = 20.0F;
    Bounds others(one, std::vector<float>(kVocabulary, 1.0F));
    EXPECT_EQ(choice.choose(others.row(), sampling, {1, 5}, others), 77'777);
  }
}

TEST_P(BoundedChoices, AreNotMadeOfWhatIsNoBound) {
  const std::vector<float> logits = {1.0F, 3.0F, 2.0F};
  for (const float slack : {NAN, testing::kInfinity, -testing::kInfinity}) {
    for (const float temperature : {0.0F, 1.0F}) {
      SamplingParams sampling;
      sampling.temperature = temperature;
      sampling.top_k = 2;
      Bounds bounds(logits, std::vector<float>(logits.size(), slack));
      BoundedChoice choice(kernels_, 3);
      EXPECT_FALSE(choice.choose(bounds.row(), sampling, {1, 5}, bounds).has_value()) << slack;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, BoundedChoices, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace draftwerk::cpu
