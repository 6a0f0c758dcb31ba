// What an engine takes of a device's memory, and requests that there is too little of it for at once.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "gate.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

TEST(EngineMemory, IsGivenBackWhenTheEngineCloses) {
  testing::TinyModel tiny(WeightType::bf16);
  const EngineOptions options = testing::small_options();
  const std::size_t before = emulation::allocated_bytes();
  Engine engine(tiny.model(), options, {}, {});
  EXPECT_GT(emulation::allocated_bytes(), before + testing::kPlenty * 9 / 10);
  testing::run(engine, testing::make_request(testing::random_tokens(5, 1), 3));
  engine.close();
  EXPECT_LT(emulation::allocated_bytes(), before + testing::kPlenty / 10);
  EXPECT_EQ(engine.statistics().generated_tokens, 3);
}

TEST(EngineMemory, PreemptedRequestsAreComputedAnewToTheSameTokens) {
  testing::SmallModel small;
  EngineOptions options;
  options.prefix_cache = false;
  options.kv_memory_bytes = 10 * testing::SmallModel::kPage;  // of 7 that each takes in the end
  testing::Gate gate(1);
  Engine engine(small.model(), options, gate.drafter(), {});
  std::vector<Request> requests;
  std::vector<RequestId> ids;
  for (unsigned i = 0; i < 2; ++i) {
    requests.push_back(testing::make_request(testing::random_tokens(20, i), 30, i));
    ids.push_back(engine.submit(requests.back()));
    gate.wait_until_held();
  }
  gate.let_pass();
  auto outcomes = testing::collect(engine, ids);
  testing::Reference reference;
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(outcomes[ids[i]].token_ids, reference(requests[i]));
  EXPECT_GT(engine.statistics().preemptions, 0);
  testing::expect_nothing_left(engine);
}

}  // namespace
}  // namespace draftwerk
