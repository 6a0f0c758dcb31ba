// Passes allocate nothing once they have run: memory is reserved when a model is made.
#include <gtest/gtest.h>

#include "allocation_count.h"
#include "engine/evaluation.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

using testing::allocations;
using testing::TinyModel;

template <typename Work>
std::int64_t allocations_of(const Work& work) {
  const std::int64_t before = allocations();
  work();
  return allocations() - before;
}

class Allocations : public ::testing::TestWithParam<std::tuple<ModelConfig (*)(), WeightType>> {
 protected:
  void SetUp() override {
    if (!testing::kCountsAllocations) GTEST_SKIP() << "a sanitizer owns the operators";
  }
  static constexpr int kThreads = 2;
  static constexpr int kRows = 40;  // more than the window: pages of both kinds
};

TEST_P(Allocations, APassOfTheTargetMakesNone) {
  const auto& [config, type] = GetParam();
  TinyModel tiny(type, kThreads, 64, config());
  const std::vector<TokenId> text = written_text(tiny.model());
  for (const bool screened : {false, true}) {
    if (screened) tiny.model().screen_head();
    for (const int rows : {1, 4, kRows}) {
      const auto passes = [&](int repeats) {
        return allocations_of([&] { time_passes(tiny.model(), text, rows, repeats, 50); });
      };
      passes(2);
      const std::int64_t few = passes(2);
      EXPECT_GT(few, 0);  // what surrounds the passes
      EXPECT_EQ(passes(12), few) << rows << " rows";
    }
  }
}

TEST_P(Allocations, ARoundOfDraftsMakesNone) {
  const auto& [config, type] = GetParam();
  for (const auto& [clusters, draft_vocabulary] : {std::pair(0, 0), {10, 0}, {0, 150}, {10, 150}}) {
    TinyModel tiny(type, kThreads, 64, config());
    MtpModel& mtp = tiny.mtp(clusters, draft_vocabulary);
    const std::vector<TokenId> text = written_text(tiny.model());
    for (const int sequences : {1, 5}) {
      const auto rounds = [&](int repeats) {
        return allocations_of([&] { time_drafts(mtp, text, sequences, 6, repeats, 50); });
      };
      // The drafter that makes the rounds is made anew, and takes what it needs in its first one.
      rounds(2);
      EXPECT_EQ(rounds(12), rounds(2)) << sequences << " sequences, " << clusters << " clusters, " << draft_vocabulary
                                       << " tokens";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryKind, Allocations,
                         ::testing::Combine(::testing::Values(&testing::tiny_config, &testing::tiny_edge_config,
                                                              &testing::tiny_dense_config,
                                                              &testing::tiny_experts_config),
                                            ::testing::Values(WeightType::f32, WeightType::bf16, WeightType::q8_0)));

}  // namespace
}  // namespace draftwerk
