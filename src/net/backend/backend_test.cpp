#include "net/backend/backend.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/if.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "net/packet/packet.hpp"
#include "net/tap/tap.hpp"

namespace ring3::net {
namespace {

TEST(NetOption, User) {
  auto s = parse_net("user,hostfwd=tcp::2222-:22,hostfwd=udp:5353:53,pcap=a.pcap,mac=52:54:00:00:00:01,queues=2,restrict=on,mtu=1400");
  ASSERT_TRUE(s) << s.error().message;
  EXPECT_EQ(s->kind, NetSpec::Kind::kUser);
  ASSERT_EQ(s->forwards.size(), 2u);
  EXPECT_EQ(s->forwards[1].guest_port, 53);
  EXPECT_EQ(s->capture, "a.pcap");
  EXPECT_EQ(to_string(*s->mac), "52:54:00:00:00:01");
  EXPECT_EQ(s->queues, 2u);
  EXPECT_EQ(s->mtu, 1400);
  EXPECT_TRUE(s->restrict_outgoing);
  EXPECT_TRUE(parse_net("user"));
  EXPECT_EQ(parse_net("none")->kind, NetSpec::Kind::kNone);
  EXPECT_EQ(parse_net("tap,ifname=tap0")->interface, "tap0");
}

TEST(NetOption, MistakesAreNamed) {
  for (const char* bad : {"", "bridge", "user,", "user,hostfwd", "user,hostfwd=tcp:22", "user,ifname=tap0", "tap", "tap,hostfwd=tcp:1:2",
                          "tap,ifname=", "none,pcap=x", "user,mac=1", "user,mac=ff:ff:ff:ff:ff:ff", "user,queues=0", "user,queues=99",
                          "user,mtu=100", "user,mtu=9000", "user,restrict=yes", "user,pcap="}) {
    auto s = parse_net(bad);
    ASSERT_FALSE(s) << bad;
    EXPECT_EQ(s.error().code, EINVAL);
    EXPECT_EQ(s.error().message.find("--net"), 0u) << s.error().message;
    EXPECT_EQ(s.error().message.find('\n'), std::string::npos);
  }
}

TEST(NetOption, AddressesFollowFromTheName) {
  EXPECT_EQ(default_mac("a", 0), default_mac("a", 0));
  EXPECT_NE(default_mac("a", 0), default_mac("a", 1));
  EXPECT_NE(default_mac("a", 0), default_mac("b", 0));
  EXPECT_FALSE(default_mac("a", 0).is_group());
}

TEST(Backend, AFileThatCannotBeWrittenIsSaid) {
  auto spec = parse_net("user,pcap=/nonexistent/x.pcap");
  auto b = open_backend(*spec, "vm", 0);
  ASSERT_FALSE(b);
  EXPECT_NE(b.error().message.find("/nonexistent/x.pcap"), std::string::npos);
}

TEST(Pcap, WhatWiresharkReads) {
  const std::string path = testing::TempDir() + "ring3-pcap-" + std::to_string(getpid());
  {
    auto w = PcapWriter::create(path);
    ASSERT_TRUE(w);
    char header[12] = {}, frame[60];
    for (int i = 0; i < 60; i++) frame[i] = static_cast<char>(i);
    const iovec pieces[3] = {{header, 12}, {frame, 20}, {frame + 20, 40}};
    (*w)->write(pieces, 12, 72);
    (*w)->write(pieces, 12, 40);
  }
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  std::ifstream file(path, std::ios::binary);
  std::string all((std::istreambuf_iterator<char>(file)), {});
  unlink(path.c_str());
  ASSERT_EQ(all.size(), 24u + 16 + 60 + 16 + 28);
  const auto word = [&](std::size_t at) {
    u32 v;
    std::memcpy(&v, all.data() + at, 4);
    return v;
  };
  EXPECT_EQ(word(0), 0xa1b23c4du);
  EXPECT_EQ(word(20), 1u);
  EXPECT_EQ(word(24 + 8), 60u);
  EXPECT_EQ(word(24 + 12), 60u);
  EXPECT_EQ(all[24 + 16 + 59], 59);
  EXPECT_EQ(word(24 + 76 + 8), 28u);
}

/// In a network namespace of this test's own, on a thread of its own.
template <class Body>
void in_a_namespace(Body body) {
  bool could = true;
  std::thread([&] {
    if (::unshare(CLONE_NEWNET) != 0) could = false;
    else body();
  }).join();
  if (!could) GTEST_SKIP() << "no network namespace can be made here (it takes root)";
}

TEST(Tap, FramesGoBothWays) {
  if (::access("/dev/net/tun", R_OK | W_OK) != 0) GTEST_SKIP() << "/dev/net/tun cannot be opened here";
  in_a_namespace([] {
    auto tap = TapLink::open("r3test", 1);
    ASSERT_TRUE(tap) << tap.error().message;
    ASSERT_TRUE((*tap)->set_offloads({true, true, true, true, false}));
    UniqueFd raw(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL)));
    ASSERT_TRUE(raw);
    ifreq r{};
    std::strcpy(r.ifr_name, "r3test");
    ASSERT_EQ(::ioctl(raw.get(), SIOCGIFFLAGS, &r), 0);
    r.ifr_flags |= IFF_UP;
    ASSERT_EQ(::ioctl(raw.get(), SIOCSIFFLAGS, &r), 0);
    ASSERT_EQ(::ioctl(raw.get(), SIOCGIFINDEX, &r), 0);
    sockaddr_ll address{};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(ETH_P_ALL);
    address.sll_ifindex = r.ifr_ifindex;
    ASSERT_EQ(::bind(raw.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);

    const Mac from{{2, 0, 0, 0, 0, 1}};
    u8 frame[kEthHeader + kIp4Header + 30] = {};
    put_headers(frame, kBroadcastMac, from, Ip::v4(10, 9, 9, 1), Ip::v4(10, 9, 9, 2), 200, 30);
    VnetHeader vnet;
    const iovec message[2] = {{&vnet, sizeof vnet}, {frame, sizeof frame}};
    ASSERT_TRUE((*tap)->send(0, message));
    u8 buffer[4096];
    bool seen = false;
    for (int i = 0; i < 20 && !seen; i++) {
      pollfd p{raw.get(), POLLIN, 0};
      if (::poll(&p, 1, 500) != 1) break;
      const ssize_t n = ::recv(raw.get(), buffer, sizeof buffer, 0);
      seen = n == sizeof frame && std::memcmp(buffer, frame, sizeof frame) == 0;
    }
    EXPECT_TRUE(seen);

    frame[kEthHeader + kIp4Header] = 0x77;
    ASSERT_EQ(::send(raw.get(), frame, sizeof frame, 0), static_cast<ssize_t>(sizeof frame));
    seen = false;
    for (int i = 0; i < 50 && !seen; i++) {  // the kernel's own multicasts come too
      pollfd p{(*tap)->fd(0), POLLIN, 0};
      if (::poll(&p, 1, 500) != 1) break;
      iovec into{buffer, sizeof buffer};
      const ssize_t n = (*tap)->receive(0, {&into, 1});
      seen = n == static_cast<ssize_t>(kVnetHeader + sizeof frame) && std::memcmp(buffer + kVnetHeader, frame, sizeof frame) == 0;
    }
    EXPECT_TRUE(seen);
  });
}

TEST(Tap, SeveralQueues) {
  if (::access("/dev/net/tun", R_OK | W_OK) != 0) GTEST_SKIP() << "/dev/net/tun cannot be opened here";
  in_a_namespace([] {
    auto tap = TapLink::open("r3multi", 4);
    ASSERT_TRUE(tap) << tap.error().message;
    EXPECT_EQ((*tap)->queues(), 4u);
    for (const u32 n : {1u, 3u, 4u, 1u}) EXPECT_TRUE((*tap)->set_active_queues(n)) << n;
    auto other = TapLink::open("r3multi", 1);
    ASSERT_FALSE(other);
    EXPECT_NE(other.error().message.find("r3multi"), std::string::npos);
  });
  EXPECT_FALSE(TapLink::open("a name that is much too long", 1));
  EXPECT_FALSE(TapLink::open("", 1));
}

}  // namespace
}  // namespace ring3::net
