#include "shim/convert.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim/heap.hpp"
#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr size_t kPage = 4096, kLarge = 2 << 20, kLeast = 16 << 20;
/// So much is twice in memory at a time.
constexpr size_t kChunk = 64 << 20;

/// The lines of a file of /proc.
class Lines {
 public:
  explicit Lines(const char* path) : file_(real::fopen(path, "re")) {}
  ~Lines() {
    ::free(line_);
    if (file_ != nullptr) ::fclose(file_);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  const char* next() { return file_ != nullptr && ::getline(&line_, &room_, file_) > 0 ? line_ : nullptr; }

 private:
  FILE* file_;
  char* line_ = nullptr;
  size_t room_ = 0;
};

/// A line of /proc/self/maps, which also begins what /proc/self/smaps has of a mapping.
struct Header {
  unsigned long begin = 0, end = 0;
  bool eligible = false;
  bool parse(const char* line) {
    unsigned long inode;
    char rights[5];
    int name = 0;
    if (::sscanf(line, "%lx-%lx %4s %*x %*x:%*x %lu %n", &begin, &end, rights, &inode, &name) != 4) return false;
    // Anonymous memory may bear a name, "[anon:...]"; the heap and the stack are others.
    const bool nameless = line[name] == 0 || line[name] == '\n' || strncmp(line + name, "[anon:", 6) == 0;
    eligible = strcmp(rights, "rw-p") == 0 && inode == 0 && nameless && end - begin >= kLeast;
    return true;
  }
};

/// The short list, which costs nothing for the pages that a mapping has.
bool any_eligible(uintptr_t from, uintptr_t to) {
  Lines lines("/proc/self/maps");
  Header h;
  for (const char* line = lines.next(); line != nullptr && h.parse(line) && h.begin < to; line = lines.next()) {
    if (h.eligible && from < h.end) return true;
  }
  return false;
}

bool is_zero(const char* page) {
  const auto* words = reinterpret_cast<const uint64_t*>(page);
  for (size_t i = 0; i < kPage / sizeof *words; i++) {
    if (words[i] != 0) return false;
  }
  return true;
}

/// What the pages of [begin, begin + length) hold, to `to`. Those that nobody has touched stay so at both ends.
bool copy_touched(int pagemap, uintptr_t begin, size_t length, char* to) {
  uint64_t entries[512];  // proc_pid_pagemap(5): bit 63 present, bit 62 in swap
  const uintptr_t end = begin + length;
  for (uintptr_t at = begin; at < end;) {
    const size_t left = (end - at) / kPage, pages = left < 512 ? left : 512;
    if (::pread(pagemap, entries, pages * 8, static_cast<off_t>(at / kPage * 8)) != static_cast<ssize_t>(pages * 8)) return false;
    for (size_t i = 0; i < pages; i++, at += kPage) {
      const char* from = reinterpret_cast<const char*>(at);
      if (entries[i] >> 62 != 0 && !is_zero(from)) memcpy(to + (at - begin), from, kPage);
    }
  }
  return true;
}

/// Memory for every page, now.
bool populate(char* begin, size_t length) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14
  if (real::madvise(begin, length, kPopulateWrite) == 0) return true;
  if (errno != EINVAL) return false;
  for (size_t at = 0; at < length; at += kPage) *static_cast<volatile char*>(begin + at) = 0;
  return true;
}

/// The NUMA policy of what is at place, for fresh.
bool keep_policy(const void* place, void* fresh, size_t length) {
  constexpr unsigned kNodes = 1024;
  unsigned long nodes[kNodes / (8 * sizeof(long))] = {};
  int mode = MPOL_DEFAULT;
  const auto word = [](const void* p) { return reinterpret_cast<long>(p); };
  if (real::syscall(SYS_get_mempolicy, word(&mode), word(nodes), kNodes + 1, word(place), MPOL_F_ADDR, 0) != 0 || mode == MPOL_DEFAULT) return true;
  return real::syscall(SYS_mbind, word(fresh), static_cast<long>(length), mode, word(nodes), kNodes + 1, 0) == 0;
}

