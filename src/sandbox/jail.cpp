#include "sandbox/jail.hpp"

#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace ring3::sandbox {

namespace {

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_restrict_self 446
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/// struct landlock_ruleset_attr up to its sixth version.
struct LandlockRuleset {
  u64 handled_access_fs = 0;
  u64 handled_access_net = 0;
  u64 scoped = 0;
};

Status limit(int resource, u64 value, const char* name) {
  rlimit r{value, value};
  rlimit now{};
  if (::getrlimit(static_cast<__rlimit_resource>(resource), &now) == 0) {
    r.rlim_cur = std::min<u64>(value, now.rlim_max);
    r.rlim_max = r.rlim_cur;
  }
  if (::setrlimit(static_cast<__rlimit_resource>(resource), &r) != 0) return Error::from_errno(std::string("jail: limit of ") + name);
  return Ok{};
}

bool write_file(const char* path, const std::string& text) {
  const int fd = ::open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool good = ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  ::close(fd);
  return good;
}

/// An empty, read-only root in namespaces of our own. Half of it is worse than none of it for no one: what has been
/// entered stays.
bool enter_namespaces() {
  const uid_t uid = ::geteuid();
  const gid_t gid = ::getegid();
  if (::unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS) != 0) return false;
  if (!write_file("/proc/self/setgroups", "deny")) return false;
  if (!write_file("/proc/self/uid_map", "65534 " + std::to_string(uid) + " 1")) return false;
  if (!write_file("/proc/self/gid_map", "65534 " + std::to_string(gid) + " 1")) return false;
  if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
  const char* place = nullptr;
  for (const char* p : {"/tmp", "/run", "/mnt", "/proc"}) {
    struct stat info {};
    if (::stat(p, &info) == 0 && S_ISDIR(info.st_mode)) {
      place = p;
      break;
    }
  }
  if (place == nullptr) return false;
  if (::mount("none", place, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,nr_inodes=2,mode=0555") != 0) return false;
  if (::chdir(place) != 0) return false;
  if (::syscall(SYS_pivot_root, ".", ".") != 0) return false;
  if (::umount2(".", MNT_DETACH) != 0) return false;
  if (::chdir("/") != 0) return false;
  return ::mount("none", "/", nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) == 0;
}

bool enter_landlock(int* abi) {
  const long version = ::syscall(SYS_landlock_create_ruleset, nullptr, 0, 1 /* LANDLOCK_CREATE_RULESET_VERSION */);
  if (version < 1) return false;
  *abi = static_cast<int>(version);
  LandlockRuleset rules;
  rules.handled_access_fs = (u64{1} << 13) - 1;
  if (version >= 2) rules.handled_access_fs |= u64{1} << 13;  // refer
  if (version >= 3) rules.handled_access_fs |= u64{1} << 14;  // truncate
  if (version >= 5) rules.handled_access_fs |= u64{1} << 15;  // device ioctl
  if (version >= 6) rules.scoped = 3;                         // abstract UNIX sockets, signals
  const std::size_t size = version >= 6 ? 24 : version >= 4 ? 16 : 8;
  const int fd = static_cast<int>(::syscall(SYS_landlock_create_ruleset, &rules, size, 0));
  if (fd < 0) return false;
  const bool good = ::syscall(SYS_landlock_restrict_self, fd, 0) == 0;
  ::close(fd);
  return good;
}

Status drop_capabilities() {
  for (int cap = 0; cap < 64; cap++) ::prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);  // beyond the last one it fails
  ::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (::syscall(SYS_capset, &header, data) != 0) return Error::from_errno("jail: capabilities");
  return Ok{};
}

}  // namespace

Status filter_system_calls(const JailPolicy& policy) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  // A sanitizer's runtime makes calls of its own, which may fail but must not kill.
  scmp_filter_ctx context = ::seccomp_init(SCMP_ACT_ERRNO(EPERM));
#else
  scmp_filter_ctx context = ::seccomp_init(SCMP_ACT_KILL_PROCESS);
#endif
  if (context == nullptr) return Error::of(ENOMEM, "jail: no memory for the filter");
  int error = 0;
  for (const SyscallRule& rule : policy.system_calls) {
    std::vector<scmp_arg_cmp> compare;
    for (const ArgumentRule& a : rule.arguments) {
      compare.push_back({a.index, SCMP_CMP_MASKED_EQ, a.mask, a.value});
    }
    const int r = ::seccomp_rule_add_array(context, SCMP_ACT_ALLOW, rule.number, static_cast<unsigned>(compare.size()), compare.data());
    if (r != 0 && r != -EEXIST) error = r;
  }
  ::seccomp_attr_set(context, SCMP_FLTATR_CTL_OPTIMIZE, 2);
  if (error == 0) error = ::seccomp_load(context);
  ::seccomp_release(context);
  if (error != 0) return Error::from_errno("jail: the filter of role " + policy.role, -error);
  return Ok{};
}

void close_all_but(std::vector<int> keep) {
  std::sort(keep.begin(), keep.end());
  unsigned next = 3;
  const auto close_up_to = [&](unsigned end) {  // [next, end)
    if (next >= end) return;
    if (::syscall(SYS_close_range, next, end - 1, 0) != 0) {
      const long most = std::min<long>(::sysconf(_SC_OPEN_MAX), 65536);
      for (unsigned fd = next; fd < end && static_cast<long>(fd) < most; fd++) ::close(static_cast<int>(fd));
    }
  };
  for (const int fd : keep) {
    if (fd < 3) continue;
    close_up_to(static_cast<unsigned>(fd));
    next = static_cast<unsigned>(fd) + 1;
  }
  close_up_to(~0u);
}

Result<JailReport> enter_jail(const JailPolicy& policy) {
  JailReport report;
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return Error::from_errno("jail: no_new_privs");
  report.namespaces = enter_namespaces();
  if (::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return Error::from_errno("jail: PR_SET_DUMPABLE");
  report.landlock = enter_landlock(&report.landlock_abi);
  if (auto s = limit(RLIMIT_CORE, 0, "core dumps"); !s) return s.error();
  if (auto s = limit(RLIMIT_FSIZE, 0, "file sizes"); !s) return s.error();
  if (auto s = limit(RLIMIT_NPROC, 0, "processes"); !s) return s.error();
  if (auto s = limit(RLIMIT_NOFILE, policy.open_files, "open files"); !s) return s.error();
  if (policy.address_space != 0) {
    if (auto s = limit(RLIMIT_AS, policy.address_space, "memory"); !s) return s.error();
  }
  if (auto s = drop_capabilities(); !s) return s.error();
  if (auto s = filter_system_calls(policy); !s) return s.error();
  return report;
}

}  // namespace ring3::sandbox
