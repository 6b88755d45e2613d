// The functions of libc that are interposed, each as thin as can be: what is none of KVM's goes on to the real one.
// Their names and types are libc's; the headers that declare them as inline functions of another name are kept out.
#undef _FORTIFY_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "shim/cancel.hpp"
#include "shim/engine.hpp"
#include "shim/exec.hpp"
#include "shim/heap.hpp"
#include "shim/kvm.hpp"
#include "shim/reach.hpp"
#include "shim/real.hpp"
#include "shim/sharing.hpp"
#include "shim/signals.hpp"

using namespace ring3::shim;

#define HOOK extern "C" __attribute__((visibility("default")))

namespace {

template <class T>
T answer(long result) {
  if (result < 0 && result > -4096) {
    errno = static_cast<int>(-result);
    return static_cast<T>(-1);
  }
  return static_cast<T>(result);
}

int open_at(int dir, const char* path, int flags, unsigned mode) {
  if (is_kvm_path(path)) return answer<int>(open_system(flags));
  return real::openat(dir, path, flags, mode);
}

int open_path(const char* path, int flags, unsigned mode) {
  if (is_kvm_path(path)) return answer<int>(open_system(flags));
  return real::open(path, flags, mode);
}

unsigned mode_of(int flags, va_list list) {
  return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, unsigned) : 0;
}

void* map(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (fd >= 0 && !(flags & MAP_ANONYMOUS)) {
    if (File* file = find(fd)) {
      const long result = mmap_of(file, address, length, protection, flags, offset);
      release(file);
      if (result < 0 && result > -4096) {
        errno = static_cast<int>(-result);
        return MAP_FAILED;
      }
      return reinterpret_cast<void*>(result);
    }
  }
  if (flags & MAP_FIXED) forget_shared(address, length);
  return real::mmap(address, length, protection, flags, fd, offset);
}

/// A character device as the kernel's: 10, 232, for everybody.
int stat_kvm(struct stat* out) {
  if (real::stat("/dev/null", out) != 0) {
    memset(out, 0, sizeof *out);
    out->st_nlink = 1;
    out->st_blksize = 4096;
  }
  out->st_mode = S_IFCHR | 0666;
  out->st_rdev = makedev(10, 232);
  return 0;
}

int access_kvm(int mode) {
  if (mode & ~(R_OK | W_OK | X_OK)) return answer<int>(-EINVAL);
  return mode & X_OK ? answer<int>(-EACCES) : 0;
}

int copied(int fd, int copy) {
  if (copy >= 0 && copy != fd && any_files()) duplicated(fd, copy);
  return copy;
}

int control(int fd, int command, void* arg) {
  const int result = real::fcntl(fd, command, arg);
  return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? copied(fd, result) : result;
}

}  // namespace

// ---- ioctl, mmap ----

HOOK int ioctl(int fd, unsigned long request, ...) {
  va_list list;
  va_start(list, request);
  void* arg = va_arg(list, void*);
  va_end(list);
  if (is_kvm_request(request)) {
    if (File* file = find(fd)) {
      // The kernel takes 32 bits; programs that keep requests in an int pass them sign-extended.
      CancelScope scope(static_cast<unsigned>(request) == KVM_RUN ? file : nullptr);
      const long result = ioctl_on(file, static_cast<unsigned>(request), arg);
      scope.over();
      release(file);
      return answer<int>(result);
    }
  }
  watch_userfaultfd(static_cast<unsigned>(request), arg);
  return real::ioctl(fd, request, arg);
}

// The engine maps and unmaps where none of the program's memory is, on threads that others wait for here.
#define FROM_ENGINE called_by_engine(__builtin_return_address(0))

HOOK void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (FROM_ENGINE) return real::mmap(address, length, protection, flags, fd, offset);
  return map(address, length, protection, flags, fd, offset);
}
HOOK void* mmap64(void* address, size_t length, int protection, int flags, int fd, off64_t offset) {
  if (FROM_ENGINE) return real::mmap(address, length, protection, flags, fd, offset);
  return map(address, length, protection, flags, fd, offset);
}

