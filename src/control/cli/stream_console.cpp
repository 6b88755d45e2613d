#include "control/cli/stream_console.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/event_fd.hpp"

namespace ring3::control {

namespace {

/// A second, non-blocking description of a terminal: O_NONBLOCK on the one that was inherited would
/// reach the shell too. Invalid when the terminal may not be reopened.
UniqueFd reopen_terminal(int fd, int flags) {
  if (fd < 0 || isatty(fd) == 0) return UniqueFd();
  char name[256];
  if (ttyname_r(fd, name, sizeof name) != 0) return UniqueFd();
  return UniqueFd(::open(name, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
}

}  // namespace

Result<std::unique_ptr<StreamConsole>> StreamConsole::on_fds(int in_fd, int out_fd, bool keys, Callbacks callbacks) {
  std::unique_ptr<StreamConsole> console(new StreamConsole);
  console->in_ = in_fd;
  console->out_ = out_fd;
  if (auto status = console->start(keys, std::move(callbacks)); !status) return status.error();
  return console;
}

Result<std::unique_ptr<StreamConsole>> StreamConsole::standard_io(Callbacks callbacks) {
  const int flags = fcntl(STDOUT_FILENO, F_GETFL);
  if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) {
    return Error::of(EBADF, "standard output is closed, and the console is on it; say --console none or file:PATH");
  }
  std::unique_ptr<StreamConsole> console(new StreamConsole);
  console->name_ = "standard output";
  console->owned_in_ = reopen_terminal(STDIN_FILENO, O_RDONLY);
  console->owned_out_ = reopen_terminal(STDOUT_FILENO, O_WRONLY);
  console->in_ = console->owned_in_ ? console->owned_in_.get() : STDIN_FILENO;
  console->out_ = console->owned_out_ ? console->owned_out_.get() : STDOUT_FILENO;
  if (auto status = console->start(true, std::move(callbacks)); !status) return status.error();
  return console;
}

Result<std::unique_ptr<StreamConsole>> StreamConsole::file(const std::string& path, Callbacks callbacks) {
  if (path.empty()) return Error::of(EINVAL, "--console file: wants a path, such as --console file:console.log");
  std::unique_ptr<StreamConsole> console(new StreamConsole);
  // O_NONBLOCK: a FIFO without a reader answers ENXIO instead of holding us; the writer polls anyway.
  console->owned_out_.reset(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644));
  if (!console->owned_out_) return Error::from_errno("cannot write the console to " + path);
  console->out_ = console->owned_out_.get();
  console->name_ = path;
  if (auto status = console->start(false, std::move(callbacks)); !status) return status.error();
  return console;
}

Result<std::unique_ptr<StreamConsole>> StreamConsole::pseudo_terminal(std::string& path, Callbacks callbacks) {
  std::unique_ptr<StreamConsole> console(new StreamConsole);
  console->owned_out_.reset(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
  const int master = console->owned_out_.get();
  char name[128];
  if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0 || ptsname_r(master, name, sizeof name) != 0) {
    return Error::from_errno("cannot make a pseudo-terminal for the console");
  }
  // Raw, so that the guest alone echoes and edits. Opening and closing it once also makes poll() tell
  // from now on whether somebody is there.
  UniqueFd slave(::open(name, O_RDWR | O_NOCTTY | O_CLOEXEC));
  termios mode;
  if (!slave || tcgetattr(slave.get(), &mode) != 0) return Error::from_errno(std::string("cannot open ") + name);
  cfmakeraw(&mode);
  if (tcsetattr(slave.get(), TCSANOW, &mode) != 0) return Error::from_errno(std::string("cannot set up ") + name);
  path = name;
  console->in_ = console->out_ = master;
  console->hangup_is_idle_ = true;
  console->name_ = path;
  slave.reset();
  if (auto status = console->start(false, std::move(callbacks)); !status) return status.error();
  return console;
}

Result<std::unique_ptr<StreamConsole>> StreamConsole::none() { return on_fds(-1, -1, false, {}); }

Status StreamConsole::start(bool keys, Callbacks callbacks) {
  keys_ = keys;
  callbacks_ = std::move(callbacks);
  ready_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  cancel_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!ready_fd_ || !cancel_fd_) return Error::from_errno("eventfd");
  if (in_ >= 0) {
    reader_ = std::thread([this] { read_ahead(); });
    pthread_setname_np(reader_.native_handle(), "console-in");
  }
  return Ok{};
}

StreamConsole::~StreamConsole() {
  cancel();
  if (reader_.joinable()) reader_.join();
}

void StreamConsole::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  signal_event(cancel_fd_.get());
  room_.notify_all();
}

