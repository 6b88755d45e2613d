#pragma once
#include <pthread.h>
#include <signal.h>

#include <string>
#include <thread>
#include <utility>

namespace ring3::vmm {

/// Starts a thread that takes none of the signals meant for the program (terminal, termination,
/// timers): those stay with the thread that called Machine::run(). Faults and the providers' own
/// signals are not touched. Throws nothing but std::system_error when the host is out of threads.
template <class F>
std::thread start_thread(const std::string& name, F f) {
  sigset_t set, old;
  sigemptyset(&set);
  for (int s : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH, SIGTSTP, SIGCONT, SIGUSR1, SIGUSR2, SIGCHLD, SIGALRM, SIGPIPE}) {
    sigaddset(&set, s);
  }
  pthread_sigmask(SIG_BLOCK, &set, &old);
  std::thread thread;
  try {
    thread = std::thread([name, f = std::move(f)] {
      pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
      f();
    });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return thread;
}

}  // namespace ring3::vmm
