#include "engine/timer/pvclock.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace ring3::engine {
namespace {

TEST(TscScale, ConvertsWithin32BitPrecision) {
  for (const u32 khz : {1u, 1000u, 32'768u, 999'999u, 1'000'000u, 1'000'001u, 2'445'404u, 2'999'999u,
                        5'000'000u, 100'000'000u, 4'000'000'000u}) {
    const TscScale s = tsc_to_ns_scale(khz);
    const u64 ticks = static_cast<u64>(khz) * 1000;  // one second
    EXPECT_NEAR(static_cast<double>(scale_tsc_delta(ticks, s)), 1e9, 1.5 + 1e9 / static_cast<double>(ticks))
        << khz;
  }
}

struct PvTest : testing::Test {
  FakeClock clock{2'400'000};
  std::vector<u8> ram = std::vector<u8>(8192);
  std::vector<std::pair<u64, std::vector<u8>>> writes;
  GuestWriter writer = [this](Gpa a, const void* p, std::size_t n) {
    if (a.value > ram.size() || n > ram.size() - a.value) return false;
    std::memcpy(ram.data() + a.value, p, n);
    writes.emplace_back(a.value, std::vector<u8>(static_cast<const u8*>(p), static_cast<const u8*>(p) + n));
    return true;
  };
  KvmClock vm{clock};
  TscSync sync;
  Tsc tsc{clock, sync};
  PvClock pv{vm, sync, tsc, writer, true};

  PvclockTimeInfo page(u64 at = 0x1000) {
    PvclockTimeInfo i;
    std::memcpy(&i, ram.data() + at, sizeof i);
    return i;
  }
  // What a guest computes.
  u64 guest_ns(const PvclockTimeInfo& i) {
    return i.system_time + scale_tsc_delta(tsc.read() - i.tsc_timestamp, {i.tsc_to_system_mul, i.tsc_shift});
  }
};

TEST_F(PvTest, PageTellsTheVmsClock) {
  clock.advance(123'456'789);
  pv.write_msr(0x4b564d01, 0x1001, false);
  EXPECT_TRUE(pv.update_pending());
  pv.update();
  EXPECT_FALSE(pv.update_pending());
  const auto i = page();
  EXPECT_EQ(i.version & 1, 0u);
  EXPECT_EQ(i.flags, kPvclockTscStable);
  EXPECT_NEAR(static_cast<double>(guest_ns(i)), 123'456'789, 3);
  clock.advance(10'000'000'000);
  EXPECT_NEAR(static_cast<double>(guest_ns(i)), static_cast<double>(vm.now_ns()), 5);
  EXPECT_EQ(pv.read_msr(0x4b564d01), 0x1001u);
  EXPECT_EQ(pv.read_msr(0x12), 0x1001u);
}

TEST_F(PvTest, VersionIsOddWhileFieldsChange) {
  pv.write_msr(0x4b564d01, 0x1001, false);
  pv.update();
  writes.clear();
  pv.request_update();
  pv.update();
  ASSERT_EQ(writes.size(), 3u);
  u32 v[3];
  for (int i = 0; i < 3; ++i) std::memcpy(&v[i], writes[static_cast<size_t>(i)].second.data(), 4);
  EXPECT_EQ(v[0] & 1, 1u);
  EXPECT_EQ(v[1], v[0]);
  EXPECT_EQ(v[2], v[0] + 1);
}

TEST_F(PvTest, GuestRateScalesTheFactor) {
  ASSERT_EQ(tsc.set_khz(1'000'000), 0);
  clock.advance(5'000'000);
  pv.write_msr(0x4b564d01, 0x1001, false);
  pv.update();
  const auto i = page();
  clock.advance(1'000'000'000);
  EXPECT_NEAR(static_cast<double>(guest_ns(i)), 1'005'000'000, 3);
}

TEST_F(PvTest, SetClockMovesIt) {
  kvm_clock_data d{};
  d.clock = 77'000'000'000;
  ASSERT_EQ(vm.set(d), 0);
  EXPECT_EQ(vm.now_ns(), 77'000'000'000u);
  clock.advance(1000);
  kvm_clock_data got;
  vm.get(&got, true);
  EXPECT_NEAR(static_cast<double>(got.clock), 77'000'001'000, 2);
  EXPECT_EQ(got.flags, static_cast<u32>(KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC | KVM_CLOCK_TSC_STABLE));
  EXPECT_EQ(got.realtime, clock.realtime_ns());
  clock.advance(5'000'000);
  got.flags = KVM_CLOCK_REALTIME;  // goes on by what has passed outside
  ASSERT_EQ(vm.set(got), 0);
  EXPECT_NEAR(static_cast<double>(vm.now_ns()), 77'005'001'000, 3);
  got.flags = 1u << 30;
  EXPECT_EQ(vm.set(got), -EINVAL);
}

TEST_F(PvTest, WallClockPlusSystemTimeIsRealTime) {
  clock.advance(9'876'543'210);
  pv.write_msr(0x4b564d00, 0x40, false);
  u32 w[3];
  std::memcpy(w, ram.data() + 0x40, sizeof w);
  EXPECT_EQ(w[0] & 1, 0u);
  EXPECT_NEAR(static_cast<double>(w[1]) * 1e9 + w[2] + static_cast<double>(vm.now_ns()),
              static_cast<double>(clock.realtime_ns()), 1000);
  EXPECT_EQ(pv.read_msr(0x11), 0x40u);
}

TEST_F(PvTest, StoppedFlagIsToldOnce) {
  EXPECT_EQ(pv.guest_stopped(), -EINVAL);
  pv.write_msr(0x4b564d01, 0x1001, false);
  ASSERT_EQ(pv.guest_stopped(), 0);
  pv.update();
  EXPECT_TRUE(page().flags & kPvclockGuestStopped);
  pv.request_update();
  pv.update();
  EXPECT_FALSE(page().flags & kPvclockGuestStopped);
}

TEST_F(PvTest, NotStableWhenVcpusDifferOrTheGuestIsOld) {
  Tsc other(clock, sync);
  other.guest_write(1'000'000'000'000);
  pv.write_msr(0x4b564d01, 0x1001, false);
  pv.update();
  EXPECT_EQ(page().flags, 0);
  other.set_offset(tsc.offset());
  pv.write_msr(0x12, 0x1001, false);
  pv.update();
  EXPECT_EQ(page().flags, 0);
}

TEST_F(PvTest, DisabledOrBadAddressesWriteNothing) {
  pv.write_msr(0x4b564d01, 0x1000, false);  // enable bit clear
  pv.update();
  pv.write_msr(0x4b564d01, 0xfffffffffffff001, false);
  pv.update();
  pv.write_msr(0x4b564d00, 0xffffffffffffffff, false);
  EXPECT_TRUE(writes.empty());
}

TEST_F(PvTest, StealTimeAccumulates) {
  StealTime steal(writer);
  EXPECT_FALSE(steal.write_msr(0x1003));
  EXPECT_TRUE(steal.write_msr(0x1041));
  steal.update_to(1000);
  const auto get = [&](u64 at, auto v) {
    std::memcpy(&v, ram.data() + 0x1040 + at, sizeof v);
    return v;
  };
  const u64 base = get(0, u64{});
  steal.update_to(6000);
  EXPECT_GE(get(0, u64{}), base);
  const u64 before = get(0, u64{});
  steal.update_to(10'006'000);
  EXPECT_EQ(get(0, u64{}), before + 10'000'000);
  EXPECT_EQ(get(8, u32{}) & 1, 0u);
  EXPECT_GT(get(8, u32{}), 0u);
}

}  // namespace
}  // namespace ring3::engine
