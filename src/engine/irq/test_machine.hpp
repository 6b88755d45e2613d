#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "engine/irq/irq_chip.hpp"

/// A few LAPICs, time that stands still, and a sink that counts: for this room's tests.
namespace ring3::engine {

struct TestSink : VcpuSink {
  struct Seen {
    std::atomic<int> wakes{0}, extints{0}, nmis{0}, smis{0}, inits{0}, sipis{0};
    std::atomic<int> sipi_vector{-1}, eoi_vector{-1};
  };
  std::array<Seen, 16> seen;

  void wake(unsigned v, Attention why) override {
    ++(why == Attention::kInterrupt ? seen[v & 15].wakes : seen[v & 15].extints);
  }
  void nmi(unsigned v) override { ++seen[v & 15].nmis; }
  void smi(unsigned v) override { ++seen[v & 15].smis; }
  void init(unsigned v) override { ++seen[v & 15].inits; }
  void sipi(unsigned v, u8 vector) override {
    ++seen[v & 15].sipis;
    seen[v & 15].sipi_vector = vector;
  }
  void ioapic_eoi(unsigned v, u8 vector) override { seen[v & 15].eoi_vector = vector; }
};

struct TestMachine {
  FakeClock clock;
  TimerQueue timers{clock, TimerQueue::Mode::kManual};
  TscSync sync;
  TestSink sink;
  ApicBus bus{sink};
  std::unique_ptr<IrqChip> chip;
  std::vector<std::unique_ptr<Tsc>> tscs;
  std::vector<std::unique_ptr<Lapic>> lapics;

  explicit TestMachine(unsigned n = 4, IrqChip::Mode mode = IrqChip::Mode::kFull, unsigned reserved = 0)
      : chip(std::make_unique<IrqChip>(bus, mode, reserved)) {
    for (unsigned i = 0; i < n; ++i) {
      tscs.push_back(std::make_unique<Tsc>(clock, sync));
      lapics.push_back(std::make_unique<Lapic>(bus, timers, *tscs.back(), i, i == 0));
      mmio(i, 0xf0, 0x1ff);           // software enabled
      mmio(i, 0xd0, 1u << (24 + i));  // flat logical id
    }
  }
  void mmio(unsigned v, u32 offset, u32 value) { lapics[v]->mmio_write(offset, &value, 4); }
  u32 mmio(unsigned v, u32 offset) {
    u32 value;
    lapics[v]->mmio_read(offset, &value, 4);
    return value;
  }
  void x2apic(unsigned v) { lapics[v]->set_apic_base(lapics[v]->apic_base() | Lapic::kBaseX2apic, false); }
  void ipi(unsigned from, u32 low, u32 dest) {
    mmio(from, 0x310, dest << 24);
    mmio(from, 0x300, low);
  }
  // Which vCPUs have vector pending or in IRR; takes the IRR bit away by acknowledging and ending it.
  std::string take(unsigned vector) {
    std::string who;
    for (auto& l : lapics) {
      if (l->pending_vector() != static_cast<int>(vector)) continue;
      who += static_cast<char>('0' + l->vcpu());
      l->ack_interrupt();
      if (l->x2apic()) {
        l->write_x2apic(0x80b, 0);
      } else {
        const u32 zero = 0;
        l->mmio_write(0xb0, &zero, 4);
      }
    }
    return who;
  }
  void pass(u64 ns) {
    clock.advance(ns);
    timers.run_due();
  }

  void ioapic_write(u32 reg, u32 value) {
    chip->mmio_write(Gpa(0xfec00000), &reg, 4);
    chip->mmio_write(Gpa(0xfec00010), &value, 4);
  }
  u32 ioapic_read(u32 reg) {
    u32 value = 0;
    chip->mmio_write(Gpa(0xfec00000), &reg, 4);
    chip->mmio_read(Gpa(0xfec00010), &value, 4);
    return value;
  }
  static constexpr u32 kLevel = 1u << 15, kMasked = 1u << 16, kLogical = 1u << 11;
  void route(unsigned pin, u32 low, u8 dest) {
    ioapic_write(0x11 + 2 * pin, static_cast<u32>(dest) << 24);
    ioapic_write(0x10 + 2 * pin, low);
  }
  void out(u16 port, u8 value) { chip->pio_write(port, &value, 1); }
  u8 in(u16 port) {
    u8 value = 0;
    chip->pio_read(port, &value, 1);
    return value;
  }
};

}  // namespace ring3::engine
