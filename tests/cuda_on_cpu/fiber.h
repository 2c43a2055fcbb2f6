// A function call that can be left in the middle and taken up again: its own stack, and a switch of seven registers.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#if defined(__x86_64__)
// Saves the registers that a call preserves on this stack, and goes on where `to` left off.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
  .popsection
)");
using Context = void*;
inline void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // as after a call: 8 off a multiple of 16
  *top = nullptr;                                            // entry never returns
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {stack, 0, bytes};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

class Fiber {
 public:
  Fiber()
      : stack_(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
    munmap(stack_, kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Starts `function`, or goes on with it where it was suspended; true when it has returned.
  bool run(const std::function<void()>& function) {
    if (!running_) {
      function_ = &function;
      running_ = true;
      make_context(inside_, stack_, kStack, [] { active_->enter(); });
    }
    active_ = this;
    enter_stack();
    switch_context(outside_, inside_);
    leave_stack(outside_fake_);
    return !running_;
  }

  bool has(const void* p) const { return size_t(static_cast<const char*>(p) - stack_) < kStack; }

  // Called inside: back to run(), which returns false.
  void suspend() {
    exit_stack(false);
    switch_context(inside_, outside_);
    leave_stack(inside_fake_);
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  // The last switch never comes back.
  void enter() {
    leave_stack(nullptr);
    (*function_)();
    running_ = false;
    exit_stack(true);
    switch_context(inside_, outside_);
  }

#if defined(__SANITIZE_ADDRESS__)  // it must know which stack is in use
  void enter_stack() { __sanitizer_start_switch_fiber(&outside_fake_, stack_, kStack); }
  void exit_stack(bool last) {
    __sanitizer_start_switch_fiber(last ? nullptr : &inside_fake_, outside_stack_, outside_bytes_);
  }
  void leave_stack(void* fake) {
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake, &stack, &bytes);
    if (stack != stack_) outside_stack_ = stack, outside_bytes_ = bytes;
  }
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
#else
  void enter_stack() {}
  void exit_stack(bool) {}
  void leave_stack(void*) {}
#endif

  static inline Fiber* active_ = nullptr;
  char* stack_;
  const std::function<void()>* function_ = nullptr;
  bool running_ = false;
  Context inside_{}, outside_{};
  void *inside_fake_ = nullptr, *outside_fake_ = nullptr;
};

}  // namespace cuda_on_cpu