/// While it stands, whoever touches a page of the memory that is not there waits for the end of it.
class Gate {
 public:
  Gate(uintptr_t begin, size_t length) {
    if (filtered()) return;  // the filter may end the program for the question
    fd_ = make(0);
    if (fd_ < 0) fd_ = from_device();
    if (fd_ < 0) fd_ = make(UFFD_USER_MODE_ONLY);
    uffdio_api api = {};
    api.api = UFFD_API;
    uffdio_register all = {};
    all.range = {begin, length};
    all.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (fd_ < 0 || (real::ioctl(fd_, UFFDIO_API, &api) == 0 && real::ioctl(fd_, UFFDIO_REGISTER, &all) == 0)) return;
    real::close(fd_);
    fd_ = -1;
  }
  ~Gate() {
    if (fd_ >= 0) real::close(fd_);
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  bool stands() const { return fd_ >= 0; }

 private:
  static int make(int flags) { return static_cast<int>(real::syscall(SYS_userfaultfd, O_CLOEXEC | flags, 0, 0, 0, 0, 0)); }
  static int from_device() {
    const int device = real::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (device < 0) return -1;
    const int fd = real::ioctl(device, USERFAULTFD_IOC_NEW, reinterpret_cast<void*>(O_CLOEXEC));
    real::close(device);
    return fd;
  }
  int fd_ = -1;
};

/// Addresses for one chunk, where large pages lie as they do at `like`.
class Aside {
 public:
  explicit Aside(uintptr_t like) : all_(real::mmap(nullptr, kChunk + kLarge, PROT_NONE, kFlags, -1, 0)) {
    if (all_ != MAP_FAILED) at_ = reinterpret_cast<char*>(all_) + (like - reinterpret_cast<uintptr_t>(all_)) % kLarge;
  }
  ~Aside() {
    if (all_ != MAP_FAILED) real::munmap(all_, kChunk + kLarge);
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
  char* at() const { return at_; }

  /// The pages of place go here; none are there then. False: nothing has changed.
  bool take(char* place, size_t length) {
    return at_ != nullptr && real::mremap(place, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, at_) != MAP_FAILED;
  }
  void give_back(char* place, size_t length) {
    (void)real::mremap(at_, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    drop(length);
  }
  void drop(size_t length) { (void)real::mmap(at_, length, PROT_NONE, kFlags | MAP_FIXED, -1, 0); }

 private:
  static constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* all_;
  char* at_ = nullptr;
};

bool move_chunk(int pagemap, const Gate& gate, Aside* aside, const PrivateMapping& m, char* place, char* fresh, size_t length) {
  if (m.full && !populate(fresh, length)) return false;
  const bool taken = gate.stands() && aside->take(place, length);
  const bool good = copy_touched(pagemap, reinterpret_cast<uintptr_t>(taken ? aside->at() : place), length, fresh) &&
                    real::mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place) != MAP_FAILED;
  if (taken) good ? aside->drop(length) : aside->give_back(place, length);
  return good;
}

/// A handler of this thread's that touched the memory would wait for itself.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }
  NoSignals(const NoSignals&) = delete;
  NoSignals& operator=(const NoSignals&) = delete;

 private:
  sigset_t saved_;
};

}  // namespace

unsigned find_private(uintptr_t from, uintptr_t to, PrivateMapping* out, unsigned most) {
  if (!any_eligible(from, to)) return 0;
  Lines lines("/proc/self/smaps");
  unsigned n = 0;
  bool candidate = false;
  PrivateMapping m;
  unsigned long own_kib = 0;
  for (const char* line = lines.next(); line != nullptr && n < most; line = lines.next()) {
    Header h;
    if (h.parse(line)) {
      if (h.begin >= to) break;
      m = {};
      m.begin = h.begin;
      m.end = h.end;
      own_kib = 0;
      candidate = h.eligible && from < h.end;
      continue;
    }
    unsigned long kib = 0;
    if (!candidate) continue;
    if (::sscanf(line, "Anonymous: %lu kB", &kib) == 1 || ::sscanf(line, "Swap: %lu kB", &kib) == 1) own_kib += kib;
    if (strncmp(line, "VmFlags:", 8) != 0) continue;
    const auto has = [line](const char* flag) { return strstr(line, flag) != nullptr; };
    // Not: userfaultfd's, hugetlbfs', devices'.
    if (!has(" dc") || has(" um") || has(" uw") || has(" ui") || has(" ht") || has(" io") || has(" pf")) continue;
    m.accounted = has(" ac");
    m.dumped = !has(" dd");
    m.huge = has(" hg");
    m.locked = has(" lo");
    m.full = own_kib >= (m.end - m.begin) / 1024;
    out[n++] = m;
  }
  return n;
}

size_t make_shared(const PrivateMapping& m) {
  const size_t length = m.end - m.begin;
  char* const place = reinterpret_cast<char*>(m.begin);
  const int pagemap = real::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
  if (pagemap < 0) return 0;
  void* const fresh = real::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | (m.accounted ? 0 : MAP_NORESERVE), -1, 0);
  size_t done = 0;
  if (fresh != MAP_FAILED) {
    const bool ready = real::madvise(fresh, length, MADV_DONTFORK) == 0 && keep_policy(place, fresh, length);
    if (!m.dumped) (void)real::madvise(fresh, length, MADV_DONTDUMP);
    if (m.huge) (void)real::madvise(fresh, length, MADV_HUGEPAGE);
    {
      const NoSignals quiet;
      const Gate gate(m.begin, length);
      Aside aside(m.begin);
      while (ready && done < length) {
        const size_t n = length - done < kChunk ? length - done : kChunk;
        if (!move_chunk(pagemap, gate, &aside, m, place + done, static_cast<char*>(fresh) + done, n)) break;
        done += n;
      }
    }
    if (done < length) real::munmap(static_cast<char*>(fresh) + done, length - done);
    if (m.locked && done != 0) (void)::mlock(place, done);
  }
  real::close(pagemap);
  return done;
}

}  // namespace ring3::shim
