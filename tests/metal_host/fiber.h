// Fibers: one stack each, switched by hand because swapcontext makes a system call.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
asm(R"(
.text
.globl host_switch
.type host_switch,@function
host_switch:
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
.size host_switch,.-host_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl host_switch
.type host_switch,@function
host_switch:
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
.size host_switch,.-host_switch
)");
#else
#error "no fiber switch for this processor"
#endif

extern "C" void host_switch(void** save, void* to);

// The stack pointer of a fiber that has not run yet and will start in `entry`.
inline void* fiber_start(char* stack, size_t bytes, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(63);
#if defined(__x86_64__)
  // Six saved registers and the address to return to; a zero above it ends backtraces.
  uintptr_t* sp = reinterpret_cast<uintptr_t*>(top) - 8;
  for (int i = 0; i < 8; i++) {
    sp[i] = 0;
  }
  sp[6] = reinterpret_cast<uintptr_t>(entry);
#else
  uintptr_t* sp = reinterpret_cast<uintptr_t*>(top) - 20;
  for (int i = 0; i < 20; i++) {
    sp[i] = 0;
  }
  sp[11] = reinterpret_cast<uintptr_t>(entry);
#endif
  return sp;
}
