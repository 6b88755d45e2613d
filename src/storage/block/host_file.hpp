#pragma once
#include <atomic>
#include <memory>
#include <string>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "storage/block/file.hpp"

namespace ring3::storage {

/// A regular file or a block device of the host.
///
/// Locks:     open file description locks on single bytes, as QEMU sets them on images (bytes 100.. for what is
///            done, 200.. for what others must not do): a second writer is refused, whether it is ring3 or QEMU,
///            and so are a writer beside readers and a reader beside a writer. The kernel drops them with the
///            last descriptor, however the process ends. Where the host has no such locks, process locks are
///            taken; where it has none at all, none.
/// Direct:    O_DIRECT for aligned accesses; others go through the page cache, which Linux keeps coherent.
class HostFile final : public File {
 public:
  struct Options {
    bool writable = false;
    bool direct = false;      ///< O_DIRECT
    bool create = false;      ///< make it, or empty it when it is there; the size is 0 afterwards
    bool exclusive = true;    ///< with writable: nobody else may write, nor read expecting stillness
    bool lock = true;
  };
  /// Errors: one line that names the file and says what to do. EBUSY: locked by another process.
  /// Neither follows nor waits for anything that is no regular file or block device.
  static Result<std::unique_ptr<HostFile>> open(const std::string& path, const Options& options);

  int read(u64 offset, std::span<const iovec> buffers) override;
  int write(u64 offset, std::span<const iovec> buffers) override;
  int sync() override;
  int zero(u64 offset, u64 length, bool deallocate) override;
  int reserve(u64 offset, u64 length) override;
  int truncate(u64 size) override;
  i64 size() override;
  Segment segment(u64 offset) override;
  bool grows_with_zeroes() const override { return regular_; }
  int direct_fd(u64 offset, std::span<const iovec> buffers) const override;
  void note_failed_sync() override { sync_failed_.store(true); }
  using File::read;
  using File::write;

  int fd() const { return fd_.get(); }
  /// st_dev and st_ino: the same file under another name has the same.
  std::pair<u64, u64> identity() const { return identity_; }
  /// Bytes that the host has allocated.
  u64 allocated() const;

 private:
  HostFile() = default;
  Status lock(const std::string& path, bool writer);
  bool aligned(u64 offset, std::span<const iovec> buffers) const;

  UniqueFd fd_;
  UniqueFd direct_;  // the same file with O_DIRECT
  u32 alignment_ = 4096;
  bool regular_ = true;
  bool writable_ = false;
  std::pair<u64, u64> identity_;
  std::atomic<bool> sync_failed_{false};
  std::atomic<bool> can_punch_{true}, can_zero_{true}, can_seek_{true};
};

}  // namespace ring3::storage
