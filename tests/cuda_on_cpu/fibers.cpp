#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call keeps on the stack, stores its pointer in *from, and goes on
// where `to` was stored.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr int kReturn = 6, kFrame = 8;  // words; at kReturn the place to go on
#elif defined(__aarch64__)
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr int kReturn = 11, kFrame = 20;
#else
#error "the emulator switches fibers on x86-64 and arm64 only"
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kPage = 4096;

Fiber* running = nullptr;
// Where fibers are entered.
void* outer_pointer;
void* outer_fake_stack;
const void* outer_stack;
size_t outer_stack_size;

// AddressSanitizer has to be told of every change of stacks: before it, where it goes, and after.
void announce_switch(void** fake_stack, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#else
  (void)fake_stack, (void)stack, (void)size;
#endif
}
void confirm_switch(void* fake_stack, const void** from, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
#else
  (void)fake_stack, (void)from, (void)size;
#endif
}

}  // namespace

void Fiber::prepare(void (*entry)(), bool abandoned) {
  if (stack_ == nullptr) {
    void* mapped = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    mprotect(mapped, kPage, PROT_NONE);  // a kernel that overflows its stack stops there
    stack_ = static_cast<unsigned char*>(mapped) + kPage;
  }
#if defined(__SANITIZE_ADDRESS__)
  if (abandoned) __asan_unpoison_memory_region(stack_, kStack);
#else
  (void)abandoned;
#endif
  auto** top = reinterpret_cast<void**>(stack_ + kStack);
  void** frame = top - kFrame;
  std::fill(frame, top, nullptr);
  frame[kReturn] = reinterpret_cast<void*>(&Fiber::begin);
  entry_ = entry;
  stack_pointer_ = frame;
  fake_stack_ = nullptr;
}

void Fiber::begin() {
  confirm_switch(nullptr, &outer_stack, &outer_stack_size);
  running->entry_();
  std::abort();
}

void Fiber::enter() {
  running = this;
  announce_switch(&outer_fake_stack, stack_, kStack);
  cuda_on_cpu_switch(&outer_pointer, stack_pointer_);
  confirm_switch(outer_fake_stack, nullptr, nullptr);
}

void Fiber::leave() {
  announce_switch(&fake_stack_, outer_stack, outer_stack_size);
  cuda_on_cpu_switch(&stack_pointer_, outer_pointer);
  confirm_switch(fake_stack_, &outer_stack, &outer_stack_size);
}

void Fiber::leave_forever() {
  announce_switch(nullptr, outer_stack, outer_stack_size);
  cuda_on_cpu_switch(&stack_pointer_, outer_pointer);
  std::abort();
}

}  // namespace cuda_on_cpu
