#pragma once
#include <stddef.h>

#include "ring3/ring3.h"

/// Guest memory that host windows can map a second time: private anonymous memory of the VMM's, which no system call maps twice, becomes
/// shared anonymous memory at the same address, with its contents, when it becomes a memslot; the engine is told.
///
/// Only memory that the program has kept out of its children (MADV_DONTFORK), so that nobody sees the difference at fork(2); of
/// 16 MiB or more; without userfaultfd. MADV_DONTNEED gives zeroes there as before: the hook of madvise(2) sees to it. Before it is
/// unmapped, mapped anew, protected, or given to userfaultfd the engine takes it out of its windows, for good; all of it when a part goes to
/// userfaultfd, which must not wait for a vCPU that waits for a page.
/// Not with the engine option windows=0, nor where the engine uses no windows.
///
/// Threading: any. What other threads do with the memory while it becomes shared: make_shared().
/// Errors:    none: what cannot be shared stays as it was.
namespace ring3::shim {

/// Before KVM_SET_USER_MEMORY_REGION of a VM. region: its argument, which may be a bad pointer.
void share_region(ring3_kvm* vm, const void* region);

/// The VM is about to be closed.
void forget_vm(ring3_kvm* vm);

/// The program asks for madvise(2). True: it is done, and *result its answer.
bool advise_shared(void* address, size_t length, int advice, int* result);

/// The program is about to unmap or replace what is there.
void forget_shared(const void* address, size_t length);

/// What is there keeps being that memory, but accesses to it get a meaning that only this address has.
void withdraw_shared(const void* address, size_t length);

/// An ioctl(2) of userfaultfd is about to be made.
void watch_userfaultfd(unsigned long request, const void* arg);

}  // namespace ring3::shim
