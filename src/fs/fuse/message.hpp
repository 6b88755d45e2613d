#pragma once
#include <linux/fuse.h>

#include <cstring>
#include <span>

#include "base/types.hpp"

namespace ring3::fs {

/// What follows a request's header, taken from its start. Every taker says whether it was there.
class Arguments {
 public:
  explicit Arguments(std::span<const u8> bytes) : rest_(bytes) {}

  template <class T>
  bool take(T& out) {
    if (rest_.size() < sizeof(T)) return false;
    std::memcpy(&out, rest_.data(), sizeof(T));
    rest_ = rest_.subspan(sizeof(T));
    return true;
  }
  /// A string that ends with a NUL within the request; points into it.
  const char* text() {
    const void* end = rest_.empty() ? nullptr : std::memchr(rest_.data(), 0, rest_.size());
    if (end == nullptr) return nullptr;
    const char* start = reinterpret_cast<const char*>(rest_.data());
    rest_ = rest_.subspan(static_cast<std::size_t>(static_cast<const u8*>(end) - rest_.data()) + 1);
    return start;
  }
  /// A file's name: not empty, not "." or "..", without '/', at most 255 bytes. Null otherwise.
  const char* name() {
    const char* s = text();
    if (s == nullptr) return nullptr;
    const std::size_t length = std::strlen(s);
    if (length == 0 || length > 255 || std::strchr(s, '/') != nullptr) return nullptr;
    return std::strcmp(s, ".") == 0 || std::strcmp(s, "..") == 0 ? nullptr : s;
  }
  std::span<const u8> rest() const { return rest_; }

 private:
  std::span<const u8> rest_;
};

/// The room for an answer, behind its header.
class Reply {
 public:
  explicit Reply(std::span<u8> room) : room_(room) {}

  template <class T>
  bool put(const T& value) {
    return put_bytes(&value, sizeof(T));
  }
  bool put_bytes(const void* bytes, std::size_t size) {
    if (room_.size() - used_ < size) return false;
    std::memcpy(room_.data() + used_, bytes, size);
    used_ += size;
    return true;
  }
  /// What is left, to be filled by a system call and then add()ed.
  std::span<u8> room() const { return room_.subspan(used_); }
  void add(std::size_t size) { used_ += size; }
  std::size_t used() const { return used_; }
  void clear() { used_ = 0; }

 private:
  std::span<u8> room_;
  std::size_t used_ = 0;
};

}  // namespace ring3::fs
