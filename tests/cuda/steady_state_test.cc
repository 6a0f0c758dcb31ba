// What steps do not do: allocate, or divide a multiprocessor's memory anew.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "drafting/mtp.h"
#include "engine/engine.h"
#include "reference_engine.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

std::vector<Request> some_requests(unsigned first_seed) {
  std::vector<Request> requests;
  for (unsigned i = 0; i < 2; ++i) {
    requests.push_back(testing::make_request(testing::random_tokens(8, first_seed + i), 6, first_seed + i));
    requests.back().ignore_eos = true;
  }
  return requests;
}

class SteadyState : public ::testing::TestWithParam<std::pair<int, int>> {};

TEST_P(SteadyState, AllocatesNothing) {
  const auto [clusters, draft_vocabulary] = GetParam();
  testing::TinyModel tiny(WeightType::bf16);
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(make_mtp_drafter(tiny.mtp(clusters, draft_vocabulary)));
  EngineOptions options = testing::small_options();
  options.draft_length = 3;
  Engine engine(tiny.model(), options, std::move(drafters), {});
  // What grows with what is asked of a step, penalties for instance, has its size after the first requests.
  testing::run_all(engine, some_requests(1));
  const std::int64_t before = emulation::allocations();
  testing::run_all(engine, some_requests(11));
  EXPECT_GT(engine.statistics().drafted, 0);
  EXPECT_EQ(emulation::allocations(), before);
}

TEST_P(SteadyState, FirstDraftsAllocateNothing) {
  const auto [clusters, draft_vocabulary] = GetParam();
  testing::TinyModel tiny(WeightType::bf16);
  MtpModel& mtp = tiny.mtp(clusters, draft_vocabulary);
  const auto allocated_by = [&](bool drafting) {
    std::vector<std::unique_ptr<Drafter>> drafters;
    if (drafting) drafters.push_back(make_mtp_drafter(mtp));
    EngineOptions options = testing::small_options();
    options.draft_length = 3;
    Engine engine(tiny.model(), options, std::move(drafters), {});
    const std::int64_t before = emulation::allocations();
    testing::run_all(engine, some_requests(1));
    return emulation::allocations() - before;
  };
  static_cast<void>(allocated_by(false));
  EXPECT_EQ(allocated_by(true), 0);
}

INSTANTIATE_TEST_SUITE_P(Heads, SteadyState, ::testing::Values(std::pair{0, 0}, std::pair{10, 0}, std::pair{8, 128}),
                         [](const auto& tested) {
                           return std::to_string(tested.param.first) + "_clusters_of_" +
                                  std::to_string(tested.param.second);
                         });

TEST(SharedMemory, IsWhatEveryKernelPrefers) {
  const std::int64_t before = emulation::launches_that_prefer_cache();
  testing::TinyModel tiny(WeightType::bf16);
  Engine engine(tiny.model(), testing::small_options(), {}, {});
  testing::run_all(engine, some_requests(1));
  EXPECT_EQ(emulation::launches_that_prefer_cache(), before);
}

}  // namespace
}  // namespace draftwerk
