#pragma once
#include <span>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::boot {

/// A file the user named, held open: a regular, non-empty one.
///
/// Errors:    one line that names `what` ("kernel", "initrd") and the path.
/// Threading: thread-compatible; reads do not move a file position.
/// Trust:     the content is hostile and may change at any time.
class ImageFile {
 public:
  /// Refuses what is missing, unreadable, empty, not a regular file, or longer than `limit` bytes.
  static Result<ImageFile> open(const std::string& path, const std::string& what, u64 limit);

  const std::string& path() const { return path_; }
  u64 size() const { return size_; }
  /// Fills all of `into` from byte `at` on; fails when the file has become shorter.
  Status read(u64 at, std::span<u8> into) const;

 private:
  ImageFile(UniqueFd fd, u64 size, std::string path, std::string what)
      : fd_(std::move(fd)), size_(size), path_(std::move(path)), what_(std::move(what)) {}
  UniqueFd fd_;
  u64 size_;
  std::string path_;
  std::string what_;
};

}  // namespace ring3::boot
