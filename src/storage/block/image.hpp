#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "storage/block/file.hpp"

namespace ring3::storage {

/// Accesses that run outside an image's locks, on host space that must not be given to others before they end.
///
/// enter() and leave() are cheap and never wait; drain() returns when all that had entered have left. Two epochs
/// take turns, so that drain() does not wait for those that come later. drain() is for one thread at a time.
class AccessGate {
 public:
  u32 enter() {
    const std::lock_guard lock(mutex_);
    inside_[epoch_]++;
    return epoch_;
  }
  void leave(u32 epoch) {
    const std::lock_guard lock(mutex_);
    if (--inside_[epoch] == 0 && waiting_) empty_.notify_all();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    const u32 old = epoch_;
    epoch_ ^= 1;
    waiting_ = true;
    empty_.wait(lock, [&] { return inside_[old] == 0; });
    waiting_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable empty_;
  u32 epoch_ = 0;
  u64 inside_[2] = {0, 0};
  bool waiting_ = false;
};

/// A virtual disk: an array of bytes with a fixed size, in some format.
///
/// Errors:    0 or -errno; after an error the content of the range written is undefined, that of others is not.
/// Ranges:    offset and length in bytes, any alignment; outside [0, size()) they give -EINVAL.
/// Promise:   what returned 0 before flush() was called is on the disk once flush() has returned 0; and no failure,
///            of power, process or host, makes that undone or the image inconsistent.
/// Threading: any thread, several at once; overlapping writes race as those of a disk do.
class Image {
 public:
  virtual ~Image() = default;

  virtual const char* format() const = 0;
  virtual u64 size() const = 0;
  virtual bool writable() const = 0;
  /// The unit in which space is given out, bytes; a good size for discards.
  virtual u32 cluster_size() const = 0;

  virtual int read(u64 offset, std::span<const iovec> buffers) = 0;
  virtual int write(u64 offset, std::span<const iovec> buffers) = 0;
  /// Reads as zeroes afterwards; with may_unmap, space may be given back.
  virtual int write_zeroes(u64 offset, u64 length, bool may_unmap) = 0;
  /// The content does not matter any more. It reads as zeroes or as before.
  virtual int discard(u64 offset, u64 length) = 0;
  virtual int flush() = 0;
  /// The last call: flushes, and marks the image as closed in good order.
  virtual int close() { return flush(); }

  enum class Kind {
    kAbsent,      ///< nothing stands here or in any image below; reads as zeroes
    kZero,        ///< said to be zeroes
    kData,
    kCompressed,
  };
  struct Extent {
    Kind kind = Kind::kAbsent;
    u64 length = 0;               ///< > 0, bytes from the offset asked for
    u32 depth = 0;                ///< 0: this image, 1: the one below, ...
    bool has_offset = false;
    u64 host_offset = 0;          ///< in that image's file
  };
  /// What stands at `offset`, at most `length` bytes of it. Error: -errno.
  virtual int map(u64 offset, u64 length, Extent& extent) = 0;

  /// A place on the host where the whole of an access may be made directly. Ends with end_direct().
  struct Direct {
    int fd = -1;            ///< -1: not possible; use read() or write()
    u64 host_offset = 0;
    u32 token = 0;
    Image* below = nullptr; ///< the backing image that it came from; null: this one
  };
  virtual Direct begin_direct(bool write, u64 offset, std::span<const iovec> buffers) {
    (void)write, (void)offset, (void)buffers;
    return {};
  }
  virtual void end_direct(const Direct& direct) { (void)direct; }

  int read(u64 offset, std::span<u8> to) {
    const iovec v{to.data(), to.size()};
    return read(offset, std::span(&v, 1));
  }
  int write(u64 offset, std::span<const u8> from) {
    const iovec v{const_cast<u8*>(from.data()), from.size()};
    return write(offset, std::span<const iovec>(&v, 1));
  }
};

}  // namespace ring3::storage
