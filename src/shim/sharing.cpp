#include "shim/sharing.hpp"

#include <errno.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "shim/convert.hpp"
#include "shim/engine.hpp"
#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr size_t kPage = 4096;
constexpr unsigned kMost = 32;

struct Range {
  uintptr_t begin = 0, end = 0;
  ring3_kvm* vm = nullptr;  ///< whose engine knows of it; null: none any more
  bool overlaps(uintptr_t from, uintptr_t to) const { return from < end && begin < to; }
};

pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;
Range g_shared[kMost];  // guarded by g_mutex
unsigned g_count = 0;   // atomic, written under g_mutex

class Lock {
 public:
  Lock() { pthread_mutex_lock(&g_mutex); }
  ~Lock() { pthread_mutex_unlock(&g_mutex); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

void before_fork() { pthread_mutex_lock(&g_mutex); }
void after_fork_parent() { pthread_mutex_unlock(&g_mutex); }
void after_fork_child() {
  g_count = 0;  // a child has none of it
  pthread_mutex_unlock(&g_mutex);
}

bool any() { return __atomic_load_n(&g_count, __ATOMIC_ACQUIRE) != 0; }

/// Under g_mutex. The part of s in [begin, end) is not for windows any more.
void withdraw(const Range& s, uintptr_t begin, uintptr_t end) {
  const uintptr_t from = begin > s.begin ? begin : s.begin, to = end < s.end ? end : s.end;
  if (s.vm != nullptr) (void)engine().window_memory(s.vm, reinterpret_cast<void*>(from), to - from, 0);
}

void share(ring3_kvm* vm, const PrivateMapping& m) {
  static bool watched = false;
  if (!watched) watched = pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0;
  const size_t length = make_shared(m);
  if (length == 0) return;
  g_shared[g_count] = {m.begin, m.begin + length, vm};
  __atomic_store_n(&g_count, g_count + 1, __ATOMIC_RELEASE);
  (void)engine().window_memory(vm, reinterpret_cast<void*>(m.begin), length, 1);
}

}  // namespace

void share_region(ring3_kvm* vm, const void* region) {
  if (engine().window_memory(vm, nullptr, 0, 1) != 0) return;
  kvm_userspace_memory_region r;
  const iovec to = {&r, sizeof r}, from = {const_cast<void*>(region), sizeof r};
  if (::process_vm_readv(::getpid(), &to, 1, &from, 1, 0) != static_cast<ssize_t>(sizeof r)) return;
  const uintptr_t begin = r.userspace_addr, end = begin + r.memory_size;
  if (end <= begin || begin % kPage != 0 || end % kPage != 0) return;
  const int error = errno;
  const Lock lock;
  bool known = false;
  for (unsigned i = 0; i < g_count; i++) known = known || (g_shared[i].begin <= begin && end <= g_shared[i].end);
  PrivateMapping found[kMost];
  const unsigned n = known ? 0 : find_private(begin, end, found, kMost - g_count);
  for (unsigned i = 0; i < n; i++) share(vm, found[i]);
  errno = error;
}

void forget_vm(ring3_kvm* vm) {
  if (!any()) return;
  const Lock lock;
  for (unsigned i = 0; i < g_count; i++) {
    if (g_shared[i].vm != vm) continue;
    withdraw(g_shared[i], g_shared[i].begin, g_shared[i].end);
    g_shared[i].vm = nullptr;
  }
}

void withdraw_shared(const void* address, size_t length) {
  if (!any()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + length;
  const Lock lock;
  for (unsigned i = 0; i < g_count; i++) {
    if (g_shared[i].overlaps(begin, end)) withdraw(g_shared[i], begin & ~(kPage - 1), (end + kPage - 1) & ~(kPage - 1));
  }
}

void watch_userfaultfd(unsigned long request, const void* arg) {
  if (request != UFFDIO_REGISTER || !any()) return;
  uffdio_register r;
  const iovec to = {&r, sizeof r}, from = {const_cast<void*>(arg), sizeof r};
  if (::process_vm_readv(::getpid(), &to, 1, &from, 1, 0) != static_cast<ssize_t>(sizeof r)) return;
  const Lock lock;
  bool ours = false;
  for (unsigned i = 0; i < g_count; i++) ours = ours || g_shared[i].overlaps(r.range.start, r.range.start + r.range.len);
  // All of it: later, a vCPU may wait for this very thread to bring a page, and could not be waited for here.
  for (unsigned i = 0; i < g_count && ours; i++) withdraw(g_shared[i], g_shared[i].begin, g_shared[i].end);
}

bool advise_shared(void* address, size_t length, int advice, int* result) {
  if (!any() || (advice != MADV_DONTNEED && advice != MADV_FREE)) return false;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + ((length + kPage - 1) & ~(kPage - 1));
  if (begin % kPage != 0 || end < begin) return false;
  const Lock lock;
  for (unsigned i = 0; i < g_count; i++) {
    const Range& s = g_shared[i];
    if (!s.overlaps(begin, end)) continue;
    const uintptr_t from = begin > s.begin ? begin : s.begin, to = end < s.end ? end : s.end;
    // Shared memory knows no MADV_FREE: to free at once is what that allows. What is locked takes neither (EINVAL).
    const int answer = real::madvise(reinterpret_cast<void*>(from), to - from, MADV_REMOVE);
    if (s.begin > begin || end > s.end) continue;
    *result = answer;
    return true;
  }
  return false;
}

void forget_shared(const void* address, size_t length) {
  if (!any()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + ((length + kPage - 1) & ~(kPage - 1));
  const Lock lock;
  for (unsigned i = 0; i < g_count; i++) {
    Range& s = g_shared[i];
    if (!s.overlaps(begin, end)) continue;
    withdraw(s, begin, end);
    // What stays on either side: a range for each, as long as there is room; without one it is not zeroed by advice any more.
    const Range behind = {end, s.end, s.vm};
    if (begin > s.begin) {
      s.end = begin;
      if (behind.begin < behind.end && g_count < kMost) {
        g_shared[g_count] = behind;
        __atomic_store_n(&g_count, g_count + 1, __ATOMIC_RELEASE);
      }
    } else if (behind.begin < behind.end) {
      s = behind;
    } else {
      s = g_shared[g_count - 1];
      __atomic_store_n(&g_count, g_count - 1, __ATOMIC_RELEASE);
      i--;
    }
  }
}

}  // namespace ring3::shim
