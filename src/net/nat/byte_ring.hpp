#pragma once
#include <sys/uio.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <span>

#include "base/types.hpp"

namespace ring3::net {

/// A queue of bytes that grows by doubling up to a limit and gives its memory back when told to.
/// What it has allocated is counted in the budget it was given.
class ByteRing {
 public:
  explicit ByteRing(u64* allocated) : allocated_(allocated) {}
  ByteRing(const ByteRing&) = delete;
  ByteRing& operator=(const ByteRing&) = delete;
  ~ByteRing() { release(); }

  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t room() const { return capacity_ - size_; }
  bool empty() const { return size_ == 0; }

  /// Makes the capacity a power of two of at least `wanted`; never smaller than it was.
  void grow(std::size_t wanted) {
    const std::size_t capacity = std::bit_ceil(std::max<std::size_t>(wanted, 4096));
    if (capacity <= capacity_) return;
    std::unique_ptr<u8[]> bigger(new u8[capacity]);
    iovec pieces[2];
    std::size_t at = 0;
    for (int i = 0, n = peek(0, size_, pieces); i < n; i++) {
      std::memcpy(bigger.get() + at, pieces[i].iov_base, pieces[i].iov_len);
      at += pieces[i].iov_len;
    }
    *allocated_ += capacity - capacity_;
    bytes_ = std::move(bigger);
    capacity_ = capacity;
    head_ = 0;
  }
  void release() {
    *allocated_ -= capacity_;
    bytes_.reset();
    capacity_ = size_ = head_ = 0;
  }

  /// Up to two pieces that hold `length` bytes from `offset` on, which must be there; how many pieces.
  int peek(std::size_t offset, std::size_t length, iovec out[2]) const {
    if (length == 0) return 0;
    return pieces(head_ + offset, length, out);
  }
  /// The free space, at most `limit` bytes of it.
  int space(std::size_t limit, iovec out[2]) {
    const std::size_t n = std::min(limit, room());
    return n == 0 ? 0 : pieces(head_ + size_, n, out);
  }
  void commit(std::size_t n) { size_ += n; }
  void consume(std::size_t n) {
    size_ -= n;
    head_ = size_ == 0 ? 0 : (head_ + n) & (capacity_ - 1);
  }
  /// `bytes` must fit into room().
  void append(std::span<const u8> bytes) {
    iovec out[2];
    std::size_t at = 0;
    for (int i = 0, n = space(bytes.size(), out); i < n; i++) {
      std::memcpy(out[i].iov_base, bytes.data() + at, out[i].iov_len);
      at += out[i].iov_len;
    }
    commit(bytes.size());
  }

 private:
  int pieces(std::size_t from, std::size_t length, iovec out[2]) const {
    from &= capacity_ - 1;
    const std::size_t first = std::min(length, capacity_ - from);
    out[0] = {bytes_.get() + from, first};
    if (first == length) return 1;
    out[1] = {bytes_.get(), length - first};
    return 2;
  }

  u64* allocated_;
  std::unique_ptr<u8[]> bytes_;
  std::size_t capacity_ = 0;
  std::size_t size_ = 0;
  std::size_t head_ = 0;
};

}  // namespace ring3::net
