#include "fs/fuse/server.hpp"

#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/checked.hpp"
#include "fs/fuse/beneath.hpp"
#include "fs/fuse/message.hpp"

namespace ring3::fs {
namespace {

constexpr u32 kOldestMinor = 27;
constexpr u32 kMinor = 37;  // what the structures here are of

/// The requests that change something.
bool changes(u32 opcode) {
  switch (opcode) {
    case FUSE_SETATTR: case FUSE_SYMLINK: case FUSE_MKNOD: case FUSE_MKDIR: case FUSE_UNLINK: case FUSE_RMDIR: case FUSE_RENAME:
    case FUSE_RENAME2: case FUSE_LINK: case FUSE_WRITE: case FUSE_CREATE: case FUSE_FALLOCATE: case FUSE_COPY_FILE_RANGE:
      return true;
    default: return false;
  }
}

}  // namespace

Result<std::unique_ptr<Server>> Server::create(UniqueFd root, UniqueFd proc_fds, Options options) {
  struct stat info {};
  UniqueFd path(openat(root.get(), ".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!path || fstat(path.get(), &info) != 0) return Error::from_errno("cannot share the directory");
  std::unique_ptr<Server> server(new Server(std::move(proc_fds), options));
  server->uid_ = geteuid();
  server->gid_ = getegid();
  Node node;
  node.fd = std::move(path);
  node.device = info.st_dev;
  node.inode = info.st_ino;
  node.type = S_IFDIR;
  server->inodes_.set_root(std::move(node));
  if (options.most_nodes != 0) server->inodes_.set_limit(options.most_nodes);
  return server;
}

std::size_t Server::open_files() const {
  const std::lock_guard lock(open_mutex_);
  return open_.size();
}

std::size_t Server::handle(std::span<const u8> request, std::span<u8> reply) {
  fuse_in_header header;
  Arguments in(request);
  if (!in.take(header)) return 0;
  if (header.opcode == FUSE_FORGET || header.opcode == FUSE_BATCH_FORGET) {
    forget(header, in, header.opcode == FUSE_BATCH_FORGET);
    return 0;
  }
  if (header.opcode == FUSE_INTERRUPT) return 0;  // nothing here waits for long
  if (reply.size() < sizeof(fuse_out_header)) return 0;
  Reply out(reply.subspan(sizeof(fuse_out_header)));
  int error = -EIO;
  if (header.len == request.size()) {
    if (!ready_ && header.opcode != FUSE_INIT) error = -EIO;
    else if (options_.read_only && changes(header.opcode)) error = -EROFS;
    else error = dispatch(header, in, out);
  }
  if (error != 0) out.clear();
  const fuse_out_header answer{static_cast<u32>(sizeof(fuse_out_header) + out.used()), error, header.unique};
  std::memcpy(reply.data(), &answer, sizeof answer);
  return answer.len;
}

int Server::dispatch(const fuse_in_header& h, Arguments& in, Reply& out) {
  switch (h.opcode) {
    case FUSE_INIT: return init(in, out);
    case FUSE_DESTROY: {
      inodes_.clear();
      const std::lock_guard lock(open_mutex_);
      open_.clear();
      ready_ = false;
      return 0;
    }
    case FUSE_LOOKUP: return lookup(h, in, out);
    case FUSE_GETATTR: return getattr(h, in, out);
    case FUSE_SETATTR: return setattr(h, in, out);
    case FUSE_READLINK: return readlink(h, out);
    case FUSE_SYMLINK: return symlink(h, in, out);
    case FUSE_MKNOD: return mknod(h, in, out);
    case FUSE_MKDIR: return mkdir(h, in, out);
    case FUSE_UNLINK: return unlink(h, in, 0);
    case FUSE_RMDIR: return unlink(h, in, AT_REMOVEDIR);
    case FUSE_RENAME: return rename(h, in, false);
    case FUSE_RENAME2: return rename(h, in, true);
    case FUSE_LINK: return link(h, in, out);
    case FUSE_OPEN: return open(h, in, out, false);
    case FUSE_OPENDIR: return open(h, in, out, true);
    case FUSE_CREATE: return create_file(h, in, out);
    case FUSE_READ: return read(in, out);
    case FUSE_WRITE: return write(in, out);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: return release(in);
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR: return fsync(in);
    case FUSE_READDIR: return readdir(h, in, out, false);
    case FUSE_READDIRPLUS: return readdir(h, in, out, true);
    case FUSE_STATFS: return statfs(h, out);
    case FUSE_FALLOCATE: return fallocate(in);
    case FUSE_LSEEK: return lseek(in, out);
    case FUSE_COPY_FILE_RANGE: return copy_file_range(in, out);
    case FUSE_SYNCFS: return syncfs(h);
    // FLUSH: writes have gone through already, so a close has nothing to wait for; ENOSYS says never to ask again.
    // ACCESS: the guest's kernel checks permissions from the attributes.
    default: return -ENOSYS;
  }
}

int Server::init(Arguments& in, Reply& out) {
  struct {
    u32 major, minor, max_readahead, flags;
  } want;
  if (!in.take(want)) return -EINVAL;
  fuse_init_out answer{};
  answer.major = FUSE_KERNEL_VERSION;
  answer.minor = kMinor;
  if (want.major > FUSE_KERNEL_VERSION) return out.put(answer) ? 0 : -EINVAL;  // the kernel tries again with ours
  if (want.major < FUSE_KERNEL_VERSION || want.minor < kOldestMinor) return -EPROTO;
  answer.minor = std::min(want.minor, kMinor);
  answer.max_readahead = std::min(want.max_readahead, kMostData);
  constexpr u32 kOffered = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ATOMIC_O_TRUNC | FUSE_AUTO_INVAL_DATA | FUSE_DO_READDIRPLUS |
                           FUSE_READDIRPLUS_AUTO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS | FUSE_ASYNC_DIO |
                           FUSE_EXPORT_SUPPORT | FUSE_HANDLE_KILLPRIV_V2;
  // EXPORT_SUPPORT would have "." and ".." looked up, which are refused here.
  answer.flags = want.flags & kOffered & ~static_cast<u32>(FUSE_EXPORT_SUPPORT);
  answer.max_background = 64;
  answer.congestion_threshold = 48;
  answer.max_write = kMostData;
  answer.time_gran = 1;
  answer.max_pages = kMostData / kPageSize;
  if (!out.put(answer)) return -EINVAL;
  // A guest that begins anew, after a reset say, knows nothing of what it had before.
  inodes_.clear();
  {
    const std::lock_guard lock(open_mutex_);
    open_.clear();
  }
  ready_ = true;
  return 0;
}

// ---- Names and nodes

Server::NodePtr Server::directory(u64 nodeid) const {
  auto node = inodes_.find(nodeid);
  return node && S_ISDIR(node->type) ? node : nullptr;
}

int Server::find(const Node& parent, const char* name, NodePtr& node, struct stat& info) {
  if (parent.opaque) return -ENOENT;
  Node found;
  found.fd = inodes_.open_with_room([&] { return open_beneath(parent.fd.get(), name, O_PATH | O_NOFOLLOW); });
  if (!found.fd) return -errno;
  if (fstatat(found.fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  found.device = info.st_dev;
  found.inode = info.st_ino;
  found.type = info.st_mode & S_IFMT;
  found.opaque = found.device != parent.device && is_kernel_interface(found.fd.get());
  node = inodes_.add(std::move(found), parent.id, name);
  return 0;
}

void Server::to_attr(const struct stat& info, const Node& node, fuse_attr& attr) const {
  attr = {};
  attr.ino = static_cast<u64>(info.st_ino) ^ inodes_.device_index(info.st_dev) << 48;
  attr.size = static_cast<u64>(info.st_size);
  attr.blocks = static_cast<u64>(info.st_blocks);
  attr.atime = static_cast<u64>(info.st_atim.tv_sec);
  attr.mtime = static_cast<u64>(info.st_mtim.tv_sec);
  attr.ctime = static_cast<u64>(info.st_ctim.tv_sec);
  attr.atimensec = static_cast<u32>(info.st_atim.tv_nsec);
  attr.mtimensec = static_cast<u32>(info.st_mtim.tv_nsec);
  attr.ctimensec = static_cast<u32>(info.st_ctim.tv_nsec);
  attr.mode = info.st_mode;
  attr.nlink = static_cast<u32>(info.st_nlink);
  attr.uid = shown_uid(info.st_uid);
  attr.gid = shown_gid(info.st_gid);
  attr.rdev = static_cast<u32>(info.st_rdev);
  attr.blksize = static_cast<u32>(info.st_blksize);
  if (node.opaque) attr.mode = S_IFDIR | 0555;
}

int Server::put_entry(const Node& node, const struct stat& info, Reply& out) {
  fuse_entry_out entry{};
  entry.nodeid = node.id;
  put_name_validity(entry);
  put_attr(info, node, entry);
  if (out.put(entry)) return 0;
  inodes_.forget(node.id, 1);  // the guest will not hear of it
  return -EINVAL;
}

int Server::entry(const Node& parent, const char* name, Reply& out) {
  NodePtr node;
  struct stat info {};
  if (const int error = find(parent, name, node, info); error != 0) return error;
  return put_entry(*node, info, out);
}

int Server::lookup(const fuse_in_header& h, Arguments& in, Reply& out) {
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return inodes_.find(h.nodeid) ? -ENOTDIR : -ESTALE;
  const char* text = in.text();
  if (text == nullptr) return -EINVAL;
  if (std::strlen(text) > 255) return -ENAMETOOLONG;
  Arguments again(std::span(reinterpret_cast<const u8*>(text), std::strlen(text) + 1));
  const char* name = again.name();
  if (name == nullptr) return -EINVAL;
  const int error = entry(*parent, name, out);
  if (error != -ENOENT) return error;
  fuse_entry_out none{};  // node 0: the guest may remember for a while that there is nothing
  put_name_validity(none);
  return out.put(none) ? 0 : -EINVAL;
}

int Server::forget(const fuse_in_header& h, Arguments& in, bool batch) {
  if (!batch) {
    fuse_forget_in one;
    if (in.take(one)) inodes_.forget(h.nodeid, one.nlookup);
    return 0;
  }
  fuse_batch_forget_in many;
  fuse_forget_one one;
  if (!in.take(many)) return 0;
  for (u32 i = 0; i < many.count && in.take(one); i++) inodes_.forget(one.nodeid, one.nlookup);
  return 0;
}

// ---- Attributes

int Server::getattr(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_getattr_in want;
  const NodePtr node = inodes_.find(h.nodeid);
  if (!node) return -ESTALE;
  if (!in.take(want)) return -EINVAL;
  struct stat info {};
  if (fstatat(node->fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  fuse_attr_out answer{};
  put_attr(info, *node, answer);
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::setattr(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_setattr_in want;
  const NodePtr node = inodes_.find(h.nodeid);
  if (!node) return -ESTALE;
  if (!in.take(want)) return -EINVAL;
  if (node->opaque) return -EPERM;
  const std::string number = std::to_string(node->fd.get());
  const bool changes_owner = (want.valid & (FATTR_UID | FATTR_GID)) != 0;
  if (options_.privileged ? (want.valid & FATTR_KILL_SUIDGID) != 0 : changes_owner) {
    if (const int error = drop_id_bits(node->fd.get()); error != 0) return error;
  }
  if (changes_owner && options_.privileged) {
    const uid_t uid = (want.valid & FATTR_UID) != 0 ? want.uid : static_cast<uid_t>(-1);
    const gid_t gid = (want.valid & FATTR_GID) != 0 ? want.gid : static_cast<gid_t>(-1);
    if (fchownat(node->fd.get(), "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  }
  if ((want.valid & FATTR_MODE) != 0) {
    if (S_ISLNK(node->type)) return -EOPNOTSUPP;
    // By way of /proc, which leads to the very inode of the descriptor: fchmod takes no O_PATH.
    if (fchmodat(proc_fds_.get(), number.c_str(), want.mode & 07777, 0) != 0) return -errno;
  }
  if ((want.valid & FATTR_SIZE) != 0) {
    if (!S_ISREG(node->type)) return S_ISDIR(node->type) ? -EISDIR : -EINVAL;
    OpenPtr open_file = (want.valid & FATTR_FH) != 0 ? opened(want.fh) : nullptr;
    if (open_file && (open_file->directory || (fcntl(open_file->fd.get(), F_GETFL) & O_ACCMODE) == O_RDONLY)) open_file = nullptr;
    UniqueFd fd;
    if (!open_file) {
      if (const int error = reopen(*node, O_WRONLY, fd); error != 0) return error;
    }
    if (want.size > static_cast<u64>(INT64_MAX)) return -EFBIG;
    if (ftruncate(open_file ? open_file->fd.get() : fd.get(), static_cast<off_t>(want.size)) != 0) return -errno;
  }
  if ((want.valid & (FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW)) != 0) {
    const auto time = [&](u32 set, u32 now, u64 seconds, u32 ns) {
      timespec t{};
      t.tv_nsec = UTIME_OMIT;
      if ((want.valid & now) != 0) t.tv_nsec = UTIME_NOW;
      else if ((want.valid & set) != 0) t = {static_cast<time_t>(seconds), static_cast<long>(std::min(ns, 999'999'999u))};
      return t;
    };
    const timespec times[2] = {time(FATTR_ATIME, FATTR_ATIME_NOW, want.atime, want.atimensec),
                               time(FATTR_MTIME, FATTR_MTIME_NOW, want.mtime, want.mtimensec)};
    if (utimensat(node->fd.get(), "", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  }
  struct stat info {};
  if (fstatat(node->fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  fuse_attr_out answer{};
  put_attr(info, *node, answer);
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::statfs(const fuse_in_header& h, Reply& out) {
  const NodePtr node = inodes_.find(h.nodeid);
  if (!node) return -ESTALE;
  struct statfs s {};
  if (fstatfs(node->fd.get(), &s) != 0) return -errno;
  fuse_statfs_out answer{};
  answer.st.blocks = s.f_blocks;
  answer.st.bfree = s.f_bfree;
  answer.st.bavail = s.f_bavail;
  answer.st.files = s.f_files;
  answer.st.ffree = s.f_ffree;
  answer.st.bsize = static_cast<u32>(s.f_bsize);
  answer.st.frsize = static_cast<u32>(s.f_frsize);
  answer.st.namelen = 255;
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::readlink(const fuse_in_header& h, Reply& out) {
  const NodePtr node = inodes_.find(h.nodeid);
  if (!node) return -ESTALE;
  if (!S_ISLNK(node->type)) return -EINVAL;
  char target[4097];
  const ssize_t length = ::readlinkat(node->fd.get(), "", target, sizeof target);
  if (length < 0) return -errno;
  return out.put_bytes(target, static_cast<std::size_t>(length)) ? 0 : -ENAMETOOLONG;
}

// ---- Making, naming and removing

/// A new file gets the owner that the guest says, where that can be; its mode survives that.
int Server::adopt(const fuse_in_header& h, const Node& parent, int fd, u32 mode) {
  if (!options_.privileged || (h.uid == uid_ && h.gid == gid_)) return 0;
  struct stat above {};
  if (fstatat(parent.fd.get(), "", &above, AT_EMPTY_PATH) != 0) return -errno;
  const gid_t gid = (above.st_mode & S_ISGID) != 0 ? static_cast<gid_t>(-1) : h.gid;
  if (fchownat(fd, "", h.uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  if ((mode & (S_ISUID | S_ISGID)) != 0 && fchmodat(proc_fds_.get(), std::to_string(fd).c_str(), mode & 07777, 0) != 0) return -errno;
  return 0;
}

int Server::made(const fuse_in_header& h, const Node& parent, const char* name, u32 mode, Reply& out) {
  NodePtr node;
  struct stat info {};
  if (const int error = find(parent, name, node, info); error != 0) return error;
  int error = adopt(h, parent, node->fd.get(), S_ISLNK(node->type) ? 0 : mode);
  if (error == 0 && fstatat(node->fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) error = -errno;
  if (error == 0) return put_entry(*node, info, out);
  inodes_.forget(node->id, 1);
  return error;
}

int Server::symlink(const fuse_in_header& h, Arguments& in, Reply& out) {
  const NodePtr parent = directory(h.nodeid);
  const char* name = in.name();
  const char* target = in.text();
  if (!parent) return -ESTALE;
  if (name == nullptr || target == nullptr) return -EINVAL;
  if (parent->opaque) return -EACCES;
  if (::symlinkat(target, parent->fd.get(), name) != 0) return -errno;
  return made(h, *parent, name, 0, out);
}

int Server::mknod(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_mknod_in want;
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return -ESTALE;
  const char* name = in.take(want) ? in.name() : nullptr;
  if (name == nullptr) return -EINVAL;
  if (parent->opaque) return -EACCES;
  // A device node would be the host's device for whoever on the host opens it.
  const u32 type = want.mode & S_IFMT;
  if (type != S_IFREG && type != S_IFIFO && type != S_IFSOCK) return -EPERM;
  if (::mknodat(parent->fd.get(), name, want.mode & (S_IFMT | 07777), 0) != 0) return -errno;
  return made(h, *parent, name, want.mode, out);
}

int Server::mkdir(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_mkdir_in want;
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return -ESTALE;
  const char* name = in.take(want) ? in.name() : nullptr;
  if (name == nullptr) return -EINVAL;
  if (parent->opaque) return -EACCES;
  if (::mkdirat(parent->fd.get(), name, want.mode & 07777) != 0) return -errno;
  return made(h, *parent, name, want.mode, out);
}

int Server::unlink(const fuse_in_header& h, Arguments& in, int flags) {
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return -ESTALE;
  const char* name = in.name();
  if (name == nullptr) return -EINVAL;
  if (parent->opaque) return -EACCES;
  return ::unlinkat(parent->fd.get(), name, flags) == 0 ? 0 : -errno;
}

int Server::rename(const fuse_in_header& h, Arguments& in, bool two) {
  u64 to_id = 0;
  u32 flags = 0;
  if (two) {
    fuse_rename2_in want;
    if (!in.take(want)) return -EINVAL;
    to_id = want.newdir;
    flags = want.flags;
  } else {
    fuse_rename_in want;
    if (!in.take(want)) return -EINVAL;
    to_id = want.newdir;
  }
  if ((flags & ~static_cast<u32>(RENAME_NOREPLACE | RENAME_EXCHANGE)) != 0) return -EINVAL;
  const NodePtr from = directory(h.nodeid);
  const NodePtr to = directory(to_id);
  if (!from || !to) return -ESTALE;
  const char* name = in.name();
  const char* new_name = in.name();
  if (name == nullptr || new_name == nullptr) return -EINVAL;
  if (from->opaque || to->opaque) return -EACCES;
  if (::renameat2(from->fd.get(), name, to->fd.get(), new_name, flags) != 0) return -errno;
  const auto tell = [&](const Node& parent, const char* at) {
    struct stat info {};
    if (fstatat(parent.fd.get(), at, &info, AT_SYMLINK_NOFOLLOW) == 0) inodes_.renamed(info.st_dev, info.st_ino, parent.id, at);
  };
  tell(*to, new_name);
  if ((flags & RENAME_EXCHANGE) != 0) tell(*from, name);
  return 0;
}

int Server::link(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_link_in want;
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return -ESTALE;
  const char* name = in.take(want) ? in.name() : nullptr;
  if (name == nullptr) return -EINVAL;
  const NodePtr node = inodes_.find(want.oldnodeid);
  if (!node) return -ESTALE;
  if (S_ISDIR(node->type)) return -EPERM;
  if (parent->opaque) return -EACCES;
  const std::string number = std::to_string(node->fd.get());
  if (::linkat(proc_fds_.get(), number.c_str(), parent->fd.get(), name, AT_SYMLINK_FOLLOW) != 0) return -errno;
  return entry(*parent, name, out);
}

// ---- Open files

int Server::reopen(const Node& node, int flags, UniqueFd& fd) const {
  // Only these two kinds: to open a FIFO may wait for ever, to open a device may do anything.
  if (!S_ISREG(node.type) && !S_ISDIR(node.type)) return -ENXIO;
  fd = inodes_.open_with_room([&] {
    return UniqueFd(::openat(proc_fds_.get(), std::to_string(node.fd.get()).c_str(), flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  });
  return fd ? 0 : -errno;
}

/// What the host's kernel does of itself when a user writes or truncates, and when root changes the owner; for the other half.
/// As there, set-group-ID without the group's execute bit is something else, and stays.
int Server::drop_id_bits(int fd) const {
  struct stat info {};
  if (fstatat(fd, "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return -errno;
  const mode_t drop = (info.st_mode & S_ISUID) | ((info.st_mode & S_IXGRP) != 0 ? info.st_mode & S_ISGID : 0);
  if (!S_ISREG(info.st_mode) || drop == 0) return 0;
  return fchmodat(proc_fds_.get(), std::to_string(fd).c_str(), info.st_mode & 07777 & ~drop, 0) == 0 ? 0 : -errno;
}

int Server::add_open(UniqueFd fd, NodePtr node, u64& handle) {
  auto file = std::make_shared<Open>();
  file->directory = S_ISDIR(node->type);
  file->node = std::move(node);
  file->fd = std::move(fd);
  const std::lock_guard lock(open_mutex_);
  if (open_.size() >= kMostOpen) return -ENFILE;
  handle = next_handle_++;
  open_.emplace(handle, std::move(file));
  return 0;
}

/// The guest keeps a listing until it sees another modification time. Time stamps are as coarse as the host's clock tick: of a directory that
/// has changed just now, a further change might show the same one, and would never be seen.
bool Server::listing_may_be_kept(const Open& directory) const {
  constexpr i64 kSettled = 2;  // seconds
  struct stat info {};
  timespec now{};
  if (options_.cache_ms == 0 || fstat(directory.fd.get(), &info) != 0 || clock_gettime(CLOCK_REALTIME, &now) != 0) return false;
  return info.st_mtim.tv_sec < now.tv_sec - kSettled;
}

Server::OpenPtr Server::opened(u64 handle) const {
  const std::lock_guard lock(open_mutex_);
  const auto it = open_.find(handle);
  return it == open_.end() ? nullptr : it->second;
}

/// Of a guest's open flags, those that mean something on this side.
static int host_flags(u32 flags) {
  return static_cast<int>(flags) & (O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC | O_DSYNC);
}

int Server::open(const fuse_in_header& h, Arguments& in, Reply& out, bool is_directory) {
  fuse_open_in want;
  const NodePtr node = inodes_.find(h.nodeid);
  if (!node) return -ESTALE;
  if (!in.take(want)) return -EINVAL;
  if (is_directory != S_ISDIR(node->type)) return is_directory ? -ENOTDIR : S_ISDIR(node->type) ? -EISDIR : -ENXIO;
  const int flags = is_directory ? O_RDONLY | O_DIRECTORY : host_flags(want.flags);
  if (options_.read_only && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC) != 0)) return -EROFS;
  UniqueFd fd;
  if (const int error = reopen(*node, flags, fd); error != 0) return error;
  if ((want.open_flags & FUSE_OPEN_KILL_SUIDGID) != 0 && !is_directory && options_.privileged && !options_.read_only) {
    if (const int error = drop_id_bits(fd.get()); error != 0) return error;
  }
  fuse_open_out answer{};
  if (const int error = add_open(std::move(fd), node, answer.fh); error != 0) return error;
  // AUTO_INVAL_DATA drops the pages of a file that has changed; those of others may stay.
  if (!is_directory) answer.open_flags = FOPEN_KEEP_CACHE;
  else if (listing_may_be_kept(*opened(answer.fh))) answer.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR;
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::create_file(const fuse_in_header& h, Arguments& in, Reply& out) {
  fuse_create_in want;
  const NodePtr parent = directory(h.nodeid);
  if (!parent) return -ESTALE;
  const char* name = in.take(want) ? in.name() : nullptr;
  if (name == nullptr) return -EINVAL;
  if (parent->opaque) return -EACCES;
  const int flags = host_flags(want.flags);
  // Always O_EXCL first: what exists may be a FIFO or a device, and is looked at before it is opened.
  UniqueFd fd = inodes_.open_with_room([&] {
    return open_beneath(parent->fd.get(), name, (flags & ~O_TRUNC) | O_CREAT | O_EXCL | O_NOFOLLOW | O_NONBLOCK, want.mode & 07777);
  });
  const bool is_new = static_cast<bool>(fd);
  if (!is_new && (errno != EEXIST || (want.flags & O_EXCL) != 0)) return -errno;
  NodePtr node;
  struct stat info {};
  int error = 0;
  if (is_new) {
    error = adopt(h, *parent, fd.get(), want.mode);
    if (error != 0) return error;
  }
  if (error = find(*parent, name, node, info); error != 0) return error;
  u64 handle = 0;
  if (is_new) {
    struct stat mine {};
    // Renamed away and replaced just now by somebody on the host: then the name is that file's.
    if (fstat(fd.get(), &mine) != 0 || mine.st_ino != node->inode || mine.st_dev != node->device) error = -EAGAIN;
  } else {
    error = S_ISDIR(node->type) ? -EISDIR : reopen(*node, flags, fd);
    if (error == 0 && (want.open_flags & FUSE_OPEN_KILL_SUIDGID) != 0 && options_.privileged) error = drop_id_bits(fd.get());
  }
  if (error == 0 && !is_new && fstatat(node->fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) error = -errno;
  if (error == 0) error = add_open(std::move(fd), node, handle);
  if (error != 0) {
    inodes_.forget(node->id, 1);
    return error;
  }
  if (error = put_entry(*node, info, out); error != 0) return error;
  fuse_open_out answer{};
  answer.fh = handle;
  answer.open_flags = FOPEN_KEEP_CACHE;
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::release(Arguments& in) {
  fuse_release_in want;
  if (!in.take(want)) return -EINVAL;
  OpenPtr last;  // closed without the lock
  const std::lock_guard lock(open_mutex_);
  const auto it = open_.find(want.fh);
  if (it == open_.end()) return -EBADF;
  last = std::move(it->second);
  open_.erase(it);
  return 0;
}

int Server::read(Arguments& in, Reply& out) {
  fuse_read_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file || file->directory) return -EBADF;
  const auto room = out.room();
  std::size_t size = std::min<std::size_t>({want.size, room.size(), kMostData});
  std::size_t done = 0;
  if (want.offset > static_cast<u64>(INT64_MAX) - kMostData) return -EINVAL;
  while (done < size) {
    const ssize_t got = ::pread(file->fd.get(), room.data() + done, size - done, static_cast<off_t>(want.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return done > 0 ? (out.add(done), 0) : -errno;
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  out.add(done);
  return 0;
}

int Server::write(Arguments& in, Reply& out) {
  fuse_write_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file || file->directory) return -EBADF;
  const auto data = in.rest();
  if (want.size > data.size() || want.size > kMostData) return -EINVAL;
  if (want.offset > static_cast<u64>(INT64_MAX) - kMostData) return -EFBIG;
  if ((want.write_flags & FUSE_WRITE_KILL_SUIDGID) != 0 && options_.privileged) {
    if (const int error = drop_id_bits(file->fd.get()); error != 0) return error;
  }
  fuse_write_out answer{};
  while (answer.size < want.size) {
    const ssize_t wrote = ::pwrite(file->fd.get(), data.data() + answer.size, want.size - answer.size, static_cast<off_t>(want.offset + answer.size));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0 && answer.size == 0) return -errno;
    if (wrote <= 0) break;
    answer.size += static_cast<u32>(wrote);
  }
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::fsync(Arguments& in) {
  fuse_fsync_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file) return -EBADF;
  const int result = (want.fsync_flags & FUSE_FSYNC_FDATASYNC) != 0 ? ::fdatasync(file->fd.get()) : ::fsync(file->fd.get());
  return result == 0 ? 0 : -errno;
}

int Server::syncfs(const fuse_in_header& h) {
  const NodePtr node = directory(h.nodeid);
  if (!node) return -ESTALE;
  UniqueFd fd;
  if (const int error = reopen(*node, O_RDONLY | O_DIRECTORY, fd); error != 0) return error;
  return ::syncfs(fd.get()) == 0 ? 0 : -errno;
}

int Server::fallocate(Arguments& in) {
  fuse_fallocate_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file || file->directory) return -EBADF;
  if (want.offset > static_cast<u64>(INT64_MAX) || want.length > static_cast<u64>(INT64_MAX)) return -EFBIG;
  return ::fallocate(file->fd.get(), static_cast<int>(want.mode), static_cast<off_t>(want.offset), static_cast<off_t>(want.length)) == 0 ? 0 : -errno;
}

int Server::lseek(Arguments& in, Reply& out) {
  fuse_lseek_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr file = opened(want.fh);
  if (!file || file->directory) return -EBADF;
  if (want.whence != SEEK_DATA && want.whence != SEEK_HOLE) return -EINVAL;
  const std::lock_guard lock(file->mutex);
  const off_t at = ::lseek(file->fd.get(), static_cast<off_t>(want.offset), static_cast<int>(want.whence));
  if (at < 0) return -errno;
  const fuse_lseek_out answer{static_cast<u64>(at)};
  return out.put(answer) ? 0 : -EINVAL;
}

int Server::copy_file_range(Arguments& in, Reply& out) {
  fuse_copy_file_range_in want;
  if (!in.take(want)) return -EINVAL;
  const OpenPtr from = opened(want.fh_in);
  const OpenPtr to = opened(want.fh_out);
  if (!from || !to || from->directory || to->directory) return -EBADF;
  if (want.off_in > static_cast<u64>(INT64_MAX) || want.off_out > static_cast<u64>(INT64_MAX)) return -EINVAL;
  off_t off_in = static_cast<off_t>(want.off_in);
  off_t off_out = static_cast<off_t>(want.off_out);
  // A bounded piece at a time, so that a request does not hold a thread for long; the guest asks for the rest.
  const std::size_t size = std::min<u64>(want.len, u64{64} << 20);
  const ssize_t copied = ::copy_file_range(from->fd.get(), &off_in, to->fd.get(), &off_out, size, 0);
  if (copied < 0) return -errno;
  fuse_write_out answer{};
  answer.size = static_cast<u32>(copied);
  return out.put(answer) ? 0 : -EINVAL;
}

}  // namespace ring3::fs