HOOK int munmap(void* address, size_t length) {
  if (!FROM_ENGINE) forget_shared(address, length);
  return real::munmap(address, length);
}
HOOK void* mremap(void* address, size_t old_length, size_t length, int flags, ...) {
  va_list list;
  va_start(list, flags);
  void* to = flags & MREMAP_FIXED ? va_arg(list, void*) : nullptr;
  va_end(list);
  // With an old length of 0 what is there stays; a mapping that shrinks loses its end, one that moves all of it.
  if (old_length != 0 && !FROM_ENGINE) forget_shared(address, old_length);
  if ((flags & MREMAP_FIXED) && !FROM_ENGINE) forget_shared(to, length);
  return real::mremap(address, old_length, length, flags, to);
}
HOOK int madvise(void* address, size_t length, int advice) {
  int result = 0;
  return !FROM_ENGINE && advise_shared(address, length, advice, &result) ? result : real::madvise(address, length, advice);
}
HOOK int mprotect(void* address, size_t length, int protection) {
  if (!FROM_ENGINE) withdraw_shared(address, length);
  return real::mprotect(address, length, protection);
}

HOOK int pthread_cancel(pthread_t thread) {
  const int error = real::pthread_cancel(thread);
  if (error == 0 && any_files()) cancelled(thread);
  return error;
}

// ---- open ----

HOOK int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const unsigned mode = mode_of(flags, list);
  va_end(list);
  return open_path(path, flags, mode);
}
HOOK int open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const unsigned mode = mode_of(flags, list);
  va_end(list);
  return open_path(path, flags | O_LARGEFILE, mode);
}
HOOK int openat(int dir, const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const unsigned mode = mode_of(flags, list);
  va_end(list);
  return open_at(dir, path, flags, mode);
}
HOOK int openat64(int dir, const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const unsigned mode = mode_of(flags, list);
  va_end(list);
  return open_at(dir, path, flags | O_LARGEFILE, mode);
}
HOOK int __open_2(const char* path, int flags) { return open_path(path, flags, 0); }
HOOK int __open64_2(const char* path, int flags) { return open_path(path, flags | O_LARGEFILE, 0); }
HOOK int __openat_2(int dir, const char* path, int flags) { return open_at(dir, path, flags, 0); }
HOOK int __openat64_2(int dir, const char* path, int flags) { return open_at(dir, path, flags | O_LARGEFILE, 0); }

namespace {
FILE* open_stream(const char* path, const char* mode) {
  if (!is_kvm_path(path)) return real::fopen(path, mode);
  const int fd = answer<int>(open_system(strchr(mode, 'e') != nullptr ? O_CLOEXEC : 0));
  return fd < 0 ? nullptr : ::fdopen(fd, mode);
}
}  // namespace
HOOK FILE* fopen(const char* path, const char* mode) { return open_stream(path, mode); }
HOOK FILE* fopen64(const char* path, const char* mode) { return open_stream(path, mode); }

// ---- close, dup ----

HOOK int close(int fd) {
  closing(fd);
  return real::close(fd);
}
HOOK int close_range(unsigned first, unsigned last, int flags) {
  // With CLOSE_RANGE_CLOEXEC (4) nothing is closed.
  if (!(flags & 4) && first <= last) closing_range(first, last);
  return real::close_range(first, last, flags);
}
HOOK void closefrom(int low) {
  const unsigned first = low < 0 ? 0 : static_cast<unsigned>(low);
  closing_range(first, ~0u);
  if (real::close_range(first, ~0u, 0) == 0) return;
  for (long fd = first, end = ::sysconf(_SC_OPEN_MAX); fd < end; fd++) real::close(static_cast<int>(fd));
}
HOOK int dup(int fd) { return copied(fd, real::dup(fd)); }
HOOK int dup2(int fd, int to) {
  if (fd != to) closing(to);
  return copied(fd, real::dup2(fd, to));
}
HOOK int dup3(int fd, int to, int flags) {
  if (fd != to) closing(to);
  return copied(fd, real::dup3(fd, to, flags));
}
HOOK int fcntl(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* arg = va_arg(list, void*);
  va_end(list);
  return control(fd, command, arg);
}
HOOK int fcntl64(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* arg = va_arg(list, void*);
  va_end(list);
  return control(fd, command, arg);
}

// ---- what programs ask about the path ----

