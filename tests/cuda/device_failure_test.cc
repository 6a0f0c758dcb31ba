// A device that fails ends what runs on it with its error, and the engine takes no more; memory that runs out does not.
#include <gtest/gtest.h>

#include <string>

#include "backend/cuda/error.h"
#include "backend/cuda/handles.h"
#include "engine/engine.h"
#include "reference_engine.h"

namespace draftwerk {
namespace {

using testing::collect;
using testing::make_request;
using testing::random_tokens;
using testing::TinyModel;

class DeviceFailureTest : public ::testing::Test {
 protected:
  ~DeviceFailureTest() override { emulation::reset(); }
};

TEST_F(DeviceFailureTest, AnErrorAfterWhichTheDeviceWorksIsNone) {
  emulation::set_device_memory(emulation::allocated_bytes() + 4096);
  EXPECT_THROW(cuda::DeviceMemory::of(std::size_t{1} << 20), std::bad_alloc);
  EXPECT_THROW(cuda::check(cudaErrorInvalidValue, "asking"), cuda::CudaError);
}

TEST_F(DeviceFailureTest, AnErrorAfterWhichTheDeviceWorksEndsWhatRunsAlone) {
  TinyModel tiny(WeightType::bf16);
  EngineOptions options = testing::small_options();
  options.prefix_cache = false;
  Engine engine(tiny.model(), options, {}, {});
  const Request request = make_request(random_tokens(5, 1), 9);
  const std::vector<TokenId> expected = testing::run(engine, request).token_ids;
  emulation::fail_copy(0, cudaErrorMemoryAllocation);
  const testing::Outcome failed = testing::run(engine, request);
  EXPECT_EQ(failed.finish_reason, FinishReason::error);
  EXPECT_NE(failed.error.find("cudaErrorMemoryAllocation"), std::string::npos) << failed.error;
  EXPECT_EQ(engine.failure(), "");
  EXPECT_EQ(testing::run(engine, request).token_ids, expected);
  testing::expect_nothing_left(engine);
}

// A step goes to the device in pieces, and each may be the one that fails.
TEST_F(DeviceFailureTest, AFailureInAnyPieceOfAStepLeavesNothingForTheNext) {
  TinyModel tiny(WeightType::bf16, 1, 128, testing::tiny_edge_config());
  EngineOptions options = testing::small_options();
  options.prefix_cache = false;
  options.draft_length = 4;
  Engine engine(tiny.model(), options, tiny.drafters("mtp"), {});
  const Request request = make_request(random_tokens(5, 1), 4);
  const std::vector<TokenId> expected = testing::run(engine, request).token_ids;
  constexpr int kCopies[] = {0, 1, 2, 4, 7};
  int failures = 0;
  for (const int copy : kCopies) {
    emulation::fail_copy(copy, cudaErrorMemoryAllocation);
    failures += testing::run(engine, request).finish_reason == FinishReason::error ? 1 : 0;
    emulation::reset();
    ASSERT_EQ(testing::run(engine, request).token_ids, expected) << "after a failure of copy " << copy;
  }
  EXPECT_EQ(failures, std::ssize(kCopies));
  testing::expect_nothing_left(engine);
}

TEST_F(DeviceFailureTest, AStepWithoutAGraphIsLaunchedKernelByKernel) {
  TinyModel tiny(WeightType::bf16);
  Engine engine(tiny.model(), testing::small_options(), {}, {});
  const Request request = make_request(random_tokens(5, 1), 9);
  const std::vector<TokenId> expected = testing::run(engine, request).token_ids;
  Request longer = request;  // contexts that there is no graph of yet
  longer.max_tokens = 200;
  emulation::fail_graph(cudaErrorMemoryAllocation);
  EXPECT_EQ(testing::run(engine, longer).finish_reason, FinishReason::length);
  EXPECT_EQ(testing::run(engine, request).token_ids, expected);
  testing::expect_nothing_left(engine);
}

TEST_F(DeviceFailureTest, ADeviceThatRefusesEarlyStartsComputesTheSameAndSaysSo) {
  TinyModel tiny(WeightType::bf16);
  Engine engine(tiny.model(), testing::small_options(), {}, {});
  const Request request = make_request(random_tokens(5, 1), 9);
  emulation::refuse_early_starts();
  const std::vector<TokenId> refused = testing::run(engine, request).token_ids;
  EXPECT_EQ(tiny.model().backend().description(), "cuda sm_90, emulated, launches ordered");
  emulation::reset();
  TinyModel other(WeightType::bf16);
  Engine early(other.model(), testing::small_options(), {}, {});
  EXPECT_EQ(testing::run(early, request).token_ids, refused);
  EXPECT_EQ(other.model().backend().description(), "cuda sm_90, emulated");
}

TEST_F(DeviceFailureTest, AllThatRunsEndsAndNothingMoreIsTaken) {
  TinyModel tiny(WeightType::bf16);
  Engine engine(tiny.model(), testing::small_options(), {}, {});
  EXPECT_EQ(testing::run(engine, make_request(random_tokens(5, 1), 3)).finish_reason, FinishReason::length);
  EXPECT_EQ(engine.failure(), "");
  emulation::fail_launch(40, cudaErrorIllegalAddress);
  const RequestId one = engine.submit(make_request(random_tokens(5, 2), 900));
  const RequestId two = engine.submit(make_request(random_tokens(9, 3), 900));
  auto outcomes = collect(engine, {one, two});
  for (const RequestId id : {one, two}) {
    EXPECT_EQ(outcomes[id].finish_reason, FinishReason::error);
    EXPECT_NE(outcomes[id].error.find("cudaErrorIllegalAddress"), std::string::npos) << outcomes[id].error;
    EXPECT_NE(outcomes[id].error.find("until the process is started anew"), std::string::npos);
  }
  EXPECT_EQ(engine.failure(), outcomes[one].error);
  EXPECT_THROW(engine.submit(make_request(random_tokens(5, 4), 3)), DeviceFailure);
  testing::expect_nothing_left(engine);
}

}  // namespace
}  // namespace draftwerk
