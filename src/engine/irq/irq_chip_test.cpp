#include "engine/irq/irq_chip.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <thread>

#include "engine/irq/test_machine.hpp"
#include "engine/timer/pit.hpp"

namespace ring3::engine {
namespace {

constexpr u32 kLevel = TestMachine::kLevel;

kvm_irq_routing_entry chip_route(u32 gsi, u32 chip, u32 pin) {
  kvm_irq_routing_entry e{};
  e.gsi = gsi;
  e.type = KVM_IRQ_ROUTING_IRQCHIP;
  e.u.irqchip.irqchip = chip;
  e.u.irqchip.pin = pin;
  return e;
}
kvm_irq_routing_entry msi_route(u32 gsi, u32 address, u32 data, u32 high = 0) {
  kvm_irq_routing_entry e{};
  e.gsi = gsi;
  e.type = KVM_IRQ_ROUTING_MSI;
  e.u.msi.address_lo = address;
  e.u.msi.address_hi = high;
  e.u.msi.data = data;
  return e;
}

void program_pic(TestMachine& m) {
  for (const u16 port : {u16{0x20}, u16{0xa0}}) {
    m.out(port, 0x11);
    m.out(port + 1, port == 0x20 ? 0x20 : 0x28);
    m.out(port + 1, port == 0x20 ? 4 : 2);
    m.out(port + 1, 1);
    m.out(port + 1, 0);
  }
}

TEST(Msi, Decoding) {
  ApicOptions o;
  auto m = decode_msi(0xfee0a000, 0x00000500, 0x4041, o);
  EXPECT_EQ(m.dest, 0x0au);
  EXPECT_EQ(m.vector, 0x41);
  EXPECT_EQ(m.mode, DeliveryMode::kFixed);
  EXPECT_FALSE(m.logical || m.level || m.redirection_hint);
  m = decode_msi(0xfee0f00c, 0, 0xc441, o);
  EXPECT_TRUE(m.logical && m.level && m.redirection_hint);
  EXPECT_EQ(m.mode, DeliveryMode::kNmi);
  o.x2apic_format = true;
  EXPECT_EQ(decode_msi(0xfee0a000, 0x00000500, 0, o).dest, 0x50au);
  o = {};
  o.ext_dest_id = true;
  EXPECT_EQ(decode_msi(0xfee0a020, 0, 0, o).dest, 0x10au);
}

TEST(Msi, AddressingModes) {
  TestMachine m(4);
  EXPECT_EQ(m.bus.deliver_msi(0xfee02000, 0, 0x41), 1);
  EXPECT_EQ(m.take(0x41), "2");
  EXPECT_EQ(m.bus.deliver_msi(0xfee05004, 0, 0x42), 2);
  EXPECT_EQ(m.take(0x42), "02");
  EXPECT_EQ(m.bus.deliver_msi(0xfee0f00c, 0, 0x43), 1);  // redirection hint
  EXPECT_EQ(m.take(0x43).size(), 1u);
  EXPECT_EQ(m.bus.deliver_msi(0xfee0f004, 0, 0x144), 1);  // lowest priority
  EXPECT_EQ(m.take(0x44).size(), 1u);
  EXPECT_EQ(m.bus.deliver_msi(0xfeeff000, 0, 0x45), 4);
  EXPECT_EQ(m.take(0x45), "0123");
  EXPECT_EQ(m.bus.deliver_msi(0xfeeff000, 0, 0x14a), 4) << "a physical broadcast has no lowest priority";
  EXPECT_EQ(m.take(0x4a), "0123");
  EXPECT_EQ(m.bus.deliver_msi(0xfee09000, 0, 0x46), -1);
  EXPECT_EQ(m.bus.deliver_msi(0xfee03000, 0, 0x400), 1);
  EXPECT_EQ(m.sink.seen[3].nmis, 1);
  m.bus.options().x2apic_format = true;
  EXPECT_EQ(m.bus.deliver_msi(0xfee02000, 1, 0x41), -EINVAL);
  for (unsigned i = 0; i < 4; ++i) m.x2apic(i);
  EXPECT_EQ(m.bus.deliver_msi(0xfee0c004, 0, 0x47), 2);  // cluster 0, ids 2 and 3
  EXPECT_EQ(m.take(0x47), "23");
  EXPECT_EQ(m.bus.deliver_msi(0xfeeff000, 0xffffff00, 0x48), 4);
  EXPECT_EQ(m.take(0x48), "0123");
  EXPECT_EQ(m.bus.deliver_msi(0xfeeff000, 0, 0x49), 4) << "the broadcast quirk";
  EXPECT_EQ(m.take(0x49), "0123");
  m.bus.options().no_broadcast_quirk = true;
  EXPECT_EQ(m.bus.deliver_msi(0xfeeff000, 0, 0x49), -1);
}

TEST(IrqRouting, DefaultTable) {
  TestMachine m(1);
  program_pic(m);
  m.route(4, 0x54, 0);
  m.route(20, 0x64, 0);
  EXPECT_EQ(m.chip->set_irq(kIrqSourceUser, 4, true), 2) << "PIC and IOAPIC";
  EXPECT_TRUE(m.chip->has_extint(*m.lapics[0]));
  EXPECT_EQ(m.chip->ack_interrupt(*m.lapics[0]), 0x24) << "ExtINT first";
  EXPECT_EQ(m.chip->ack_interrupt(*m.lapics[0]), 0x54);
  EXPECT_EQ(m.chip->set_irq(kIrqSourceUser, 20, true), 1);
  EXPECT_EQ(m.chip->set_irq(kIrqSourceUser, 24, true), -1);
  EXPECT_EQ(m.chip->set_irq(kIrqSourceUser, 0xffffffff, true), -1);
}

TEST(IrqRouting, RejectsWhatTheKernelRejects) {
  TestMachine m(1);
  IrqChip& c = *m.chip;
  const auto try_one = [&](kvm_irq_routing_entry e) { return c.set_routing(&e, 1, 0); };
  EXPECT_EQ(try_one(chip_route(5, KVM_IRQCHIP_IOAPIC, 24)), -EINVAL);
  EXPECT_EQ(try_one(chip_route(5, KVM_IRQCHIP_PIC_MASTER, 8)), -EINVAL);
  EXPECT_EQ(try_one(chip_route(5, 3, 0)), -EINVAL);
  EXPECT_EQ(try_one(chip_route(4096, KVM_IRQCHIP_IOAPIC, 0)), -EINVAL);
  auto e = msi_route(5, 0xfee00000, 0x41);
  e.flags = 2;
  EXPECT_EQ(try_one(e), -EINVAL);
  e.flags = KVM_MSI_VALID_DEVID;
  EXPECT_EQ(try_one(e), 0);
  e.type = KVM_IRQ_ROUTING_S390_ADAPTER;
  EXPECT_EQ(try_one(e), -EINVAL);
  e = msi_route(5, 0xfee00000, 0x41);
  EXPECT_EQ(c.set_routing(&e, 1, 1), -EINVAL);
  const kvm_irq_routing_entry two[] = {chip_route(5, KVM_IRQCHIP_IOAPIC, 5),
                                       chip_route(5, KVM_IRQCHIP_IOAPIC, 6)};
  EXPECT_EQ(c.set_routing(two, 2, 0), -EINVAL);
  EXPECT_EQ(c.set_irq(0, 5, true), 1) << "the last good table is in force";
  EXPECT_EQ(m.take(0x41), "0");
  TestMachine s(1, IrqChip::Mode::kSplit, 24);
  e = chip_route(5, KVM_IRQCHIP_IOAPIC, 5);
  EXPECT_EQ(s.chip->set_routing(&e, 1, 0), -EINVAL);
}

TEST(IrqRouting, QemuLikeTable) {
  TestMachine m(2);
  const kvm_irq_routing_entry t[] = {chip_route(0, KVM_IRQCHIP_PIC_MASTER, 0),
                                     chip_route(0, KVM_IRQCHIP_IOAPIC, 2), chip_route(24, 0, 1),
                                     msi_route(30, 0xfee01000, 0x91)};
  ASSERT_EQ(m.chip->set_routing(t, 4, 0), 0);
  m.route(2, 0x30, 0);
  m.chip->set_irq(kIrqSourcePit, 0, true);
  EXPECT_EQ(m.take(0x30), "0");
  EXPECT_EQ(m.chip->pulse(30), 1);
  EXPECT_EQ(m.take(0x91), "1");
  EXPECT_EQ(m.chip->set_irq(0, 30, false), -1) << "an MSI has no low level";
}

TEST(IrqChip, ExtIntReachesWhoLetsItIn) {
  TestMachine m(2);
  program_pic(m);
  const int before = m.sink.seen[0].extints;
  m.chip->set_irq(0, 1, true);
  EXPECT_EQ(m.sink.seen[0].extints, before + 1);
  EXPECT_TRUE(m.chip->has_interrupt(*m.lapics[0]));
  EXPECT_FALSE(m.chip->has_interrupt(*m.lapics[1]));
  m.mmio(0, 0x350, 0x10000);  // LINT0 masked
  EXPECT_FALSE(m.chip->has_interrupt(*m.lapics[0]));
  m.mmio(1, 0x350, 0x700);
  EXPECT_TRUE(m.chip->has_interrupt(*m.lapics[1]));
  EXPECT_EQ(m.chip->ack_interrupt(*m.lapics[1]), 0x21);
}

TEST(IrqChip, PortsAndSizes) {
  TestMachine m(1);
  program_pic(m);
  m.out(0x21, 0x5a);
  EXPECT_EQ(m.in(0x21), 0x5a);
  u16 wide = 0xffff;
  EXPECT_TRUE(m.chip->pio_read(0x21, &wide, 2));
  EXPECT_EQ(wide, 0);
  EXPECT_TRUE(m.chip->pio_write(0x20, &wide, 2));
  EXPECT_FALSE(m.chip->pio_read(0x22, &wide, 1));
  kvm_irqchip s{};
  s.chip_id = 3;
  EXPECT_EQ(m.chip->get_irqchip(&s), -EINVAL);
  EXPECT_EQ(m.chip->set_irqchip(s), -EINVAL);
}

TEST(IrqChip, ResampleNotifiers) {
  TestMachine m(1);
  m.route(10, 0x51 | kLevel, 0);
  int told = 0;
  bool device_wants = true;
  const u64 id = m.chip->add_ack_notifier(10, [&] {
    ++told;
    m.chip->set_irq(kIrqSourceResample, 10, false);
    if (device_wants) m.chip->set_irq(kIrqSourceResample, 10, true);
  });
  m.chip->set_irq(kIrqSourceResample, 10, true);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x51);
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(told, 1);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x51);
  device_wants = false;
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(told, 2);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), -1);
  m.chip->remove_ack_notifier(id);
  m.chip->remove_ack_notifier(id);
  m.chip->set_irq(kIrqSourceResample, 10, true);
  m.lapics[0]->ack_interrupt();
  m.mmio(0, 0xb0, 0);
  EXPECT_EQ(told, 2);
}

