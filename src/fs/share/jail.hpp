#pragma once
#include "base/result.hpp"

namespace ring3::fs {

/// Confines the calling process, which has one thread, to a directory (any descriptor of it) for good; see ShareProcess.
/// Errors: what must not be missing is: no_new_privs, the capabilities.
Status enter_share_jail(int directory, bool privileged);
/// The last wall, for each thread by itself, so that no thread may make another or a process: the system calls of a file server.
Status filter_share_thread();

}  // namespace ring3::fs
