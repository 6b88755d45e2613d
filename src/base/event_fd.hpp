#pragma once
#include <unistd.h>

#include <cerrno>

#include "base/types.hpp"

/// The two things that are done with an eventfd. Any thread; async-signal-safe; errno is not kept.
namespace ring3 {

/// Makes fd readable. A counter that is full says so already (EAGAIN), and an fd that is none has nobody waiting.
inline void signal_event(int fd) {
  const u64 one = 1;
  while (::write(fd, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

/// Takes back all signals so far. fd should be non-blocking: there may be none.
inline void drain_event(int fd) {
  u64 count;
  while (::read(fd, &count, sizeof count) < 0 && errno == EINTR) {
  }
}

}  // namespace ring3
