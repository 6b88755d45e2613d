#include "fs/share/jail.hpp"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/unique_fd.hpp"
#include "sandbox/jail.hpp"

namespace ring3::fs {
namespace {

/// Confines file access to the directory. Needs version 2, without which renames between directories would be refused.
void enter_landlock(int directory) {
  const long version = syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
  if (version < 2) return;
  constexpr u64 kDevices = LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_BLOCK;
  u64 all = (u64{1} << 14) - 1;           // up to "refer"
  if (version >= 3) all |= u64{1} << 14;  // truncate
  landlock_ruleset_attr rules{};
  rules.handled_access_fs = all;
  const UniqueFd ruleset(static_cast<int>(syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0)));
  if (!ruleset) return;
  landlock_path_beneath_attr beneath{};
  beneath.allowed_access = all & ~kDevices & ~u64{LANDLOCK_ACCESS_FS_EXECUTE};
  beneath.parent_fd = directory;
  if (syscall(SYS_landlock_add_rule, ruleset.get(), LANDLOCK_RULE_PATH_BENEATH, &beneath, 0) != 0) return;
  syscall(SYS_landlock_restrict_self, ruleset.get(), 0);
}

Status keep_capabilities(bool privileged) {
  constexpr u32 kKept = 1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE | 1u << CAP_FOWNER | 1u << CAP_FSETID;
  for (int cap = 0; cap < 64; cap++) prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);  // not ours to drop, or beyond the last: fails
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (privileged) {
    if (syscall(SYS_capget, &header, data) != 0) return Error::from_errno("capget");
    data[0].permitted &= kKept;
    data[0].effective = data[0].permitted;
    data[0].inheritable = 0;
    data[1] = {};
  }
  if (syscall(SYS_capset, &header, data) != 0) return Error::from_errno("capset");
  return Ok{};
}

sandbox::JailPolicy policy() {
  sandbox::JailPolicy p;
  p.role = "share";
  for (const int nr :
       {SYS_openat2, SYS_openat, SYS_close, SYS_newfstatat, SYS_statx, SYS_fstat, SYS_fstatfs, SYS_readlinkat, SYS_symlinkat, SYS_mknodat, SYS_mkdirat,
        SYS_unlinkat, SYS_renameat, SYS_renameat2, SYS_linkat, SYS_pread64, SYS_pwrite64, SYS_fsync, SYS_fdatasync, SYS_syncfs, SYS_fallocate, SYS_lseek,
        SYS_copy_file_range, SYS_getdents64, SYS_fchownat, SYS_fchmodat, SYS_utimensat, SYS_ftruncate,
        // The socket, the locks and the memory of the C library.
        SYS_recvfrom, SYS_sendto, SYS_futex, SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_exit, SYS_exit_group, SYS_rt_sigprocmask,
        SYS_rt_sigreturn, SYS_restart_syscall, SYS_sched_yield, SYS_clock_gettime, SYS_gettid, SYS_getpid, SYS_sched_getaffinity}) {
    p.system_calls.push_back({nr, {}});
  }
  p.system_calls.push_back({SYS_fcntl, {{1, ~u64{0}, F_GETFL}}});
  // Memory that is not executable.
  p.system_calls.push_back({SYS_mmap, {{2, PROT_EXEC, 0}, {3, MAP_ANONYMOUS, MAP_ANONYMOUS}}});
  p.system_calls.push_back({SYS_mprotect, {{2, PROT_EXEC, 0}}});
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  // A sanitizer's runtime; by a pipe it looks whether memory is there.
  for (const int nr : {SYS_sigaltstack, SYS_rt_sigaction, SYS_write, SYS_read, SYS_pipe, SYS_pipe2, SYS_prctl, SYS_getrandom, SYS_readlink})
    p.system_calls.push_back({nr, {}});
  p.system_calls.push_back({SYS_mmap, {}});
#endif
  return p;
}

}  // namespace

Status enter_share_jail(int directory, bool privileged) {
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return Error::from_errno("no_new_privs");
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
  enter_landlock(directory);
  if (privileged) {
    // Each by itself: a container may allow one and not the other.
    for (const int space : {CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS}) unshare(space);
    if (fchdir(directory) == 0 && chroot(".") != 0) errno = 0;
  }
  if (fchdir(directory) != 0) return Error::from_errno("fchdir");
  if (auto status = keep_capabilities(privileged); !status) return status;
  return Ok{};
}

Status filter_share_thread() { return sandbox::filter_system_calls(policy()); }

}  // namespace ring3::fs
