#include "shim/real.hpp"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

namespace ring3::shim {

void* find_real(const char* name, void** slot) {
  void* p = ::dlsym(RTLD_NEXT, name);
  if (p == nullptr) {
    // A libc without a function that it is asked for: there is nothing to go on with.
    const char* text[] = {"ring3-shim: the C library lacks ", name, "\n"};
    for (const char* t : text) {
      [[maybe_unused]] const ssize_t n = ::write(2, t, ::strlen(t));
    }
    ::_exit(127);
  }
  __atomic_store_n(slot, p, __ATOMIC_RELEASE);
  return p;
}

namespace real {
#define RING3_REAL(name) constinit decltype(name) name(#name)
RING3_REAL(ioctl);
RING3_REAL(open);
RING3_REAL(openat);
RING3_REAL(fopen);
RING3_REAL(close);
RING3_REAL(pthread_cancel);
RING3_REAL(close_range);
RING3_REAL(dup);
RING3_REAL(dup2);
RING3_REAL(dup3);
RING3_REAL(fcntl);
RING3_REAL(mmap);
RING3_REAL(munmap);
RING3_REAL(mremap);
RING3_REAL(madvise);
RING3_REAL(mprotect);
RING3_REAL(prctl);
RING3_REAL(syscall);
RING3_REAL(sigaction);
RING3_REAL(access);
RING3_REAL(faccessat);
RING3_REAL(stat);
RING3_REAL(fstatat);
RING3_REAL(statx);
RING3_REAL(execve);
RING3_REAL(execvpe);
RING3_REAL(fexecve);
RING3_REAL(posix_spawn);
RING3_REAL(posix_spawnp);
#undef RING3_REAL

void resolve_early() {
  ioctl.resolve();
  close.resolve();
  close_range.resolve();
  dup2.resolve();
  fcntl.resolve();
  sigaction.resolve();
  execve.resolve();
  execvpe.resolve();
  syscall.resolve();
}
}  // namespace real

}  // namespace ring3::shim
