#pragma once
#include <sys/types.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "fs/fuse/inodes.hpp"

struct fuse_in_header;
struct fuse_attr;
struct stat;

namespace ring3::fs {

class Arguments;
class Reply;

/// A FUSE server on a directory of the host: bytes of a request in, bytes of the answer out.
///
/// Spec:      the kernel's <linux/fuse.h>, protocol 7.27 to 7.38.
/// Escape:    nothing is ever reached by a path. Every inode is an O_PATH descriptor, reached from its parent by one
///            openat2 of one name with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS. Names with '/',
///            "." and ".." are refused. Symbolic links are read and given to the guest, never followed here. What is no
///            regular file or directory (devices, FIFOs, sockets) is never opened.
/// Mounts:    file systems mounted below the directory are part of it, but for those that are interfaces of the host's
///            kernel (proc, sysfs, cgroups, ...): these are shown as empty directories.
/// Owners:    Options::own_id: files of the user who runs this are shown as that user of the guest's; other owners are shown
///            as they are. A privileged server sets owners as the guest says (1:1); an unprivileged one, who could not, says yes
///            to a chown and leaves the owner as it is, so that tar and cp work.
/// Locks:     not offered, so that the guest's kernel keeps them: they hold among the guest's processes.
/// Not there: extended attributes, ACLs, device nodes (EPERM), ioctl, poll, DAX.
/// Set-user-ID and set-group-ID bits: taken away here by a write, a truncation or a change of owner, where the guest's kernel asks for
///            it (HANDLE_KILLPRIV_V2; else it would ask for attributes before each chown).
/// Caching:   names and attributes may be kept by the guest for Options::cache_ms, but attributes of files with such bits not at
///            all, since it is not told when they go; file data until the size or
///            modification time changes, a directory's listing until its modification time does. Writes go through to the host's page cache.
/// Threading: handle() on any number of threads at once.
/// Trust:     requests are hostile. A handler checks what it is given; an answer never is longer than `reply`.
class Server {
 public:
  struct Options {
    bool read_only = false;
    bool privileged = false;        ///< may set owners
    std::optional<u32> own_id;      ///< the guest's uid and gid of files of this process's user; nothing: 1:1
    u32 cache_ms = 1000;
    std::size_t most_nodes = 0;     ///< descriptors kept for inodes the guest knows; 0: no limit but the process's own
  };
  static constexpr u32 kMostData = 1 << 20;                  ///< of one READ or WRITE
  static constexpr std::size_t kMostMessage = kMostData + 4096;
  static constexpr std::size_t kMostOpen = 1 << 16;          ///< open files and directories together

  /// `root`: the directory, any descriptor of it. `proc_fds`: /proc/self/fd of this very process, opened O_PATH.
  static Result<std::unique_ptr<Server>> create(UniqueFd root, UniqueFd proc_fds, Options options);

  /// Serves one request; returns the answer's length, 0 when it has none (FORGET, INTERRUPT, a request that cannot be
  /// answered because it has no whole header).
  std::size_t handle(std::span<const u8> request, std::span<u8> reply);

  /// For tests: inodes the guest knows, the root included; open files and directories.
  std::size_t inodes() const { return inodes_.size(); }
  std::size_t descriptors() const { return inodes_.kept(); }
  void close_descriptors() { inodes_.close_some(~std::size_t{0}); }
  std::size_t open_files() const;

 private:
  struct Open {
    UniqueFd fd;
    bool directory = false;
    std::shared_ptr<const Node> node;  ///< kept, though the guest looks at other inodes meanwhile
    std::mutex mutex;  ///< the directory position
  };
  using NodePtr = std::shared_ptr<const Node>;
  using OpenPtr = std::shared_ptr<Open>;

  Server(UniqueFd proc_fds, Options options) : proc_fds_(std::move(proc_fds)), options_(options) {}

