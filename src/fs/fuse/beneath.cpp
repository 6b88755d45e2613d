#include "fs/fuse/beneath.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>

namespace ring3::fs {

UniqueFd open_beneath(int directory, const char* name, int flags, u32 mode) {
  open_how how{};
  how.flags = static_cast<u64>(flags | O_CLOEXEC);
  how.mode = (flags & O_CREAT) != 0 ? mode : 0;
  // With O_PATH | O_NOFOLLOW a link is opened as itself, which NO_SYMLINKS refuses for the last component: there
  // O_NOFOLLOW does the work, and a single name has no other component.
  const bool link_itself = (flags & (O_PATH | O_NOFOLLOW)) == (O_PATH | O_NOFOLLOW);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | (link_itself ? 0 : RESOLVE_NO_SYMLINKS);
  for (int attempt = 0; attempt < 16; attempt++) {
    const long fd = syscall(SYS_openat2, directory, name, &how, sizeof how);
    if (fd >= 0) return UniqueFd(static_cast<int>(fd));
    if (errno != EAGAIN && errno != EINTR) break;
  }
  return UniqueFd();
}

bool is_kernel_interface(int fd) {
  struct statfs s {};
  if (fstatfs(fd, &s) != 0) return true;
  switch (static_cast<u64>(s.f_type)) {
    case PROC_SUPER_MAGIC: case SYSFS_MAGIC: case CGROUP_SUPER_MAGIC: case CGROUP2_SUPER_MAGIC: case DEBUGFS_MAGIC:
    case TRACEFS_MAGIC: case SECURITYFS_MAGIC: case DEVPTS_SUPER_MAGIC: case BPF_FS_MAGIC: case EFIVARFS_MAGIC:
    case PSTOREFS_MAGIC: case BINFMTFS_MAGIC: case 0x19800202 /* mqueue */: case 0x62656570 /* configfs */:
    case 0x65735543 /* fusectl */:
      return true;
    default: return false;
  }
}

}  // namespace ring3::fs
