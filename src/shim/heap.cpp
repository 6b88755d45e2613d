#include "shim/heap.hpp"

#include <linux/seccomp.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

/// glibc's: the end of the heap as the last brk(2) left it; null before the first.
extern "C" __attribute__((weak)) void* __curbrk;

namespace ring3::shim {
namespace {

bool g_filtered = false, g_engine = false;  // atomic

/// sbrk() of this process fails with ENOMEM from now on; what it has given out stays.
void leave_brk() {
  if (!__atomic_load_n(&g_filtered, __ATOMIC_SEQ_CST) || !__atomic_load_n(&g_engine, __ATOMIC_SEQ_CST) || &__curbrk == nullptr) return;
  // An end from where no heap can grow: sbrk() sees that it would pass the last address, and does not ask the kernel.
  __atomic_store_n(&__curbrk, reinterpret_cast<void*>(UINTPTR_MAX & ~uintptr_t{0xfff}), __ATOMIC_SEQ_CST);
}

}  // namespace

void watch_filters(long number, long first, long second) {
  const bool filter = number == SYS_seccomp ? first == SECCOMP_SET_MODE_FILTER
                                            : number == SYS_prctl && first == PR_SET_SECCOMP && second == SECCOMP_MODE_FILTER;
  if (!filter) return;
  __atomic_store_n(&g_filtered, true, __ATOMIC_SEQ_CST);
  leave_brk();
}

bool filtered() { return __atomic_load_n(&g_filtered, __ATOMIC_SEQ_CST); }

void heap_for_engine() {
  __atomic_store_n(&g_engine, true, __ATOMIC_SEQ_CST);
  leave_brk();
}

}  // namespace ring3::shim
