#include "engine/irq/lapic.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <random>

#include "engine/irq/test_machine.hpp"

namespace ring3::engine {
namespace {

struct LapicTest : testing::Test {
  TestMachine m{4};
  Lapic& a = *m.lapics[0];
  void inject(u8 vector, bool level = false) {
    InterruptMessage msg;
    msg.vector = vector;
    msg.level = level;
    a.accept(msg);
  }
  bool irr(u8 v) { return m.mmio(0, 0x200 + (v >> 5) * 16) >> (v & 31) & 1; }
  bool isr(u8 v) { return m.mmio(0, 0x100 + (v >> 5) * 16) >> (v & 31) & 1; }
};

TEST_F(LapicTest, PowerOnState) {
  TestMachine n(0);
  n.tscs.push_back(std::make_unique<Tsc>(n.clock, n.sync));
  n.lapics.push_back(std::make_unique<Lapic>(n.bus, n.timers, *n.tscs[0], 3, false));
  EXPECT_EQ(n.mmio(0, 0x20), 3u << 24);
  EXPECT_EQ(n.mmio(0, 0x30), 0x00050014u);
  EXPECT_EQ(n.mmio(0, 0xf0), 0xffu);
  EXPECT_EQ(n.mmio(0, 0xe0), 0xffffffffu);
  for (u32 r = 0x320; r <= 0x370; r += 0x10) EXPECT_EQ(n.mmio(0, r), 0x10000u) << r;
  EXPECT_EQ(n.lapics[0]->apic_base(), 0xfee00800u);
  EXPECT_FALSE(n.lapics[0]->accepts_extint());
  EXPECT_EQ(a.apic_base(), 0xfee00900u);
  EXPECT_TRUE(a.accepts_extint()) << "the BSP's LINT0 passes the 8259 through";
}

TEST_F(LapicTest, HighestVectorFirstAndNesting) {
  inject(0x31);
  inject(0x52);
  inject(0x41);
  EXPECT_TRUE(a.has_interrupt());
  EXPECT_EQ(a.ack_interrupt(), 0x52);
  EXPECT_FALSE(a.has_interrupt()) << "lower classes wait";
  inject(0x5f);
  EXPECT_FALSE(a.has_interrupt()) << "the same class waits";
  inject(0x60);
  EXPECT_EQ(a.ack_interrupt(), 0x60);
  EXPECT_EQ(m.mmio(0, 0xa0), 0x60u);
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(m.mmio(0, 0xa0), 0x50u);
  EXPECT_TRUE(isr(0x52));
  EXPECT_FALSE(isr(0x60));
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(a.ack_interrupt(), 0x5f);
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(a.ack_interrupt(), 0x41);
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(a.ack_interrupt(), 0x31);
  EXPECT_EQ(a.ack_interrupt(), -1);
}

TEST_F(LapicTest, TaskPriorityHoldsBack) {
  m.mmio(0, 0x80, 0x45);
  EXPECT_EQ(m.mmio(0, 0xa0), 0x45u);
  EXPECT_EQ(a.cr8(), 4);
  inject(0x48);
  EXPECT_FALSE(a.has_interrupt());
  const int wakes = m.sink.seen[0].wakes;
  a.set_cr8(3);
  EXPECT_GT(m.sink.seen[0].wakes, wakes) << "lowering the priority calls for attention";
  EXPECT_EQ(m.mmio(0, 0x80), 0x30u);
  EXPECT_EQ(a.pending_vector(), 0x48);
  a.set_cr8(15);
  EXPECT_FALSE(a.has_interrupt());
}

TEST_F(LapicTest, EveryVectorIsDelivered) {
  for (unsigned v = 16; v < 256; ++v) inject(static_cast<u8>(v));
  for (unsigned v = 255; v >= 16; --v) {
    ASSERT_EQ(a.ack_interrupt(), static_cast<int>(v));
    m.mmio(0, 0xb0, 0);
  }
}

TEST_F(LapicTest, SecondArrivalMerges) {
  InterruptMessage msg;
  msg.vector = 0x40;
  EXPECT_EQ(a.accept(msg), 1);
  EXPECT_EQ(a.accept(msg), 0);
  a.ack_interrupt();
  EXPECT_EQ(a.accept(msg), 1) << "one in service and one pending";
}

TEST_F(LapicTest, FirstArrivalWakes) {
  const int before = m.sink.seen[0].wakes;
  inject(0x40);
  EXPECT_EQ(m.sink.seen[0].wakes, before + 1);
  inject(0x40);
  EXPECT_EQ(m.sink.seen[0].wakes, before + 1);
}

TEST_F(LapicTest, TriggerModeFollowsTheLastArrival) {
  inject(0x40, true);
  EXPECT_EQ(m.mmio(0, 0x1a0), 1u);
  inject(0x40, false);
  EXPECT_EQ(m.mmio(0, 0x1a0), 0u);
  m.ipi(1, 0xc041, 0);  // an IPI's level bit means nothing but for INIT
  EXPECT_EQ(m.mmio(0, 0x1a0), 0u);
  EXPECT_EQ(m.take(0x41), "0");
}

TEST_F(LapicTest, SoftwareDisabledTakesNoFixedButNmi) {
  m.mmio(0, 0x350, 0x700);
  m.mmio(0, 0xf0, 0xff);
  InterruptMessage msg;
  msg.vector = 0x40;
  EXPECT_EQ(a.accept(msg), -1);
  msg.mode = DeliveryMode::kNmi;
  EXPECT_EQ(a.accept(msg), 1);
  EXPECT_EQ(m.sink.seen[0].nmis, 1);
  EXPECT_EQ(m.mmio(0, 0x350), 0x10700u) << "LVT entries are masked";
  m.mmio(0, 0x350, 0x700);
  EXPECT_EQ(m.mmio(0, 0x350), 0x10700u) << "and stay so";
}

TEST_F(LapicTest, IpiModes) {
  m.ipi(0, 0x4040, 2);
  EXPECT_EQ(m.take(0x40), "2");
  m.ipi(0, 0x4041 | TestMachine::kLogical, 0x0a);
  EXPECT_EQ(m.take(0x41), "13");
  m.ipi(1, 0x42 | 1u << 18, 0);
  EXPECT_EQ(m.take(0x42), "1");
  m.ipi(1, 0x43 | 2u << 18, 0);
  EXPECT_EQ(m.take(0x43), "0123");
  m.ipi(1, 0x44 | 3u << 18, 0);
  EXPECT_EQ(m.take(0x44), "023");
  m.ipi(1, 0x45, 0xff);
  EXPECT_EQ(m.take(0x45), "0123");
  m.ipi(1, 0x46, 9);
  EXPECT_EQ(m.take(0x46), "");
  m.ipi(0, 0x400, 3);  // NMI
  EXPECT_EQ(m.sink.seen[3].nmis, 1);
  m.ipi(0, 0x200, 3);  // SMI
  EXPECT_EQ(m.sink.seen[3].smis, 1);
  m.ipi(0, 0xc500, 3);  // INIT assert
  EXPECT_EQ(m.sink.seen[3].inits, 1);
  m.ipi(0, 0x8500, 3);  // INIT level de-assert
  EXPECT_EQ(m.sink.seen[3].inits, 1);
  m.ipi(0, 0x4699, 3);  // start-up
  EXPECT_EQ(m.sink.seen[3].sipis, 1);
  EXPECT_EQ(m.sink.seen[3].sipi_vector, 0x99);
  m.ipi(0, 0xc4500, 0);  // INIT to all but self
  EXPECT_EQ(m.sink.seen[0].inits, 0);
  EXPECT_EQ(m.sink.seen[1].inits, 1);
  EXPECT_FALSE(m.mmio(0, 0x300) & 1u << 12) << "delivery status is idle";
}

TEST_F(LapicTest, LowestPriorityChoosesOne) {
  m.mmio(0, 0x80, 0x50);
  m.mmio(1, 0x80, 0x20);
  m.mmio(2, 0x80, 0x20);
  m.mmio(3, 0x80, 0x30);
  for (u32 v = 0x60; v < 0x70; ++v) {
    m.ipi(0, 0x100 | v | TestMachine::kLogical, 0x0f);
    const std::string who = m.take(v);
    ASSERT_EQ(who.size(), 1u);
    EXPECT_EQ(who, v % 2 ? "2" : "1") << "equals share by vector";
  }
  m.mmio(1, 0xf0, 0xff);
  m.mmio(2, 0xf0, 0xff);
  m.ipi(0, 0x171 | TestMachine::kLogical, 0x0f);
  EXPECT_EQ(m.take(0x71), "3") << "disabled ones do not take part";
}

TEST_F(LapicTest, ClusterModel) {
  for (unsigned i = 0; i < 4; ++i) {
    m.mmio(i, 0xe0, 0x0fffffff);
    m.mmio(i, 0xd0, ((i / 2) << 4 | 1u << (i % 2)) << 24);
  }
  m.ipi(0, 0x50 | TestMachine::kLogical, 0x03);
  EXPECT_EQ(m.take(0x50), "01");
  m.ipi(0, 0x50 | TestMachine::kLogical, 0x12);
  EXPECT_EQ(m.take(0x50), "3");
  m.ipi(0, 0x50 | TestMachine::kLogical, 0x21);
  EXPECT_EQ(m.take(0x50), "");
}

TEST_F(LapicTest, ChangedIdIsFollowed) {
  m.mmio(2, 0x20, 9u << 24);
  m.ipi(0, 0x50, 9);
  EXPECT_EQ(m.take(0x50), "2");
  m.ipi(0, 0x50, 2);
  EXPECT_EQ(m.take(0x50), "");
}

TEST_F(LapicTest, X2apic) {
  u64 v = 0;
  EXPECT_FALSE(a.read_x2apic(0x802, &v)) << "#GP in xAPIC mode";
  for (unsigned i = 0; i < 4; ++i) m.x2apic(i);
  ASSERT_TRUE(m.lapics[2]->read_x2apic(0x802, &v));
  EXPECT_EQ(v, 2u);
  ASSERT_TRUE(m.lapics[2]->read_x2apic(0x80d, &v));
  EXPECT_EQ(v, 4u);
  EXPECT_TRUE(a.write_x2apic(0x830, 0x40 | u64{3} << 32));
  EXPECT_EQ(m.take(0x40), "3");
  EXPECT_TRUE(a.write_x2apic(0x830, 0x41 | 0x800 | u64{0x0000000c} << 32));
  EXPECT_EQ(m.take(0x41), "23");
  EXPECT_TRUE(a.write_x2apic(0x830, 0x42 | u64{0xffffffff} << 32));
  EXPECT_EQ(m.take(0x42), "0123");
  EXPECT_TRUE(a.write_x2apic(0x830, 0x43 | u64{0xff} << 32));
  EXPECT_EQ(m.take(0x43), "") << "0xff is an id like any other";
  ASSERT_TRUE(a.read_x2apic(0x830, &v));
  EXPECT_EQ(v, 0x43 | u64{0xff} << 32);
  EXPECT_TRUE(a.write_x2apic(0x83f, 0x44));
  EXPECT_EQ(m.take(0x44), "0");
  // #GP: read-only, write-only, absent, reserved bits.
  EXPECT_FALSE(a.write_x2apic(0x802, 0));
  EXPECT_FALSE(a.write_x2apic(0x803, 0));
  EXPECT_FALSE(a.write_x2apic(0x80d, 0));
  EXPECT_FALSE(a.write_x2apic(0x80e, 0));
  EXPECT_FALSE(a.write_x2apic(0x831, 0));
  EXPECT_FALSE(a.write_x2apic(0x839, 0));
  EXPECT_FALSE(a.write_x2apic(0x80b, 1));
  EXPECT_FALSE(a.write_x2apic(0x828, 1));
  EXPECT_FALSE(a.write_x2apic(0x80f, u64{1} << 32));
  EXPECT_FALSE(a.write_x2apic(0x8ff, 0));
  EXPECT_FALSE(a.read_x2apic(0x80b, &v));
  EXPECT_FALSE(a.read_x2apic(0x80e, &v));
  EXPECT_FALSE(a.read_x2apic(0x831, &v));
  EXPECT_FALSE(a.read_x2apic(0x83f, &v));
  EXPECT_FALSE(a.read_x2apic(0x840, &v));
  EXPECT_EQ(m.mmio(0, 0x20), 0xffffffffu) << "no MMIO in x2APIC mode";
}

TEST_F(LapicTest, ApicBaseTransitions) {
  constexpr u64 base = 0xfee00000, en = 0x800, x2 = 0x400;
  EXPECT_FALSE(a.set_apic_base(base | x2, false));
  EXPECT_FALSE(a.set_apic_base(base | en | 1, false));
  EXPECT_FALSE(a.set_apic_base(base | en | u64{1} << 40, false));
  EXPECT_FALSE(a.set_apic_base(base | x2, true));
  EXPECT_TRUE(a.set_apic_base(base | en | x2, false));
  EXPECT_FALSE(a.set_apic_base(base | en, false)) << "x2APIC to xAPIC";
  EXPECT_TRUE(a.x2apic());
  EXPECT_TRUE(a.set_apic_base(base, false));
  EXPECT_FALSE(a.enabled());
  EXPECT_TRUE(a.accepts_extint());
  EXPECT_FALSE(a.has_interrupt());
  EXPECT_FALSE(a.set_apic_base(base | en | x2, false)) << "disabled to x2APIC";
  EXPECT_TRUE(a.set_apic_base(base | en, false));
  EXPECT_TRUE(a.set_apic_base(base | en | x2, true));
  EXPECT_TRUE(a.set_apic_base(base | en, true)) << "the VMM may";
  Lapic::Features f;
  f.x2apic = false;
  a.set_features(f);
  EXPECT_FALSE(a.set_apic_base(base | en | x2, false));
  EXPECT_TRUE(a.set_apic_base(0x12345000 | en, false));
  EXPECT_TRUE(a.mmio_contains(Gpa(0x12345020)));
  EXPECT_FALSE(a.mmio_contains(Gpa(0xfee00020)));
}

TEST_F(LapicTest, OneShotTimer) {
  m.mmio(0, 0x320, 0x30);
  m.mmio(0, 0x3e0, 0x3);  // by 16
  m.mmio(0, 0x380, 1000);
  m.pass(8000);
  EXPECT_EQ(m.mmio(0, 0x390), 500u);
  EXPECT_FALSE(a.has_interrupt());
  m.pass(8000);
  EXPECT_EQ(m.take(0x30), "0");
  EXPECT_EQ(m.mmio(0, 0x390), 0u);
  m.pass(1'000'000);
  EXPECT_FALSE(a.has_interrupt());
  m.mmio(0, 0x380, 1000);
  m.mmio(0, 0x380, 0);  // stops it
  m.pass(1'000'000);
  EXPECT_FALSE(a.has_interrupt());
}

TEST_F(LapicTest, PeriodicTimerAndDivisors) {
  static constexpr u32 kDivide[] = {2, 4, 8, 16, 32, 64, 128, 1};
  for (u32 code = 0; code < 8; ++code) {
    m.mmio(0, 0x320, 0x30 | 1u << 17);
    m.mmio(0, 0x3e0, (code & 3) | (code & 4) << 1);
    m.mmio(0, 0x380, 1'000'000);
    for (int i = 0; i < 5; ++i) {
      m.pass(u64{1'000'000} * kDivide[code]);
      ASSERT_EQ(m.take(0x30), "0") << code;
    }
  }
  m.mmio(0, 0x320, 0x30 | 1u << 17 | 1u << 16);
  m.pass(u64{1} << 30);
  EXPECT_FALSE(a.has_interrupt()) << "masked";
}

TEST_F(LapicTest, FastPeriodicTimerIsStretched) {
  m.mmio(0, 0x320, 0x30 | 1u << 17);
  m.mmio(0, 0x3e0, 0xb);
  m.mmio(0, 0x380, 1);
  int fired = 0;
  for (int i = 0; i < 1000; ++i) {
    m.pass(1000);
    fired += m.take(0x30) == "0";
  }
  EXPECT_EQ(fired, 5);
}

TEST_F(LapicTest, TscDeadline) {
  a.set_tsc_deadline(5000);
  EXPECT_EQ(a.tsc_deadline(), 0u) << "not in that mode";
  m.mmio(0, 0x320, 0x31 | 2u << 17);
  const u64 now = m.tscs[0]->read();
  a.set_tsc_deadline(now + 5000);
  EXPECT_EQ(a.tsc_deadline(), now + 5000);
  m.pass(4999);
  EXPECT_FALSE(a.has_interrupt());
  m.pass(1);
  EXPECT_EQ(m.take(0x31), "0");
  EXPECT_EQ(a.tsc_deadline(), 0u);
  a.set_tsc_deadline(1);  // past: at once
  EXPECT_EQ(m.take(0x31), "0");
  a.set_tsc_deadline(m.tscs[0]->read() + 1000);
  a.set_tsc_deadline(0);
  m.pass(5000);
  EXPECT_FALSE(a.has_interrupt());
  a.set_tsc_deadline(m.tscs[0]->read() + 1'000'000);
  m.tscs[0]->guest_write(m.tscs[0]->read() + 900'000);
  a.tsc_changed();
  m.pass(100'000);
  EXPECT_EQ(m.take(0x31), "0");
  a.set_tsc_deadline(m.tscs[0]->read() + 1000);
  m.mmio(0, 0x320, 0x31);  // leaving the mode disarms
  m.pass(5000);
  EXPECT_FALSE(a.has_interrupt());
  m.mmio(0, 0x380, 1000);
  m.mmio(0, 0x320, 0x31 | 2u << 17);
  EXPECT_EQ(m.mmio(0, 0x380), 0u);
}

TEST_F(LapicTest, LocalSources) {
  m.mmio(0, 0x350, 0x400);
  EXPECT_TRUE(a.local_event(Lapic::Source::kLint0));
  EXPECT_EQ(m.sink.seen[0].nmis, 1);
  m.bus.pulse_lint0_nmi();
  EXPECT_EQ(m.sink.seen[0].nmis, 2);
  m.mmio(0, 0x350, 0x10400);
  m.bus.pulse_lint0_nmi();
  EXPECT_EQ(m.sink.seen[0].nmis, 2);
  m.mmio(0, 0x360, 0x44 | 1u << 15);
  EXPECT_TRUE(a.local_event(Lapic::Source::kLint1));
  EXPECT_EQ(m.take(0x44), "0");
  EXPECT_FALSE(a.local_event(Lapic::Source::kThermal));
  m.mmio(0, 0x340, 0x45);
  EXPECT_TRUE(a.local_event(Lapic::Source::kPerf));
  EXPECT_EQ(m.take(0x45), "0");
}

TEST_F(LapicTest, ErrorsAreCollectedAndReported) {
  m.mmio(0, 0x370, 0x77);
  m.ipi(0, 5, 1);  // illegal vector
  EXPECT_EQ(m.take(0x77), "0");
  EXPECT_EQ(m.mmio(0, 0x280), 0u) << "visible only after a write";
  m.mmio(0, 0x280, 0);
  EXPECT_EQ(m.mmio(0, 0x280), 0x20u);
  m.mmio(0, 0x280, 0);
  EXPECT_EQ(m.mmio(0, 0x280), 0u);
  InterruptMessage msg;
  msg.vector = 3;
  a.accept(msg);
  (void)m.mmio(0, 0x3f0);
  m.mmio(0, 0x280, 0);
  EXPECT_EQ(m.mmio(0, 0x280), 0xc0u);
  m.mmio(0, 0x370, 0x3);  // an error vector that is itself illegal
  m.ipi(0, 5, 1);
}

TEST_F(LapicTest, OddAccesses) {
  u64 wide = ~0ull;
  a.mmio_read(0x30, &wide, 8);
  EXPECT_EQ(wide, 0u);
  u8 byte = 0xff;
  a.mmio_read(0x32, &byte, 1);
  EXPECT_EQ(byte, 5);
  u16 half = 0xffff;
  a.mmio_read(0x33, &half, 2);
  EXPECT_EQ(half, 0);
  const u32 value = 0x55;
  a.mmio_write(0x80, &value, 1);
  a.mmio_write(0x84, &value, 4);
  EXPECT_EQ(m.mmio(0, 0x80), 0u);
  std::mt19937 rng(3);
  for (int i = 0; i < 100'000; ++i) {  // nothing a guest writes does harm
    u64 v = rng();
    const u32 offset = rng() & 0xfff, size = 1u << (rng() & 3);
    if (rng() & 1)
      a.mmio_write(rng() & 1 ? offset & ~15u : offset, &v, rng() % 8 ? 4 : size);
    else
      a.mmio_read(offset, &v, size);
    if (rng() % 16 == 0) a.ack_interrupt();
    if (rng() % 64 == 0) m.pass(rng() % 100'000);
    if (rng() % 512 == 0) a.set_apic_base(0xfee00000 | (rng() & 0xc00), rng() & 1);
    if (a.x2apic()) {
      a.write_x2apic(0x800 + (rng() & 0xff), rng());
      a.read_x2apic(0x800 + (rng() & 0xff), &v);
    }
  }
}

TEST_F(LapicTest, StateRoundTrips) {
  std::mt19937 rng(5);
  for (int mode = 0; mode < 3; ++mode) {
    m.bus.options().x2apic_format = mode == 2;
    if (mode) {
      a.set_apic_base(0xfee00d00, true);
    }
    for (int round = 0; round < 300; ++round) {
      kvm_lapic_state in{}, out;
      const auto put = [&](u32 offset, u32 v) { std::memcpy(in.regs + offset, &v, 4); };
      put(0x20, mode == 2 ? 0 : 0);
      put(0x30, 0x50014);
      const u32 tpr = rng() & 0xff;
      put(0x80, tpr);
      for (u32 bank = 0x100; bank < 0x280; bank += 16) put(bank, rng() & (bank % 0x80 ? ~0u : 0xffff0000));
      put(0xd0, mode ? 1 : rng() & 0xff000000);
      put(0xe0, mode ? 0 : 0xffffffff);
      put(0xf0, 0x1ff);
      put(0x300, rng() & 0xfffff & ~0x1000u);
      put(0x310, rng());
      put(0x320, (rng() & 0xff) | (rng() & 1) << 17 | 0x10000);
      for (u32 r = 0x330; r <= 0x370; r += 16) put(r, (rng() & 0xff) | 0x10000);
      put(0x3e0, rng() & 0xb);
      const u32 initial = 1'000'000'000 + (rng() & 0xffffff);
      put(0x380, initial);
      put(0x390, initial - (rng() & 0xffff));
      // PPR follows from TPR and ISR.
      u32 top = 0;
      for (u32 i = 0; i < 8; ++i) {
        u32 w;
        std::memcpy(&w, in.regs + 0x100 + i * 16, 4);
        for (u32 b = 0; b < 32; ++b) {
          if (w >> b & 1) top = i * 32 + b;
        }
      }
      put(0xa0, (tpr & 0xf0) >= (top & 0xf0) ? tpr : top & 0xf0);
      ASSERT_EQ(a.set_state(in), 0);
      a.get_state(&out);
      for (u32 r = 0; r < 0x400; r += 4) {
        u32 x, y;
        std::memcpy(&x, in.regs + r, 4);
        std::memcpy(&y, out.regs + r, 4);
        ASSERT_EQ(x, y) << std::hex << r;
      }
    }
  }
  kvm_lapic_state bad{};
  bad.regs[0x20] = 9;
  EXPECT_EQ(a.set_state(bad), -EINVAL);
  m.x2apic(2);
  m.bus.options().x2apic_format = false;
  kvm_lapic_state s;
  m.lapics[2]->get_state(&s);
  EXPECT_EQ(s.regs[0x23], 2) << "8-bit id format";
  m.bus.options().x2apic_format = true;
  m.lapics[2]->get_state(&s);
  EXPECT_EQ(s.regs[0x20], 2) << "32-bit id format";
}

TEST_F(LapicTest, RestoredTimerGoesOn) {
  m.mmio(0, 0x320, 0x30 | 1u << 17);
  m.mmio(0, 0x3e0, 0xb);
  m.mmio(0, 0x380, 1'000'000);
  m.pass(400'000);
  kvm_lapic_state s;
  a.get_state(&s);
  m.mmio(0, 0x380, 0);
  m.pass(5'000'000);
  EXPECT_FALSE(a.has_interrupt());
  ASSERT_EQ(a.set_state(s), 0);
  m.pass(599'000);
  EXPECT_FALSE(a.has_interrupt());
  m.pass(1'000);
  EXPECT_EQ(m.take(0x30), "0");
  m.pass(1'000'000);
  EXPECT_EQ(m.take(0x30), "0");
}

TEST_F(LapicTest, InitKeepsBaseAndId) {
  m.x2apic(1);
  m.mmio(2, 0x20, 7u << 24);
  inject(0x50);
  for (auto& l : m.lapics) l->reset(true);
  EXPECT_TRUE(m.lapics[1]->x2apic());
  EXPECT_EQ(m.lapics[1]->apic_id(), 1u);
  EXPECT_EQ(m.lapics[2]->apic_id(), 7u);
  EXPECT_FALSE(a.has_interrupt());
  EXPECT_EQ(m.mmio(0, 0xf0), 0xffu);
  m.lapics[1]->reset(false);
  EXPECT_FALSE(m.lapics[1]->x2apic());
}

TEST_F(LapicTest, SelfIpiAndEoiCallForAttentionOnlyWhenDue) {
  inject(0x50);
  a.ack_interrupt();
  inject(0x30);
  const int before = m.sink.seen[0].wakes;
  a.set_cr8(9);
  EXPECT_EQ(m.sink.seen[0].wakes, before);
  a.set_cr8(0);
  EXPECT_EQ(m.sink.seen[0].wakes, before) << "still in service";
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(m.sink.seen[0].wakes, before + 1);
}

}  // namespace
}  // namespace ring3::engine
