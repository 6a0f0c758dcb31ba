#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = std::size_t{128} << 10;

}  // namespace

// swapcontext would do everywhere, but asks the kernel for the signal mask each time: half a microsecond, of which a
// block of 256 threads needs thousands. What the calling convention wants kept is six registers.
#if defined(__x86_64__)

extern "C" void emulation_switch_stack(void** save, void* load);
asm(R"(
.text
.type emulation_switch_stack, @function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack, .-emulation_switch_stack
)");

struct Fiber::State {
  void* outside = nullptr;
  void* inside = nullptr;

  void prepare(void* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    inside = top;
  }
  void enter() { emulation_switch_stack(&outside, inside); }
  void leave() { emulation_switch_stack(&inside, outside); }
#else

struct Fiber::State {
  ucontext_t outside{};
  ucontext_t inside{};

  void prepare(void* stack, void (*entry)()) {
    getcontext(&inside);
    inside.uc_stack.ss_sp = stack;
    inside.uc_stack.ss_size = kStackBytes;
    inside.uc_link = nullptr;
    makecontext(&inside, entry, 0);
  }
  void enter() { swapcontext(&outside, &inside); }
  void leave() { swapcontext(&inside, &outside); }
#endif

  static void run();

  void* stack = nullptr;
  Body body = nullptr;
  void* argument = nullptr;
  bool done = true;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;  ///< the sanitizer's own record of the fiber's frames
  const void* outer_stack = nullptr;
  std::size_t outer_bytes = 0;
#endif
  static thread_local State* current;
};

thread_local Fiber::State* Fiber::State::current = nullptr;

void Fiber::State::run() {
  State& state = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.outer_stack, &state.outer_bytes);
#endif
  state.body(state.argument);
  state.done = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, state.outer_stack, state.outer_bytes);
#endif
  state.leave();
}

Fiber::Fiber() : state_(std::make_unique<State>()) {
  state_->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (state_->stack == MAP_FAILED) throw std::bad_alloc();
}

Fiber::~Fiber() { munmap(state_->stack, kStackBytes); }

void Fiber::start(Body body, void* argument) {
  state_->body = body;
  state_->argument = argument;
  state_->done = false;
#if defined(__SANITIZE_ADDRESS__)
  state_->fake_stack = nullptr;
  __asan_unpoison_memory_region(state_->stack, kStackBytes);  // of one that hung, whose frames were never left
#endif
  state_->prepare(state_->stack, &State::run);
}

void Fiber::resume() {
  State::current = state_.get();
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, state_->stack, kStackBytes);
  state_->enter();
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  state_->enter();
#endif
}

void Fiber::yield() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state_->fake_stack, state_->outer_stack, state_->outer_bytes);
  state_->leave();
  __sanitizer_finish_switch_fiber(state_->fake_stack, &state_->outer_stack, &state_->outer_bytes);
#else
  state_->leave();
#endif
}

bool Fiber::finished() const { return state_->done; }

}  // namespace emulation
