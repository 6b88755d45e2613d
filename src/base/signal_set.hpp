#pragma once
#include <signal.h>

/// Signals that a thread of the engine leaves to the embedding program's own threads: all but those that a fault of its own
/// raises. A fault whose signal is blocked ends the process, even where a handler would have helped it over: guest memory may
/// vanish under any thread that touches it. Any thread.
namespace ring3 {

inline sigset_t signals_but_faults() {
  sigset_t set;
  sigfillset(&set);
  for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&set, s);
  return set;
}

}  // namespace ring3
