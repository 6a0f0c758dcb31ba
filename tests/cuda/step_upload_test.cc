#include "backend/cuda/step_upload.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "backend/cuda/device.cuh"
#include "backend/cuda/graph_cache.h"
#include "step_arrays.h"

namespace draftwerk::cuda {
namespace {

TEST(PaddedCount, IsOneOfAFew) {
  const std::pair<int, int> want[] = {{0, 0},   {1, 1},   {2, 2},     {3, 4},    {5, 8},
                                      {17, 24}, {33, 64}, {129, 192}, {257, 384}};
  for (const auto& [count, padded] : want) EXPECT_EQ(padded_count(count), padded);
  int before = 0;
  for (int count = 0; count < 2000; ++count) {
    const int padded = padded_count(count);
    EXPECT_GE(padded, count);
    EXPECT_GE(padded, before);
    EXPECT_EQ(padded_count(padded), padded);
    before = padded;
  }
}

TEST(StepUpload, BringsChainsTreesAndPadding) {
  const std::vector<TokenId> tokens = {7, 8, 9, 4, 5, 6};
  const std::vector<std::int64_t> positions = {30, 31, 32, 17, 18, 18};
  const std::vector<int> outputs = {2, 3, 4, 5};
  const std::vector<PageId> sliding = {kNoPage, 11, 12};
  const std::vector<PageId> full = {20, 21, 22};
  const std::vector<std::int32_t> parents = {-1, -1};
  const std::vector<Segment> segments = {{0, 3, 30, {sliding.data(), full.data()}},
                                         {3, 3, 17, {nullptr, full.data()}, parents}};
  std::byte arena[1];
  StepUpload upload;
  upload.reserve(20, 5);
  upload.fill({tokens, positions, segments, outputs}, {arena});
  const std::int32_t* listed = upload.add_rows(std::vector<int>{5, 3}, 4);
  const StepView& view = arrived(upload);
  EXPECT_EQ(view.rows, 8);
  EXPECT_EQ(view.outputs, 4);
  EXPECT_EQ(view.arena, arena);
  EXPECT_EQ(view.segment_count, 2);
  EXPECT_EQ(view.context, 64);
  EXPECT_EQ(std::vector<std::int32_t>(view.tokens, view.tokens + 8),
            (std::vector<std::int32_t>{7, 8, 9, 4, 5, 6, 0, 0}));
  EXPECT_EQ(std::vector<std::int32_t>(view.positions, view.positions + 6),
            (std::vector<std::int32_t>{30, 31, 32, 17, 18, 18}));
  EXPECT_EQ(std::vector<std::int32_t>(view.row_segment, view.row_segment + 8),
            (std::vector<std::int32_t>{0, 0, 0, 1, 1, 1, -1, -1}));
  EXPECT_EQ(std::vector<std::int32_t>(view.output_rows, view.output_rows + 4), (std::vector<std::int32_t>{2, 3, 4, 5}));
  EXPECT_EQ(std::vector<std::int32_t>(listed, listed + 4), (std::vector<std::int32_t>{5, 3, 0, 0}));
  const StepSegment& chain = view.segments[0];
  EXPECT_EQ(chain.tree, 0);
  EXPECT_EQ(std::vector<PageId>(view.pages + chain.pages[0], view.pages + chain.pages[0] + 3), sliding);
  EXPECT_EQ(std::vector<PageId>(view.pages + chain.pages[1], view.pages + chain.pages[1] + 3), full);
  const StepSegment& tree = view.segments[1];
  EXPECT_EQ(tree.tree, 1);
  EXPECT_EQ(view.pages[tree.pages[0]], kNoPage);
  EXPECT_EQ(view.pages[tree.pages[1] + 1], 21U);
  const auto path = [&](int row, int at) { return int{view.paths[row * kMaxPath + at]}; };
  EXPECT_EQ(path(3, 0), 0);
  EXPECT_EQ(path(4, 0), 0);
  EXPECT_EQ(path(4, 1), 1);
  EXPECT_EQ(path(5, 0), 0);
  EXPECT_EQ(path(5, 1), 2);
}

TEST(StepUpload, ListsOfRowsThatComeLaterAreCopiedByThemselves) {
  const std::vector<TokenId> tokens = {7, 8, 9};
  const std::vector<std::int64_t> positions = {0, 1, 2};
  const std::vector<PageId> pages = {1};
  const std::vector<Segment> segments = {{0, 3, 0, {pages.data(), pages.data()}}};
  const std::vector<int> outputs = {2};
  StepUpload upload;
  upload.reserve(4, 2);
  upload.fill({tokens, positions, segments, outputs}, {nullptr});
  const std::int32_t* first = upload.add_rows(std::vector<int>{1}, 1);
  const StepView& view = arrived(upload);
  std::vector<Copy> copies;
  upload.collect(copies);
  EXPECT_TRUE(copies.empty()) << "nothing has come since";
  // As a kernel may: what has arrived is the device's.
  upload.growing().tokens[1] = 99;
  const std::int32_t* second = upload.add_rows(std::vector<int>{2, 0}, 2);
  EXPECT_EQ(upload.add_rows(std::vector<int>{2, 0}, 2), second);
  arrived(upload);
  EXPECT_EQ(first[0], 1);
  EXPECT_EQ(std::vector<std::int32_t>(second, second + 2), (std::vector<std::int32_t>{2, 0}));
  EXPECT_EQ(view.tokens[1], 99);
}

// A step of one row does not pay for the largest that there may be; but as many rows are the same launches.
TEST(StepUpload, IsLaidOutByTheRowsOfTheStep) {
  StepUpload upload;
  upload.reserve(512, 64);
  const std::vector<PageId> pages(64, 3);
  const auto fill = [&](int rows, int outputs) {
    const std::vector<TokenId> tokens(static_cast<std::size_t>(rows), 1);
    std::vector<std::int64_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<int> output_rows(static_cast<std::size_t>(outputs));
    std::iota(output_rows.begin(), output_rows.end(), 0);
    const std::vector<Segment> segments = {{0, rows, 0, {pages.data(), pages.data()}}};
    upload.fill({tokens, positions, segments, output_rows}, {nullptr});
    std::vector<Copy> copies;
    upload.collect(copies);
    return std::pair(upload.view(), copies.at(0).bytes);
  };
  EXPECT_GT(fill(512, 64).second, 512U * kMaxPath);
  const auto [one, bytes_of_one] = fill(1, 1);
  EXPECT_LE(bytes_of_one, 4096U);
  const auto [seven, bytes_of_seven] = fill(7, 1);
  const auto [eight, bytes_of_eight] = fill(8, 5);
  EXPECT_EQ(bytes_of_seven, bytes_of_eight);
  EXPECT_EQ(seven.paths, eight.paths);
  EXPECT_EQ(seven.pages, eight.pages);
  EXPECT_NE(one.pages, eight.pages);
}

TEST(StepUpload, StaysWhereItIsUntilPageTablesGrow) {
  StepUpload upload;
  upload.reserve(4, 1);
  const std::vector<TokenId> tokens = {1};
  const std::vector<int> outputs = {0};
  const auto fill = [&](std::int64_t position) {
    const std::vector<std::int64_t> positions = {position};
    const std::vector<PageId> pages(static_cast<std::size_t>(position / kPageSize + 1), 3);
    const std::vector<Segment> segments = {{0, 1, position, {pages.data(), pages.data()}}};
    upload.fill({tokens, positions, segments, outputs}, {nullptr});
    return arrived(upload);
  };
  const StepView first = fill(300);
  const StepView second = fill(500);
  EXPECT_EQ(std::memcmp(&first, &second, sizeof first), 0);
  const StepView long_one = fill(200'000);
  EXPECT_EQ(long_one.pages[long_one.segments[0].pages[1] + 12'500], 3U);
  EXPECT_THROW(upload.add_rows(std::vector<int>(5), 5), std::logic_error);
  // Memory that cannot grow stays what it was.
  emulation::fail_pinned();
  EXPECT_THROW(fill(800'000), std::runtime_error);
  emulation::reset();
  EXPECT_EQ(fill(200'000).pages[0], 3U);
}

struct Add {
  int* sum;
  std::int64_t number;
};
__global__ void add(const Add a) {
  follow_previous();
  *a.sum += static_cast<int>(a.number);
}

TEST(GraphCache, RunsListsAndKeepsTheLatestGraphs) {
  GraphCache cache(2);
  const Stream stream = Stream::create();
  std::vector<int> sum(1);
  const auto run = [&](int number) {
    LaunchList list;
    list.add(add, {dim3(1), dim3(1)}, {sum.data(), number});
    list.add(add, {dim3(1), dim3(1)}, {sum.data(), 100 * number});
    cache.run(list, stream.get());
    stream.wait();
    return std::exchange(sum[0], 0);
  };
  EXPECT_EQ(run(1), 101);
  EXPECT_EQ(cache.graphs(), 0U) << "a list that is seen once has no graph";
  EXPECT_EQ(run(1), 101);
  EXPECT_EQ(run(1), 101);
  EXPECT_EQ(cache.graphs(), 1U);
  EXPECT_EQ(run(2), 202);
  EXPECT_EQ(run(2), 202);
  EXPECT_EQ(cache.graphs(), 2U);
  EXPECT_EQ(run(3), 303);  // takes the place of 1
  EXPECT_EQ(cache.graphs(), 1U);
  EXPECT_EQ(run(1), 101);
  EXPECT_EQ(cache.graphs(), 0U);
  LaunchList of_nothing;
  of_nothing.add(add, {dim3(0), dim3(1)}, {sum.data(), 1});
  EXPECT_TRUE(of_nothing.empty());
  cache.run(of_nothing, stream.get());
  cache.clear();
  EXPECT_EQ(run(2), 202);
}

__global__ void set(const Add a) {
  follow_previous();
  *a.sum = static_cast<int>(a.number);
}
/// Awaits what is ahead, as every kernel has to, but adds before.
__global__ void add_too_early(const Add a) {
  *a.sum += static_cast<int>(a.number);
  follow_previous();
}

TEST(GraphCache, LaunchesAsItIsTold) {
  // What the second kernel adds to before it awaits the first is lost only where it begins early.
  const auto run = [](LaunchMode mode) {
    GraphCache cache(2, mode);
    const Stream stream = Stream::create();
    std::vector<int> sum(1);
    LaunchList list;
    list.add(set, {dim3(1), dim3(1)}, {sum.data(), 5});
    list.add(add_too_early, {dim3(1), dim3(1)}, {sum.data(), 1});
    for (int i = 0; i < 2; ++i) cache.run(list, stream.get());
    stream.wait();
    return std::pair(sum[0], cache.graphs());
  };
  EXPECT_EQ(run(LaunchMode::early), std::pair(5, std::size_t{1}));
  EXPECT_EQ(run(LaunchMode::ordered), std::pair(6, std::size_t{1}));
  EXPECT_EQ(run(LaunchMode::single), std::pair(6, std::size_t{0}));
}

/// What became of a list of kernels that begin early.
struct Refused {
  int sum;
  std::size_t graphs;
  LaunchMode mode;
  bool operator==(const Refused&) const = default;
};
/// Runs one three times; before the second, which makes its graph, `refuse` says what is refused.
Refused add_three_times(void (*refuse)()) {
  GraphCache cache(2);
  const Stream stream = Stream::create();
  std::vector<int> sum(1);
  LaunchList list;
  list.add(add, {dim3(1), dim3(1)}, {sum.data(), 1});
  list.add(add, {dim3(1), dim3(1)}, {sum.data(), 10});
  cache.run(list, stream.get());
  refuse();
  for (int i = 0; i < 2; ++i) cache.run(list, stream.get());
  stream.wait();
  emulation::reset();
  return {sum[0], cache.graphs(), cache.mode()};
}

TEST(GraphCache, GoesOnWithoutEarlyStartsWhereTheyAreRefused) {
  const Refused ordered = {33, 1, LaunchMode::ordered};
  EXPECT_EQ(add_three_times(emulation::refuse_early_starts), ordered);
  EXPECT_EQ(add_three_times([] { emulation::fail_graph(cudaErrorInvalidValue); }), ordered);
  EXPECT_EQ(add_three_times([] { emulation::fail_graph_launch(cudaErrorNotSupported); }), ordered);
}

TEST(GraphCache, LaunchesKernelByKernelWhereMemoryIsShort) {
  const Refused early = {33, 1, LaunchMode::early};
  EXPECT_EQ(add_three_times([] { emulation::fail_graph(cudaErrorMemoryAllocation); }), early);
  EXPECT_EQ(add_three_times([] { emulation::fail_graph_launch(cudaErrorMemoryAllocation); }), early);
}

TEST(GraphCache, SaysWhatIsRefusedOtherwise) {
  GraphCache cache(2, LaunchMode::ordered);
  const Stream stream = Stream::create();
  std::vector<int> sum(1);
  LaunchList list;
  list.add(add, {dim3(1), dim3(1)}, {sum.data(), 1});
  cache.run(list, stream.get());
  emulation::fail_graph(cudaErrorNotSupported);
  EXPECT_THROW(cache.run(list, stream.get()), CudaError);
  emulation::reset();
}

TEST(GraphCache, IsToldByTheEnvironment) {
  const auto mode_of = [](const char* value) {
    setenv("DRAFTWERK_CUDA_LAUNCHES", value, 1);
    try {
      const LaunchMode mode = launch_mode();
      return std::to_string(static_cast<int>(mode));
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
  };
  EXPECT_EQ(mode_of(""), "0");
  EXPECT_EQ(mode_of("early"), "0");
  EXPECT_EQ(mode_of("ordered"), "1");
  EXPECT_EQ(mode_of("single"), "2");
  EXPECT_EQ(mode_of("graphs"), "DRAFTWERK_CUDA_LAUNCHES=graphs: expected early, ordered or single");
  unsetenv("DRAFTWERK_CUDA_LAUNCHES");
}

}  // namespace
}  // namespace draftwerk::cuda
