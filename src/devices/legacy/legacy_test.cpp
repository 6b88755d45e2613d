#include <gtest/gtest.h>

#include <random>

#include "devices/bus/bus.hpp"
#include "devices/legacy/acpi_pm.hpp"
#include "devices/legacy/fw_cfg.hpp"
#include "devices/legacy/i8042.hpp"
#include "devices/legacy/pvpanic.hpp"
#include "devices/legacy/rtc.hpp"
#include "devices/legacy/test_device.hpp"

namespace ring3::devices {
namespace {

constexpr i64 kS = 1'000'000'000;
constexpr i64 kT0 = 1'700'000'000;  // 2023-11-14 22:13:20 UTC, a Tuesday

u64 in(Device& d, u64 offset, std::size_t n = 1) {
  u8 b[8];
  std::fill(b, b + 8, u8{0xff});
  d.read(offset, std::span(b, n));
  return load_le(std::span<const u8>(b, n));
}
void out(Device& d, u64 offset, u64 v, std::size_t n = 1) {
  u8 b[8];
  store_le(b, v);
  d.write(offset, std::span<const u8>(b, n));
}

struct Clock {
  i64 utc = kT0 * kS;
  bool line = false;
  int changes = 0;
  Rtc rtc{{[this](bool l) { line = l; }, [this] { return utc; }, [this] { changes++; }, u64{3} << 30, u64{1} << 30, 4}};
  u8 get(u8 index) {
    out(rtc, 0, index);
    return static_cast<u8>(in(rtc, 1));
  }
  void set(u8 index, u8 v) {
    out(rtc, 0, index);
    out(rtc, 1, v);
  }
};

TEST(Rtc, TellsTheTimeInBothFormats) {
  Clock c;
  EXPECT_EQ(c.get(0), 0x20);
  EXPECT_EQ(c.get(2), 0x13);
  EXPECT_EQ(c.get(4), 0x22);
  EXPECT_EQ(c.get(6), 3);  // Sunday is 1
  EXPECT_EQ(c.get(7), 0x14);
  EXPECT_EQ(c.get(8), 0x11);
  EXPECT_EQ(c.get(9), 0x23);
  EXPECT_EQ(c.get(0x32), 0x20);
  c.set(0x0b, 0x06);
  EXPECT_EQ(c.get(4), 22);
  EXPECT_EQ(c.get(9), 23);
  EXPECT_EQ(c.get(0x32), 0x20);
  c.set(0x0b, 0x00);  // BCD, 12 hours
  EXPECT_EQ(c.get(4), 0x90);
  EXPECT_EQ(c.get(0x0d), 0x80);
}

TEST(Rtc, UpdateInProgress) {
  Clock c;
  EXPECT_EQ(c.get(0x0a) & 0x80, 0);
  c.utc += kS - 100'000;
  EXPECT_EQ(c.get(0x0a) & 0x80, 0x80);
}

TEST(Rtc, GuestSetsTheTime) {
  Clock c;
  c.set(0x0b, 0x82);  // SET
  const u8 fields[][2] = {{0, 0x58}, {2, 0x59}, {4, 0x23}, {7, 0x31}, {8, 0x12}, {9, 0x99}, {0x32, 0x19}};
  for (auto& f : fields) c.set(f[0], f[1]);
  c.utc += 10 * kS;
  EXPECT_EQ(c.get(0), 0x58);  // stands still
  c.set(0x0b, 0x02);
  EXPECT_EQ(c.get(0), 0x58);
  c.utc += 2 * kS;
  EXPECT_EQ(c.get(0), 0x00);
  EXPECT_EQ(c.get(9), 0x00);
  EXPECT_EQ(c.get(0x32), 0x20);
  c.set(2, 0x30);  // without SET
  EXPECT_EQ(c.get(2), 0x30);
  EXPECT_EQ(c.get(4), 0x00);
}

TEST(Rtc, UpdateEndedInterrupt) {
  Clock c;
  EXPECT_FALSE(c.rtc.poll().has_value());
  c.set(0x0b, 0x12);
  EXPECT_EQ(c.changes, 1);
  auto next = c.rtc.poll();
  ASSERT_TRUE(next.has_value());
  EXPECT_LE(*next, kS);
  EXPECT_FALSE(c.line);
  c.utc += *next;
  c.rtc.poll();
  EXPECT_TRUE(c.line);
  EXPECT_EQ(c.get(0x0c) & 0x90, 0x90);
  EXPECT_FALSE(c.line);
  EXPECT_EQ(c.get(0x0c), 0);
}

TEST(Rtc, AlarmWithDontCare) {
  Clock c;
  c.set(1, 0x25);
  c.set(3, 0xff);
  c.set(5, 0xff);
  c.set(0x0b, 0x22);
  for (int i = 0; i < 4; i++) {
    c.utc += kS;
    c.rtc.poll();
    EXPECT_FALSE(c.line) << i;
  }
  c.utc += kS;
  c.rtc.poll();
  EXPECT_TRUE(c.line);
  EXPECT_EQ(c.get(0x0c) & 0x20, 0x20);
  c.utc += 90 * kS;  // polled late: not lost
  c.rtc.poll();
  EXPECT_TRUE(c.line);
}

TEST(Rtc, PeriodicInterrupt) {
  Clock c;
  c.set(0x0a, 0x26);  // 1024 Hz
  c.set(0x0b, 0x42);
  int fired = 0;
  for (int i = 0; i < 2000 && fired < 100; i++) {
    auto next = c.rtc.poll();
    ASSERT_TRUE(next.has_value());
    if (c.line) {
      fired++;
      c.get(0x0c);
    }
    c.utc += *next;
  }
  EXPECT_EQ(fired, 100);
  EXPECT_NEAR(static_cast<double>(c.utc - kT0 * kS), 100.0 * kS / 1024, 2.0 * kS / 1024);
}

TEST(Rtc, MemorySizes) {
  Clock c;
  EXPECT_EQ(c.get(0x15) | c.get(0x16) << 8, 640);
  EXPECT_EQ(c.get(0x17) | c.get(0x18) << 8, 0xffff);
  EXPECT_EQ(c.get(0x34) | c.get(0x35) << 8, (3072 - 16) * 16);
  EXPECT_EQ(c.get(0x5b) | c.get(0x5c) << 8, 1024 * 16);
  EXPECT_EQ(c.get(0x5f), 3);
}

TEST(Rtc, AnyByteAnywhere) {
  Clock c;
  std::mt19937 rng(2);
  for (int i = 0; i < 100000; i++) {
    const u8 index = static_cast<u8>(rng() % 4 ? rng() % 14 : rng());
    if (rng() % 2) {
      c.set(index, static_cast<u8>(rng()));
    } else {
      c.get(index);
    }
    if (rng() % 16 == 0) c.utc += static_cast<i64>(rng() % 3) * kS / 2;
    if (rng() % 8 == 0) c.rtc.poll();
    if (rng() % 64 == 0) c.rtc.restore(c.rtc.state());
  }
  Rtc::State s;
  s.offset_s = INT64_MAX;
  c.rtc.restore(s);
  c.rtc.poll();
}

TEST(I8042, ResetsAndAnswersProbes) {
  int resets = 0;
  I8042 k([&] { resets++; });
  out(k, 1, 0xaa);
  EXPECT_EQ(in(k, 1) & 1, 1u);
  EXPECT_EQ(in(k, 0), 0x55u);
  EXPECT_EQ(in(k, 1) & 1, 0u);
  out(k, 1, 0x60);
  out(k, 0, 0x47);
  out(k, 1, 0x20);
  EXPECT_EQ(in(k, 0), 0x47u);
  out(k, 0, 0xf2);  // identify keyboard: none
  EXPECT_EQ(in(k, 1) & 0x41, 0x41u);
  EXPECT_EQ(in(k, 0), 0xfeu);
  out(k, 1, 0xd3);
  out(k, 0, 0x5a);
  EXPECT_NE(in(k, 0), 0x5au);
  EXPECT_EQ(resets, 0);
  out(k, 1, 0xff);  // pulses nothing
  EXPECT_EQ(resets, 0);
  out(k, 1, 0xfe);
  EXPECT_EQ(resets, 1);
  out(k, 1, 0xd1);
  out(k, 0, 0xfe);
  EXPECT_EQ(resets, 2);
}

TEST(Port92, Resets) {
  int resets = 0;
  Port92 p([&] { resets++; });
  EXPECT_EQ(in(p, 0), 2u);
  out(p, 0, 2);
  EXPECT_EQ(resets, 0);
  out(p, 0, 3);
  EXPECT_EQ(resets, 1);
}

struct Pm {
  u64 now = 0;
  bool sci = false;
  int offs = 0;
  AcpiPm pm{{[this](bool l) { sci = l; }, [this] { offs++; }, [this] { return now; }}};
};

TEST(AcpiPm, PowerOff) {
  Pm p;
  EXPECT_EQ(in(p.pm, 4, 2), 1u);
  out(p.pm, 4, 5 << 10, 2);
  EXPECT_EQ(p.offs, 0);
  out(p.pm, 4, 3 << 10 | 1 << 13, 2);  // another sleep state: nothing
  EXPECT_EQ(p.offs, 0);
  out(p.pm, 4, 5 << 10 | 1 << 13, 2);
  EXPECT_EQ(p.offs, 1);
  EXPECT_EQ(in(p.pm, 4, 2), u64{5 << 10 | 1});
}

TEST(AcpiPm, TimerRuns) {
  Pm p;
  EXPECT_EQ(in(p.pm, 8, 4), 0u);
  p.now = 1'000'000'000;
  EXPECT_EQ(in(p.pm, 8, 4), 3579545u);
  p.now = u64{100'000} * 1'000'000'000;
  EXPECT_EQ(in(p.pm, 8, 4), (u64{100'000} * 3579545) & 0xffffffff);
  EXPECT_EQ(in(p.pm, 8, 2), (u64{100'000} * 3579545) & 0xffff);
}

TEST(AcpiPm, PowerButtonRaisesSci) {
  Pm p;
  p.pm.press_power_button();
  EXPECT_FALSE(p.sci);
  out(p.pm, 2, 0x100, 2);
  EXPECT_TRUE(p.sci);
  EXPECT_EQ(in(p.pm, 0, 2) & 0x100, 0x100u);
  out(p.pm, 0, 0x100, 2);
  EXPECT_FALSE(p.sci);
  p.pm.raise_gpe(2);
  EXPECT_FALSE(p.sci);
  out(p.pm, 0x22, 4, 2);
  EXPECT_TRUE(p.sci);
  out(p.pm, 0x20, 4, 2);
  EXPECT_FALSE(p.sci);
  p.pm.raise_gpe(77);
}

TEST(AcpiPm, StateKeepsTheTimer) {
  Pm p;
  p.now = 5'000'000'000;
  auto s = p.pm.state();
  Pm q;
  q.now = 900'000'000'000;
  q.pm.restore(s);
  EXPECT_EQ(in(q.pm, 8, 4), u64{5 * 3579545});
}

TEST(ResetRegister, RisingEdge) {
  int resets = 0;
  ResetRegister r([&] { resets++; });
  out(r, 0, 0x02);
  EXPECT_EQ(resets, 0);
  out(r, 0, 0x06);
  EXPECT_EQ(resets, 1);
}

TEST(PvPanic, Events) {
  int panics = 0;
  int crashes = 0;
  PvPanic p([&] { panics++; }, [&] { crashes++; });
  EXPECT_EQ(in(p, 0), 3u);
  out(p, 0, 2);
  out(p, 0, 1);
  out(p, 0, 0xfc);
  EXPECT_EQ(panics, 1);
  EXPECT_EQ(crashes, 1);
}

TEST(FwCfg, Items) {
  FwCfg f;
  f.set_u64(FwCfg::kRamSize, u64{512} << 20);
  f.set_u16(FwCfg::kCpuCount, 3);
  out(f, 0, 0, 2);
  std::string sig;
  for (int i = 0; i < 5; i++) sig.push_back(static_cast<char>(in(f, 1)));
  EXPECT_EQ(sig, std::string("QEMU\0", 5));
  out(f, 0, FwCfg::kRamSize, 2);
  u64 ram = 0;
  for (int i = 0; i < 8; i++) ram |= in(f, 1) << (8 * i);
  EXPECT_EQ(ram, u64{512} << 20);
  out(f, 0, FwCfg::kCpuCount, 2);
  EXPECT_EQ(in(f, 1), 3u);
  out(f, 0, 0x7777, 2);
  EXPECT_EQ(in(f, 1), 0u);
}

TEST(TestDevice, Windows) {
  std::vector<std::pair<u32, bool>> irqs;
  int status = -1;
  Bus ports(0x10000);
  Bus memory;
  TestDevice t({[&](u32 n, bool l) { irqs.emplace_back(n, l); }, [&](u8 s) { status = s; }});
  ASSERT_TRUE(t.attach(ports, memory).ok());
  u8 b[4] = {1, 2, 3, 4};
  EXPECT_TRUE(ports.write(0xe0, b));
  u8 r[4] = {};
  EXPECT_TRUE(ports.read(0xe0, r));
  EXPECT_EQ(load_le(r), 0x04030201u);
  EXPECT_TRUE(ports.read(0xe2, std::span(r, 2)));
  EXPECT_EQ(r[0], 3);
  EXPECT_TRUE(ports.write(0xe8, std::span<const u8>(b, 1)));
  EXPECT_TRUE(ports.read(0xe8, std::span(r, 1)));
  EXPECT_EQ(r[0], 1);
  EXPECT_TRUE(ports.write(0x2005, b));
  const u8 zero[4] = {};
  EXPECT_TRUE(ports.write(0x2005, zero));
  EXPECT_EQ(irqs, (std::vector<std::pair<u32, bool>>{{5, true}, {5, false}}));
  EXPECT_TRUE(memory.write(0xff00fffe, b));  // the tail lies outside
  EXPECT_TRUE(memory.read(0xff00fffe, r));
  EXPECT_EQ(load_le(r), 0xffff0201u);
  const u8 leave[4] = {33, 0, 0, 0};
  EXPECT_TRUE(ports.write(0xf4, leave));
  EXPECT_EQ(status, 67);
  EXPECT_FALSE(ports.write(0x2018, b));
}

TEST(AllDevices, AnyAccessIsHarmless) {
  Pm p;
  I8042 k([] {});
  Port92 a([] {});
  ResetRegister reset([] {});
  PvPanic panic([] {}, [] {});
  FwCfg f;
  Device* devices[] = {&p.pm, &k, &a, &reset, &panic, &f};
  std::mt19937 rng(3);
  for (int i = 0; i < 300000; i++) {
    u8 bytes[8];
    for (u8& b : bytes) b = static_cast<u8>(rng());
    Device& d = *devices[rng() % 6];
    const u64 offset = rng() % 0x48;
    const std::size_t n = 1 + rng() % 8;
    if (rng() % 2) {
      d.read(offset, std::span(bytes, n));
    } else {
      d.write(offset, std::span<const u8>(bytes, n));
    }
    p.now += rng() % 1'000'000'000;
  }
}

}  // namespace
}  // namespace ring3::devices