TEST(IrqChip, SplitModeTellsLevelEois) {
  TestMachine m(2, IrqChip::Mode::kSplit, 24);
  EXPECT_FALSE(m.chip->mmio_read(Gpa(0xfec00000), nullptr, 4));
  EXPECT_FALSE(m.chip->pio_read(0x20, nullptr, 1));
  kvm_irqchip s{};
  EXPECT_EQ(m.chip->get_irqchip(&s), -ENXIO);
  const kvm_irq_routing_entry t[] = {msi_route(5, 0xfee01000, 0x8061), msi_route(6, 0xfee01000, 0x62),
                                     msi_route(30, 0xfee01000, 0x8063)};
  ASSERT_EQ(m.chip->set_routing(t, 3, 0), 0);
  for (const u32 gsi : {5u, 6u, 30u}) {
    m.sink.seen[1].eoi_vector = -1;
    EXPECT_EQ(m.chip->set_irq(0, gsi, true), 1);
    EXPECT_GE(m.lapics[1]->ack_interrupt(), 0x61);
    m.mmio(1, 0xb0, 0);
    EXPECT_EQ(m.sink.seen[1].eoi_vector, gsi == 5 ? 0x61 : -1) << gsi;
  }
}

// The PIT behind the IRQ chip, with a guest that acknowledges through the 8259, then the IOAPIC.
TEST(IrqChip, PitTicksThroughPicAndIoApic) {
  TestMachine m(1);
  Pit pit(
      m.timers, [&] { m.chip->pit_tick(); }, false);
  m.chip->add_ack_notifier(0, [&] { pit.irq_acked(); });
  m.chip->set_unmask_notifier(0, [&] { pit.irq_unmasked(); });
  program_pic(m);
  pit.write(0x43, 0x34);
  pit.write(0x40, 0x9c);
  pit.write(0x40, 0x2e);  // 100 Hz
  int got = 0;
  for (int i = 0; i < 20; ++i) {
    m.pass(10'001'000);
    if (m.chip->ack_interrupt(*m.lapics[0]) == 0x20) ++got;
    m.out(0x20, 0x20);
  }
  EXPECT_EQ(got, 20);
  // Lost ticks come back one by one.
  for (int i = 0; i < 5; ++i) m.pass(10'001'000);
  got = 0;
  for (int i = 0; i < 10; ++i) {
    if (m.chip->has_extint(*m.lapics[0])) {
      ++got;
      m.chip->ack_interrupt(*m.lapics[0]);
      m.out(0x20, 0x20);
    }
    m.timers.run_due();
  }
  EXPECT_EQ(got, 5);
  // Over to the IOAPIC, as kernels do. (The default table has GSI 0 at pin 0.)
  m.out(0x21, 0xff);
  for (int i = 0; i < 5; ++i) m.pass(10'001'000);  // goes nowhere
  m.route(0, 0x30, 0);
  got = 0;
  for (int i = 0; i < 20; ++i) {
    m.pass(10'001'000);
    if (m.take(0x30) == "0") ++got;
    m.timers.run_due();
  }
  EXPECT_EQ(got, 20);
}

