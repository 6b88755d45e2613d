#include "storage/block/host_file.hpp"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/checked.hpp"
#include "base/log.hpp"

namespace ring3::storage {
namespace {

constexpr u64 kMostOffset = u64{1} << 62;
constexpr std::size_t kMostBuffers = 1024;  // IOV_MAX

// QEMU's permissions, in the order of their bits: what is done (byte 100 + bit), and what others must not do
// (byte 200 + bit). Its docs call them consistent read, write, write unchanged, resize.
constexpr int kDone = 100, kNotShared = 200;
constexpr u32 kConsistentRead = 1, kWrite = 2, kResize = 8;

int fcntl_lock(int fd, int command, short type, int byte) {
  struct flock l {};
  l.l_type = type;
  l.l_whence = SEEK_SET;
  l.l_start = byte;
  l.l_len = 1;
  if (::fcntl(fd, command, &l) < 0) return -errno;
  return l.l_type == F_UNLCK ? 0 : 1;
}

// Moves a whole list of buffers; `once` is preadv or pwritev at an offset.
template <class Once>
int transfer(u64 offset, std::span<const iovec> buffers, bool zero_at_end, Once once) {
  const u64 length = total_length(buffers);
  if (!range_within(offset, length, kMostOffset)) return -EFBIG;
  u64 done = 0;
  std::vector<iovec> rest;
  std::span<const iovec> now = buffers;
  while (done < length) {
    if (done != 0 || now.size() > kMostBuffers) {
      rest = slice(buffers, done, length - done);
      now = rest;
    }
    const ssize_t n = once(now.first(std::min(now.size(), kMostBuffers)), static_cast<off_t>(offset + done));
    if (n < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      return -errno;
    }
    if (n == 0) {
      if (!zero_at_end) return -ENOSPC;
      fill_zero(slice(buffers, done, length - done));
      return 0;
    }
    done += static_cast<u64>(n);
  }
  return 0;
}

std::string quoted(const std::string& path) { return "'" + path + "'"; }

}  // namespace

Result<std::unique_ptr<HostFile>> HostFile::open(const std::string& path, const Options& o) {
  std::unique_ptr<HostFile> file(new HostFile);
  // O_NONBLOCK: a FIFO or a device must not make us wait; it means nothing to regular files.
  const int flags = O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (o.writable ? O_RDWR : O_RDONLY) | (o.create ? O_CREAT : 0);
  file->fd_.reset(::open(path.c_str(), flags, 0644));
  if (!file->fd_) {
    const int code = errno;
    std::string hint;
    if (code == ENOENT && !o.create) hint = " (make one with: ring3 image create)";
    if ((code == EACCES || code == EROFS || code == EPERM) && o.writable && !o.create) {
      hint = " for writing (add ,readonly to use it without)";
    }
    return Error::of(code, "cannot open " + quoted(path) + hint + ": " + std::strerror(code));
  }
  struct stat info {};
  if (::fstat(file->fd_.get(), &info) < 0) return Error::from_errno(quoted(path));
  if (!S_ISREG(info.st_mode) && !S_ISBLK(info.st_mode)) {
    return Error::of(EINVAL, quoted(path) + " is neither a file nor a block device");
  }
  file->regular_ = S_ISREG(info.st_mode);
  file->writable_ = o.writable;
  file->identity_ = {info.st_dev, info.st_ino};
  if (o.lock) {
    if (auto r = file->lock(path, o.writable && o.exclusive); !r) return r.error();
  }
  if (o.create && file->regular_) {
    if (::ftruncate(file->fd_.get(), 0) < 0) return Error::from_errno("cannot empty " + quoted(path));
  }
  if (o.direct) {
    // Through /proc: the very file that is open, not what the name means by now.
    const std::string self = "/proc/self/fd/" + std::to_string(file->fd_.get());
    file->direct_.reset(::open(self.c_str(), O_CLOEXEC | O_DIRECT | (o.writable ? O_RDWR : O_RDONLY)));
    if (!file->direct_) {
      return Error::of(errno, quoted(path) + ": the host's file system has no O_DIRECT; leave direct=on out");
    }
  }
  return file;
}

Status HostFile::lock(const std::string& path, bool writer) {
  const u32 done = kConsistentRead | (writer ? kWrite | kResize : 0);
  const u32 not_shared = kWrite | kResize;
  int set = F_OFD_SETLK, get = F_OFD_GETLK;
  const auto hold = [&](int byte) {
    int r = fcntl_lock(fd_.get(), set, F_RDLCK, byte);
    if (r == -EINVAL && set == F_OFD_SETLK) {  // no open file description locks here
      set = F_SETLK, get = F_GETLK;
      r = fcntl_lock(fd_.get(), set, F_RDLCK, byte);
    }
    return r;
  };
  const auto busy = [&] {
    return Error::of(EBUSY, quoted(path) + " is in use by another process (" +
                                (writer ? "a disk has one writer: end the other, or add ,readonly on both sides"
                                        : "it is being written: end the other first") + ")");
  };
  // First take, then look whether somebody else's locks speak against it: of two that start at once, at least
  // one sees the other.
  for (int bit = 0; bit < 4; bit++) {
    for (const auto& [mask, base] : {std::pair<u32, int>{done, kDone}, {not_shared, kNotShared}}) {
      if ((mask >> bit & 1) == 0) continue;
      const int r = hold(base + bit);
      if (r == -EAGAIN || r == -EACCES) return busy();
      if (r < 0) {
        log::info("{}: the host cannot lock it ({})", path, std::strerror(-r));
        return Ok{};
      }
    }
  }
  for (int bit = 0; bit < 4; bit++) {
    for (const auto& [mask, base] : {std::pair<u32, int>{done, kNotShared}, {not_shared, kDone}}) {
      if ((mask >> bit & 1) == 0) continue;
      if (fcntl_lock(fd_.get(), get, F_WRLCK, base + bit) == 1) return busy();
    }
  }
  return Ok{};
}

bool HostFile::aligned(u64 offset, std::span<const iovec> buffers) const {
  u64 bits = offset;
  for (const iovec& v : buffers) bits |= reinterpret_cast<u64>(v.iov_base) | v.iov_len;
  return (bits & (alignment_ - 1)) == 0;
}

int HostFile::direct_fd(u64 offset, std::span<const iovec> buffers) const {
  if (!direct_) return fd_.get();
  return aligned(offset, buffers) ? direct_.get() : -1;
}

int HostFile::read(u64 offset, std::span<const iovec> buffers) {
  const int fd = direct_ && aligned(offset, buffers) ? direct_.get() : fd_.get();
  return transfer(offset, buffers, true, [&](std::span<const iovec> v, off_t at) {
    return ::preadv(fd, v.data(), static_cast<int>(v.size()), at);
  });
}

int HostFile::write(u64 offset, std::span<const iovec> buffers) {
  const int fd = direct_ && aligned(offset, buffers) ? direct_.get() : fd_.get();
  return transfer(offset, buffers, false, [&](std::span<const iovec> v, off_t at) {
    return ::pwritev(fd, v.data(), static_cast<int>(v.size()), at);
  });
}

int HostFile::sync() {
  if (!writable_) return 0;
  if (sync_failed_.load()) return -EIO;
  while (::fdatasync(fd_.get()) < 0) {
    if (errno == EINTR) continue;
    const int r = -errno;
    sync_failed_.store(true);
    return r;
  }
  return 0;
}

int HostFile::zero(u64 offset, u64 length, bool deallocate) {
  if (length == 0) return 0;
  if (!range_within(offset, length, kMostOffset)) return -EFBIG;
  const auto try_mode = [&](int mode, std::atomic<bool>& can) {
    if (!can.load(std::memory_order_relaxed)) return -EOPNOTSUPP;
    int r;
    do {
      r = ::fallocate(fd_.get(), mode | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(length)) < 0
              ? -errno : 0;
    } while (r == -EINTR);
    if (r == -EOPNOTSUPP || r == -ENOSYS || r == -EINVAL || r == -ENODEV) can.store(false, std::memory_order_relaxed);
    return r;
  };
  const i64 end = size();
  if (end < 0) return static_cast<int>(end);
  if (regular_ && offset + length > static_cast<u64>(end)) {
    if (const int r = truncate(offset + length); r < 0) return r;
  }
  if (deallocate && try_mode(FALLOC_FL_PUNCH_HOLE, can_punch_) == 0) return 0;
  if (!deallocate && try_mode(FALLOC_FL_ZERO_RANGE, can_zero_) == 0) return 0;
  static const std::vector<u8> zeroes(u64{1} << 20);
  while (length != 0) {
    const u64 n = std::min<u64>(length, zeroes.size());
    if (const int r = File::write(offset, std::span(zeroes).first(n)); r < 0) return r;
    offset += n;
    length -= n;
  }
  return 0;
}

int HostFile::reserve(u64 offset, u64 length) {
  if (length == 0) return 0;
  if (!range_within(offset, length, kMostOffset)) return -EFBIG;
  for (;;) {
    const int r = ::posix_fallocate(fd_.get(), static_cast<off_t>(offset), static_cast<off_t>(length));
    if (r != EINTR) return -r;
  }
}

int HostFile::truncate(u64 size) {
  if (size > kMostOffset) return -EFBIG;
  if (!regular_) return -EINVAL;
  return ::ftruncate(fd_.get(), static_cast<off_t>(size)) < 0 ? -errno : 0;
}

i64 HostFile::size() {
  if (!regular_) {
    u64 bytes = 0;
    return ::ioctl(fd_.get(), BLKGETSIZE64, &bytes) < 0 ? -errno : static_cast<i64>(bytes);
  }
  struct stat info {};
  return ::fstat(fd_.get(), &info) < 0 ? -errno : static_cast<i64>(info.st_size);
}

u64 HostFile::allocated() const {
  struct stat info {};
  return ::fstat(fd_.get(), &info) < 0 ? 0 : static_cast<u64>(info.st_blocks) * 512;
}

File::Segment HostFile::segment(u64 offset) {
  const i64 end = size();
  if (end < 0 || offset >= static_cast<u64>(end)) return {true, 0};
  const u64 left = static_cast<u64>(end) - offset;
  if (!regular_ || !can_seek_.load(std::memory_order_relaxed)) return {true, left};
  const off_t data = ::lseek(fd_.get(), static_cast<off_t>(offset), SEEK_DATA);
  if (data < 0) {
    if (errno == ENXIO) return {false, left};
    can_seek_.store(false, std::memory_order_relaxed);
    return {true, left};
  }
  if (static_cast<u64>(data) > offset) return {false, std::min<u64>(static_cast<u64>(data) - offset, left)};
  const off_t hole = ::lseek(fd_.get(), static_cast<off_t>(offset), SEEK_HOLE);
  return {true, hole < 0 ? left : std::min<u64>(static_cast<u64>(hole) - offset, left)};
}

}  // namespace ring3::storage
