#include "devices/virtio/net/net.hpp"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "devices/virtio/core/test_driver.hpp"

namespace ring3::virtio {
namespace {

namespace f = net_feature;
using test::Buffer;
using test::Done;
using test::Driver;
using test::Guest;

class PairLink final : public net::Link {
 public:
  explicit PairLink(std::vector<UniqueFd> fds) : Link(std::move(fds)) {}
  bool send(u32 queue, std::span<const iovec> message) override {
    msghdr m{};
    m.msg_iov = const_cast<iovec*>(message.data());
    m.msg_iovlen = message.size();
    return ::sendmsg(fds_[queue].get(), &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
  }
  ssize_t receive(u32 queue, std::span<iovec> message) override {
    msghdr m{};
    m.msg_iov = message.data();
    m.msg_iovlen = message.size();
    return ::recvmsg(fds_[queue].get(), &m, MSG_DONTWAIT);
  }
  Status set_offloads(const net::Offloads& o) override {
    offloads = o;
    return Ok{};
  }
  Status set_active_queues(u32 count) override {
    active = count;
    return Ok{};
  }
  net::Offloads offloads;
  std::atomic<u32> active{0};
};

/// The device with `pairs` pairs, a driver for each queue, and the other end of the link.
class Card : public testing::Test {
 public:
  void make(u64 features, u32 pairs = 1, bool packed = false, u16 size = 64) {
    std::vector<UniqueFd> ours;
    for (u32 i = 0; i < pairs; i++) {
      int fds[2];
      ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
      ours.emplace_back(fds[0]);
      wire.emplace_back(fds[1]);
    }
    auto made = std::make_unique<PairLink>(std::move(ours));
    link = made.get();
    Net::Config config;
    config.mac = net::Mac{{2, 0, 0, 0, 0, 9}};
    device = std::make_unique<Net>(std::move(made), config);
    device->attach(transport);
    negotiated = features;
    auto broken = std::make_shared<std::atomic<bool>>(false);
    const std::size_t count = 2 * std::size_t{pairs} + 1;
    for (std::size_t i = 0; i < count; i++) {
      auto setup = Driver::layout(size, packed, false, 0x1000 + 0x8000 * i);
      setup.index = static_cast<u16>(i);
      drivers.push_back(std::make_unique<Driver>(guest, setup));
      kicks.emplace_back(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      Queue::Hooks hooks;
      hooks.broken = [this](const std::string& why) { transport.needs_reset(why); };
      hooks.device_broken = broken;
      auto queue = Queue::create(guest.memory(), setup, kicks.back().get(), hooks);
      ASSERT_TRUE(queue);
      queues.push_back(std::move(*queue));
    }
  }
  void start() {
    std::vector<Queue*> all;
    for (auto& q : queues) all.push_back(q.get());
    device->start(negotiated, all);
    for (std::size_t i = 0; i < kicks.size(); i++) kick(i);
  }
  void TearDown() override {
    if (device) device->stop();
  }
  void kick(std::size_t queue) {
    const u64 one = 1;
    ASSERT_EQ(::write(kicks[queue].get(), &one, sizeof one), 8);
  }
  template <class Condition>
  bool until(Condition holds) {
    for (int i = 0; i < 1000; i++) {
      if (holds()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return holds();
  }
  std::optional<Done> used(std::size_t queue) {
    std::optional<Done> done;
    until([&] { return (done = drivers[queue]->take()).has_value(); });
    return done;
  }
  std::vector<u8> from_guest(u32 queue = 0) {
    std::vector<u8> message(net::kMaxMessage);
    pollfd p{wire[queue].get(), POLLIN, 0};
    if (::poll(&p, 1, 2000) != 1) return {};
    const ssize_t n = ::recv(wire[queue].get(), message.data(), message.size(), 0);
    message.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    return message;
  }
  bool nothing_from_guest() {
    pollfd p{wire[0].get(), POLLIN, 0};
    return ::poll(&p, 1, 100) == 0;
  }
  void to_guest(const std::vector<u8>& message, u32 queue = 0) {
    ASSERT_EQ(::send(wire[queue].get(), message.data(), message.size(), 0), static_cast<ssize_t>(message.size()));
  }
  static std::vector<u8> message(std::size_t frame, net::VnetHeader header = {}) {
    std::vector<u8> m(net::kVnetHeader + frame);
    std::memcpy(m.data(), &header, sizeof header);
    for (std::size_t i = net::kVnetHeader; i < m.size(); i++) m[i] = static_cast<u8>(i * 7);
    return m;
  }
  void transmit(const std::vector<u8>& m, std::size_t queue = 1, u64 at = 0x80000) {
    std::memcpy(guest.at(at), m.data(), m.size());
    drivers[queue]->add({{at, static_cast<u32>(m.size()), false}});
    kick(queue);
  }

  Guest guest;
  test::RecordingTransport transport;
  std::vector<UniqueFd> wire, kicks;
  PairLink* link = nullptr;
  std::unique_ptr<Net> device;
  std::vector<std::unique_ptr<Driver>> drivers;
  std::vector<std::unique_ptr<Queue>> queues;
  u64 negotiated = 0;
};

constexpr u64 kAll = f::kChecksum | f::kGuestChecksum | f::kGuestOffloads | f::kMac | f::kGuestTso4 | f::kGuestTso6 | f::kHostTso4 |
                     f::kHostTso6 | f::kMergeable | f::kStatus | f::kControl | f::kControlRx | f::kControlMac;

TEST_F(Card, ConfigurationSpace) {
  make(kAll);
  u8 config[12] = {};
  device->read_config(0, config);
  EXPECT_EQ(config[5], 9);
  EXPECT_EQ(config[6], 1);  // the link is up
  EXPECT_EQ(config[8], 1);  // one pair
  EXPECT_EQ(config[10] | config[11] << 8, 1500);
  EXPECT_EQ(device->features() & f::kMultiqueue, 0u);
  EXPECT_EQ(device->queue_sizes().size(), 3u);
  u8 past[8] = {7, 7, 7, 7, 7, 7, 7, 7};
  device->read_config(~u64{0} - 3, past);
  device->read_config(10, past);
  EXPECT_EQ(past[2], 7);
}

class Kinds : public Card, public testing::WithParamInterface<bool> {};

TEST_P(Kinds, FramesGoOutInAnyPieces) {
  make(kAll, 1, GetParam());
  start();
  const auto m = message(100);
  std::memcpy(guest.at(0x80000), m.data(), m.size());
  drivers[1]->add({{0x80000, 5, false}, {0x80005, 20, false}, {0x80019, static_cast<u32>(m.size() - 25), false}});
  kick(1);
  EXPECT_EQ(from_guest(), m);
  const auto done = used(1);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->written, 0u);
  EXPECT_EQ(device->counters().sent, 1u);
}

TEST_P(Kinds, FramesComeInAcrossBuffers) {
  make(kAll, 1, GetParam());
  for (u32 i = 0; i < 60; i++) drivers[0]->add({{0x80000 + 0x800 * u64{i}, 1536, true}});
  start();
  for (const std::size_t size : {60u, 1514u, 40000u}) {
    const auto m = message(size);
    to_guest(m);
    std::vector<u8> got;
    u16 buffers = 0;
    do {
      const auto done = used(0);
      ASSERT_TRUE(done);
      // The n-th descriptor of this driver is the n-th buffer: ids tell which.
      static u32 next = 0;
      if (size == 60 && got.empty()) next = 0;
      const u8* at = guest.at(0x80000 + 0x800 * u64{next++});
      if (got.empty()) std::memcpy(&buffers, at + 10, 2);
      got.insert(got.end(), at, at + done->written);
    } while (got.size() < m.size());
    EXPECT_EQ(buffers, (m.size() + 1535) / 1536);
    got[10] = got[11] = 0;
    EXPECT_TRUE(got == m) << size;
  }
}

INSTANTIATE_TEST_SUITE_P(Rings, Kinds, testing::Bool(), [](const auto& i) { return i.param ? "packed" : "split"; });

TEST_F(Card, FewBuffersHoldTheFrameBack) {
  make(kAll);
  drivers[0]->add({{0x80000, 1000, true}});
  start();
  const auto m = message(2000);
  to_guest(m);
  to_guest(message(100));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(drivers[0]->take());
  drivers[0]->add({{0x81000, 1000, true}});
  kick(0);
  drivers[0]->add({{0x82000, 1000, true}});
  kick(0);
  ASSERT_TRUE(used(0));
  ASSERT_TRUE(used(0));
  ASSERT_TRUE(used(0));
  EXPECT_EQ(guest.get<u16>(0x80000 + 10), 3);
  EXPECT_EQ(std::memcmp(guest.at(0x80000 + 12), m.data() + 12, 988), 0);
  EXPECT_EQ(std::memcmp(guest.at(0x82000), m.data() + 2000, 12), 0);
  drivers[0]->add({{0x83000, 1000, true}});
  kick(0);
  const auto next = used(0);
  ASSERT_TRUE(next);
  EXPECT_EQ(next->written, 112u);
}

TEST_F(Card, WithoutMergingABufferTakesAFrame) {
  make(f::kMac);
  drivers[0]->add({{0x80000, 12, true}, {0x81000, 1518, true}});
  drivers[0]->add({{0x82000, 12, true}, {0x83000, 60, true}});
  drivers[0]->add({{0x84000, 1530, true}});
  start();
  const auto m = message(1514);
  to_guest(m);
  auto done = used(0);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->written, m.size());
  EXPECT_EQ(std::memcmp(guest.at(0x81000), m.data() + 12, 1514), 0);
  EXPECT_EQ(guest.get<u16>(0x8000a), 1);
  to_guest(message(1514));  // too large for the next one: dropped, and the buffer kept
  ASSERT_TRUE(until([&] { return device->counters().receive_dropped == 1; }));
  to_guest(message(60));
  done = used(0);
  ASSERT_TRUE(done);
  EXPECT_EQ(done->written, 72u);
}

TEST_F(Card, BadHeadersAreDropped) {
  make(f::kChecksum | f::kHostTso4 | f::kMergeable);
  start();
  net::VnetHeader h;
  u64 expected = 0;
  const auto bad = [&](const net::VnetHeader& header, std::size_t size = 100) {
    transmit(message(size, header));
    expected++;
    ASSERT_TRUE(used(1));
    EXPECT_EQ(device->counters().send_dropped, expected);
  };
  h.flags = net::VnetHeader::kNeedsCsum;
  h.csum_start = 99;
  bad(h);                       // beyond the frame
  h.csum_start = 0xffff;
  h.csum_offset = 0xffff;
  bad(h);
  h = {};
  h.gso_type = net::VnetHeader::kGsoTcp4;
  h.gso_size = 1000;
  bad(h);                       // without a checksum to be completed
  h.flags = net::VnetHeader::kNeedsCsum;
  h.gso_size = 0;
  bad(h);
  h.gso_size = 1000;
  h.gso_type = net::VnetHeader::kGsoTcp6;
  bad(h);                       // not negotiated
  h.gso_type = net::VnetHeader::kGsoUdpL4;
  bad(h);
  h.gso_type = 0x7f;
  bad(h);
  h.gso_type = net::VnetHeader::kGsoTcp4 | net::VnetHeader::kGsoEcn;
  bad(h);
  bad({}, 13);                  // shorter than an Ethernet header
  transmit({1, 2, 3});
  ASSERT_TRUE(used(1));
  // A buffer that lies about being one for sending.
  drivers[1]->add({{0x80000, 100, true}});
  kick(1);
  ASSERT_TRUE(used(1));
  EXPECT_TRUE(nothing_from_guest());
  h = {};
  h.flags = net::VnetHeader::kNeedsCsum;
  h.gso_type = net::VnetHeader::kGsoTcp4;
  h.gso_size = 1000;
  h.csum_start = 34;
  h.csum_offset = 16;
  h.hdr_len = 54;
  transmit(message(5000, h));
  EXPECT_EQ(from_guest().size(), 5012u);
  EXPECT_TRUE(transport.broken.empty());
}

TEST_F(Card, ABlockedLinkHoldsFramesBack) {
  make(kAll);
  start();
  const auto m = message(30000);
  u32 sent = 0;
  for (; sent < 60; sent++) transmit(m, 1, 0x80000);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_LT(device->counters().sent, 60u);  // the socket holds some
  for (u32 i = 0; i < sent; i++) ASSERT_EQ(from_guest().size(), m.size()) << i;
  EXPECT_EQ(device->counters().send_dropped, 0u);
  for (u32 i = 0; i < sent; i++) ASSERT_TRUE(used(1));
}

TEST_F(Card, ControlQueue) {
  make(kAll | f::kMultiqueue, 2);
  start();
  EXPECT_NE(device->features() & f::kMultiqueue, 0u);
  const auto command = [&](const std::vector<u8>& bytes) {
    std::copy(bytes.begin(), bytes.end(), guest.at(0xa0000));
    *guest.at(0xb0000) = 0x55;
    drivers[4]->add({{0xa0000, static_cast<u32>(bytes.size()), false}, {0xb0000, 1, true}});
    kick(4);
    const auto done = used(4);
    EXPECT_TRUE(done && done->written == 1);
    return *guest.at(0xb0000);
  };
  EXPECT_EQ(command({0, 0, 1}), 0);
  EXPECT_EQ(command({0, 9, 1}), 1);
  EXPECT_EQ(command({0, 0}), 1);
  EXPECT_EQ(command({}), 1);
  EXPECT_EQ(command({1, 1, 2, 0, 0, 0, 0, 0x77}), 0);
  u8 mac[6] = {};
  device->read_config(0, mac);
  EXPECT_EQ(mac[5], 0x77);
  EXPECT_EQ(command({1, 1, 3, 0, 0, 0, 0, 0x77}), 1);  // a group address
  EXPECT_EQ(command({1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6}), 0);
  EXPECT_EQ(command({1, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0}), 1);
  EXPECT_EQ(command({4, 0, 2, 0}), 0);
  EXPECT_EQ(link->active, 2u);
  EXPECT_EQ(command({4, 0, 0, 0}), 1);
  EXPECT_EQ(command({4, 0, 3, 0}), 1);
  EXPECT_TRUE(link->offloads.tcp4);
  EXPECT_EQ(command({5, 0, 2, 0, 0, 0, 0, 0, 0, 0}), 0);
  EXPECT_FALSE(link->offloads.tcp4);
  EXPECT_TRUE(link->offloads.checksum);
  EXPECT_EQ(command({5, 0, 0, 4, 0, 0, 0, 0, 0, 0}), 1);  // not negotiated
  EXPECT_EQ(command({9, 0, 0}), 1);
  // The second pair works.
  transmit(message(80), 3);
  EXPECT_EQ(from_guest(1).size(), 92u);
  EXPECT_TRUE(transport.broken.empty());
}

TEST_F(Card, TheLinksEndIsTold) {
  make(kAll);
  drivers[0]->add({{0x80000, 1536, true}});
  start();
  wire.clear();
  ASSERT_TRUE(until([&] { return transport.config_changes == 1; }));
  u8 status[2] = {};
  device->read_config(6, status);
  EXPECT_EQ(status[0], 0);
  transmit(message(60));
  EXPECT_TRUE(used(1));  // into the void, but the guest goes on
}

// Found by the fuzzer: with no buffer to read the end into, it was looked at again and again and never told.
TEST_F(Card, TheLinksEndIsToldToAGuestWithoutBuffers) {
  make(kAll);
  start();
  wire.clear();
  EXPECT_TRUE(until([&] { return transport.config_changes == 1; }));
}

TEST_F(Card, StopGivesBuffersBack) {
  make(kAll);
  for (u32 i = 0; i < 40; i++) drivers[0]->add({{0x80000 + 0x800 * u64{i}, 1536, true}});
  start();
  to_guest(message(60));
  ASSERT_TRUE(used(0));
  device->stop();
  EXPECT_EQ(queues[0]->state().next_avail, 1);
  start();
  to_guest(message(60));
  ASSERT_TRUE(used(0));
}

TEST_F(Card, HostileChainsUnderAChangingRam) {
  make(kAll);
  start();
  std::atomic<bool> end{false};
  std::thread flipper([&] {
    std::mt19937_64 r(7);
    while (!end) guest.at(0x80000)[r() % 0x20000] = static_cast<u8>(r());
  });
  std::thread drain([&] {
    std::vector<u8> buffer(net::kMaxMessage);
    while (!end) {
      if (::recv(wire[0].get(), buffer.data(), buffer.size(), 0) <= 0) std::this_thread::yield();
    }
  });
  std::mt19937_64 r(42);
  for (int i = 0; i < 20'000; i++) {
    const std::size_t queue = r() % 3;
    std::vector<Buffer> chain;
    const std::size_t pieces = 1 + r() % 4;
    bool writable = queue == 0;
    for (std::size_t k = 0; k < pieces; k++) {
      if (r() % 8 == 0) writable = true;
      chain.push_back({0x80000 + r() % 0x1f000, static_cast<u32>(r() % (r() % 16 == 0 ? 0x10000 : 200)), writable});
    }
    drivers[queue]->add(chain);
    kick(queue);
    if (queue == 0 && r() % 4 == 0) {
      const auto m = message(14 + r() % 3000);
      [[maybe_unused]] const ssize_t n = ::send(wire[0].get(), m.data(), m.size(), MSG_DONTWAIT);
    }
    for (std::size_t q = 0; q < 3; q++) while (drivers[q]->take()) {}
  }
  end = true;
  flipper.join();
  drain.join();
  EXPECT_TRUE(transport.broken.empty()) << transport.broken;
}

}  // namespace
}  // namespace ring3::virtio
