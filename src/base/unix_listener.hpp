#pragma once
#include <string>

#include "base/result.hpp"
#include "base/unique_fd.hpp"

namespace ring3 {

/// A listening UNIX stream socket with a name in the file system, which only this user may connect to. Its file goes with it.
class UnixListener {
 public:
  /// A file that a socket left behind at `path`, which nobody listens on, is replaced; any other is in the way.
  /// Errors: EINVAL (a path that is empty or too long), EADDRINUSE, what bind() says; one line that begins with the path.
  static Result<UnixListener> create(const std::string& path);
  UnixListener(UnixListener&&) = default;
  UnixListener& operator=(UnixListener&&) = delete;
  ~UnixListener();

  /// Non-blocking.
  int fd() const { return fd_.get(); }
  /// Absolute: the working directory may change.
  const std::string& path() const { return path_; }

 private:
  UnixListener(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  UniqueFd fd_;
  std::string path_;
};

}  // namespace ring3
