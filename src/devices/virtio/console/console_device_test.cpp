#include "devices/virtio/console/console_device.hpp"

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <condition_variable>

#include "devices/virtio/pci/test_bus.hpp"

namespace ring3::virtio {
namespace {

constexpr u64 kModern = feature::kVersion1;
constexpr u64 kMulti = kModern | 3;  // SIZE, MULTIPORT

struct Console : testing::Test {
  Console() {
    spdlog::set_level(spdlog::level::off);
    ConsoleDevice::Config c;
    c.columns = 80, c.rows = 25;
    c.ports.resize(2);
    c.ports[0].console = true;
    c.ports[0].output = [this](std::span<const u8> b) { add(0, b); };
    c.ports[1].name = "org.ring3.test";
    c.ports[1].output = [this](std::span<const u8> b) { add(1, b); };
    c.ports[1].opened = [this](bool open) { opened = open; };
    c.ports[0].has_room = [this] { made_room++; };
    device = std::make_shared<ConsoleDevice>(c);
    EXPECT_TRUE(bus.add(device));
  }
  ~Console() override { spdlog::set_level(spdlog::level::info); }
  void add(int port, std::span<const u8> b) {
    const std::lock_guard lock(mutex);
    text[port].append(b.begin(), b.end());
  }
  bool wait_text(int port, const std::string& wanted) {
    for (int i = 0; i < 4000; i++) {
      {
        const std::lock_guard lock(mutex);
        if (text[port] == wanted) return true;
      }
      usleep(500);
    }
    return false;
  }
  void write(u16 queue, const std::string& s) {
    std::memcpy(bus.guest.at(0x60000), s.data(), s.size());
    ASSERT_TRUE(bus.drivers[queue]->add({{0x60000, static_cast<u32>(s.size()), false}}));
    bus.kick(1, queue);
    ASSERT_TRUE(bus.wait(queue));
  }
  /// A message of the device for the driver.
  std::string control() {
    if (!bus.drivers[2]->add({{0x70000, 64, true}})) return "full";
    bus.kick(1, 2);
    const auto done = bus.wait(2);
    return done ? std::string(reinterpret_cast<char*>(bus.guest.at(0x70000)), done->written) : "nothing";
  }
  void tell(u32 id, u16 event, u16 value) {
    std::string s(8, 0);
    std::memcpy(s.data(), &id, 4);
    std::memcpy(s.data() + 4, &event, 2);
    std::memcpy(s.data() + 6, &value, 2);
    write(3, s);
  }
  static std::string message(u32 id, u16 event, u16 value, const std::string& more = "") {
    std::string s(8, 0);
    std::memcpy(s.data(), &id, 4);
    std::memcpy(s.data() + 4, &event, 2);
    std::memcpy(s.data() + 6, &value, 2);
    return s + more;
  }
  test::TestBus bus;
  std::shared_ptr<ConsoleDevice> device;
  std::mutex mutex;
  std::string text[2];
  std::atomic<bool> opened{false};
  std::atomic<int> made_room{0};
};

TEST_F(Console, OnePortBothWays) {
  ASSERT_TRUE(bus.start(1, kModern, 2, 16));
  write(1, "hello");
  write(1, ", guest");
  EXPECT_TRUE(wait_text(0, "hello, guest"));
  // Input that came before there was a buffer, in buffers that are too small for it.
  const std::string keys = "twelve bytes";
  device->receive(0, std::span(reinterpret_cast<const u8*>(keys.data()), keys.size()));
  std::string got;
  for (int i = 0; i < 2; i++) {
    ASSERT_TRUE(bus.drivers[0]->add({{0x70000, 8, true}}));
    bus.kick(1, 0);
    const auto done = bus.wait(0);
    ASSERT_TRUE(done);
    got.append(reinterpret_cast<char*>(bus.guest.at(0x70000)), done->written);
  }
  EXPECT_EQ(got, keys);
}

/// A channel whose other end takes little at a time, and comes and goes.
TEST_F(Console, SlowAndAbsentReaders) {
  ConsoleDevice::Config c;
  c.ports.resize(1);
  c.ports[0].name = "slow";
  c.ports[0].open = false;
  std::atomic<std::size_t> room{3};
  c.ports[0].try_output = [&](std::span<const u8> b) {
    const std::size_t n = std::min(b.size(), room.load());
    room -= n;
    add(0, b.first(n));
    return n;
  };
  c.ports[0].opened = [this](bool open) { opened = open; };
  auto slow = std::make_shared<ConsoleDevice>(c);
  test::TestBus own;
  ASSERT_TRUE(own.add(slow));
  ASSERT_TRUE(own.start(1, kMulti, 4, 16));
  const auto control = [&] {
    EXPECT_TRUE(own.drivers[2]->add({{0x70000, 64, true}}));
    own.kick(1, 2);
    const auto done = own.wait(2);
    return done ? std::string(reinterpret_cast<char*>(own.guest.at(0x70000)), done->written) : "nothing";
  };
  const auto tell = [&](const std::string& s) {
    std::memcpy(own.guest.at(0x61000), s.data(), s.size());
    ASSERT_TRUE(own.drivers[3]->add({{0x61000, static_cast<u32>(s.size()), false}}));
    own.kick(1, 3);
    ASSERT_TRUE(own.wait(3));
  };
  tell(message(0, 0, 1));
  EXPECT_EQ(control(), message(0, 1, 1));
  tell(message(0, 3, 1));
  EXPECT_EQ(control(), message(0, 7, 1, "slow"));
  slow->set_open(0, true);
  EXPECT_EQ(control(), message(0, 6, 1));
  tell(message(0, 6, 1));
  EXPECT_TRUE(opened);
  const std::string words = "ten bytes.";
  std::memcpy(own.guest.at(0x60000), words.data(), words.size());
  ASSERT_TRUE(own.drivers[1]->add({{0x60000, 10, false}}));
  own.kick(1, 1);
  EXPECT_TRUE(wait_text(0, "ten"));
  EXPECT_FALSE(own.drivers[1]->take());
  room = 4;
  slow->output_room(0);
  EXPECT_TRUE(wait_text(0, "ten byt"));
  room = 100;
  slow->output_room(0);
  ASSERT_TRUE(own.wait(1));
  EXPECT_TRUE(wait_text(0, words));
  slow->set_open(0, false);
  EXPECT_EQ(control(), message(0, 6, 0));
  // A reset with output that nobody takes does not wait for it.
  room = 0;
  ASSERT_TRUE(own.drivers[1]->add({{0x60000, 10, false}}));
  own.kick(1, 1);
  usleep(10000);
  own.write<u8>(own.bar(1) + 0x14, 0);
  EXPECT_FALSE(opened);
}

TEST_F(Console, ABufferThatWaitsIsFilled) {
  ASSERT_TRUE(bus.start(1, kModern, 2, 16));
  ASSERT_TRUE(bus.drivers[0]->add({{0x70000, 8, true}}));
  bus.kick(1, 0);
  usleep(20000);
  const u8 key = 'x';
  device->receive(0, std::span(&key, 1));
  const auto done = bus.wait(0);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->written, 1u);
  EXPECT_EQ(bus.guest.get<u8>(0x70000), 'x');
}

TEST_F(Console, InputIsBounded) {
  ASSERT_TRUE(bus.start(1, kModern, 2, 16));
  const std::vector<u8> much(100000, 'k');
  EXPECT_EQ(device->room(0), ConsoleDevice::kMostWaiting);
  device->receive(0, much);
  EXPECT_EQ(device->room(0), 0u);
  std::size_t got = 0;
  for (int i = 0; i < 40 && got < ConsoleDevice::kMostWaiting; i++) {
    ASSERT_TRUE(bus.drivers[0]->add({{0x70000, 4096, true}}));
    bus.kick(1, 0);
    const auto done = bus.wait(0);
    ASSERT_TRUE(done);
    got += done->written;
  }
  EXPECT_EQ(got, ConsoleDevice::kMostWaiting);
  EXPECT_EQ(made_room, 1);
}

TEST_F(Console, PortsAreAnnounced) {
  ASSERT_TRUE(bus.start(1, kMulti, 6, 16));
  tell(0xffffffff, 0, 1);  // DEVICE_READY
  EXPECT_EQ(control(), message(0, 1, 1));
  EXPECT_EQ(control(), message(1, 1, 1));
  tell(0, 3, 1);  // PORT_READY
  EXPECT_EQ(control(), message(0, 4, 1));
  EXPECT_EQ(control(), message(0, 5, 0, std::string("\x50\0\x19\0", 4)));
  EXPECT_EQ(control(), message(0, 6, 1));
  tell(1, 3, 1);
  EXPECT_EQ(control(), message(1, 7, 1, "org.ring3.test"));
  EXPECT_EQ(control(), message(1, 6, 1));
  tell(1, 6, 1);
  for (int i = 0; i < 2000 && !opened; i++) usleep(500);
  EXPECT_TRUE(opened);
  tell(77, 3, 1);  // no such port
  write(5, "through port one");
  EXPECT_TRUE(wait_text(1, "through port one"));
}

TEST_F(Console, Resize) {
  ASSERT_TRUE(bus.start(1, kMulti, 6, 16));
  device->resize(132, 50);
  EXPECT_EQ(control(), message(0, 5, 0, std::string("\x84\0\x32\0", 4)));
  for (int i = 0; i < 2000 && bus.messages(100) == 0; i++) usleep(500);
  EXPECT_EQ(bus.messages(100), 1);
  EXPECT_EQ(bus.read<u16>(bus.bar(1) + 0x2000), 132);
  EXPECT_EQ(bus.read<u16>(bus.bar(1) + 0x2002), 50);
  EXPECT_EQ(bus.read<u32>(bus.bar(1) + 0x2004), 2u);
}

TEST_F(Console, EmergencyWrite) {
  bus.write<u32>(bus.bar(1) + 0x2008, '!');
  EXPECT_TRUE(wait_text(0, "!"));
}

TEST_F(Console, ADriverThatOnlyAsksGetsNoMore) {
  ASSERT_TRUE(bus.start(1, kMulti, 6, 16));
  for (int i = 0; i < 1000; i++) tell(0, 0, 1);
  EXPECT_EQ(bus.status(1), 15);
  ASSERT_TRUE(bus.drivers[3]->add({{0x60000, 5, false}}));  // no whole message
  bus.kick(1, 3);
  for (int i = 0; i < 2000 && bus.status(1) == 15; i++) usleep(500);
  EXPECT_EQ(bus.status(1), 15 | 64);
}

}  // namespace
}  // namespace ring3::virtio
