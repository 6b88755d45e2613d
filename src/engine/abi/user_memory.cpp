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
    "ring3_user_copy_begin:\n"
    "  cmp $8, %rdx\n"
    "  je 8f\n"
    "  cmp $4, %rdx\n"
    "  je 4f\n"
    "  cmp $1, %rdx\n"
    "  je 1f\n"
    "  rep movsb\n"
    "  ret\n"
    "8: mov (%rsi), %rcx\n"
    "  mov %rcx, (%rdi)\n"
    "  ret\n"
    "4: mov (%rsi), %ecx\n"
    "  mov %ecx, (%rdi)\n"
    "  ret\n"
    "1: movzbl (%rsi), %ecx\n"
    "  movb %cl, (%rdi)\n"
    "ring3_user_copy_end:\n"
    "  ret\n"
    "ring3_user_copy_fault:\n"
    "  ret\n"
    ".size ring3_user_copy, .-ring3_user_copy\n"
    // RDI: a byte; ESI: bits to set in it. EAX: the byte before, or a number above 255 when it is not there.
    ".p2align 4\n"
    ".hidden ring3_user_or, ring3_user_or_begin, ring3_user_or_end, ring3_user_or_fault\n"
    ".globl ring3_user_or, ring3_user_or_begin, ring3_user_or_end, ring3_user_or_fault\n"
    ".type ring3_user_or, @function\n"
    "ring3_user_or:\n"
    "ring3_user_or_begin:\n"
    "  movzbl (%rdi), %eax\n"
    "1: mov %eax, %edx\n"
    "  or %esi, %edx\n"
    "  lock cmpxchgb %dl, (%rdi)\n"
    "  jne 1b\n"
    "ring3_user_or_end:\n"
    "  ret\n"
    "ring3_user_or_fault:\n"
    "  mov $0x100, %eax\n"
    "  ret\n"
    ".size ring3_user_or, .-ring3_user_or\n");

extern "C" {
ring3::u64 ring3_user_copy(void* to, const void* from, ring3::u64 size);
extern const ring3::u8 ring3_user_copy_begin[], ring3_user_copy_end[], ring3_user_copy_fault[];
ring3::u32 ring3_user_or(ring3::u8* at, ring3::u32 bits);
extern const ring3::u8 ring3_user_or_begin[], ring3_user_or_end[], ring3_user_or_fault[];
}

namespace ring3::engine::abi {

namespace {
struct Guards {
  HostFaultRange copy{ring3_user_copy_begin, ring3_user_copy_end, ring3_user_copy_fault, ring3_user_copy_fault};
  HostFaultRange bits{ring3_user_or_begin, ring3_user_or_end, ring3_user_or_fault, ring3_user_or_fault};
};
}  // namespace

std::shared_ptr<const void> guard_user_copies() { return std::make_shared<Guards>(); }

bool copy_bytes_in(u64 address, void* to, u64 size) {
  // SAFETY: the VMM's own memory; a byte that is not there stops the copy.
  return size == 0 || (user_pointer(address, size) && ring3_user_copy(to, reinterpret_cast<const void*>(address), size) == 0);
}

bool copy_bytes_out(u64 address, const void* from, u64 size) {
  return size == 0 || (user_pointer(address, size) && ring3_user_copy(reinterpret_cast<void*>(address), from, size) == 0);
}

int set_bits(u64 address, u8 bits) {
  if (!user_pointer(address)) return -1;
  const u32 before = ring3_user_or(reinterpret_cast<u8*>(address), bits);
  return before > 0xff ? -1 : static_cast<int>(before);
}

}  // namespace ring3::engine::abi
