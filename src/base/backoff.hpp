#pragma once
#include <sched.h>

#include <ctime>

namespace ring3 {

/// One turn of waiting for another thread, longer as turns add up: a pause, a yield, 50 µs of sleep.
/// spins: how often this wait has come here before.
inline void back_off(unsigned spins) {
  if (spins < 64) {
    __builtin_ia32_pause();
  } else if (spins < 1024) {
    ::sched_yield();
  } else {
    const timespec nap{0, 50'000};
    ::nanosleep(&nap, nullptr);
  }
}

}  // namespace ring3
