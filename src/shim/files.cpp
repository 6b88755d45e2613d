#include "shim/files.hpp"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shim/engine.hpp"
#include "shim/real.hpp"
#include "shim/sharing.hpp"

namespace ring3::shim {
namespace {

constexpr unsigned kChunk = 1024, kChunks = 1024;  // the kernel's own limit on descriptors is 2^20 as a rule

struct Chunk {
  File* files[kChunk];
};
Chunk* g_chunks[kChunks];  // atomic, set once
bool g_any = false;        // atomic
File* g_free = nullptr;    // guarded by g_mutex
pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;
uint32_t g_process = 1;
pid_t g_pid = 0;

File** slot(int fd) {
  if (fd < 0 || static_cast<unsigned>(fd) >= kChunk * kChunks) return nullptr;
  Chunk* c = __atomic_load_n(&g_chunks[static_cast<unsigned>(fd) / kChunk], __ATOMIC_ACQUIRE);
  return c == nullptr ? nullptr : &c->files[static_cast<unsigned>(fd) % kChunk];
}

/// Precondition: TableLock. Null without memory.
File** make_slot(int fd) {
  if (fd < 0 || static_cast<unsigned>(fd) >= kChunk * kChunks) return nullptr;
  Chunk*& place = g_chunks[static_cast<unsigned>(fd) / kChunk];
  if (place == nullptr) {
    Chunk* c = static_cast<Chunk*>(::calloc(1, sizeof(Chunk)));
    if (c == nullptr) return nullptr;
    __atomic_store_n(&place, c, __ATOMIC_RELEASE);
  }
  return slot(fd);
}

/// Whether this is a child of vfork(2) or clone(2): its descriptors are its own, this memory perhaps its parent's.
bool foreign_process() { return g_pid != 0 && ::getpid() != g_pid; }

void before_fork() { pthread_mutex_lock(&g_mutex); }
void after_fork_parent() { pthread_mutex_unlock(&g_mutex); }
void after_fork_child() {
  g_process++;
  g_pid = ::getpid();
  pthread_mutex_unlock(&g_mutex);
}

}  // namespace

TableLock::TableLock() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &saved_);
  pthread_mutex_lock(&g_mutex);
}
TableLock::~TableLock() {
  pthread_mutex_unlock(&g_mutex);
  pthread_sigmask(SIG_SETMASK, &saved_, nullptr);
}

bool any_files() { return __atomic_load_n(&g_any, __ATOMIC_ACQUIRE); }
uint32_t process_generation() { return __atomic_load_n(&g_process, __ATOMIC_RELAXED); }
void watch_forks() { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

File* find(int fd) {
  if (!any_files()) return nullptr;
  File** s = slot(fd);
  if (s == nullptr) return nullptr;
  for (;;) {
    File* file = __atomic_load_n(s, __ATOMIC_ACQUIRE);
    if (file == nullptr) return nullptr;
    uint32_t n = __atomic_load_n(&file->references, __ATOMIC_RELAXED);
    while (n != 0) {
      if (__atomic_compare_exchange_n(&file->references, &n, n + 1, true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        // It may have been recycled between the two looks.
        if (__atomic_load_n(s, __ATOMIC_ACQUIRE) == file) return file;
        release(file);
        break;
      }
    }
  }
}

void release(File* file) {
  if (__atomic_sub_fetch(&file->references, 1, __ATOMIC_ACQ_REL) != 0) return;
  // Nobody has it any more, and nobody can get it: the count is zero.
  if (file->object != nullptr && (file->kind == Kind::System || file->process == process_generation())) {
    if (file->kind == Kind::Vm) forget_vm(file->object);
    engine().close(file->object);
  }
  file->object = nullptr;
  const TableLock lock;
  file->next_free = g_free;
  g_free = file;
}

int install(Kind kind, ring3_kvm* object, const char* name, bool cloexec) {
  int fd = ::memfd_create(name, MFD_ALLOW_SEALING | (cloexec ? MFD_CLOEXEC : 0u));
  int error = fd < 0 ? errno : 0;
  File* old = nullptr;
  if (error == 0) {
    real::fcntl(fd, F_ADD_SEALS, reinterpret_cast<void*>(F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL));
    const TableLock lock;
    if (g_pid == 0) g_pid = ::getpid();
    File* file = g_free;
    if (file != nullptr) {
      g_free = file->next_free;
    } else {
      file = static_cast<File*>(::calloc(1, sizeof(File)));
    }
    File** s = file == nullptr ? nullptr : make_slot(fd);
    if (s == nullptr) {
      if (file != nullptr) {
        file->next_free = g_free;
        g_free = file;
      }
      error = file == nullptr ? ENOMEM : EMFILE;
    } else {
      file->kind = kind;
      file->process = g_process;
      file->object = object;
      file->has_sigmask = false;
      __atomic_store_n(&file->references, 1, __ATOMIC_RELEASE);
      // Not null when the number was closed without our seeing it.
      old = __atomic_exchange_n(s, file, __ATOMIC_ACQ_REL);
      __atomic_store_n(&g_any, true, __ATOMIC_RELEASE);
    }
  }
  if (old != nullptr) release(old);
  if (error != 0) {
    if (fd >= 0) real::close(fd);
    engine().close(object);
    return -error;
  }
  return fd;
}

void duplicated(int fd, int copy) {
  File* file = find(fd);  // its reference becomes the new number's
  File* old = nullptr;
  {
    const TableLock lock;
    File** s = file == nullptr ? slot(copy) : make_slot(copy);
    if (s != nullptr) {
      old = __atomic_exchange_n(s, file, __ATOMIC_ACQ_REL);
      file = nullptr;
    }
  }
  if (file != nullptr) release(file);
  if (old != nullptr) release(old);
}

void closing(int fd) {
  if (!any_files()) return;
  File** s = slot(fd);
  if (s == nullptr || __atomic_load_n(s, __ATOMIC_ACQUIRE) == nullptr || foreign_process()) return;
  File* file;
  {
    const TableLock lock;
    file = __atomic_exchange_n(s, nullptr, __ATOMIC_ACQ_REL);
  }
  if (file != nullptr) release(file);
}

void closing_range(unsigned first, unsigned last) {
  if (!any_files()) return;
  for (unsigned c = first / kChunk; c < kChunks && c <= last / kChunk; c++) {
    if (__atomic_load_n(&g_chunks[c], __ATOMIC_ACQUIRE) == nullptr) continue;
    for (unsigned i = 0; i < kChunk; i++) {
      const unsigned fd = c * kChunk + i;
      if (fd >= first && fd <= last) closing(static_cast<int>(fd));
    }
  }
}

}  // namespace ring3::shim
