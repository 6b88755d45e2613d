#pragma once
#include <cstddef>
#include <utility>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3 {

/// Owns one mmap'ed range; unmaps it once. Thread-compatible.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Mapping& operator=(Mapping&& o) noexcept;
  ~Mapping() { reset(); }

  /// Zeroed private memory, page aligned, not reserved in swap. Size in bytes, > 0.
  static Result<Mapping> anonymous(std::size_t size);
  /// Zeroed memory that fork(2) shares and that mremap(2) of old size 0 maps a second time.
  static Result<Mapping> shared_anonymous(std::size_t size);
  /// A shared mapping of fd. prot as for mmap(2).
  static Result<Mapping> shared_fd(int fd, std::size_t size, int prot, std::size_t offset = 0);

  u8* data() const { return data_; }
  std::size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }
  void reset();

 private:
  Mapping(u8* data, std::size_t size) : data_(data), size_(size) {}
  u8* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace ring3
