#include <dirent.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "fs/fuse/message.hpp"
#include "fs/fuse/server.hpp"

namespace ring3::fs {

int Server::readdir(const fuse_in_header& h, Arguments& in, Reply& out, bool plus) {
  fuse_read_in want;
  const NodePtr node = directory(h.nodeid);
  if (!node) return -ESTALE;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file || !file->directory) return -EBADF;
  if (node->opaque) return 0;

  const std::size_t limit = std::min<std::size_t>(want.size, out.room().size());
  const std::size_t fixed = plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;
  const std::lock_guard lock(file->mutex);
  // The offset is the host's cookie of the entry before; one that never was one gives entries of some sort, no harm.
  if (want.offset > static_cast<u64>(INT64_MAX) || ::lseek(file->fd.get(), static_cast<off_t>(want.offset), SEEK_SET) < 0) return -EINVAL;
  alignas(dirent64) std::array<char, 16384> buffer;
  for (;;) {
    const long got = syscall(SYS_getdents64, file->fd.get(), buffer.data(), buffer.size());
    if (got < 0) return out.used() > 0 ? 0 : -errno;
    if (got == 0) return 0;
    for (long at = 0; at < got;) {
      dirent64 entry;
      const std::size_t header = offsetof(dirent64, d_name);
      std::memcpy(&entry, buffer.data() + at, header);
      const char* name = buffer.data() + at + header;
      at += entry.d_reclen;
      const std::size_t length = strnlen(name, 256);
      const std::size_t size = FUSE_DIRENT_ALIGN(fixed + length);
      if (limit - out.used() < size) return 0;
      const bool dots = std::strcmp(name, ".") == 0 || std::strcmp(name, "..") == 0;

      fuse_direntplus record{};
      if (plus && !dots) {
        NodePtr child;
        struct stat info {};
        // Gone meanwhile, or not to be had: then it is a name without a node, which the guest looks up itself.
        if (find(*node, name, child, info) == 0) {
          record.entry_out.nodeid = child->id;
          put_name_validity(record.entry_out);
          put_attr(info, *child, record.entry_out);
        }
      }
      record.dirent.ino = record.entry_out.nodeid != 0 ? record.entry_out.attr.ino : static_cast<u64>(entry.d_ino);
      record.dirent.off = static_cast<u64>(entry.d_off);
      record.dirent.namelen = static_cast<u32>(length);
      record.dirent.type = entry.d_type;
      const u8* start = reinterpret_cast<const u8*>(&record) + (plus ? 0 : offsetof(fuse_direntplus, dirent));
      static constexpr std::array<u8, 8> kPad{};
      out.put_bytes(start, fixed);
      out.put_bytes(name, length);
      out.put_bytes(kPad.data(), size - fixed - length);
    }
  }
}

}  // namespace ring3::fs