  // Each returns 0 or a negative errno.
  int dispatch(const fuse_in_header& header, Arguments& in, Reply& out);
  int init(Arguments& in, Reply& out);
  int lookup(const fuse_in_header& h, Arguments& in, Reply& out);
  int getattr(const fuse_in_header& h, Arguments& in, Reply& out);
  int setattr(const fuse_in_header& h, Arguments& in, Reply& out);
  int readlink(const fuse_in_header& h, Reply& out);
  int symlink(const fuse_in_header& h, Arguments& in, Reply& out);
  int mknod(const fuse_in_header& h, Arguments& in, Reply& out);
  int mkdir(const fuse_in_header& h, Arguments& in, Reply& out);
  int unlink(const fuse_in_header& h, Arguments& in, int flags);
  int rename(const fuse_in_header& h, Arguments& in, bool two);
  int link(const fuse_in_header& h, Arguments& in, Reply& out);
  int open(const fuse_in_header& h, Arguments& in, Reply& out, bool directory);
  int create_file(const fuse_in_header& h, Arguments& in, Reply& out);
  int read(Arguments& in, Reply& out);
  int write(Arguments& in, Reply& out);
  int release(Arguments& in);
  int fsync(Arguments& in);
  int readdir(const fuse_in_header& h, Arguments& in, Reply& out, bool plus);
  int statfs(const fuse_in_header& h, Reply& out);
  int fallocate(Arguments& in);
  int lseek(Arguments& in, Reply& out);
  int copy_file_range(Arguments& in, Reply& out);
  int syncfs(const fuse_in_header& h);
  int forget(const fuse_in_header& h, Arguments& in, bool batch);

  /// The child of that name; *error is set when there is none.
  int find(const Node& parent, const char* name, NodePtr& node, struct stat& info);
  int entry(const Node& parent, const char* name, Reply& out);
  int put_entry(const Node& node, const struct stat& info, Reply& out);
  int made(const fuse_in_header& h, const Node& parent, const char* name, u32 mode, Reply& out);
  int adopt(const fuse_in_header& h, const Node& parent, int fd, u32 mode);
  int reopen(const Node& node, int flags, UniqueFd& fd) const;
  int drop_id_bits(int fd) const;
  int add_open(UniqueFd fd, NodePtr node, u64& handle);
  OpenPtr opened(u64 handle) const;
  bool listing_may_be_kept(const Open& directory) const;
  NodePtr directory(u64 nodeid) const;
  void to_attr(const struct stat& info, const Node& node, fuse_attr& attr) const;
  /// For fuse_entry_out and fuse_attr_out.
  template <class T>
  void put_attr(const struct stat& info, const Node& node, T& out) const {
    const bool kept = !S_ISREG(info.st_mode) || (info.st_mode & (S_ISUID | S_ISGID)) == 0;
    out.attr_valid = kept ? options_.cache_ms / 1000 : 0;
    out.attr_valid_nsec = kept ? options_.cache_ms % 1000 * 1'000'000 : 0;
    to_attr(info, node, out.attr);
  }
  template <class T>
  void put_name_validity(T& entry) const {
    entry.entry_valid = options_.cache_ms / 1000;
    entry.entry_valid_nsec = options_.cache_ms % 1000 * 1'000'000;
  }
  u32 shown_uid(u32 host) const { return options_.own_id && host == uid_ ? *options_.own_id : host; }
  u32 shown_gid(u32 host) const { return options_.own_id && host == gid_ ? *options_.own_id : host; }

  UniqueFd proc_fds_;
  Options options_;
  u32 uid_ = 0, gid_ = 0;
  Inodes inodes_;
  mutable std::mutex open_mutex_;
  std::unordered_map<u64, OpenPtr> open_;  ///< guarded by open_mutex_
  u64 next_handle_ = 1;                    ///< guarded by open_mutex_
  std::atomic<bool> ready_{false};         ///< INIT was answered
};

}  // namespace ring3::fs
