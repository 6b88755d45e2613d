#pragma once
#include <condition_variable>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "base/types.hpp"
#include "engine/timer/clock.hpp"

/// One-shot timers of a VM, served by one host thread.
///
/// Units:     deadlines are CLOCK_MONOTONIC nanoseconds; a deadline in the past fires at once.
/// Threading: everything from any thread. Callbacks run on the queue's thread without its lock, one
///            at a time; they may arm and disarm any timer. Arming takes only the queue's own mutex,
///            which is innermost: it may be held under any other lock. The thread is started by the first
///            arm(), blocks all signals but those of faults, and is joined by the destructor.
/// Lifetime:  every Timer must be destroyed before its queue.
/// Cost:      arm() makes a host system call only when the new deadline is earlier than the one the
///            thread sleeps for.
namespace ring3::engine {

class TimerQueue {
 public:
  enum class Mode {
    kThread,  ///< real time
    kManual,  ///< no thread: run_due() fires what is due by the clock (tests)
  };
  explicit TimerQueue(const Clock& clock, Mode mode = Mode::kThread);
  ~TimerQueue();
  TimerQueue(const TimerQueue&) = delete;
  TimerQueue& operator=(const TimerQueue&) = delete;

  class Timer {
   public:
    Timer(TimerQueue& queue, std::function<void()> callback);
    /// cancel().
    ~Timer();
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

    /// (Re)arms: replaces an earlier deadline. The callback runs once at or after deadline_ns.
    void arm(u64 deadline_ns);
    /// Disarms without waiting: a callback that has begun may still run, so it must re-check its
    /// state under its owner's lock. Allowed with that lock held.
    void disarm();
    /// Disarms and waits for a running callback to end. Not with a lock held that the callback takes;
    /// from within the callback itself it only disarms.
    void cancel();

   private:
    friend class TimerQueue;
    TimerQueue& queue_;
    const std::function<void()> callback_;
    u64 deadline_ = 0;    // guarded by queue_.mutex_
    bool armed_ = false;  // guarded by queue_.mutex_
  };

  const Clock& clock() const { return clock_; }
  /// kManual: runs the callbacks of every timer due at clock().monotonic_ns(), in order of deadline,
  /// including those armed meanwhile. Returns how many ran.
  unsigned run_due();
  /// The earliest deadline, or ~0 when none is armed.
  u64 next_deadline() const;

 private:
  void arm(Timer& timer, u64 deadline_ns);
  void disarm(Timer& timer, bool wait);
  bool run_one(std::unique_lock<std::mutex>& lock);
  void thread_main();

  const Clock& clock_;
  const Mode mode_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;  // the thread waits here
  std::condition_variable idle_;  // cancel() waits here
  std::set<std::pair<u64, Timer*>> armed_;
  Timer* running_ = nullptr;
  std::thread::id runner_;
  u64 sleeping_until_ = 0;  // what the thread waits for; 0 while it is awake
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace ring3::engine
