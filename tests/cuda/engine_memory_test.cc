// What an engine takes of a device's memory.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

TEST(EngineMemory, IsGivenBackWhenTheEngineCloses) {
  testing::TinyModel tiny(WeightType::bf16);
  EngineOptions options;
  options.kv_memory_bytes = testing::kPlenty;
  const std::size_t before = emulation::allocated_bytes();
  Engine engine(tiny.model(), options, {}, {});
  EXPECT_GT(emulation::allocated_bytes(), before + testing::kPlenty * 9 / 10);
  testing::run(engine, testing::make_request(testing::random_tokens(5, 1), 3));
  engine.close();
  EXPECT_LT(emulation::allocated_bytes(), before + testing::kPlenty / 10);
  EXPECT_EQ(engine.statistics().generated_tokens, 3);
}

}  // namespace
}  // namespace draftwerk
