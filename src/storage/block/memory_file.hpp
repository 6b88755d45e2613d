#pragma once
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "storage/block/file.hpp"

namespace ring3::storage {

/// A file in memory, for tests and fuzzers: fails when told to, and remembers its writes.
///
/// Threading: any thread; one mutex.
class MemoryFile final : public File {
 public:
  struct Write {
    u64 offset = 0;
    std::vector<u8> bytes;   ///< empty: a truncation to `offset`
    bool sync = false;       ///< no write: everything before it is on the disk
  };
  static constexpr u64 kMost = u64{1} << 30;

  MemoryFile() = default;
  /// most: the size that it may come to, bytes; what would go past it is -EFBIG.
  explicit MemoryFile(std::vector<u8> bytes, u64 most = kMost) : bytes_(std::move(bytes)), most_(most) {}

  /// The call numbered `n` from now on, and every n-th after it, fails with `code`. 0: none.
  void fail_every(u64 n, int code) { every_ = n, code_ = code, calls_ = 0; }
  void record(bool on) { recording_ = on; }
  std::vector<Write>& log() { return log_; }
  std::vector<u8>& bytes() { return bytes_; }

  using File::read;
  using File::write;
  int read(u64 offset, std::span<const iovec> buffers) override {
    const std::lock_guard lock(mutex_);
    if (const int r = failure(); r < 0) return r;
    for (const iovec& v : buffers) {
      const u64 there = offset < bytes_.size() ? std::min<u64>(bytes_.size() - offset, v.iov_len) : 0;
      if (there != 0) std::memcpy(v.iov_base, bytes_.data() + offset, there);
      if (there < v.iov_len) std::memset(static_cast<u8*>(v.iov_base) + there, 0, v.iov_len - there);
      offset += v.iov_len;
    }
    return 0;
  }
  int write(u64 offset, std::span<const iovec> buffers) override {
    const std::lock_guard lock(mutex_);
    if (const int r = failure(); r < 0) return r;
    const u64 n = total_length(buffers);
    if (n == 0) return 0;
    if (offset > most_ || n > most_ - offset) return -EFBIG;
    std::vector<u8> flat(n);
    copy_from(flat.data(), buffers);
    put(offset, std::move(flat));
    return 0;
  }
  int sync() override {
    const std::lock_guard lock(mutex_);
    if (const int r = failure(); r < 0) return r;
    if (recording_) log_.push_back({0, {}, true});
    return 0;
  }
  int zero(u64 offset, u64 length, bool) override {
    const std::lock_guard lock(mutex_);
    if (const int r = failure(); r < 0) return r;
    if (offset > most_ || length > most_ - offset) return -EFBIG;
    if (length != 0) put(offset, std::vector<u8>(length));
    return 0;
  }
  int reserve(u64, u64) override { return 0; }
  int truncate(u64 size) override {
    const std::lock_guard lock(mutex_);
    if (const int r = failure(); r < 0) return r;
    if (size > most_) return -EFBIG;
    bytes_.resize(size);
    if (recording_) log_.push_back({size, {}, false});
    return 0;
  }
  i64 size() override {
    const std::lock_guard lock(mutex_);
    return static_cast<i64>(bytes_.size());
  }
  Segment segment(u64 offset) override {
    const std::lock_guard lock(mutex_);
    return {true, offset < bytes_.size() ? bytes_.size() - offset : 0};
  }

 private:
  int failure() { return every_ != 0 && ++calls_ % every_ == 0 ? -code_ : 0; }
  void put(u64 offset, std::vector<u8> flat) {
    if (offset + flat.size() > bytes_.size()) bytes_.resize(offset + flat.size());
    std::memcpy(bytes_.data() + offset, flat.data(), flat.size());
    if (recording_) log_.push_back({offset, std::move(flat), false});
  }

  std::mutex mutex_;
  std::vector<u8> bytes_;
  u64 most_ = kMost;
  std::vector<Write> log_;
  bool recording_ = false;
  u64 every_ = 0, calls_ = 0;
  int code_ = EIO;
};

}  // namespace ring3::storage