int StreamConsole::input_fd() const { return in_ >= 0 ? ready_fd_.get() : -1; }

vmm::ConsoleInput StreamConsole::read(std::span<u8> into) {
  const std::lock_guard lock(mutex_);
  vmm::ConsoleInput input;
  input.stop = stop_;
  input.bytes = std::min(into.size(), pending_.size() - taken_);
  if (input.bytes > 0) std::memcpy(into.data(), pending_.data() + taken_, input.bytes);
  taken_ += input.bytes;
  if (taken_ == pending_.size()) {
    pending_.clear();
    taken_ = 0;
    drain_event(ready_fd_.get());
    input.closed = closed_;
  }
  room_.notify_all();
  return input;
}

/// False when cancelled.
bool StreamConsole::wait_for_room() {
  std::unique_lock lock(mutex_);
  room_.wait(lock, [this] { return cancelled_ || pending_.size() - taken_ < kReadAhead; });
  return !cancelled_;
}

/// False when cancelled.
bool StreamConsole::wait_for_input() {
  for (;;) {
    std::array<pollfd, 2> fds{{{in_, POLLIN, 0}, {cancel_fd_.get(), POLLIN, 0}}};
    if (::poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) return false;
    if (fds[1].revents != 0) return false;
    if (fds[0].revents == 0) continue;
    if (!hangup_is_idle_ || (fds[0].revents & POLLIN) != 0) return true;
    // Nobody has the other side open; poll() would answer so without end.
    pollfd cancel{cancel_fd_.get(), POLLIN, 0};
    if (::poll(&cancel, 1, 100) > 0) return false;
  }
}

void StreamConsole::deliver(std::span<const u8> bytes) {
  const std::lock_guard lock(mutex_);
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(taken_));
  taken_ = 0;
  pending_.insert(pending_.end(), bytes.begin(), bytes.end());
  signal_event(ready_fd_.get());
}

void StreamConsole::read_ahead() {
  std::array<u8, 4096> buffer;
  while (wait_for_room() && wait_for_input()) {
    const ssize_t got = ::read(in_, buffer.data(), buffer.size());
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got < 0 && hangup_is_idle_ && errno == EIO) continue;
    if (got <= 0) break;  // the end, or an error that does not pass: either way no more input
    const std::span<u8> typed(buffer.data(), static_cast<std::size_t>(got));
    EscapeKeys::Found found{typed.size(), false, false};
    if (keys_) found = escape_keys_.filter(typed);
    if (found.help && callbacks_.on_help) callbacks_.on_help();
    if (found.bytes > 0) deliver(typed.first(found.bytes));
    if (found.stop) {
      {
        const std::lock_guard lock(mutex_);
        stop_ = true;
      }
      signal_event(ready_fd_.get());
      if (callbacks_.on_stop) callbacks_.on_stop();
      break;
    }
  }
  const std::lock_guard lock(mutex_);
  closed_ = true;
  signal_event(ready_fd_.get());
}

void StreamConsole::lose_output(int code) {
  if (output_lost_) return;
  output_lost_ = true;
  if (callbacks_.on_output_lost) {
    callbacks_.on_output_lost("cannot write the guest's console to " + name_ + ": " + std::strerror(code));
  }
}

bool StreamConsole::write(std::span<const u8> bytes) {
  if (out_ < 0) return true;
  while (!bytes.empty() && !output_lost_) {
    std::array<pollfd, 2> fds{{{out_, POLLOUT, 0}, {cancel_fd_.get(), POLLIN, 0}}};
    if (::poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) {
      lose_output(errno);
      return false;
    }
    if (hangup_is_idle_ && (fds[0].revents & POLLHUP) != 0) return true;  // nobody listens
    if ((fds[0].revents & (POLLOUT | POLLERR | POLLHUP | POLLNVAL)) == 0) {
      if (fds[1].revents != 0) return true;  // cancelled: what cannot be written at once is dropped
      continue;
    }
    // At most PIPE_BUF bytes: after POLLOUT a blocking pipe takes that much without waiting.
    const ssize_t wrote = ::write(out_, bytes.data(), std::min<std::size_t>(bytes.size(), 4096));
    if (wrote >= 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(wrote));
    } else if (errno == EAGAIN) {
      // A description shared with others may say POLLOUT and then be full: do not spin.
      pollfd cancel{cancel_fd_.get(), POLLIN, 0};
      if (::poll(&cancel, 1, 5) > 0) return true;
    } else if (errno != EINTR) {
      if (hangup_is_idle_ && errno == EIO) return true;
      lose_output(errno);
      return false;
    }
  }
  return !output_lost_;
}

}  // namespace ring3::control
