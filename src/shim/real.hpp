#pragma once
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>

/// The functions that stand behind the interposed ones: those of the next library, libc as a rule.
namespace ring3::shim {

/// A function of the next library, looked up at its first use. Threading: any; constant initialisation, so that calls
/// before the constructors have run work too. Async-signal-safe after the first use.
void* find_real(const char* name, void** slot);

template <class F>
class Real;
template <class R, class... A>
class Real<R(A...)> {
 public:
  constexpr explicit Real(const char* name) : name_(name) {}
  R operator()(A... a) {
    void* p = __atomic_load_n(&slot_, __ATOMIC_ACQUIRE);
    if (p == nullptr) p = find_real(name_, &slot_);
    return reinterpret_cast<R (*)(A...)>(p)(a...);
  }
  /// Looks it up now.
  void resolve() {
    if (slot_ == nullptr) find_real(name_, &slot_);
  }

 private:
  const char* name_;
  void* slot_ = nullptr;
};

// Variadic ones are called with all arguments they may take: the calling convention is the same but for AL, which only
// floating-point arguments would need.
namespace real {
extern Real<int(int, unsigned long, void*)> ioctl;
extern Real<int(const char*, int, unsigned)> open;
extern Real<int(int, const char*, int, unsigned)> openat;
extern Real<FILE*(const char*, const char*)> fopen;
extern Real<int(int)> close;
extern Real<int(pthread_t)> pthread_cancel;
extern Real<int(unsigned, unsigned, int)> close_range;
extern Real<int(int)> dup;
extern Real<int(int, int)> dup2;
extern Real<int(int, int, int)> dup3;
extern Real<int(int, int, void*)> fcntl;
extern Real<void*(void*, size_t, int, int, int, off_t)> mmap;
extern Real<int(void*, size_t)> munmap;
extern Real<void*(void*, size_t, size_t, int, void*)> mremap;
extern Real<int(void*, size_t, int)> madvise, mprotect;
extern Real<int(int, unsigned long, unsigned long, unsigned long, unsigned long)> prctl;
extern Real<long(long, long, long, long, long, long, long)> syscall;
extern Real<int(int, const struct sigaction*, struct sigaction*)> sigaction;
extern Real<int(const char*, int)> access;
extern Real<int(int, const char*, int, int)> faccessat;
extern Real<int(const char*, struct stat*)> stat;
extern Real<int(int, const char*, struct stat*, int)> fstatat;
extern Real<int(int, const char*, int, unsigned, void*)> statx;
extern Real<int(const char*, char* const*, char* const*)> execve;
extern Real<int(const char*, char* const*, char* const*)> execvpe;
extern Real<int(int, char* const*, char* const*)> fexecve;
extern Real<int(pid_t*, const char*, const posix_spawn_file_actions_t*, const posix_spawnattr_t*, char* const*,
                char* const*)>
    posix_spawn, posix_spawnp;

/// Those that signal handlers and children of vfork(2) may need: looked up by the constructor.
void resolve_early();
}  // namespace real

}  // namespace ring3::shim
