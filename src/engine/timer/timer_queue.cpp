#include "engine/timer/timer_queue.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <chrono>

#include "base/signal_set.hpp"

namespace ring3::engine {

TimerQueue::TimerQueue(const Clock& clock, Mode mode) : clock_(clock), mode_(mode) {}

TimerQueue::~TimerQueue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

TimerQueue::Timer::Timer(TimerQueue& queue, std::function<void()> callback)
    : queue_(queue), callback_(std::move(callback)) {}
TimerQueue::Timer::~Timer() { cancel(); }
void TimerQueue::Timer::arm(u64 deadline_ns) { queue_.arm(*this, deadline_ns); }
void TimerQueue::Timer::disarm() { queue_.disarm(*this, false); }
void TimerQueue::Timer::cancel() { queue_.disarm(*this, true); }

void TimerQueue::arm(Timer& timer, u64 deadline_ns) {
  bool notify = false;
  {
    const std::lock_guard lock(mutex_);
    if (timer.armed_) {
      if (timer.deadline_ == deadline_ns) return;
      // Move the node: no allocation on the path a guest takes at each tick.
      auto node = armed_.extract({timer.deadline_, &timer});
      node.value().first = deadline_ns;
      armed_.insert(std::move(node));
    } else {
      armed_.emplace(deadline_ns, &timer);
    }
    timer.deadline_ = deadline_ns;
    timer.armed_ = true;
    if (mode_ == Mode::kThread) {
      if (!thread_.joinable() && !stop_) {
        // The embedding VMM's signals are for its own threads.
        const sigset_t theirs = signals_but_faults();
        sigset_t old;
        pthread_sigmask(SIG_SETMASK, &theirs, &old);
        thread_ = std::thread([this] { thread_main(); });
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
      }
      if (deadline_ns < sleeping_until_) {
        sleeping_until_ = 0;
        notify = true;
      }
    }
  }
  if (notify) wake_.notify_one();
}

void TimerQueue::disarm(Timer& timer, bool wait) {
  std::unique_lock lock(mutex_);
  if (timer.armed_) {
    armed_.erase({timer.deadline_, &timer});
    timer.armed_ = false;
  }
  if (!wait) return;
  while (running_ == &timer && runner_ != std::this_thread::get_id()) {
    idle_.wait(lock);
    // The callback may have armed it again.
    if (timer.armed_) {
      armed_.erase({timer.deadline_, &timer});
      timer.armed_ = false;
    }
  }
}

// Runs the earliest timer when it is due. The lock is dropped around the callback.
bool TimerQueue::run_one(std::unique_lock<std::mutex>& lock) {
  if (armed_.empty() || armed_.begin()->first > clock_.monotonic_ns()) return false;
  Timer* timer = armed_.begin()->second;
  armed_.erase(armed_.begin());
  timer->armed_ = false;
  running_ = timer;
  runner_ = std::this_thread::get_id();
  lock.unlock();
  timer->callback_();
  lock.lock();
  running_ = nullptr;
  idle_.notify_all();
  return true;
}

unsigned TimerQueue::run_due() {
  std::unique_lock lock(mutex_);
  unsigned n = 0;
  while (run_one(lock)) ++n;
  return n;
}

u64 TimerQueue::next_deadline() const {
  const std::lock_guard lock(mutex_);
  return armed_.empty() ? ~0ull : armed_.begin()->first;
}

void TimerQueue::thread_main() {
  pthread_setname_np(pthread_self(), "ring3-timer");
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (run_one(lock)) continue;
    if (armed_.empty()) {
      sleeping_until_ = ~0ull;
      wake_.wait(lock);
    } else {
      sleeping_until_ = armed_.begin()->first;
      // A deadline centuries away must not overflow the time point.
      const u64 until = sleeping_until_ < (1ull << 62) ? sleeping_until_ : 1ull << 62;
      wake_.wait_until(
          lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(static_cast<i64>(until))));
    }
    sleeping_until_ = 0;
  }
}

}  // namespace ring3::engine