// Threads inject every vector they own again and again, each only after its last one was taken; one vCPU
// acknowledges. A lost interrupt hangs its sender.
TEST(IrqChip, ConcurrentInjectionLosesNothing) {
  TestMachine m(1);
  Lapic& lapic = *m.lapics[0];
  constexpr int kSenders = 4, kRounds = 5000;
  std::array<std::atomic<int>, 256> taken{};
  std::atomic<bool> stop{false};
  std::thread vcpu([&] {
    while (!stop) {
      if (!lapic.has_interrupt()) {
        std::this_thread::yield();
        continue;
      }
      const int v = lapic.ack_interrupt();
      if (v < 0) continue;
      const u32 zero = 0;
      lapic.mmio_write(0xb0, &zero, 4);
      taken[static_cast<unsigned>(v)].fetch_add(1);
    }
  });
  std::vector<std::thread> senders;
  std::atomic<int> lost{0};
  for (int s = 0; s < kSenders; ++s) {
    senders.emplace_back([&, s] {
      for (int i = 0; i < kRounds; ++i) {
        const u32 vector = 0x40 + static_cast<u32>(s * 16 + i % 16);
        const int before = taken[vector].load();
        if (m.bus.deliver_msi(0xfee00000, 0, vector) != 1) ++lost;
        const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (taken[vector].load() == before) {
          std::this_thread::yield();
          if (std::chrono::steady_clock::now() > until) {
            ++lost;
            return;
          }
        }
      }
    });
  }
  for (auto& t : senders) t.join();
  stop = true;
  vcpu.join();
  EXPECT_EQ(lost, 0);
  int sum = 0;
  for (auto& t : taken) sum += t;
  EXPECT_EQ(sum, kSenders * kRounds);
}

