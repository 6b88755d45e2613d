#pragma once
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

/// Jails for the processes that parse what guests send: one policy a role.
namespace ring3::sandbox {

/// A condition on one argument of a system call: (argument & mask) == value.
struct ArgumentRule {
  unsigned index = 0;
  u64 mask = ~u64{0};
  u64 value = 0;
};

/// Allows a system call, when all of `arguments` hold. Several rules for one call: any of them.
struct SyscallRule {
  int number = 0;  ///< SYS_...
  std::vector<ArgumentRule> arguments;
};

struct JailPolicy {
  std::string role;                 ///< for messages
  std::vector<SyscallRule> system_calls;
  u64 open_files = 1024;            ///< RLIMIT_NOFILE
  u64 address_space = 0;            ///< RLIMIT_AS in bytes; 0: as it was
};

/// Which walls stand. no_new_privs, the resource limits and the filter always do.
struct JailReport {
  bool namespaces = false;  ///< own user, mount, IPC and UTS namespaces, and an empty read-only root
  bool landlock = false;    ///< no file can be opened, even were there one to see
  int landlock_abi = 0;
};

/// Jails the calling process for good. It must have one thread, and hold no descriptor but those of its work.
///
/// What is done, in this order: core dumps and ptrace by others off; resource limits (no new processes, no file
/// writes); no_new_privs; own namespaces and an empty root; Landlock without any right; all capabilities dropped;
/// a seccomp filter that kills the process at every call not allowed. The network namespace stays the host's.
/// Errors: only what must not be missing: limits, capabilities, the filter. Namespaces and Landlock depend on the host,
/// and the report says whether they stand.
Result<JailReport> enter_jail(const JailPolicy& policy);

/// The last wall alone, for a role that has other ones: the calling thread, and the threads it starts later, may make the
/// policy's system calls; any other kills the process. Needs no_new_privs.
Status filter_system_calls(const JailPolicy& policy);

/// Closes every descriptor from 3 on but `keep`.
void close_all_but(std::vector<int> keep);

}  // namespace ring3::sandbox
