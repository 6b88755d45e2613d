#include "devices/virtio/balloon/balloon_device.hpp"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "devices/virtio/pci/test_bus.hpp"

namespace ring3::virtio {
namespace {

constexpr u64 kAll = feature::kVersion1 | 1 << 1 | 1 << 2 | 1 << 5;

struct Balloon : testing::Test {
  Balloon() : device(std::make_shared<BalloonDevice>()) {
    bus.guest.memory().observe_stores([this](Gpa start, u64 size) { stored.emplace_back(start.value, size); });
    EXPECT_TRUE(bus.add(device));
  }
  std::vector<std::pair<u64, u64>> stored;  ///< by the device, which a wait() stands behind
  test::TestBus bus;
  std::shared_ptr<BalloonDevice> device;
};

TEST_F(Balloon, InflatedPagesAreDroppedAndNoOthers) {
  ASSERT_TRUE(bus.start(1, kAll, 4, 16));
  std::memset(bus.guest.at(0x80000), 0x55, 0x10000);
  bus.guest.put<u32>(0x60000, 0x81);
  bus.guest.put<u32>(0x60004, 0x84);
  bus.guest.put<u32>(0x60008, 0x7fffffff);  // no RAM
  ASSERT_TRUE(bus.drivers[0]->add({{0x60000, 12, false}}));
  bus.kick(1, 0);
  ASSERT_TRUE(bus.wait(0));
  for (u64 page = 0x80; page < 0x90; page++) {
    const u8 expected = page == 0x81 || page == 0x84 ? 0 : 0x55;
    EXPECT_EQ(bus.guest.get<u8>(page << 12), expected) << page;
    EXPECT_EQ(bus.guest.get<u8>((page << 12) + 4095), expected) << page;
  }
  EXPECT_EQ(stored, (std::vector<std::pair<u64, u64>>{{0x81000, 0x1000}, {0x84000, 0x1000}}));
  ASSERT_TRUE(bus.drivers[1]->add({{0x60000, 8, false}}));
  bus.kick(1, 1);
  EXPECT_TRUE(bus.wait(1));
}

TEST_F(Balloon, TargetAndActual) {
  ASSERT_TRUE(bus.start(1, kAll, 4, 16));
  device->set_target(u64{5} << 20);
  for (int i = 0; i < 2000 && bus.messages(100) == 0; i++) usleep(500);
  EXPECT_EQ(bus.messages(100), 1);
  EXPECT_EQ(bus.read<u32>(bus.bar(1) + 0x2000), 1280u);
  bus.write<u32>(bus.bar(1) + 0x2004, 1000);
  EXPECT_EQ(device->actual(), u64{1000} * 4096);
}

TEST_F(Balloon, ReportedPagesAreDropped) {
  for (const bool stats : {true, false}) {
    const u16 queue = stats ? 3 : 2;  // numbered in the order of what was negotiated
    ASSERT_TRUE(bus.start(1, stats ? kAll : kAll & ~u64{2}, static_cast<u16>(queue + 1), 16));
    std::memset(bus.guest.at(0x80000), 0x55, 0x10000);
    ASSERT_TRUE(bus.drivers[queue]->add({{0x82000, 0x2000, true}, {0x88000, 0x1800, true}}));
    bus.kick(1, queue);
    ASSERT_TRUE(bus.wait(queue));
    EXPECT_EQ(stored, (std::vector<std::pair<u64, u64>>{{0x82000, 0x2000}, {0x88000, 0x1800}}));
    stored.clear();
    EXPECT_EQ(bus.guest.get<u8>(0x81fff), 0x55);
    EXPECT_EQ(bus.guest.get<u8>(0x82000), 0);
    EXPECT_EQ(bus.guest.get<u8>(0x83fff), 0);
    EXPECT_EQ(bus.guest.get<u8>(0x84000), 0x55);
    EXPECT_EQ(bus.guest.get<u8>(0x88000), 0);
    EXPECT_EQ(bus.guest.get<u8>(0x89000), 0x55);  // a page in part
  }
  EXPECT_EQ(device->reported(), u64{2 * 0x3800});
}

TEST_F(Balloon, Statistics) {
  ASSERT_TRUE(bus.start(1, kAll, 4, 16));
  const auto put = [&](int i, u16 tag, u64 value) {
    bus.guest.put<u16>(0x60000 + 10 * u64(i), tag);
    bus.guest.put<u64>(0x60002 + 10 * u64(i), value);
  };
  put(0, 4, 123456);
  put(1, 5, 999999);
  put(2, 77, 1);
  ASSERT_TRUE(bus.drivers[2]->add({{0x60000, 30, false}}));
  bus.kick(1, 2);
  for (int i = 0; i < 2000 && !device->stats().total; i++) usleep(500);
  EXPECT_EQ(device->stats().free, 123456u);
  EXPECT_EQ(device->stats().total, 999999u);
  EXPECT_FALSE(device->stats().swap_in);
  EXPECT_FALSE(bus.drivers[2]->take());  // kept, until asked
  device->ask_for_stats();
  EXPECT_TRUE(bus.wait(2));
  put(0, 4, 777);
  ASSERT_TRUE(bus.drivers[2]->add({{0x60000, 30, false}}));
  bus.kick(1, 2);
  for (int i = 0; i < 2000 && device->stats().free != 777u; i++) usleep(500);
  EXPECT_EQ(device->stats().free, 777u);
}

}  // namespace
}  // namespace ring3::virtio
