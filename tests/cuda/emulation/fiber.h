// Threads of a block as fibers: each has a stack of its own, and whoever runs decides who does next.
#pragma once

#include <memory>

namespace emulation {

/// A stack on which a function runs until it gives way. Fibers that give way to each other run in one thread.
class Fiber {
 public:
  using Body = void (*)(void*);

  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  Fiber(Fiber&&) = delete;
  Fiber& operator=(Fiber&&) = delete;
  ~Fiber();

  /// Gets ready to run body(argument) from its beginning; an unfinished one is forgotten. The body must not return: it
  /// ends by end().
  void start(Body body, void* argument);
  /// From outside of any fiber: runs this one, until one gives way to the outside.
  void resume();

  // --- called on the fiber's own stack

  /// Runs `next` (null: whoever called resume()), until somebody runs this one.
  void give_way(Fiber* next);
  /// The same for the last time.
  [[noreturn]] void end(Fiber* next);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace emulation
