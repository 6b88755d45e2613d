#pragma once
#include <sys/uio.h>

#include <functional>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace ring3::storage {

/// What image formats store themselves in: a host file, or memory in tests and fuzzers.
///
/// Errors:    0 or -errno. A failed call may have done a part of its work.
/// Order:     writes may reach the disk in any order; what returned before sync() was called is on the disk
///            when sync() has returned 0. After a sync() that failed, every later one fails: the host may have
///            dropped what it could not write.
/// Threading: any thread, several at once. Overlapping accesses race as those of pwrite(2) do.
class File {
 public:
  virtual ~File() = default;

  /// Fills all of the buffers; what lies past the end of the file reads as zeroes.
  virtual int read(u64 offset, std::span<const iovec> buffers) = 0;
  virtual int write(u64 offset, std::span<const iovec> buffers) = 0;
  virtual int sync() = 0;

  /// The range reads as zeroes afterwards. With `deallocate` the host gets the space back where it can.
  virtual int zero(u64 offset, u64 length, bool deallocate) = 0;
  /// Makes the host reserve space for the range, so that writes to it do not run out of it. May extend the file.
  virtual int reserve(u64 offset, u64 length) = 0;
  virtual int truncate(u64 size) = 0;
  /// Bytes, or -errno.
  virtual i64 size() = 0;

  struct Segment {
    bool data = true;  ///< false: a hole, which reads as zeroes
    u64 length = 0;    ///< bytes from the offset asked for; 0 at the end of the file
  };
  /// What the host knows of the range from `offset` on. A host that knows nothing says data to the end.
  virtual Segment segment(u64 offset) = 0;

  /// Whether bytes past the old end read as zeroes once the file has grown over them (no block device does).
  virtual bool grows_with_zeroes() const { return true; }
  /// The descriptor on which this access may be made directly (io_uring), or -1: use read() and write().
  virtual int direct_fd(u64 offset, std::span<const iovec> buffers) const {
    (void)offset, (void)buffers;
    return -1;
  }
  /// Tells of a failure of an access made on direct_fd().
  virtual void note_failed_sync() {}

  int read(u64 offset, std::span<u8> to) {
    const iovec v{to.data(), to.size()};
    return read(offset, std::span(&v, 1));
  }
  int write(u64 offset, std::span<const u8> from) {
    const iovec v{const_cast<u8*>(from.data()), from.size()};
    return write(offset, std::span<const iovec>(&v, 1));
  }
};

inline u64 total_length(std::span<const iovec> buffers) {
  u64 n = 0;
  for (const iovec& v : buffers) n += v.iov_len;
  return n;
}

/// The part [offset, offset + length) of a list of buffers.
std::vector<iovec> slice(std::span<const iovec> buffers, u64 offset, u64 length);
void fill_zero(std::span<const iovec> buffers);
void copy_to(std::span<const iovec> buffers, const u8* from);
void copy_from(u8* to, std::span<const iovec> buffers);

}  // namespace ring3::storage
