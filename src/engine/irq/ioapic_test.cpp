#include "engine/irq/ioapic.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "engine/irq/test_machine.hpp"

namespace ring3::engine {
namespace {

struct IoApicTest : testing::Test {
  TestMachine m{4};
  static constexpr u32 kLevel = TestMachine::kLevel, kMasked = TestMachine::kMasked;
  IoApic& io = *m.chip->ioapic();
  u32 entry(unsigned pin) { return m.ioapic_read(0x10 + 2 * pin); }
  int line(unsigned pin, bool level, unsigned source = 0) { return io.set_line(pin, source, level); }
  int ack(unsigned v = 0) { return m.lapics[v]->ack_interrupt(); }
  void eoi(unsigned v = 0) { m.mmio(v, 0xb0, 0); }
};

TEST_F(IoApicTest, Registers) {
  EXPECT_EQ(m.ioapic_read(1), 0x00170011u);
  m.ioapic_write(0, 0x0f000000);
  EXPECT_EQ(m.ioapic_read(0), 0x0f000000u);
  EXPECT_EQ(m.ioapic_read(2), 0x0f000000u);
  m.ioapic_write(1, 0);
  EXPECT_EQ(m.ioapic_read(1), 0x00170011u);
  for (unsigned pin = 0; pin < 24; ++pin) EXPECT_EQ(entry(pin), kMasked);
  m.ioapic_write(0x11, 0xab000000);
  m.ioapic_write(0x10, 0xffffffff);
  EXPECT_EQ(m.ioapic_read(0x11), 0xab000000u);
  EXPECT_EQ(entry(0), 0xffffafffu) << "delivery status and remote IRR are read-only";
  m.ioapic_write(0x40, 0);  // beyond the table
  m.ioapic_write(0xff, 0);
  EXPECT_EQ(m.ioapic_read(0x40), ~0u);
  EXPECT_EQ(m.ioapic_read(0x05), ~0u);
  u8 byte = 0x10;
  m.chip->mmio_write(Gpa(0xfec00000), &byte, 1);
  u16 half = 0;
  m.chip->mmio_read(Gpa(0xfec00010), &half, 2);
  EXPECT_EQ(half, 0xafff);
  u32 v = 7;
  EXPECT_TRUE(m.chip->mmio_read(Gpa(0xfec00014), &v, 4));
  EXPECT_EQ(v, 0u);
  EXPECT_FALSE(m.chip->mmio_read(Gpa(0xfec00100), &v, 4));
  EXPECT_FALSE(m.chip->mmio_read(Gpa(0xfebfffff), &v, 1));
}

TEST_F(IoApicTest, EdgeFiresOncePerEdge) {
  m.route(4, 0x41, 2);
  EXPECT_EQ(line(4, true), 1);
  EXPECT_EQ(line(4, true), 0) << "no new edge";
  EXPECT_EQ(ack(2), 0x41);
  eoi(2);
  EXPECT_EQ(ack(2), -1);
  EXPECT_EQ(line(4, false), 1);
  EXPECT_EQ(line(4, true), 1);
  line(4, false);
  EXPECT_EQ(line(4, true), 0) << "merged in the LAPIC";
  EXPECT_EQ(ack(2), 0x41);
}

TEST_F(IoApicTest, LevelRefiresUntilLowered) {
  m.route(9, 0x51 | kLevel, 0);
  EXPECT_EQ(line(9, true), 1);
  EXPECT_TRUE(entry(9) & 1u << 14) << "remote IRR";
  EXPECT_EQ(line(9, true), 0);
  EXPECT_EQ(ack(), 0x51);
  eoi();
  EXPECT_EQ(ack(), 0x51) << "still asserted";
  EXPECT_TRUE(entry(9) & 1u << 14);
  line(9, false);
  eoi();
  EXPECT_EQ(ack(), -1);
  EXPECT_FALSE(entry(9) & 1u << 14);
}

TEST_F(IoApicTest, SourcesAreOred) {
  m.route(9, 0x51 | kLevel, 0);
  line(9, true, 0);
  line(9, true, 1);
  line(9, false, 0);
  ack();
  eoi();
  EXPECT_EQ(ack(), 0x51);
  line(9, false, 1);
  eoi();
  EXPECT_EQ(ack(), -1);
}

TEST_F(IoApicTest, Masking) {
  m.route(9, 0x51 | kLevel | kMasked, 0);
  EXPECT_EQ(line(9, true), -1);
  m.ioapic_write(0x10 + 18, 0x51 | kLevel);
  EXPECT_EQ(ack(), 0x51) << "a level that is still there counts when unmasked";
  m.ioapic_write(0x10 + 18, 0x51 | kLevel | kMasked);
  eoi();
  EXPECT_EQ(ack(), -1);
  EXPECT_FALSE(entry(9) & 1u << 14);
  m.ioapic_write(0x10 + 18, 0x51 | kLevel);
  EXPECT_EQ(ack(), 0x51);
  m.route(3, 0x42 | kMasked, 0);
  eoi();
  line(9, false);
  eoi();
  while (ack() >= 0) eoi();
  EXPECT_EQ(line(3, true), -1);
  m.ioapic_write(0x10 + 6, 0x42);
  EXPECT_EQ(ack(), -1) << "an edge while masked is lost";
}

TEST_F(IoApicTest, SwitchToEdgeDropsRemoteIrr) {
  m.route(9, 0x51 | kLevel, 0);
  line(9, true);
  ack();
  m.ioapic_write(0x10 + 18, 0x51 | kMasked);
  EXPECT_FALSE(entry(9) & 1u << 14);
  m.ioapic_write(0x10 + 18, 0x51 | kLevel);
  EXPECT_TRUE(entry(9) & 1u << 14) << "delivered again";
}

TEST_F(IoApicTest, DestinationsAndModes) {
  m.route(1, 0x44 | TestMachine::kLogical, 0x06);
  line(1, true);
  EXPECT_EQ(m.take(0x44), "12");
  m.route(2, 0x45 | TestMachine::kLogical | 1u << 8, 0x0e);
  line(2, true);
  EXPECT_EQ(m.take(0x45).size(), 1u);
  m.route(3, 0x46, 0xff);
  line(3, true);
  EXPECT_EQ(m.take(0x46), "0123");
  m.route(5, 4u << 8, 3);
  line(5, true);
  EXPECT_EQ(m.sink.seen[3].nmis, 1);
  m.route(6, 7u << 8, 0);
  EXPECT_EQ(line(6, true), -1) << "ExtINT";
  m.route(7, 0x47, 9);
  EXPECT_EQ(line(7, true), -1) << "nobody there";
  EXPECT_EQ(line(24, true), -1);
}

TEST_F(IoApicTest, EoiSuppression) {
  Lapic::Features f;
  f.eoi_suppression = true;
  m.lapics[0]->set_features(f);
  EXPECT_TRUE(m.mmio(0, 0x30) & 1u << 24);
  m.mmio(0, 0xf0, 0x11ff);
  m.route(9, 0x51 | kLevel, 0);
  line(9, true);
  ack();
  eoi();
  EXPECT_TRUE(entry(9) & 1u << 14);
  EXPECT_EQ(ack(), -1);
}

TEST_F(IoApicTest, SharedVectorEndsBothPins) {
  m.route(9, 0x51 | kLevel, 0);
  m.route(10, 0x51 | kLevel, 0);
  line(9, true);
  line(10, true);
  ack();
  line(9, false);
  eoi();
  EXPECT_EQ(ack(), 0x51);
  line(10, false);
  eoi();
  EXPECT_EQ(ack(), -1);
  EXPECT_FALSE(entry(9) & 1u << 14);
  EXPECT_FALSE(entry(10) & 1u << 14);
}

TEST_F(IoApicTest, StateRoundTrips) {
  std::mt19937_64 rng(4);
  for (int round = 0; round < 500; ++round) {
    kvm_irqchip in{}, out{};
    in.chip_id = out.chip_id = KVM_IRQCHIP_IOAPIC;
    auto& s = in.chip.ioapic;
    s.base_address = 0xfec00000;
    s.ioregsel = rng() & 0xff;
    s.id = rng() & 0xf;
    for (auto& e : s.redirtbl) e.bits = rng() | kMasked;
    s.irr = rng() & 0xffffff;
    ASSERT_EQ(m.chip->set_irqchip(in), 0);
    ASSERT_EQ(m.chip->get_irqchip(&out), 0);
    ASSERT_EQ(std::memcmp(&in, &out, sizeof in), 0);
  }
}

TEST_F(IoApicTest, RestoredRequestsAreServed) {
  kvm_ioapic_state s{};
  s.base_address = IoApic::kDefaultBase;
  for (auto& e : s.redirtbl) e.bits = kMasked;
  s.redirtbl[9].bits = 0x51 | kLevel;
  s.redirtbl[4].bits = 0x42;
  s.irr = 1u << 9 | 1u << 4;
  io.set_state(s);
  EXPECT_EQ(ack(), 0x51);
  eoi();
  EXPECT_EQ(ack(), 0x51);
  line(9, false);
  eoi();
  EXPECT_EQ(ack(), 0x42);
  io.get_state(&s);
  EXPECT_EQ(s.irr & 1u << 4, 0u) << "an edge that was sent is no request any more";
}

TEST_F(IoApicTest, HostileAccessesAreHarmless) {
  std::mt19937 rng(8);
  for (int i = 0; i < 200'000; ++i) {
    u64 v = rng();
    const Gpa a(0xfec00000 + (rng() % 4 ? (rng() & 1) * 0x10 : rng() & 0xff));
    const u32 size = rng() % 4 ? 4 : 1u << (rng() & 3);
    switch (rng() % 6) {
      case 0:
        m.chip->mmio_read(a, &v, size);
        break;
      case 1:
        line(rng() % 26, rng() & 1, rng() % 34);
        break;
      case 2:
        ack(rng() & 3);
        break;
      case 3:
        eoi(rng() & 3);
        break;
      default:
        m.chip->mmio_write(a, &v, size);
        break;
    }
  }
}

}  // namespace
}  // namespace ring3::engine
