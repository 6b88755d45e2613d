#pragma once
#include <stddef.h>

/// Guest memory that host windows can map a second time (engine option `windows`): private anonymous memory of the VMM's, which no
/// system call maps twice, becomes shared anonymous memory at the same address, with its contents, when it becomes a memslot.
///
/// Only memory that the program has kept out of its children (MADV_DONTFORK), so that nobody sees the difference at fork(2); of
/// 16 MiB or more; without userfaultfd. MADV_DONTNEED gives zeroes there as before: the hook of madvise(2) sees to it.
/// Threading: any. A thread that writes to the memory while it becomes a memslot for the first time may lose what it writes.
/// Errors:    none: what cannot be shared stays as it was.
namespace ring3::shim {

/// Before KVM_SET_USER_MEMORY_REGION. region: its argument, which may be a bad pointer.
void share_region(const void* region);

/// The program asks for madvise(2), which follows: true: it is done, and *result its answer.
bool advise_shared(void* address, size_t length, int advice, int* result);

/// The program is about to unmap or replace what is there.
void forget_shared(const void* address, size_t length);

}  // namespace ring3::shim
