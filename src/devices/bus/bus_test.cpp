#include "devices/bus/bus.hpp"

#include <gtest/gtest.h>

namespace ring3::devices {
namespace {

class Recorder final : public Device {
 public:
  void read(u64 offset, std::span<u8> data) override {
    last_offset = offset;
    store_le(data, answer);
  }
  void write(u64 offset, std::span<const u8> data) override {
    last_offset = offset;
    written = load_le(data);
    sizes.push_back(data.size());
  }
  u64 last_offset = ~u64{0};
  u64 answer = 0x1122334455667788;
  u64 written = 0;
  std::vector<std::size_t> sizes;
};

TEST(Bus, UnclaimedReadsAllOnes) {
  Bus bus(0x10000);
  u8 data[4] = {};
  EXPECT_FALSE(bus.read(0x80, data));
  EXPECT_EQ(load_le(data), 0xffffffffu);
  EXPECT_FALSE(bus.write(0x80, data));
}

TEST(Bus, FindsTheDeviceByItsRange) {
  Bus bus(0x10000);
  auto a = std::make_shared<Recorder>();
  auto b = std::make_shared<Recorder>();
  b->answer = 0x42;
  ASSERT_TRUE(bus.add(0x3f8, 8, a, "a").ok());
  ASSERT_TRUE(bus.add(0x70, 2, b, "b").ok());
  u8 data[2];
  EXPECT_TRUE(bus.read(0x3ff, data));
  EXPECT_EQ(a->last_offset, 7u);
  EXPECT_EQ(load_le(data), 0x7788u);
  EXPECT_TRUE(bus.read(0x71, std::span(data, 1)));
  EXPECT_EQ(data[0], 0x42);
  EXPECT_EQ(b->last_offset, 1u);
  EXPECT_FALSE(bus.read(0x400, data));
  EXPECT_FALSE(bus.read(0x6f, data));
  EXPECT_FALSE(bus.read(0x72, data));
}

TEST(Bus, RefusesOverlap) {
  Bus bus(0x10000);
  auto d = std::make_shared<Recorder>();
  ASSERT_TRUE(bus.add(0x100, 0x10, d, "first").ok());
  for (auto [start, size] : {std::pair<u64, u64>{0x100, 1}, {0x10f, 1}, {0xf0, 0x11}, {0xf0, 0x100}, {0x104, 4}}) {
    auto r = bus.add(start, size, d, "second");
    ASSERT_FALSE(r.ok()) << start;
    EXPECT_EQ(r.error().code, EEXIST);
    EXPECT_NE(r.error().message.find("first"), std::string::npos);
  }
  EXPECT_TRUE(bus.add(0x110, 1, d, "next").ok());
  EXPECT_TRUE(bus.add(0xff, 1, d, "before").ok());
}

TEST(Bus, RefusesWhatDoesNotFit) {
  Bus ports(0x10000);
  auto d = std::make_shared<Recorder>();
  EXPECT_FALSE(ports.add(0xffff, 2, d, "x").ok());
  EXPECT_FALSE(ports.add(0x10000, 1, d, "x").ok());
  EXPECT_FALSE(ports.add(0, 0, d, "x").ok());
  EXPECT_TRUE(ports.add(0xffff, 1, d, "x").ok());
  Bus memory;
  EXPECT_FALSE(memory.add(~u64{0}, 2, d, "x").ok());
  EXPECT_TRUE(memory.add(~u64{0}, 1, d, "x").ok());
  u8 byte = 0;
  EXPECT_TRUE(memory.read(~u64{0}, std::span(&byte, 1)));
  EXPECT_EQ(byte, 0x88);
}

TEST(Bus, LongAccessesAreCut) {
  Bus bus;
  auto d = std::make_shared<Recorder>();
  ASSERT_TRUE(bus.add(0x1000, 0x100, d, "d").ok());
  u8 data[20] = {};
  EXPECT_TRUE(bus.write(0x1000, data));
  EXPECT_EQ(d->sizes, (std::vector<std::size_t>{8, 8, 4}));
  EXPECT_TRUE(bus.read(0x10f8, data));  // the tail lies outside
  EXPECT_EQ(data[0], 0x88);
  EXPECT_EQ(data[8], 0xff);
}

}  // namespace
}  // namespace ring3::devices
