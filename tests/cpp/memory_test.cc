#include "backend/cpu/memory.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace draftwerk::cpu {
namespace {

constexpr std::size_t kPage = 4096;

TEST(MappedMemory, DiscardsWholePagesAlone) {
  MappedMemory memory(4 * kPage);
  auto* data = static_cast<std::byte*>(memory.data());
  std::fill_n(data, 4 * kPage, std::byte{7});
  memory.discard(data + 10, data + 3 * kPage + 5);  // of which pages 1 and 2 are whole
  const auto all_are = [&](std::size_t first, std::size_t last, int value) {
    return std::all_of(data + first, data + last, [value](std::byte b) { return std::to_integer<int>(b) == value; });
  };
  EXPECT_TRUE(all_are(0, kPage, 7));
  EXPECT_TRUE(all_are(kPage, 3 * kPage, 0));
  EXPECT_TRUE(all_are(3 * kPage, 4 * kPage, 7));
  memory.discard(data + kPage + 1, data + kPage + 2);  // none is
  memory.discard(data, data);
  EXPECT_TRUE(all_are(0, kPage, 7));
}

TEST(MemorySlice, DiscardsNothingThatOthersHaveToo) {
  WeightArena arena;
  const MemorySlice small = arena.take(4 * kPage);
  const MemorySlice large = arena.take(std::size_t{16} << 20);
  for (const MemorySlice* slice : {&small, &large}) {
    std::fill_n(slice->data, 4 * kPage, std::byte{7});
    slice->discard(slice->data, slice->data + 4 * kPage);
  }
  EXPECT_EQ(small.data[kPage], std::byte{7});
  EXPECT_EQ(large.data[kPage], std::byte{0});
}

}  // namespace
}  // namespace draftwerk::cpu
