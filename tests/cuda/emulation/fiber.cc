#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = std::size_t{128} << 10;
// Stacks that begin at multiples of a power of two share a few sets of the caches, and hundreds of them take turns.
constexpr std::size_t kStagger = 512;
constexpr std::size_t kStaggers = 256;
constexpr std::size_t kMappedBytes = kStackBytes + kStagger * kStaggers;

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

struct Context {
  void* top = nullptr;

  void prepare(void* stack, void (*entry)()) {
    auto* at = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
    *--at = nullptr;  // where entry would return to
    *--at = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    top = at;
  }
  void change_to(const Context& next) { emulation_switch_stack(&top, next.top); }
};

#else

struct Context {
  ucontext_t registers{};

  void prepare(void* stack, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = kStackBytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  void change_to(const Context& next) { swapcontext(&registers, &next.registers); }
};

#endif

struct Fiber::State {
  Context context;
  const void* stack = nullptr;  ///< its lowest address
  std::size_t stack_bytes = kStackBytes;
  void* mapped = nullptr;
  Body body = nullptr;
  void* argument = nullptr;
  void* sanitizers_stack = nullptr;  ///< the sanitizer's own record of the fiber's frames

  static thread_local State outside;
  static thread_local State* entered;  ///< whose turn it is

  static void run();
  void change_to(State& next, bool for_ever) {
    entered = &next;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &sanitizers_stack, next.stack, next.stack_bytes);
#else
    static_cast<void>(for_ever);
#endif
    context.change_to(next.context);
    arrived(sanitizers_stack);
  }
  /// On a stack that was just changed to.
  static void arrived([[maybe_unused]] void* saved) {
#if defined(__SANITIZE_ADDRESS__)
    const void* left = nullptr;
    std::size_t left_bytes = 0;
    __sanitizer_finish_switch_fiber(saved, &left, &left_bytes);
    if (outside.stack != nullptr) return;
    outside.stack = left;  // the first change of a thread is from its own stack
    outside.stack_bytes = left_bytes;
#endif
  }
};

thread_local Fiber::State Fiber::State::outside;
thread_local Fiber::State* Fiber::State::entered = nullptr;

void Fiber::State::run() {
  arrived(nullptr);
  entered->body(entered->argument);
  std::abort();  // bodies do not return
}

Fiber::Fiber() : state_(std::make_unique<State>()) {
  static std::atomic<std::size_t> made = 0;
  void* mapped = mmap(nullptr, kMappedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  state_->mapped = mapped;
  state_->stack = static_cast<std::byte*>(mapped) + made++ % kStaggers * kStagger;
}

Fiber::~Fiber() { munmap(state_->mapped, kMappedBytes); }

void Fiber::start(Body body, void* argument) {
  state_->body = body;
  state_->argument = argument;
  state_->sanitizers_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(state_->stack, kStackBytes);  // of one that hung, whose frames were never left
#endif
  state_->context.prepare(const_cast<void*>(state_->stack), &State::run);
}

void Fiber::resume() { State::outside.change_to(*state_, false); }

void Fiber::give_way(Fiber* next) { state_->change_to(next != nullptr ? *next->state_ : State::outside, false); }

void Fiber::end(Fiber* next) {
  state_->change_to(next != nullptr ? *next->state_ : State::outside, true);
  std::abort();  // nobody comes back to one that ended
}

}  // namespace emulation
