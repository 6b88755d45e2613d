#include "devices/virtio/rng/rng_device.hpp"

#include <gtest/gtest.h>

#include <set>

#include "devices/virtio/pci/test_bus.hpp"

namespace ring3::virtio {
namespace {

TEST(Rng, FillsWhatItIsGiven) {
  test::TestBus bus;
  ASSERT_TRUE(bus.add(std::make_shared<RngDevice>()));
  ASSERT_TRUE(bus.start(1, feature::kVersion1, 1, 8));
  std::set<u64> seen;
  for (u32 length : {u32{8}, u32{64}, u32{1000}, u32{65536}}) {
    std::memset(bus.guest.at(0x80000), 0, 0x20000);
    ASSERT_TRUE(bus.drivers[0]->add({{0x80000, length, true}}));
    bus.kick(1, 0);
    const auto done = bus.wait(0);
    ASSERT_TRUE(done);
    EXPECT_EQ(done->written, length);
    EXPECT_TRUE(seen.insert(bus.guest.get<u64>(0x80000)).second);
    EXPECT_NE(bus.guest.get<u64>(0x80000 + length - 8), 0u);
    EXPECT_EQ(bus.guest.get<u8>(0x80000 + length), 0);
  }
  // More than one helping: some of it, which is allowed.
  ASSERT_TRUE(bus.drivers[0]->add({{0x80000, 0x20000, true}}));
  bus.kick(1, 0);
  EXPECT_EQ(bus.wait(0)->written, 0x10000u);
}

}  // namespace
}  // namespace ring3::virtio
