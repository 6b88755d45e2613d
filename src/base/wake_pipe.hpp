#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/unique_fd.hpp"

namespace ring3 {

/// Wakes a thread that polls fd(). Not an eventfd, so that where a client names an eventfd by a number it cannot be this one.
/// signal(): any thread; async-signal-safe; errno is not kept. The others: one thread.
class WakePipe {
 public:
  /// 0 or -errno.
  int create() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
    read_.reset(ends[0]);
    write_.reset(ends[1]);
    return 0;
  }
  int fd() const { return read_.get(); }
  /// A pipe that is full says so already.
  void signal() const {
    const char byte = 0;
    while (::write(write_.get(), &byte, 1) < 0 && errno == EINTR) {
    }
  }
  /// Takes back all signals so far.
  void drain() const {
    char bytes[256];
    ssize_t n;
    while ((n = ::read(read_.get(), bytes, sizeof bytes)) == static_cast<ssize_t>(sizeof bytes) || (n < 0 && errno == EINTR)) {
    }
  }

 private:
  UniqueFd read_, write_;
};

}  // namespace ring3
