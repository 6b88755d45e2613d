#pragma once
#include <algorithm>

#include "base/checked.hpp"
#include "storage/block/image.hpp"

namespace ring3::storage {

/// A raw image: byte n of the disk is byte n of the file.
class RawImage final : public Image {
 public:
  /// size: of the disk, bytes; usually that of the file.
  RawImage(std::unique_ptr<File> file, u64 size, bool writable)
      : file_(std::move(file)), size_(size), writable_(writable) {}

  const char* format() const override { return "raw"; }
  u64 size() const override { return size_; }
  bool writable() const override { return writable_; }
  u32 cluster_size() const override { return 4096; }
  File& file() { return *file_; }

  int read(u64 offset, std::span<const iovec> b) override {
    return inside(offset, total_length(b)) ? file_->read(offset, b) : -EINVAL;
  }
  int write(u64 offset, std::span<const iovec> b) override {
    if (!writable_) return -EROFS;
    return inside(offset, total_length(b)) ? file_->write(offset, b) : -EINVAL;
  }
  int write_zeroes(u64 offset, u64 length, bool may_unmap) override {
    if (!writable_) return -EROFS;
    return inside(offset, length) ? file_->zero(offset, length, may_unmap) : -EINVAL;
  }
  int discard(u64 offset, u64 length) override {
    if (!writable_) return -EROFS;
    return inside(offset, length) ? file_->zero(offset, length, true) : -EINVAL;
  }
  int flush() override { return file_->sync(); }
  int map(u64 offset, u64 length, Extent& e) override {
    if (length == 0 || !inside(offset, length)) return -EINVAL;
    const File::Segment s = file_->segment(offset);
    e = {};
    e.kind = s.length == 0 || !s.data ? Kind::kAbsent : Kind::kData;
    e.length = s.length == 0 ? length : std::min(length, s.length);
    e.has_offset = true;
    e.host_offset = offset;
    return 0;
  }
  Direct begin_direct(bool write, u64 offset, std::span<const iovec> b) override {
    if ((write && !writable_) || !inside(offset, total_length(b))) return {};
    return {file_->direct_fd(offset, b), offset, 0, nullptr};
  }
  using Image::read;
  using Image::write;

 private:
  bool inside(u64 offset, u64 length) const { return range_within(offset, length, size_); }

  std::unique_ptr<File> file_;
  u64 size_;
  bool writable_;
};

}  // namespace ring3::storage
