// One block at a time, its threads as fibers that run until they wait for each other: what kernels see of a device.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "vector_types.h"

namespace emulation {

/// In which order threads of a block, and blocks of a grid, come first. A kernel whose result depends on it has a race.
enum class Order { forward, backward, shuffled };
/// Of all launches from now on, of every thread of the process.
void set_order(Order order, unsigned seed = 0);

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kMaxThreads = 1024;

/// Runs body() once for each thread of each block of the grid, one launch at a time in the process. Throws
/// std::logic_error, with what waits for what, if the threads of a block cannot all end.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

/// Ends the process: an exception cannot leave a fiber.
[[noreturn]] void fail(const char* why);

// --- for the running thread ---------------------------------------------------------------------------------------

extern uint3 thread_index;
extern uint3 block_index;
extern dim3 block_size;
extern dim3 grid_size;

/// Shared memory of the size given at launch; filled with NaN (0xFF) for each block.
std::byte* dynamic_shared();
/// Waits for all threads of the block that have not ended. Returns how many of them gave true.
int sync_block(bool predicate = false);
/// Waits for the lanes of `mask`.
void sync_warp(std::uint32_t mask);
/// Adds a copy to this thread's open group of copies; zeros where `from` is null.
void copy_later(void* to, const void* from, std::size_t bytes);
/// Closes that group.
void close_copies();
/// Carries groups out, the oldest first, until `pending` closed ones are left.
void finish_copies(int pending);
/// This thread's lane.
unsigned lane();
/// What each lane of the warp shows to the others: `kShownWords` words for each.
inline constexpr unsigned kShownWords = 16;
std::uint32_t* shown(unsigned lane);

/// The value of lane source(own lane), which must be in `mask`, as all lanes of `mask` show theirs.
template <typename T>
T exchange(std::uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= kShownWords * 4);
  std::memcpy(shown(lane()), &value, sizeof value);
  sync_warp(mask);
  std::memcpy(&value, shown(source % kWarpSize), sizeof value);
  sync_warp(mask);
  return value;
}

/// fold(result, value of a lane) over the lanes of `mask`, from the lowest.
template <typename T, typename Fold>
T fold(std::uint32_t mask, T value, T start, Fold fold) {
  std::memcpy(shown(lane()), &value, sizeof value);
  sync_warp(mask);
  for (std::uint32_t left = mask; left != 0; left &= left - 1) {
    T other;
    std::memcpy(&other, shown(static_cast<unsigned>(std::countr_zero(left))), sizeof other);
    start = fold(start, other);
  }
  sync_warp(mask);
  return start;
}

}  // namespace emulation
