#include "engine/timer/tsc.hpp"

#include <gtest/gtest.h>

#include <cerrno>

namespace ring3::engine {
namespace {

TEST(HostClock, FrequencyAgreesWithTheMonotonicClock) {
  const HostClock clock;
  ASSERT_GT(clock.host_tsc_khz(), 100'000u);
  const u64 ns0 = clock.monotonic_ns(), tsc0 = clock.host_tsc();
  while (clock.monotonic_ns() < ns0 + 20'000'000) {
  }
  const u64 tsc1 = clock.host_tsc(), ns1 = clock.monotonic_ns();
  const double khz = static_cast<double>(tsc1 - tsc0) * 1e6 / static_cast<double>(ns1 - ns0);
  EXPECT_NEAR(khz / clock.host_tsc_khz(), 1.0, 0.05);
}

TEST(Tsc, StartsAtZeroAndRunsAtTheHostsRate) {
  FakeClock clock(2'000'000);
  TscSync sync;
  Tsc tsc(clock, sync);
  EXPECT_EQ(tsc.read(), 0u);
  clock.advance(1000);
  EXPECT_EQ(tsc.read(), 2000u);
  EXPECT_EQ(tsc.khz(), 2'000'000u);
}

TEST(Tsc, ScalesToAnotherRate) {
  FakeClock clock(2'000'000);
  TscSync sync;
  Tsc tsc(clock, sync);
  clock.advance(1'000'000);
  const u64 before = tsc.read();
  ASSERT_EQ(tsc.set_khz(3'000'000), 0);
  EXPECT_EQ(tsc.read(), before);
  clock.advance(1'000'000);
  EXPECT_NEAR(static_cast<double>(tsc.read() - before), 3e6, 2);
  EXPECT_EQ(tsc.khz(), 3'000'000u);
  EXPECT_EQ(tsc.set_khz(200'000'000), -EINVAL);
  EXPECT_EQ(tsc.khz(), 3'000'000u);
  ASSERT_EQ(tsc.set_khz(0), 0);
  EXPECT_EQ(tsc.khz(), 2'000'000u);
}

TEST(Tsc, AdjustFollowsTheGuestsWrites) {
  FakeClock clock;
  TscSync sync;
  Tsc tsc(clock, sync);
  clock.advance(500);
  tsc.guest_write(10'000);
  EXPECT_EQ(tsc.read(), 10'000u);
  EXPECT_EQ(tsc.adjust(), 9'500u);
  tsc.guest_write_adjust(0);
  EXPECT_EQ(tsc.read(), 500u);
  tsc.host_write_adjust(77);
  EXPECT_EQ(tsc.read(), 500u);
  EXPECT_EQ(tsc.adjust(), 77u);
  tsc.host_write(123'456'789'012);
  EXPECT_EQ(tsc.read(), 123'456'789'012u);
  EXPECT_EQ(tsc.adjust(), 77u);
}

TEST(Tsc, HostWritesWithinASecondAreSynchronised) {
  FakeClock clock;
  TscSync sync;
  Tsc a(clock, sync);
  clock.advance(300'000);
  Tsc b(clock, sync);
  EXPECT_EQ(a.read(), b.read());
  EXPECT_TRUE(sync.all_matched());
  a.host_write(50'000'000'000);
  EXPECT_FALSE(sync.all_matched());
  clock.advance(1'000'000);
  b.host_write(50'000'000'000);  // written a millisecond later
  EXPECT_TRUE(sync.all_matched());
  EXPECT_EQ(b.read(), 50'001'000'000u);
  b.host_write(90'000'000'000);  // too far off: meant
  EXPECT_EQ(b.read(), 90'000'000'000u);
  EXPECT_FALSE(sync.all_matched());
  b.set_offset(a.offset());
  EXPECT_TRUE(sync.all_matched());
}

TEST(Tsc, RateChangesOfAllVcpusStayMatched) {
  FakeClock clock;
  TscSync sync;
  Tsc a(clock, sync), b(clock, sync);
  clock.advance(12345);
  ASSERT_EQ(a.set_khz(2'500'000), 0);
  clock.advance(777'777);
  ASSERT_EQ(b.set_khz(2'500'000), 0);
  EXPECT_TRUE(sync.all_matched());
}

TEST(Tsc, DeadlineIsWhenTheCountIsReached) {
  FakeClock clock(3'000'000);
  TscSync sync;
  Tsc tsc(clock, sync);
  const u64 now = clock.monotonic_ns();
  EXPECT_EQ(tsc.deadline_ns(0), now);
  EXPECT_EQ(tsc.deadline_ns(3000), now + 1000);
  const u64 when = tsc.deadline_ns(1'000'001);
  clock.advance(when - now);
  EXPECT_GE(tsc.read(), 1'000'001u);
  EXPECT_GT(tsc.deadline_ns(~0ull), clock.monotonic_ns() + 1'000'000'000'000u);
}

}  // namespace
}  // namespace ring3::engine
