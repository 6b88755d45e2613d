#include "engine/timer/timer_queue.hpp"

#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <memory>
#include <vector>

namespace ring3::engine {
namespace {

TEST(TimerQueue, ManualRunsInOrderOfDeadline) {
  FakeClock clock;
  TimerQueue q(clock, TimerQueue::Mode::kManual);
  std::vector<int> order;
  TimerQueue::Timer a(q, [&] { order.push_back(1); }), b(q, [&] { order.push_back(2); }),
      c(q, [&] { order.push_back(3); });
  const u64 t = clock.monotonic_ns();
  a.arm(t + 300);
  b.arm(t + 100);
  c.arm(t + 200);
  EXPECT_EQ(q.next_deadline(), t + 100);
  EXPECT_EQ(q.run_due(), 0u);
  clock.advance(250);
  EXPECT_EQ(q.run_due(), 2u);
  EXPECT_EQ(order, (std::vector<int>{2, 3}));
  a.disarm();
  EXPECT_EQ(q.next_deadline(), ~0ull);
  clock.advance(1000);
  EXPECT_EQ(q.run_due(), 0u);
}

TEST(TimerQueue, RearmingReplacesTheDeadline) {
  FakeClock clock;
  TimerQueue q(clock, TimerQueue::Mode::kManual);
  int fired = 0;
  TimerQueue::Timer a(q, [&] { ++fired; });
  const u64 t = clock.monotonic_ns();
  a.arm(t + 10);
  a.arm(t + 1000);
  clock.advance(500);
  EXPECT_EQ(q.run_due(), 0u);
  a.arm(t + 20);  // in the past
  EXPECT_EQ(q.run_due(), 1u);
  EXPECT_EQ(fired, 1);
}

TEST(TimerQueue, ACallbackMayRearmItself) {
  FakeClock clock;
  TimerQueue q(clock, TimerQueue::Mode::kManual);
  int fired = 0;
  u64 next = clock.monotonic_ns();
  std::unique_ptr<TimerQueue::Timer> a;
  a = std::make_unique<TimerQueue::Timer>(q, [&] {
    if (++fired < 5) a->arm(next += 10);
  });
  a->arm(next);
  clock.advance(25);
  EXPECT_EQ(q.run_due(), 3u);
  clock.advance(1000);
  EXPECT_EQ(q.run_due(), 2u);
}

TEST(TimerQueue, ThreadFiresNeitherEarlyNorMuchTooLate) {
  const HostClock clock;
  TimerQueue q(clock);
  std::atomic<u64> fired{0};
  TimerQueue::Timer late(q, [] {}), soon(q, [&] { fired = clock.monotonic_ns(); });
  const u64 t = clock.monotonic_ns();
  late.arm(t + 60'000'000'000);
  std::this_thread::sleep_for(
      std::chrono::milliseconds(30));  // the thread sleeps for that one; the next must wake it
  soon.arm(t + 50'000'000);
  while (!fired && clock.monotonic_ns() < t + 5'000'000'000) std::this_thread::yield();
  ASSERT_NE(fired, 0u);
  EXPECT_GE(fired, t + 50'000'000);
}

TEST(TimerQueue, NoCallbackRunsAfterCancel) {
  const HostClock clock;
  TimerQueue q(clock);
  for (int round = 0; round < 300; ++round) {
    auto alive = std::make_unique<std::atomic<int>>(0);  // freed at once after cancel: ASan and TSan watch
    std::unique_ptr<TimerQueue::Timer> t;
    t = std::make_unique<TimerQueue::Timer>(q, [&t, p = alive.get(), &clock] {
      p->fetch_add(1);
      t->arm(clock.monotonic_ns());
    });
    t->arm(clock.monotonic_ns() + static_cast<u64>(round % 7) * 10'000);
    if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
    t->cancel();
    alive.reset();
  }
}

TEST(TimerQueue, CancelWaitsForARunningCallback) {
  const HostClock clock;
  TimerQueue q(clock);
  std::atomic<bool> begun{false}, ended{false};
  TimerQueue::Timer t(q, [&] {
    begun = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    ended = true;
  });
  t.arm(0);
  while (!begun) std::this_thread::yield();
  t.cancel();
  EXPECT_TRUE(ended);
}

TEST(TimerQueue, ThreadTakesNoSignals) {
  const HostClock clock;
  TimerQueue q(clock);
  std::atomic<bool> blocked{false}, done{false};
  TimerQueue::Timer t(q, [&] {
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, nullptr, &set);
    blocked = sigismember(&set, SIGUSR1) && sigismember(&set, SIGALRM);
    done = true;
  });
  t.arm(0);
  while (!done) std::this_thread::yield();
  EXPECT_TRUE(blocked);
}

}  // namespace
}  // namespace ring3::engine
