// One block at a time, its threads as fibers that run until they wait for each other: what kernels see of a device.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>

#include "vector_types.h"

namespace emulation {

/// In which order threads of a block, and blocks of a grid, come first. A kernel whose result depends on it has a race.
/// changing: each launch in another one of the others, which is how it begins.
enum class Order { forward, backward, shuffled, changing };
/// Of all launches from now on, of every thread of the process.
void set_order(Order order, unsigned seed = 0);

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kMaxThreads = 1024;

/// What runs body() once for each thread of each block of a grid.
struct Launch {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  std::function<void()> body;
  /// Its first block runs up to await_previous() before the launch ahead of it does anything. Shared memory of a size
  /// that is known (a __shared__ array) must not be used until then.
  bool early = false;
};
/// Runs launches one after the other, as the only ones of the process at the time. Throws std::logic_error, with what
/// waits for what, if the threads of a block cannot all end.
void run(std::span<const Launch> launches);

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
/// Waits until the launch ahead of this one has ended. Each thread has to.
void await_previous();
/// Adds a copy to this thread's open group of copies; zeros where `from` is null. Where threads run backward it happens
/// at once, as early as a device may do it; elsewhere as late, when it is waited for.
void copy_later(void* to, const void* from, std::size_t bytes);
/// Closes that group.
void close_copies();
/// Carries groups out, the oldest first, until `pending` closed ones are left.
void finish_copies(int pending);
/// The same, as late or at once, for what a thread of a warpgroup does with the others while it goes on: products have
/// groups of their own.
void multiply_later(std::function<void()> product);
void close_products();
/// Carries all closed groups out.
void finish_products();
/// This thread's lane.
unsigned lane();

/// What the lanes of a warp brought to where they meet; null for a lane that did not come.
using Brought = void* const*;
/// Waits for the lanes of `mask`, as they wait with theirs. Whoever comes last does together(what each brought, mask)
/// before all go on. Lanes that meet have to do the same together.
void meet(std::uint32_t mask, void* brought, void (*together)(Brought brought, std::uint32_t mask));

/// Calls visit(lane) for the lanes of a mask, from the lowest.
template <typename Visit>
void for_each_lane(std::uint32_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(static_cast<unsigned>(std::countr_zero(mask)));
}

/// The value of lane source(own lane), which must be in `mask`, as all lanes of `mask` show theirs.
template <typename T>
T exchange(std::uint32_t mask, T value, unsigned source) {
  struct Part {
    T value;
    unsigned source;
    T got;
  };
  Part part{value, source % kWarpSize, value};
  meet(mask, &part, [](Brought brought, std::uint32_t lanes) {
    for_each_lane(lanes, [&](unsigned lane) {
      Part& own = *static_cast<Part*>(brought[lane]);
      if (brought[own.source] == nullptr) fail("a lane asks for the value of one that does not take part");
      own.got = static_cast<const Part*>(brought[own.source])->value;
    });
  });
  return part.got;
}

/// Fold()(result, value of a lane) over the lanes of `mask`, from the lowest.
template <typename Fold, typename T>
T fold(std::uint32_t mask, T value, T start) {
  struct Part {
    T value;
    T result;
  };
  Part part{value, start};
  meet(mask, &part, [](Brought brought, std::uint32_t lanes) {
    T result = static_cast<const Part*>(brought[std::countr_zero(lanes)])->result;
    for_each_lane(lanes,
                  [&](unsigned lane) { result = Fold()(result, static_cast<const Part*>(brought[lane])->value); });
    for_each_lane(lanes, [&](unsigned lane) { static_cast<Part*>(brought[lane])->result = result; });
  });
  return part.result;
}

}  // namespace emulation
