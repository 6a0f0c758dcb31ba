// The floating-point environment that arithmetic is defined in.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace draftwerk {

/// As long as it lives, the calling thread rounds to nearest and keeps subnormal numbers. A thread starts with the
/// environment of the one that makes it, and what that is no program can be sure of: a library linked with -ffast-math
/// has the thread that loads it flush subnormal numbers to zero.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint(DefaultFloatingPoint&&) = delete;
  DefaultFloatingPoint& operator=(DefaultFloatingPoint&&) = delete;

#if defined(__x86_64__)
  // Read in a few cycles, and as good as never written.
  DefaultFloatingPoint() : before_(_mm_getcsr()) {
    if (is_other()) _mm_setcsr(kDefault);
  }
  ~DefaultFloatingPoint() {
    if (is_other()) _mm_setcsr(before_);
  }

 private:
  static constexpr unsigned kDefault = 0x1F80;  // exceptions are masked
  static constexpr unsigned kModes = 0xFFC0;    // all but the flags of what has happened
  [[nodiscard]] bool is_other() const { return (before_ & kModes) != kDefault; }

  unsigned before_;
#else
  DefaultFloatingPoint() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
#endif
};

}  // namespace draftwerk
