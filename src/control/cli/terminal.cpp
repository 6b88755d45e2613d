#include "control/cli/terminal.hpp"

#include <pthread.h>
#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <iterator>

namespace ring3::control {

namespace {

constexpr int kCrashSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGSYS};

/// Written before `raw` is set, read by handlers only while it is.
struct TerminalRecord {
  int fd = -1;
  termios before{};
  termios raw_mode{};
  struct sigaction former[std::size(kCrashSignals)]{};
  std::atomic<bool> raw{false};
  bool handlers = false;
};
TerminalRecord record;
static_assert(std::atomic<bool>::is_always_lock_free);

/// tcsetattr, unless the terminal is another job's just now. SIGTTOU is held off because the answer
/// may change between the question and the call.
bool apply(const termios& mode) {
  const pid_t owner = tcgetpgrp(record.fd);
  if (owner > 0 && owner != getpgrp()) return false;
  sigset_t ttou;
  sigset_t former;
  sigemptyset(&ttou);
  sigaddset(&ttou, SIGTTOU);
  pthread_sigmask(SIG_BLOCK, &ttou, &former);
  int result;
  do {
    result = tcsetattr(record.fd, TCSANOW, &mode);
  } while (result != 0 && errno == EINTR);
  pthread_sigmask(SIG_SETMASK, &former, nullptr);
  return result == 0;
}

void crash_handler(int signal, siginfo_t* info, void*) {
  const int saved_errno = errno;
  restore_terminal();
  for (std::size_t i = 0; i < std::size(kCrashSignals); ++i) {
    if (kCrashSignals[i] == signal) sigaction(signal, &record.former[i], nullptr);
  }
  // A fault happens again on return and meets the former disposition; a signal that was sent does not.
  if (info == nullptr || info->si_code <= 0) raise(signal);
  errno = saved_errno;
}

void install_handlers() {
  if (record.handlers) return;
  record.handlers = true;
  std::atexit(restore_terminal);
  struct sigaction action {};
  action.sa_sigaction = crash_handler;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < std::size(kCrashSignals); ++i) {
    sigaction(kCrashSignals[i], &action, &record.former[i]);
  }
}

}  // namespace

Result<RawTerminal> RawTerminal::enter(int fd) {
  if (isatty(fd) == 0) return RawTerminal(false);
  if (tcgetattr(fd, &record.before) != 0) return Error::from_errno("cannot read the terminal's settings");
  record.fd = fd;
  record.raw_mode = record.before;
  termios& raw = record.raw_mode;
  raw.c_iflag &= ~static_cast<tcflag_t>(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
  raw.c_lflag &= ~static_cast<tcflag_t>(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
  raw.c_cflag &= ~static_cast<tcflag_t>(CSIZE | PARENB);
  raw.c_cflag |= CS8;
  raw.c_cc[VMIN] = 1;
  raw.c_cc[VTIME] = 0;
  install_handlers();
  record.raw = true;
  // A background job becomes raw when it is brought to the front: resume_terminal().
  const pid_t owner = tcgetpgrp(fd);
  if (!apply(raw) && !(owner > 0 && owner != getpgrp())) {
    record.raw = false;
    return Error::from_errno("cannot set the terminal to raw mode");
  }
  return RawTerminal(true);
}

RawTerminal::~RawTerminal() {
  if (active_) restore_terminal();
}

void restore_terminal() {
  if (record.raw.exchange(false)) apply(record.before);
}

void suspend_terminal() {
  if (record.raw) apply(record.before);
}

void resume_terminal() {
  if (record.raw) apply(record.raw_mode);
}

}  // namespace ring3::control
