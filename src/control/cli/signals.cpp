#include "control/cli/signals.hpp"

#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <optional>
#include <utility>

#include "control/cli/terminal.hpp"

namespace ring3::control {

namespace {
/// Wakes the watcher for its own end; directed at its thread only.
constexpr int kWakeSignal = SIGUSR2;
}  // namespace

SignalWatcher::SignalWatcher(OnEnd on_end, std::function<void()> on_resize)
    : on_end_(std::move(on_end)), on_resize_(std::move(on_resize)) {
  sigemptyset(&set_);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGWINCH, kWakeSignal}) sigaddset(&set_, signal);
  pthread_sigmask(SIG_BLOCK, &set_, &former_);
  thread_ = std::thread([this] { watch(); });
}

SignalWatcher::~SignalWatcher() {
  done_ = true;
  pthread_kill(thread_.native_handle(), kWakeSignal);
  thread_.join();
  pthread_sigmask(SIG_SETMASK, &former_, nullptr);
}

void SignalWatcher::begin_stop(int status) {
  int none = -1;
  stop_status_.compare_exchange_strong(none, status);
  pthread_kill(thread_.native_handle(), kWakeSignal);
}

void SignalWatcher::watch() {
  pthread_setname_np(pthread_self(), "signals");
  using Clock = std::chrono::steady_clock;
  std::optional<Clock::time_point> deadline;  // of a VM that is being ended
  constexpr auto kNever = Clock::time_point::max();
  Clock::time_point grace = kNever;           // of a guest that was asked to end
  bool ending = false;
  int asked_with = 0;
  const auto end_now = [&](int status, const char* why) {
    restore_terminal();
    if (why != nullptr) std::fprintf(stderr, "ring3: %s\n", why);
    _exit(status);
  };
  const auto ask = [&](const Ask& request) {
    asked_with = request.signal;
    const auto time = on_end_(request);
    ending = !time.has_value();
    grace = time ? Clock::now() + *time : kNever;
  };

  while (!done_) {
    if (stop_status_ >= 0 && !deadline) deadline = Clock::now() + std::chrono::seconds(kPatienceSeconds);
    const timespec tick{0, 100'000'000};
    siginfo_t info{};
    const int signal = deadline || grace != kNever ? sigtimedwait(&set_, &info, &tick) : sigwaitinfo(&set_, &info);
    if (done_) return;
    if (deadline && Clock::now() > *deadline) end_now(stop_status_, "the VM did not stop; ended it");
    if (Clock::now() > grace) ask({asked_with, true, std::nullopt});
    if (signal < 0 || signal == kWakeSignal) continue;

    switch (signal) {
      case SIGTSTP:
        suspend_terminal();
        kill(getpid(), SIGSTOP);
        break;
      case SIGCONT: resume_terminal(); break;
      case SIGWINCH:
        if (on_resize_) on_resize_();
        break;
      default: {
        if (ending) end_now(exit_status(signal), nullptr);
        std::optional<int> wish;
        if (signal == SIGTERM && info.si_code == SI_QUEUE && info.si_value.sival_int >= 0) wish = info.si_value.sival_int;
        ask({signal, grace != kNever, wish});
      }
    }
  }
}

}  // namespace ring3::control
