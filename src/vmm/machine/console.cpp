#include "vmm/machine/console.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

namespace ring3::vmm {

FdConsole::FdConsole(int in_fd, int out_fd)
    : in_fd_(in_fd), out_fd_(out_fd), cancel_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

bool FdConsole::write(std::span<const u8> bytes) {
  if (out_fd_ < 0) return false;
  // A blocking fd can hold a write(2) of more than a pipe's or a terminal's room; small pieces after
  // POLLOUT do not block, so that cancel() is seen.
  constexpr std::size_t kPiece = 512;
  while (!bytes.empty()) {
    pollfd fds[2] = {{out_fd_, POLLOUT, 0}, {cancel_fd_.get(), POLLIN, 0}};
    if (::poll(fds, 2, -1) < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    if (fds[1].revents != 0) return false;
    if (fds[0].revents == 0) continue;
    const ssize_t n = ::write(out_fd_, bytes.data(), bytes.size() < kPiece ? bytes.size() : kPiece);
    if (n < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      return false;
    }
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return true;
}

ConsoleInput FdConsole::read(std::span<u8> into) {
  const ssize_t n = ::read(in_fd_, into.data(), into.size());
  if (n > 0) return filter(into, static_cast<std::size_t>(n));
  ConsoleInput input;
  input.closed = n == 0 || (errno != EINTR && errno != EAGAIN);
  return input;
}

ConsoleInput FdConsole::filter(std::span<u8>, std::size_t count) {
  ConsoleInput input;
  input.bytes = count;
  return input;
}

void FdConsole::cancel() {
  const u64 one = 1;
  [[maybe_unused]] const ssize_t n = ::write(cancel_fd_.get(), &one, sizeof one);
}

}  // namespace ring3::vmm
