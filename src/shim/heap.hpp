#pragma once

/// The heap of a program that forbids itself brk(2).
///
/// A VMM needs little memory while the kernel runs its guests, and its seccomp filter may say so; the engine does need some. glibc's
/// malloc asks brk for it, and mmap where brk refuses: once a program that uses KVM has a filter, brk refuses without
/// being called. A filter that forbids mmap too leaves nothing to ask.
/// Threading: any thread.
namespace ring3::shim {

/// Before a system call, or prctl(2) when number is SYS_prctl: one that installs a seccomp filter is remembered.
void watch_filters(long number, long first, long second);
/// Whether the program has one of its own making.
bool filtered();
/// The program has KVM now.
void heap_for_engine();

}  // namespace ring3::shim
