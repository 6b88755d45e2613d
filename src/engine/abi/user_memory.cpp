#include "engine/abi/user_memory.hpp"

#include "engine/interp/host_fault.hpp"

// RDI, RSI: to, from; RDX: bytes. EAX: 0, or what the fault handler puts there when a byte could not be copied.
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".hidden ring3_user_copy, ring3_user_copy_begin, ring3_user_copy_end, ring3_user_copy_fault\n"
    ".globl ring3_user_copy, ring3_user_copy_begin, ring3_user_copy_end, ring3_user_copy_fault\n"
    ".type ring3_user_copy, @function\n"
    "ring3_user_copy:\n"
    "  mov %rdx, %rcx\n"
    "  xor %eax, %eax\n"
    "  cmp $1, %rdx\n"
    "ring3_user_copy_begin:\n"
    "  jne 1f\n"
    "  movzbl (%rsi), %ecx\n"
    "  movb %cl, (%rdi)\n"
    "  ret\n"
    "1: rep movsb\n"
    "ring3_user_copy_end:\n"
    "  ret\n"
    "ring3_user_copy_fault:\n"
    "  ret\n"
    ".size ring3_user_copy, .-ring3_user_copy\n");

extern "C" {
ring3::u64 ring3_user_copy(void* to, const void* from, ring3::u64 size);
extern const ring3::u8 ring3_user_copy_begin[], ring3_user_copy_end[], ring3_user_copy_fault[];
}

namespace ring3::engine::abi {

std::shared_ptr<const void> guard_user_copies() {
  return std::make_shared<HostFaultRange>(ring3_user_copy_begin, ring3_user_copy_end, ring3_user_copy_fault,
                                          ring3_user_copy_fault);
}

bool copy_bytes_in(u64 address, void* to, u64 size) {
  // SAFETY: the VMM's own memory; a byte that is not there stops the copy.
  return size == 0 || (user_pointer(address, size) && ring3_user_copy(to, reinterpret_cast<const void*>(address), size) == 0);
}

bool copy_bytes_out(u64 address, const void* from, u64 size) {
  return size == 0 || (user_pointer(address, size) && ring3_user_copy(reinterpret_cast<void*>(address), from, size) == 0);
}

}  // namespace ring3::engine::abi
