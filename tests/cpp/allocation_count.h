// Counts what is allocated by operator new, on all threads.
#pragma once

#include <cstdint>

namespace draftwerk::testing {

// Sanitizers bring their own operators, and tests under them are to keep these.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kCountsAllocations = false;
#else
inline constexpr bool kCountsAllocations = true;
#endif

/// Since the start; 0 where they are not counted.
std::int64_t allocations();

}  // namespace draftwerk::testing
