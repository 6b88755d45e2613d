#include "devices/virtio/pci/virtio_pci.hpp"

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <random>
#include <thread>

#include "devices/virtio/core/event_loop.hpp"
#include "devices/virtio/pci/test_bus.hpp"

namespace ring3::virtio {
namespace {

/// Hands each request back with as many bytes written as it has room for, in a thread.
class Echo : public Device {
 public:
  DeviceType type() const override { return DeviceType::kEntropy; }
  u64 features() const override { return 1; }
  std::vector<u16> queue_sizes() const override { return {64, 16}; }
  void read_config(u64 offset, std::span<u8> data) override {
    const u32 config = 0x12345678;
    read_config_struct(config, offset, data);
  }
  bool can_reset_queues() const override { return true; }
  void start(u64 features, std::span<Queue* const> queues) override {
    negotiated = features;
    for (Queue* q : queues) {
      if (q != nullptr) start_queue(q->index(), *q);
    }
  }
  void start_queue(u16 index, Queue& q) override {
    (void)loops[index].add(q.kick_fd(), 1, [&q, this](u32) {
      Chain c;
      q.clear_kick();
      do {
        q.disable_kicks();
        while (q.pop(c) == Queue::Pop::kChain) {
          served++;
          if (c.readable_bytes() == 13) {
            q.fail("thirteen bytes");
            return;
          }
          q.complete(c, static_cast<u32>(c.writable_bytes()));
        }
        q.notify();
      } while (q.enable_kicks());
    });
    (void)loops[index].start("echo");
  }
  void stop_queue(u16 index) override { loops[index].stop(); }
  void stop() override {
    for (auto& l : loops) l.stop();
  }
  Transport& transport() { return *transport_; }
  EventLoop loops[2];
  u64 negotiated = 0;
  std::atomic<int> served{0};
};

constexpr u64 kModern = feature::kVersion1;

struct VirtioPciTest : testing::Test {
  VirtioPciTest() : device(std::make_shared<Echo>()) {
    spdlog::set_level(spdlog::level::off);
    EXPECT_TRUE(bus.add(device));
  }
  ~VirtioPciTest() override { spdlog::set_level(spdlog::level::info); }
  test::TestBus bus;
  std::shared_ptr<Echo> device;
};

TEST_F(VirtioPciTest, IsFoundThroughEcamAndPorts) {
  EXPECT_EQ(bus.read<u32>(bus.config(0, 0)), 0x00081b36u);
  EXPECT_EQ(bus.read<u32>(bus.config(1, 0)), 0x10441af4u);
  EXPECT_EQ(bus.read<u32>(bus.config(2, 0)), 0xffffffffu);
  EXPECT_EQ(bus.read<u32>(bus.config(1, 0x1000)), 0xffffffffu);  // function 1
  u8 address[4], data[4];
  devices::store_le(address, 0x80000800);
  bus.ports.write(0xcf8, address);
  bus.ports.read(0xcfc, data);
  EXPECT_EQ(devices::load_le(data), 0x10441af4u);
  u8 two[2];
  bus.ports.read(0xcfe, two);
  EXPECT_EQ(devices::load_le(two), 0x1044u);
  u8 back[4] = {};
  bus.ports.read(0xcf8, back);
  EXPECT_EQ(devices::load_le(back), 0x80000800u);
}

TEST_F(VirtioPciTest, CapabilitiesDescribeTheBar) {
  std::map<u8, u32> found;
  u32 at = bus.read<u8>(bus.config(1, 0x34));
  int count = 0;
  while (at != 0 && count++ < 20) {
    if (bus.read<u8>(bus.config(1, at)) == 9) {
      found[bus.read<u8>(bus.config(1, at + 3))] = bus.read<u32>(bus.config(1, at + 8));
    }
    at = bus.read<u8>(bus.config(1, at + 1));
  }
  EXPECT_EQ(count, 6);
  EXPECT_EQ(found, (std::map<u8, u32>{{1, 0}, {2, 0x3000}, {3, 0x1000}, {4, 0x2000}, {5, 0}}));
}

TEST_F(VirtioPciTest, BarsAreSizedAndMoved) {
  const u64 config = bus.config(1, 0x10);
  const u64 before = bus.bar(1);
  ASSERT_TRUE(bus.start(1, kModern, 2, 8));
  EXPECT_EQ(bus.ioeventfds.count(before + 0x3004), 1u);
  bus.write<u16>(bus.config(1, 4), 0);
  EXPECT_EQ(bus.read<u32>(before + 0x2000), 0xffffffffu);  // not decoded
  EXPECT_TRUE(bus.ioeventfds.empty());
  bus.write<u32>(config, ~0u);
  bus.write<u32>(config + 4, ~0u);
  EXPECT_EQ(bus.read<u32>(config), 0xffff8004u);
  EXPECT_EQ(bus.read<u32>(config + 4), ~0u);
  bus.write<u32>(config, 0xd0000000);
  bus.write<u32>(config + 4, 0);
  bus.write<u16>(bus.config(1, 4), 2);
  EXPECT_EQ(bus.read<u32>(0xd0002000), 0x12345678u);
  EXPECT_EQ(bus.read<u32>(before + 0x2000), 0xffffffffu);
  EXPECT_EQ(bus.ioeventfds.count(0xd0003004), 1u);
  ASSERT_TRUE(bus.drivers[1]->add({{0x40000, 10, true}}));
  bus.kick(1, 1);
  EXPECT_TRUE(bus.wait(1));
  // Out of the window: nobody answers, nothing breaks.
  bus.write<u32>(config, 0x1000);
  EXPECT_EQ(bus.read<u32>(0x3000), 0xffffffffu);
}

TEST_F(VirtioPciTest, RequestsInEachRing) {
  for (u64 features : {kModern, kModern | feature::kEventIndex, kModern | feature::kPacked, kModern | feature::kPacked | feature::kEventIndex}) {
    ASSERT_TRUE(bus.start(1, features, 2, 16));
    EXPECT_EQ(device->negotiated, features);
    for (int i = 0; i < 100; i++) {
      const u16 q = static_cast<u16>(i % 2);
      bus.drivers[q]->want_interrupt(true);
      const int before = bus.messages(101 + q);
      ASSERT_TRUE(bus.drivers[q]->add({{0x40000, 10, false}, {0x41000, 77, true}}));
      bus.kick(1, q);
      const auto done = bus.wait(q);
      ASSERT_TRUE(done);
      EXPECT_EQ(done->written, 77u);
      for (int k = 0; k < 2000 && bus.messages(101 + q) == before; k++) usleep(500);
      EXPECT_EQ(bus.messages(101 + q), before + 1);
    }
  }
}

TEST_F(VirtioPciTest, WhatIsAvailableBeforeTheStartIsServed) {
  // start() lays the rings out; a second DRIVER_OK on the same memory finds what was added between.
  ASSERT_TRUE(bus.start(1, kModern, 1, 8));
  const u64 b = bus.bar(1);
  bus.write<u8>(b + 0x14, 0);
  bus.write<u8>(b + 0x14, 3);
  bus.write<u32>(b + 8, 1);
  bus.write<u32>(b + 12, 1);
  bus.write<u8>(b + 0x14, 11);
  bus.write<u64>(b + 0x20, 0x1000);
  bus.write<u64>(b + 0x28, 0x5000);
  bus.write<u64>(b + 0x30, 0x6000);
  bus.write<u16>(b + 0x18, 8);
  bus.write<u16>(b + 0x1c, 1);
  ASSERT_TRUE(bus.drivers[0]->add({{0x41000, 5, true}}));
  bus.write<u8>(b + 0x14, 15);
  EXPECT_TRUE(bus.wait(0));
}

TEST_F(VirtioPciTest, IntxWithoutMsix) {
  ASSERT_TRUE(bus.start(1, kModern, 2, 8, false));
  EXPECT_FALSE(bus.line(17));
  ASSERT_TRUE(bus.drivers[0]->add({{0x41000, 5, true}}));
  bus.kick(1, 0);
  ASSERT_TRUE(bus.wait(0));
  for (int i = 0; i < 2000 && !bus.line(17); i++) usleep(500);
  EXPECT_TRUE(bus.line(17));
  EXPECT_EQ(bus.read<u16>(bus.config(1, 6)) & 8, 8);
  bus.write<u16>(bus.config(1, 4), 0x406);  // INTx disabled
  EXPECT_FALSE(bus.line(17));
  bus.write<u16>(bus.config(1, 4), 6);
  EXPECT_TRUE(bus.line(17));
  EXPECT_EQ(bus.read<u8>(bus.bar(1) + 0x1000), 1);
  EXPECT_FALSE(bus.line(17));
  EXPECT_EQ(bus.read<u8>(bus.bar(1) + 0x1000), 0);
  device->transport().config_changed();
  EXPECT_TRUE(bus.line(17));
  EXPECT_EQ(bus.read<u8>(bus.bar(1) + 0x1000), 2);
  EXPECT_EQ(bus.read<u8>(bus.bar(1) + 0x15), 1);
}

TEST_F(VirtioPciTest, MaskedVectorsStayPending) {
  ASSERT_TRUE(bus.start(1, kModern, 2, 8));
  const u64 b = bus.bar(1);
  bus.write<u32>(b + 0x4000 + 12, 1);
  device->transport().config_changed();
  EXPECT_EQ(bus.messages(100), 0);
  EXPECT_EQ(bus.read<u64>(b + 0x5000), 1u);
  bus.write<u32>(b + 0x4000 + 12, 0);
  EXPECT_EQ(bus.messages(100), 1);
  EXPECT_EQ(bus.read<u64>(b + 0x5000), 0u);
  bus.write<u16>(bus.config(1, 0x42), 0xc000);
  device->transport().config_changed();
  EXPECT_EQ(bus.messages(100), 1);
  bus.write<u16>(bus.config(1, 0x42), 0x8000);
  EXPECT_EQ(bus.messages(100), 2);
}

TEST_F(VirtioPciTest, FeaturesAreChecked) {
  EXPECT_FALSE(bus.start(1, 1, 1, 8));                              // no VERSION_1
  EXPECT_FALSE(bus.start(1, kModern | 2, 1, 8));                    // not offered
  EXPECT_TRUE(bus.start(1, kModern | 1, 1, 8));
  const u64 b = bus.bar(1);
  bus.write<u32>(b + 8, 0);
  bus.write<u32>(b + 12, 0);  // too late
  EXPECT_EQ(bus.read<u32>(b + 12), 1u);
}

TEST_F(VirtioPciTest, QueuesAreFrozenOnceTheyRun) {
  ASSERT_TRUE(bus.start(1, kModern, 1, 8));
  const u64 b = bus.bar(1);
  bus.write<u16>(b + 0x16, 0);
  bus.write<u16>(b + 0x18, 32);
  bus.write<u64>(b + 0x20, 0x99000);
  EXPECT_EQ(bus.read<u16>(b + 0x18), 8);
  EXPECT_EQ(bus.read<u64>(b + 0x20), 0x1000u);
  bus.write<u16>(b + 0x16, 1);  // never enabled, but the driver is ready
  bus.write<u16>(b + 0x18, 4);
  bus.write<u16>(b + 0x1c, 1);
  EXPECT_EQ(bus.read<u16>(b + 0x18), 16);
  EXPECT_EQ(bus.read<u16>(b + 0x1c), 0);
  bus.write<u16>(b + 0x16, 7);  // none such
  EXPECT_EQ(bus.read<u16>(b + 0x18), 0);
  bus.write<u16>(b + 0x18, 4);
}

TEST_F(VirtioPciTest, ARingOutsideOfRamNeedsAReset) {
  ASSERT_TRUE(bus.start(1, kModern, 1, 8));
  const u64 b = bus.bar(1);
  bus.write<u8>(b + 0x14, 0);
  bus.write<u8>(b + 0x14, 3);
  bus.write<u32>(b + 8, 1);
  bus.write<u32>(b + 12, 1);
  bus.write<u8>(b + 0x14, 11);
  bus.write<u64>(b + 0x20, u64{1} << 40);
  bus.write<u16>(b + 0x1c, 1);
  bus.write<u8>(b + 0x14, 15);
  EXPECT_EQ(bus.status(1), 15 | 64);
  EXPECT_TRUE(bus.start(1, kModern, 1, 8));
}

TEST_F(VirtioPciTest, ABrokenDeviceIsMendedByAReset) {
  for (int round = 0; round < 3; round++) {
    ASSERT_TRUE(bus.start(1, kModern, 2, 8));
    ASSERT_TRUE(bus.drivers[0]->add({{0x40000, 13, false}}));
    bus.kick(1, 0);
    for (int i = 0; i < 2000 && bus.messages(100) == round; i++) usleep(500);
    EXPECT_EQ(bus.messages(100), round + 1);  // the configuration's vector
    EXPECT_EQ(bus.status(1), 15 | 64);
    ASSERT_TRUE(bus.drivers[1]->add({{0x40000, 5, true}}));
    bus.kick(1, 1);
    usleep(20000);
    EXPECT_FALSE(bus.drivers[1]->take());  // all of the device stands still
  }
}

TEST_F(VirtioPciTest, OneQueueIsReset) {
  ASSERT_TRUE(bus.start(1, kModern | feature::kRingReset, 2, 8));
  const u64 b = bus.bar(1);
  for (int round = 0; round < 3; round++) {
    ASSERT_TRUE(bus.drivers[0]->add({{0x40000, 5, true}}));
    bus.kick(1, 0);
    ASSERT_TRUE(bus.wait(0));
    bus.write<u16>(b + 0x16, 0);
    bus.write<u16>(b + 0x3a, 1);
    EXPECT_EQ(bus.read<u16>(b + 0x3a), 0);
    EXPECT_EQ(bus.read<u16>(b + 0x1c), 0);
    const auto s = test::Driver::layout(16, false, false);
    bus.drivers[0] = std::make_unique<test::Driver>(bus.guest, s);
    bus.write<u16>(b + 0x18, 16);
    bus.write<u64>(b + 0x20, s.descriptors.value);
    bus.write<u64>(b + 0x28, s.driver.value);
    bus.write<u64>(b + 0x30, s.device.value);
    bus.write<u16>(b + 0x1c, 1);
    EXPECT_EQ(bus.read<u16>(b + 0x1c), 1);
    ASSERT_TRUE(bus.drivers[0]->add({{0x40000, 5, true}}));
    bus.kick(1, 0);
    ASSERT_TRUE(bus.wait(0));
    ASSERT_TRUE(bus.drivers[1]->add({{0x40000, 5, true}}));  // the other one went on
    bus.kick(1, 1);
    ASSERT_TRUE(bus.wait(1));
  }
}

TEST_F(VirtioPciTest, TheBarThroughConfigurationSpace) {
  u32 at = bus.read<u8>(bus.config(1, 0x34)), access = 0;
  while (at != 0) {
    if (bus.read<u8>(bus.config(1, at)) == 9 && bus.read<u8>(bus.config(1, at + 3)) == 5) access = at;
    at = bus.read<u8>(bus.config(1, at + 1));
  }
  ASSERT_NE(access, 0u);
  bus.write<u32>(bus.config(1, access + 8), 0x2000);
  bus.write<u32>(bus.config(1, access + 12), 4);
  EXPECT_EQ(bus.read<u32>(bus.config(1, access + 16)), 0x12345678u);
  bus.write<u32>(bus.config(1, access + 8), 0x14);
  bus.write<u32>(bus.config(1, access + 12), 1);
  bus.write<u32>(bus.config(1, access + 16), 3);
  EXPECT_EQ(bus.status(1), 3);
}

TEST_F(VirtioPciTest, ResetWhileRequestsFly) {
  std::atomic<bool> end{false};
  ASSERT_TRUE(bus.start(1, kModern, 2, 16));
  std::thread kicker([&] {
    while (!end) bus.kick(1, 0);
  });
  for (int round = 0; round < 100; round++) {
    ASSERT_TRUE(bus.start(1, kModern | (round % 2 ? feature::kPacked : 0), 2, 16));
    for (int i = 0; i < 8; i++) bus.drivers[0]->add({{0x40000, 5, true}});
  }
  end = true;
  kicker.join();
  EXPECT_GT(device->served.load(), 0);
}

// Registers in any state with any value: nothing may crash, and a reset always leads back.
TEST_F(VirtioPciTest, RandomRegisterWrites) {
  std::mt19937_64 random(3);
  const u64 where_it_was = bus.bar(1);
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < 2000; i++) {
      const u64 r = random();
      const u64 value = (r & 3) == 0 ? r >> 32 : (r & 3) == 1 ? (r >> 40) & 15 : random() % 0x300000;
      const u64 where = (r >> 2 & 7) == 0 ? bus.config(1, static_cast<u32>(r >> 8) % 0x100) : bus.bar(1) + ((r >> 5 & 1) != 0 ? (r >> 8) % 0x40 : (r >> 8) % 0x8000);
      if (where >= bus.config(1, 0x10) && where < bus.config(1, 0x18)) continue;
      switch (r >> 6 & 3) {
        case 0: bus.write<u8>(where, static_cast<u8>(value)); break;
        case 1: bus.write<u16>(where, static_cast<u16>(value)); break;
        case 2: bus.write<u32>(where, static_cast<u32>(value)); break;
        default: bus.write<u64>(where, value); (void)bus.read<u64>(where);
      }
    }
    bus.write<u64>(bus.config(1, 0x10), where_it_was);
    bus.write<u16>(bus.config(1, 4), 6);
    ASSERT_TRUE(bus.start(1, kModern, 2, 8));
    ASSERT_TRUE(bus.drivers[0]->add({{0x40000, 5, true}}));
    bus.kick(1, 0);
    ASSERT_TRUE(bus.wait(0));
  }
}

}  // namespace
}  // namespace ring3::virtio
