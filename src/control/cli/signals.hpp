#pragma once
#include <signal.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <thread>

/// The signals by which a shell, a user or an init system talks to a running VM.
namespace ring3::control {

/// Takes SIGINT, SIGTERM, SIGHUP, SIGQUIT (end), SIGTSTP (stop) and SIGCONT (go on) on a thread of its own,
/// so that no handler runs on a vCPU's stack.
///
/// End:       calls `on_end` on the watcher's thread. It answers how long the guest may take to end by itself; after that,
///            or at the next such signal, on_end is called once more with `last`. A signal after that, or a VM that has
///            not stopped kPatience after begin_stop(), ends the process at once with the terminal restored.
/// Stop:      restores the terminal, then stops the process; raw again when it goes on.
/// Ignored:   a signal that was ignored at the start (nohup) stays ignored.
/// Threading: construct on the main thread before any other thread exists (they inherit the mask);
///            begin_stop() on any thread.
class SignalWatcher {
 public:
  static constexpr int kPatienceSeconds = 5;

  struct Ask {
    int signal = 0;
    bool last = false;              ///< asked for the second time, or the guest's time is over
    std::optional<int> grace;       ///< seconds that the sender wants the guest to have (`ring3 stop`)
  };
  /// Answers the time the guest gets; nothing: the VM is being ended.
  using OnEnd = std::function<std::optional<std::chrono::seconds>(const Ask&)>;

  /// on_resize: SIGWINCH; may be null. On the watcher's thread.
  explicit SignalWatcher(OnEnd on_end, std::function<void()> on_resize = nullptr);
  ~SignalWatcher();
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

  /// The VM was asked to stop; `status` is the exit status if it has to be ended the hard way.
  void begin_stop(int status);

  /// 128 + signal, as a shell reports it: 130 for SIGINT.
  static int exit_status(int signal) { return 128 + signal; }

 private:
  void watch();

  OnEnd on_end_;
  std::function<void()> on_resize_;
  sigset_t set_;
  sigset_t former_;
  std::atomic<int> stop_status_{-1};
  std::atomic<bool> done_{false};
  std::thread thread_;
};

}  // namespace ring3::control