HOOK int access(const char* path, int mode) { return is_kvm_path(path) ? access_kvm(mode) : real::access(path, mode); }
HOOK int eaccess(const char* path, int mode) {
  return is_kvm_path(path) ? access_kvm(mode) : real::faccessat(AT_FDCWD, path, mode, AT_EACCESS);
}
HOOK int euidaccess(const char* path, int mode) {
  return is_kvm_path(path) ? access_kvm(mode) : real::faccessat(AT_FDCWD, path, mode, AT_EACCESS);
}
HOOK int faccessat(int dir, const char* path, int mode, int flags) {
  return is_kvm_path(path) ? access_kvm(mode) : real::faccessat(dir, path, mode, flags);
}

// struct stat and struct stat64 are one on x86-64.
#define STAT64(p) reinterpret_cast<struct stat*>(p)
HOOK int stat(const char* path, struct stat* out) { return is_kvm_path(path) ? stat_kvm(out) : real::stat(path, out); }
HOOK int stat64(const char* path, struct stat64* out) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::stat(path, STAT64(out));
}
HOOK int lstat(const char* path, struct stat* out) {
  return is_kvm_path(path) ? stat_kvm(out) : real::fstatat(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW);
}
HOOK int lstat64(const char* path, struct stat64* out) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::fstatat(AT_FDCWD, path, STAT64(out), AT_SYMLINK_NOFOLLOW);
}
HOOK int fstatat(int dir, const char* path, struct stat* out, int flags) {
  return is_kvm_path(path) ? stat_kvm(out) : real::fstatat(dir, path, out, flags);
}
HOOK int fstatat64(int dir, const char* path, struct stat64* out, int flags) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::fstatat(dir, path, STAT64(out), flags);
}
// The names of glibc before 2.33; version 1 is the only one on x86-64 (0 the kernel's, with the same layout).
HOOK int __xstat(int, const char* path, struct stat* out) {
  return is_kvm_path(path) ? stat_kvm(out) : real::stat(path, out);
}
HOOK int __xstat64(int, const char* path, struct stat64* out) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::stat(path, STAT64(out));
}
HOOK int __lxstat(int, const char* path, struct stat* out) {
  return is_kvm_path(path) ? stat_kvm(out) : real::fstatat(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW);
}
HOOK int __lxstat64(int, const char* path, struct stat64* out) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::fstatat(AT_FDCWD, path, STAT64(out), AT_SYMLINK_NOFOLLOW);
}
HOOK int __fxstatat(int, int dir, const char* path, struct stat* out, int flags) {
  return is_kvm_path(path) ? stat_kvm(out) : real::fstatat(dir, path, out, flags);
}
HOOK int __fxstatat64(int, int dir, const char* path, struct stat64* out, int flags) {
  return is_kvm_path(path) ? stat_kvm(STAT64(out)) : real::fstatat(dir, path, STAT64(out), flags);
}
HOOK int statx(int dir, const char* path, int flags, unsigned mask, struct statx* out) {
  if (!is_kvm_path(path)) return real::statx(dir, path, flags, mask, out);
  const int result = real::statx(dir, "/dev/null", flags, mask, out);
  if (result == 0) {
    out->stx_mode = S_IFCHR | 0666;
    out->stx_rdev_major = 10;
    out->stx_rdev_minor = 232;
  }
  return result;
}

// ---- signals ----

HOOK int sigaction(int sig, const struct sigaction* action, struct sigaction* old) {
  return set_action(sig, action, old, called_by_engine(__builtin_return_address(0)));
}

namespace {
sighandler_t set_handler(int sig, sighandler_t handler, int flags) {
  struct sigaction action, old;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  action.sa_flags = flags;
  sigemptyset(&action.sa_mask);
  if (handler == SIG_ERR) return answer<int>(-EINVAL), SIG_ERR;
  return set_action(sig, &action, &old, false) == 0 ? old.sa_handler : SIG_ERR;
}
}  // namespace
HOOK sighandler_t signal(int sig, sighandler_t handler) { return set_handler(sig, handler, SA_RESTART); }
HOOK sighandler_t bsd_signal(int sig, sighandler_t handler) { return set_handler(sig, handler, SA_RESTART); }
HOOK sighandler_t ssignal(int sig, sighandler_t handler) { return set_handler(sig, handler, SA_RESTART); }
HOOK sighandler_t __sysv_signal(int sig, sighandler_t handler) {
  return set_handler(sig, handler, static_cast<int>(SA_RESETHAND) | SA_NODEFER);
}
HOOK sighandler_t sysv_signal(int sig, sighandler_t handler) { return __sysv_signal(sig, handler); }