// The whole house under threads: level lines, IPIs, timers on the real clock, routing changes.
TEST(IrqChip, ConcurrentUseOfEverything) {
  const HostClock clock;
  TimerQueue timers(clock);
  TscSync sync;
  TestSink sink;
  ApicBus bus(sink);
  IrqChip chip(bus, IrqChip::Mode::kFull);
  Tsc tsc0(clock, sync), tsc1(clock, sync);
  Lapic l0(bus, timers, tsc0, 0, true), l1(bus, timers, tsc1, 1, false);
  Pit pit(
      timers, [&] { chip.pit_tick(); }, true);
  chip.add_ack_notifier(0, [&] { pit.irq_acked(); });
  chip.set_unmask_notifier(0, [&] { pit.irq_unmasked(); });
  std::atomic<bool> stop{false};
  std::atomic<int> timer_irqs{0}, level_irqs{0};
  const auto write = [](Lapic& l, u32 offset, u32 v) { l.mmio_write(offset, &v, 4); };
  const auto vcpu = [&](Lapic& l, Lapic& other) {
    write(l, 0xf0, 0x1ff);
    write(l, 0x320, 0x30 | 1u << 17);
    write(l, 0x3e0, 0xb);
    write(l, 0x380, 250'000);
    while (!stop) {
      const int v = chip.ack_interrupt(l);
      if (v == 0x30) ++timer_irqs;
      if (v == 0x51) {
        ++level_irqs;
        chip.set_irq(kIrqSourceUser, 9, false);
      }
      if (v >= 0) write(l, 0xb0, 0);
      write(l, 0x310, other.vcpu() << 24);
      write(l, 0x300, 0x60);
      u32 count;
      l.mmio_read(0x390, &count, 4);
      std::this_thread::yield();
    }
  };
  const u32 sel = 0x22, entry = 0x51 | kLevel;
  chip.mmio_write(Gpa(0xfec00000), &sel, 4);
  chip.mmio_write(Gpa(0xfec00010), &entry, 4);
  pit.write(0x43, 0x34);
  pit.write(0x40, 0);
  pit.write(0x40, 8);
  std::thread t0([&] { vcpu(l0, l1); }), t1([&] { vcpu(l1, l0); });
  std::thread device([&] {
    while (!stop) {
      chip.set_irq(kIrqSourceUser, 9, true);
      kvm_irqchip s{};
      s.chip_id = KVM_IRQCHIP_IOAPIC;
      chip.get_irqchip(&s);
      const u64 id = chip.add_ack_notifier(9, [] {});
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      chip.remove_ack_notifier(id);
    }
  });
  const u64 until = clock.monotonic_ns() + 60'000'000'000;
  while ((timer_irqs < 100 || level_irqs < 50) && clock.monotonic_ns() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  stop = true;
  t0.join();
  t1.join();
  device.join();
  EXPECT_GE(timer_irqs, 100);
  EXPECT_GE(level_irqs, 50);
}

}  // namespace
}  // namespace ring3::engine
