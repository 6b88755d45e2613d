#pragma once
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::fs {

/// Opens one name in a directory: no path component is followed out of it, no symbolic link, no magic link. errno is set when
/// the result is not valid; a change on the host at the same time is tried again a few times (EAGAIN after that).
UniqueFd open_beneath(int directory, const char* name, int flags, u32 mode = 0);

/// Whether the file system of that descriptor is a window into the host's kernel (proc, sysfs, cgroups, ...).
bool is_kernel_interface(int fd);

}  // namespace ring3::fs
