#include "shim/sharing.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "shim/engine.hpp"
#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr size_t kPage = 4096, kLeast = 16 << 20;
constexpr unsigned kMost = 32;

struct Range {
  uintptr_t begin = 0, end = 0;
  ring3_kvm* vm = nullptr;  ///< whose engine knows of it; null: none any more
  bool overlaps(uintptr_t from, uintptr_t to) const { return from < end && begin < to; }
};
struct Found : Range {
  bool accounted = false, dumped = true, huge = false, locked = false;
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

/// From the lines of /proc/self/smaps: the parts of [from, to) that may be shared, whole mappings, as many as fit.
unsigned find(uintptr_t from, uintptr_t to, Found* out, unsigned most) {
  FILE* file = real::fopen("/proc/self/smaps", "re");
  if (file == nullptr) return 0;
  unsigned n = 0;
  bool candidate = false;
  Found f;
  char* line = nullptr;
  size_t room = 0;
  while (n < most && ::getline(&line, &room, file) > 0) {
    unsigned long begin, end, inode;
    char rights[5];
    int name = 0;
    if (::sscanf(line, "%lx-%lx %4s %*x %*x:%*x %lu %n", &begin, &end, rights, &inode, &name) == 4) {
      f = {};
      f.begin = begin;
      f.end = end;
      // Anonymous memory may bear a name, "[anon:...]"; the heap and the stack are others.
      const bool nameless = line[name] == 0 || line[name] == '\n' || strncmp(line + name, "[anon:", 6) == 0;
      candidate = strcmp(rights, "rw-p") == 0 && inode == 0 && nameless && f.overlaps(from, to) && end - begin >= kLeast;
      continue;
    }
    if (!candidate || strncmp(line, "VmFlags:", 8) != 0) continue;
    const auto has = [line](const char* flag) { return strstr(line, flag) != nullptr; };
    // Not: userfaultfd's, hugetlbfs', devices'.
    if (!has(" dc") || has(" um") || has(" uw") || has(" ui") || has(" ht") || has(" io") || has(" pf")) continue;
    f.accounted = has(" ac");
    f.dumped = !has(" dd");
    f.huge = has(" hg");
    f.locked = has(" lo");
    out[n++] = f;
  }
  ::free(line);
  ::fclose(file);
  return n;
}

bool is_zero(const char* page) {
  const auto* words = reinterpret_cast<const uint64_t*>(page);
  for (size_t i = 0; i < kPage / sizeof *words; i++) {
    if (words[i] != 0) return false;
  }
  return true;
}

/// What the pages of [begin, end) hold, to `to`. Those that nobody has touched stay so at both ends.
bool copy_touched(uintptr_t begin, uintptr_t end, char* to) {
  const int fd = real::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return false;
  uint64_t entries[512];  // proc_pid_pagemap(5): bit 63 present, bit 62 in swap
  bool good = true;
  for (uintptr_t at = begin; at < end && good;) {
    const size_t left = (end - at) / kPage, pages = left < 512 ? left : 512;
    good = ::pread(fd, entries, pages * 8, static_cast<off_t>(at / kPage * 8)) == static_cast<ssize_t>(pages * 8);
    for (size_t i = 0; i < pages && good; i++, at += kPage) {
      const char* from = reinterpret_cast<const char*>(at);
      if (entries[i] >> 62 != 0 && !is_zero(from)) memcpy(to + (at - begin), from, kPage);
    }
  }
  real::close(fd);
  return good;
}

/// Under g_mutex. The part of s in [begin, end) is not for windows any more.
void withdraw(const Range& s, uintptr_t begin, uintptr_t end) {
  const uintptr_t from = begin > s.begin ? begin : s.begin, to = end < s.end ? end : s.end;
  if (s.vm != nullptr) (void)engine().window_memory(s.vm, reinterpret_cast<void*>(from), to - from, 0);
}

void share(ring3_kvm* vm, const Found& f) {
  const size_t length = f.end - f.begin;
  void* const place = reinterpret_cast<void*>(f.begin);
  void* fresh = real::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | (f.accounted ? 0 : MAP_NORESERVE), -1, 0);
  if (fresh == MAP_FAILED) return;
  if (!copy_touched(f.begin, f.end, static_cast<char*>(fresh)) ||
      real::madvise(fresh, length, MADV_DONTFORK) != 0 ||
      real::mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place) == MAP_FAILED) {
    real::munmap(fresh, length);
    return;
  }
  if (!f.dumped) (void)real::madvise(place, length, MADV_DONTDUMP);
  if (f.huge) (void)real::madvise(place, length, MADV_HUGEPAGE);
  if (f.locked) (void)::mlock(place, length);
  static bool watched = false;
  if (!watched) watched = pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0;
  g_shared[g_count] = {f.begin, f.end, vm};
  __atomic_store_n(&g_count, g_count + 1, __ATOMIC_RELEASE);
  (void)engine().window_memory(vm, place, length, 1);
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
  Found found[kMost];
  const unsigned n = known ? 0 : find(begin, end, found, kMost - g_count);
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
  withdraw_shared(reinterpret_cast<void*>(r.range.start), r.range.len);
}

bool advise_shared(void* address, size_t length, int advice, int* result) {
  if (!any() || (advice != MADV_DONTNEED && advice != MADV_FREE)) return false;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address), end = begin + ((length + kPage - 1) & ~(kPage - 1));
  if (begin % kPage != 0 || end < begin) return false;
  const Lock lock;
  bool inside = false;
  for (unsigned i = 0; i < g_count; i++) {
    const Range& s = g_shared[i];
    if (!s.overlaps(begin, end)) continue;
    const uintptr_t from = begin > s.begin ? begin : s.begin, to = end < s.end ? end : s.end;
    (void)real::madvise(reinterpret_cast<void*>(from), to - from, MADV_REMOVE);
    inside = inside || (s.begin <= begin && end <= s.end);
  }
  // Shared memory knows no MADV_FREE: to free at once is what that allows.
  if (inside) *result = 0;
  return inside;
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
