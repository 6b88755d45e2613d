#include "engine/timer/pit.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace ring3::engine {
namespace {

// The time after which exactly n input clocks have passed.
u64 clocks(u64 n) { return (n * 1'000'000'000 + Pit::kHz - 1) / Pit::kHz; }

struct PitTest : testing::Test {
  FakeClock clock;
  TimerQueue timers{clock, TimerQueue::Mode::kManual};
  int ticks = 0;
  bool ack_at_once = true;
  Pit pit{timers,
          [this] {
            ++ticks;
            if (ack_at_once) pit.irq_acked();
          },
          true};

  void load(unsigned channel, u8 mode, u32 count) {
    pit.write(0x43, static_cast<u8>(channel << 6 | 0x30 | mode << 1));
    pit.write(static_cast<u16>(0x40 + channel), static_cast<u8>(count));
    pit.write(static_cast<u16>(0x40 + channel), static_cast<u8>(count >> 8));
  }
  unsigned count(unsigned channel) {
    pit.write(0x43, static_cast<u8>(channel << 6));
    const unsigned low = pit.read(static_cast<u16>(0x40 + channel));
    return low | static_cast<unsigned>(pit.read(static_cast<u16>(0x40 + channel))) << 8;
  }
  u8 status(unsigned channel) {
    pit.write(0x43, static_cast<u8>(0xe0 | 2u << channel));
    return pit.read(static_cast<u16>(0x40 + channel));
  }
  bool out(unsigned channel) { return status(channel) & 0x80; }
  void pass(u64 ns) {
    clock.advance(ns);
    timers.run_due();
  }
};

TEST_F(PitTest, Mode2IsPeriodic) {
  load(0, 2, 11932);  // 100 Hz
  pass(clocks(11932) - 100);
  EXPECT_EQ(ticks, 0);
  pass(5000);
  for (int i = 1; i <= 50; ++i) {
    EXPECT_EQ(ticks, i);
    pass(10'000'151);
  }
}

TEST_F(PitTest, Mode0FiresOnceAndWraps) {
  load(0, 0, 1000);
  EXPECT_FALSE(out(0));
  pass(clocks(400));
  EXPECT_EQ(count(0), 600u);
  pass(clocks(600));
  EXPECT_EQ(ticks, 1);
  EXPECT_TRUE(out(0));
  pass(clocks(100));
  EXPECT_EQ(ticks, 1);
  EXPECT_NEAR(count(0), 65536 - 100, 1);
  pass(clocks(1'000'000));
  EXPECT_EQ(ticks, 1);
}

TEST_F(PitTest, Mode3CountsByTwoWithASquareOutput) {
  load(0, 3, 1000);
  EXPECT_TRUE(out(0));
  pass(clocks(100));
  EXPECT_EQ(count(0), 800u);
  pass(clocks(450));
  EXPECT_FALSE(out(0));
  pass(clocks(500));
  EXPECT_TRUE(out(0));
  EXPECT_EQ(ticks, 1);
}

TEST_F(PitTest, Mode4StrobesOnce) {
  load(0, 4, 500);
  EXPECT_TRUE(out(0));
  pass(clocks(500));
  EXPECT_FALSE(out(0));
  EXPECT_EQ(ticks, 1);
  pass(clocks(3));
  EXPECT_TRUE(out(0));
  pass(clocks(70'000));
  EXPECT_EQ(ticks, 1);
}

TEST_F(PitTest, Mode1And5AreTriggeredByTheGate) {
  for (const u8 mode : {u8{1}, u8{5}}) {
    pit.write(0x61, 0);
    load(2, mode, 2000);
    pass(clocks(3000));
    EXPECT_EQ(count(2), 2000u) << "waits for its trigger";
    pit.write(0x61, 1);
    EXPECT_EQ(out(2), mode == 5);
    pass(clocks(500));
    EXPECT_EQ(count(2), 1500u);
    pit.write(0x61, 0);  // the falling edge does nothing
    pass(clocks(500));
    EXPECT_NEAR(count(2), 1000, 1);
    pit.write(0x61, 1);  // retriggers
    EXPECT_EQ(count(2), 2000u);
    pass(clocks(2001));
    EXPECT_TRUE(out(2));
  }
}

TEST_F(PitTest, GateStopsChannel2) {
  pit.write(0x61, 1);
  load(2, 0, 5000);
  pass(clocks(1000));
  EXPECT_EQ(count(2), 4000u);
  pit.write(0x61, 0);
  pass(clocks(9999));
  EXPECT_EQ(count(2), 4000u);
  pit.write(0x61, 1);
  pass(clocks(1000));
  EXPECT_NEAR(count(2), 3000, 1);
  EXPECT_FALSE(pit.read(0x61) & 0x20);
  pass(clocks(3001));
  EXPECT_TRUE(pit.read(0x61) & 0x20) << "the way guests calibrate their TSC";
  EXPECT_EQ(pit.read(0x61) & 3, 1);
  pit.write(0x61, 3);
  EXPECT_EQ(pit.read(0x61) & 3, 3);
}

TEST_F(PitTest, LatchedCountStays) {
  load(0, 2, 10000);
  pass(clocks(100));
  pit.write(0x43, 0x00);
  pass(clocks(5000));
  pit.write(0x43, 0x00);  // a second latch before the read is ignored
  const unsigned low = pit.read(0x40);
  EXPECT_EQ(low | static_cast<unsigned>(pit.read(0x40)) << 8, 9900u);
  EXPECT_NEAR(count(0), 4900, 1);
}

TEST_F(PitTest, ReadBackLatchesSeveralChannelsAndStatusFirst) {
  load(0, 2, 30000);
  load(1, 3, 20000);
  pass(clocks(1000));
  pit.write(0x43, 0xc0 | 2 | 4);  // count and status of 0 and 1
  EXPECT_EQ(pit.read(0x40) & 0x3f, 0x34);
  EXPECT_EQ(pit.read(0x41) & 0x3f, 0x36);
  unsigned v = pit.read(0x40);
  v |= static_cast<unsigned>(pit.read(0x40)) << 8;
  EXPECT_EQ(v, 29000u);
  v = pit.read(0x41);
  v |= static_cast<unsigned>(pit.read(0x41)) << 8;
  EXPECT_EQ(v, 18000u);
}

TEST_F(PitTest, SingleByteAccess) {
  pit.write(0x43, 0x14);  // channel 0, LSB, mode 2
  pit.write(0x40, 200);
  pass(clocks(50));
  EXPECT_EQ(pit.read(0x40), 150);
  EXPECT_EQ(pit.read(0x40), 150);
  pit.write(0x43, 0x24);  // MSB
  pit.write(0x40, 0x80);
  pass(clocks(256));
  EXPECT_EQ(pit.read(0x40), 0x7f);
}

TEST_F(PitTest, ControlWordStopsTheTicks) {
  load(0, 2, 11932);
  pass(10'100'000);
  EXPECT_EQ(ticks, 1);
  pit.write(0x43, 0x30);
  pass(1'000'000'000);
  EXPECT_EQ(ticks, 1);
}

TEST_F(PitTest, FastTicksAreThrottled) {
  load(0, 2, 2);
  for (int i = 0; i < 1000; ++i) pass(1000);
  EXPECT_LE(ticks, 6);
  EXPECT_GE(ticks, 4);
}

TEST_F(PitTest, ReinjectKeepsLostTicks) {
  ack_at_once = false;
  load(0, 2, 11932);
  for (int i = 0; i < 5; ++i) pass(10'001'000);
  EXPECT_EQ(ticks, 1) << "none before the acknowledgement";
  for (int i = 0; i < 10; ++i) {
    pit.irq_acked();
    timers.run_due();
  }
  EXPECT_EQ(ticks, 5);
  pit.irq_acked();
  pit.set_reinject(false);
  EXPECT_FALSE(pit.reinject());
  for (int i = 0; i < 5; ++i) pass(10'001'000);
  EXPECT_EQ(ticks, 10) << "each, acknowledged or not";
}

TEST_F(PitTest, UnmaskForgetsWhatWasMissed) {
  ack_at_once = false;
  load(0, 2, 11932);
  for (int i = 0; i < 50; ++i) pass(10'001'000);
  EXPECT_EQ(ticks, 1);
  pit.irq_unmasked();
  pass(10'001'000);
  EXPECT_EQ(ticks, 2);
  pit.irq_acked();
  timers.run_due();
  EXPECT_EQ(ticks, 2);
}

TEST_F(PitTest, HpetLegacyModeSilencesChannel0) {
  load(0, 2, 11932);
  kvm_pit_state2 s;
  pit.get_state(&s);
  s.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
  pit.set_state(s);
  pass(100'000'000);
  EXPECT_EQ(ticks, 0);
  s.flags = 0;
  pit.set_state(s);
  for (int i = 0; i < 3; ++i) pass(10'001'000);
  EXPECT_EQ(ticks, 3);
}

TEST_F(PitTest, StateRoundTrips) {
  std::mt19937_64 rng(7);
  for (int round = 0; round < 500; ++round) {
    kvm_pit_state2 in{}, out;
    for (auto& c : in.channels) {
      c.count = static_cast<u32>(rng() % 65536 + 1);
      c.latched_count = static_cast<u16>(rng());
      c.count_latched = static_cast<u8>(rng() % 4);
      c.status_latched = rng() & 1;
      c.status = static_cast<u8>(rng());
      c.read_state = static_cast<u8>(rng() % 5);
      c.write_state = static_cast<u8>(rng() % 5);
      c.write_latch = static_cast<u8>(rng());
      c.rw_mode = static_cast<u8>(rng() % 4);
      c.mode = static_cast<u8>(rng() % 6);
      c.bcd = rng() & 1;
      c.gate = rng() & 1;
    }
    in.flags = static_cast<u32>(rng() & 3);
    ASSERT_EQ(pit.set_state(in), 0);
    pit.get_state(&out);
    for (auto& c : out.channels) c.count_load_time = 0;
    ASSERT_EQ(std::memcmp(&in, &out, sizeof in), 0) << "round " << round;
  }
}

TEST_F(PitTest, HostileStatesAndAccessesAreHarmless) {
  std::mt19937_64 rng(11);
  for (int round = 0; round < 2000; ++round) {
    kvm_pit_state2 in;
    for (size_t i = 0; i < sizeof in; ++i) reinterpret_cast<u8*>(&in)[i] = static_cast<u8>(rng());
    if (round % 3 == 0) in.channels[round % 2].count = 0;
    pit.set_state(in);
    for (int i = 0; i < 20; ++i) {
      const u16 port = rng() % 5 == 0 ? 0x61 : static_cast<u16>(0x40 + rng() % 4);
      if (rng() & 1)
        pit.write(port, static_cast<u8>(rng()));
      else
        (void)pit.read(port);
      pass(rng() % 5'000'000);
    }
  }
}

}  // namespace
}  // namespace ring3::engine
