#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/unique_fd.hpp"
#include "control/cli/commands.hpp"
#include "control/cli/keys.hpp"
#include "control/cli/life.hpp"
#include "control/cli/terminal.hpp"
#include "control/cli/text.hpp"
#include "control/vms/registry.hpp"
#include "control/vms/shared_console.hpp"

namespace ring3::control {
namespace {

constexpr char kAttachHelp[] =
    "\r\nring3: Ctrl-A h       this list\r\n"
    "ring3: Ctrl-A d       leave the console; the VM goes on\r\n"
    "ring3: Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

bool send_all(int fd, const u8* data, std::size_t size) {
  while (size > 0) {
    const ssize_t sent = ::send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    size -= static_cast<std::size_t>(sent);
  }
  return true;
}

bool send_frame(int fd, u8 kind, std::span<const u8> body) {
  std::array<u8, 3> header{kind, static_cast<u8>(body.size() & 0xff), static_cast<u8>(body.size() >> 8)};
  return send_all(fd, header.data(), header.size()) && send_all(fd, body.data(), body.size());
}

void send_size(int fd) {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0) return;
  const std::array<u8, 4> body{static_cast<u8>(size.ws_row), static_cast<u8>(size.ws_row >> 8), static_cast<u8>(size.ws_col),
                               static_cast<u8>(size.ws_col >> 8)};
  send_frame(fd, vms::SharedConsole::kSize, body);
}

Result<UniqueFd> connect_to(const std::string& root, const std::string& name) {
  const UniqueFd directory(open((root + "/" + name).c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!directory || !fd) return Error::from_errno("cannot reach the console of " + name);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = vms::socket_path(directory.get());
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return Error::from_errno("cannot reach the console of " + name);
  }
  return fd;
}

enum class Left { kDetached, kVmEnded, kInputEnded, kOutputGone, kSignal };

/// Moves bytes both ways until one side leaves. `signals`: a signalfd.
Left carry(int console, int signals) {
  EscapeKeys keys(EscapeKeys::Leave::kDetach);
  std::array<u8, 4096> buffer;
  bool input_open = true;
  for (;;) {
    std::array<pollfd, 3> fds{{{console, POLLIN, 0}, {signals, POLLIN, 0}, {input_open ? STDIN_FILENO : -1, POLLIN, 0}}};
    if (::poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) return Left::kOutputGone;
    if (fds[1].revents != 0) {
      signalfd_siginfo info{};
      if (::read(signals, &info, sizeof info) != static_cast<ssize_t>(sizeof info)) continue;
      if (info.ssi_signo == SIGWINCH) {
        send_size(console);
      } else if (info.ssi_signo == SIGTSTP) {
        suspend_terminal();
        kill(getpid(), SIGSTOP);
      } else if (info.ssi_signo == SIGCONT) {
        resume_terminal();
        send_size(console);
      } else {
        return Left::kSignal;
      }
    }
    if (fds[0].revents != 0) {
      const ssize_t got = ::read(console, buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return Left::kVmEnded;
      for (ssize_t done = 0; done < got;) {
        const ssize_t wrote = ::write(STDOUT_FILENO, buffer.data() + done, static_cast<std::size_t>(got - done));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0 && errno == EAGAIN) {
          pollfd out{STDOUT_FILENO, POLLOUT, 0};
          ::poll(&out, 1, -1);
          continue;
        }
        if (wrote <= 0) return Left::kOutputGone;
        done += wrote;
      }
    }
    if (fds[2].revents != 0) {
      const ssize_t got = ::read(STDIN_FILENO, buffer.data(), buffer.size());
      if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (got <= 0) {
        if (isatty(STDIN_FILENO) != 0) return Left::kInputEnded;
        input_open = false;  // a pipe's end: the answers are still wanted
        continue;
      }
      std::span<u8> typed(buffer.data(), static_cast<std::size_t>(got));
      EscapeKeys::Found found{typed.size(), false, false};
      if (isatty(STDIN_FILENO) != 0) found = keys.filter(typed);
      if (found.help) std::fputs(kAttachHelp, stderr);
      if (found.bytes > 0 && !send_frame(console, vms::SharedConsole::kInput, typed.first(found.bytes))) return Left::kVmEnded;
      if (found.stop) return Left::kDetached;
    }
  }
}

}  // namespace

int attach_console(const std::string& name) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  auto vm = vms::find(*root, name);
  if (!vm) return fail(vm.error().message);
  if (!vm->running()) return fail(name + " is not running; what it wrote: ring3 logs " + name);
  if (vm->console != "shared") {
    const bool terminal = vm->console.rfind("/dev/", 0) == 0;
    return fail(name + (terminal ? " has its console on " + printable(vm->console) + ": open that with a terminal program"
                                 : " has no console to attach to; it was started with --console " +
                                       std::string(vm->console == "none" ? "none" : "file:...")));
  }
  auto console = connect_to(*root, name);
  if (!console) return fail(console.error().message);

  sigset_t set, former;
  sigemptyset(&set);
  for (const int signal : {SIGWINCH, SIGTSTP, SIGCONT, SIGINT, SIGTERM, SIGHUP, SIGQUIT}) sigaddset(&set, signal);
  sigprocmask(SIG_BLOCK, &set, &former);
  const UniqueFd signals(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals) return fail(Error::from_errno("signalfd").message);

  const bool terminal = isatty(STDIN_FILENO) != 0;
  if (terminal) std::fprintf(stderr, "ring3: connected to %s; Ctrl-A d leaves, Ctrl-A h lists the keys\n", name.c_str());
  Left left;
  {
    auto raw = RawTerminal::enter(STDIN_FILENO);
    if (!raw) return fail(raw.error().message);
    send_size(console->get());
    left = carry(console->get(), signals.get());
  }
  sigprocmask(SIG_SETMASK, &former, nullptr);
  switch (left) {
    case Left::kDetached:
      std::fprintf(stderr, "\nring3: left %s, which goes on\n", name.c_str());
      return kSuccess;
    case Left::kVmEnded:
      if (terminal) std::fprintf(stderr, "\nring3: %s has ended\n", name.c_str());
      return kSuccess;
    case Left::kInputEnded: return kSuccess;
    case Left::kOutputGone: return fail(std::string("cannot write to standard output: ") + std::strerror(errno));
    case Left::kSignal: break;
  }
  return kKeyboard;
}

}  // namespace ring3::control
