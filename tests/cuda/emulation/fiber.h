// Threads of a block as fibers: each has a stack of its own, and whoever runs decides when another does.
#pragma once

#include <cstddef>
#include <memory>

namespace emulation {

/// A stack on which a function runs until it yields or returns.
class Fiber {
 public:
  using Body = void (*)(void*);

  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  Fiber(Fiber&&) = delete;
  Fiber& operator=(Fiber&&) = delete;
  ~Fiber();

  /// Gets ready to run body(argument) from its beginning. Not while an earlier one is unfinished.
  void start(Body body, void* argument);
  /// Runs it until it yields or returns; called from outside of any fiber.
  void resume();
  /// Goes back to who called resume(); called on the fiber's own stack.
  void yield();
  [[nodiscard]] bool finished() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace emulation