// ---- system calls by number, as some runtimes make them ----

HOOK int prctl(int option, ...) {
  va_list list;
  va_start(list, option);
  const unsigned long a = va_arg(list, unsigned long), b = va_arg(list, unsigned long), c = va_arg(list, unsigned long),
                      d = va_arg(list, unsigned long);
  va_end(list);
  watch_filters(SYS_prctl, option, static_cast<long>(a));
  return real::prctl(option, a, b, c, d);
}

HOOK long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  const long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long);
  const long d = va_arg(list, long), e = va_arg(list, long), f = va_arg(list, long);
  va_end(list);
  switch (number) {
    case SYS_ioctl:
      return ioctl(static_cast<int>(a), static_cast<unsigned long>(b), reinterpret_cast<void*>(c));
    case SYS_open:
      if (is_kvm_path(reinterpret_cast<const char*>(a))) return answer<long>(open_system(static_cast<int>(b)));
      break;
    case SYS_openat:
      if (is_kvm_path(reinterpret_cast<const char*>(b))) return answer<long>(open_system(static_cast<int>(c)));
      break;
    case SYS_mmap:
      return reinterpret_cast<long>(map(reinterpret_cast<void*>(a), static_cast<size_t>(b), static_cast<int>(c),
                                        static_cast<int>(d), static_cast<int>(e), f));
    case SYS_munmap: return munmap(reinterpret_cast<void*>(a), static_cast<size_t>(b));
    case SYS_madvise: return madvise(reinterpret_cast<void*>(a), static_cast<size_t>(b), static_cast<int>(c));
    case SYS_close: return close(static_cast<int>(a));
    case SYS_close_range:
      return close_range(static_cast<unsigned>(a), static_cast<unsigned>(b), static_cast<int>(c));
    case SYS_dup: return dup(static_cast<int>(a));
    case SYS_dup2: return dup2(static_cast<int>(a), static_cast<int>(b));
    case SYS_dup3: return dup3(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c));
    case SYS_fcntl: return control(static_cast<int>(a), static_cast<int>(b), reinterpret_cast<void*>(c));
    default: break;
  }
  watch_filters(number, a, b);
  return real::syscall(number, a, b, c, d, e, f);
}

// ---- exec: the preload goes along ----
// A name without a slash that the path is searched for is not looked at.

HOOK int execve(const char* path, char* const* argv, char* const* env) {
  warn_if_out_of_reach(path);
  RING3_CARRY(carried, env);
  return real::execve(path, argv, carried);
}
HOOK int execv(const char* path, char* const* argv) {
  warn_if_out_of_reach(path);
  RING3_CARRY(carried, environ);
  return real::execve(path, argv, carried);
}
HOOK int execvpe(const char* file, char* const* argv, char* const* env) {
  warn_if_out_of_reach(file);
  RING3_CARRY(carried, env);
  return real::execvpe(file, argv, carried);
}
HOOK int execvp(const char* file, char* const* argv) {
  warn_if_out_of_reach(file);
  RING3_CARRY(carried, environ);
  return real::execvpe(file, argv, carried);
}
HOOK int fexecve(int fd, char* const* argv, char* const* env) {
  RING3_CARRY(carried, env);
  return real::fexecve(fd, argv, carried);
}
HOOK int posix_spawn(pid_t* pid, const char* path, const posix_spawn_file_actions_t* actions, const posix_spawnattr_t* attr,
                     char* const* argv, char* const* env) {
  warn_if_out_of_reach(path);
  RING3_CARRY(carried, env);
  return real::posix_spawn(pid, path, actions, attr, argv, carried);
}
HOOK int posix_spawnp(pid_t* pid, const char* file, const posix_spawn_file_actions_t* actions,
                      const posix_spawnattr_t* attr, char* const* argv, char* const* env) {
  warn_if_out_of_reach(file);
  RING3_CARRY(carried, env);
  return real::posix_spawnp(pid, file, actions, attr, argv, carried);
}
