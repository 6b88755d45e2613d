#pragma once
#include "base/result.hpp"

/// The terminal in raw mode, and back to what it was on every way out.
///
/// What a process does to its terminal outlives it, so the state to restore is one record for the
/// process (a terminal's modes are as global as it gets), reachable from signal handlers.
namespace ring3::control {

/// Holds a terminal in raw mode: keys arrive one by one and unechoed, and Ctrl-C, Ctrl-Z and Ctrl-\ are
/// bytes for the guest. Output processing stays as it was, so that messages still begin at column 0.
///
/// Restored:  by the destructor, by exit(), and by the handlers of SIGSEGV, SIGBUS, SIGILL, SIGFPE,
///            SIGABRT, SIGTRAP and SIGSYS, which then let the former disposition have the signal. The
///            signals that ask a process to end, stop or go on are SignalWatcher's (signals.hpp).
/// Jobs:      never touches the terminal from a background job: it belongs to another process then.
/// Threading: construction and destruction on one thread; one instance at a time.
class RawTerminal {
 public:
  /// Does nothing, successfully, when fd is not a terminal.
  static Result<RawTerminal> enter(int fd);
  RawTerminal(RawTerminal&& o) noexcept : active_(o.active_) { o.active_ = false; }
  RawTerminal& operator=(RawTerminal&&) = delete;
  ~RawTerminal();

 private:
  explicit RawTerminal(bool active) : active_(active) {}
  bool active_;
};

/// Puts the terminal back for good, if it is raw. Async-signal-safe, idempotent.
void restore_terminal();
/// Puts it back until resume_terminal(), for a process about to be stopped. Async-signal-safe.
void suspend_terminal();
/// Raw again after suspend_terminal() or after a stop that could not be caught. Async-signal-safe.
void resume_terminal();

}  // namespace ring3::control
