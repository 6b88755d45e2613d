#include "net/nat/tcp.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "net/nat/guest_side.hpp"
#include "net/nat/process.hpp"

namespace ring3::net::test {
namespace {

/// A listening socket on the host's loopback.
struct Server {
  explicit Server(bool v4 = true) {
    const Endpoint any{v4 ? Ip::v4(127, 0, 0, 1) : Ip::v6(0, 1), 0, 0};
    sockaddr_storage address;
    const socklen_t length = to_sockaddr(any, address);
    fd = UniqueFd(::socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length), 0);
    EXPECT_EQ(::listen(fd.get(), 512), 0);
    socklen_t size = sizeof address;
    ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size);
    port = from_sockaddr(address)->port;
  }
  UniqueFd accept() { return UniqueFd(::accept4(fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)); }
  UniqueFd fd;
  u16 port = 0;
};

std::vector<u8> pattern(std::size_t n) {
  std::vector<u8> v(n);
  u64 x = 88172645463325252u;
  for (u8& b : v) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    b = static_cast<u8>(x);
  }
  return v;
}

Endpoint guest4(u16 port) { return {kGuest4, port, 0}; }

class TcpBothFamilies : public testing::TestWithParam<bool> {
 protected:
  bool v4() const { return GetParam(); }
  Endpoint self(u16 port) const { return {v4() ? kGuest4 : kGuest6, port, 0}; }
  Endpoint peer(u16 port) const { return {v4() ? plan.gateway4 : plan.gateway6, port, 0}; }
  Plan plan;
};

TEST_P(TcpBothFamilies, ConnectsTalksAndCloses) {
  Bench b;
  Server server(v4());
  TcpGuest g(b, self(40000), peer(server.port));
  g.scale = 7;
  ASSERT_TRUE(g.connect());
  EXPECT_EQ(g.peer_mss, v4() ? 1460 : 1440);
  EXPECT_EQ(g.peer_scale, 6);
  UniqueFd host = server.accept();
  ASSERT_TRUE(host);

  g.send(kTcpAck | kTcpPsh, pattern(100));
  u8 buffer[200];
  ASSERT_TRUE(g.until([&] { return g.peer_ack == g.seq; }));
  EXPECT_EQ(::recv(host.get(), buffer, sizeof buffer, 0), 100);
  EXPECT_EQ(::memcmp(buffer, pattern(100).data(), 100), 0);

  ASSERT_EQ(::send(host.get(), "hello", 5, 0), 5);
  ASSERT_TRUE(g.until([&] { return g.received.size() == 5; }));

  // The guest closes first; the host may go on.
  g.send(kTcpAck | kTcpFin);
  ASSERT_TRUE(g.until([&] { return g.peer_ack == g.seq; }));
  EXPECT_EQ(::recv(host.get(), buffer, sizeof buffer, 0), 0);
  ASSERT_EQ(::send(host.get(), "world", 5, 0), 5);
  ASSERT_TRUE(g.until([&] { return g.received.size() == 10; }));
  EXPECT_FALSE(g.fin);
  host.reset();
  ASSERT_TRUE(g.until([&] { return g.fin; }));
  b.round(10);
  EXPECT_EQ(b.stack.tcp_connections(), 1u);  // it lingers
  b.pass(2000);
  EXPECT_EQ(b.stack.tcp_connections(), 0u);
  EXPECT_FALSE(g.reset);
}

TEST_P(TcpBothFamilies, HostClosesFirst) {
  Bench b;
  Server server(v4());
  TcpGuest g(b, self(40001), peer(server.port));
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  ASSERT_EQ(::shutdown(host.get(), SHUT_WR), 0);
  ASSERT_TRUE(g.until([&] { return g.fin; }));
  g.send(kTcpAck, pattern(3000));
  ASSERT_TRUE(g.until([&] { return g.peer_ack == g.seq; }));
  u8 buffer[4000];
  EXPECT_EQ(::recv(host.get(), buffer, sizeof buffer, MSG_WAITALL | MSG_DONTWAIT), 3000);
  g.send(kTcpAck | kTcpFin);
  ASSERT_TRUE(g.until([&] { return g.peer_ack == g.seq; }));
  EXPECT_EQ(::recv(host.get(), buffer, sizeof buffer, 0), 0);
  EXPECT_FALSE(g.reset);
}

TEST_P(TcpBothFamilies, RefusedPortIsReset) {
  Bench b;
  u16 port;
  {
    Server server(v4());
    port = server.port;
  }
  TcpGuest g(b, self(40002), peer(port));
  EXPECT_FALSE(g.connect());
  EXPECT_TRUE(g.reset);
  EXPECT_EQ(b.stack.tcp_connections(), 0u);
}

TEST_P(TcpBothFamilies, BulkBothWays) {
  Bench b;
  Server server(v4());
  TcpGuest g(b, self(40003), peer(server.port));
  g.scale = 4;
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  const auto data = pattern(3 << 20);

  // To the host, which reads slowly: windows close and open again.
  std::size_t sent = 0;
  std::vector<u8> got;
  ASSERT_TRUE(g.until([&] {
    while (sent < data.size()) {
      const u32 edge = g.peer_ack + g.peer_window;
      const std::size_t room = static_cast<i32>(edge - g.seq) > 0 ? edge - g.seq : 0;
      const std::size_t n = std::min({room, std::size_t{1460}, data.size() - sent});
      if (n == 0) break;
      g.send(kTcpAck, std::span(data).subspan(sent, n));
      sent += n;
    }
    b.round();
    g.take();
    std::vector<u8> buffer(70'000);
    const ssize_t n = ::recv(host.get(), buffer.data(), buffer.size(), 0);
    if (n > 0) got.insert(got.end(), buffer.begin(), buffer.begin() + n);
    return got.size() == data.size();
  }));
  EXPECT_TRUE(got == data);

  // And to the guest.
  sent = 0;
  ASSERT_TRUE(g.until([&] {
    while (sent < data.size()) {
      const ssize_t n = ::send(host.get(), data.data() + sent, data.size() - sent, MSG_DONTWAIT);
      if (n <= 0) break;
      sent += static_cast<std::size_t>(n);
    }
    return g.received.size() >= data.size();
  }));
  EXPECT_TRUE(g.received == data);
}

INSTANTIATE_TEST_SUITE_P(Families, TcpBothFamilies, testing::Bool(), [](const auto& i) { return i.param ? "v4" : "v6"; });

TEST(Tcp, GsoBothWaysWhenTheGuestTakesIt) {
  Bench b;
  const u8 control[3] = {Stack::kControl, Stack::kSetOffloads, 7};
  b.stack.receive(0, control);
  Server server;
  TcpGuest g(b, guest4(40100), {b.plan.gateway4, server.port, 0});
  g.scale = 7;
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();

  // A segment of 40,000 bytes from the guest, its checksum left to be completed.
  const auto data = pattern(40'000);
  VnetHeader vnet;
  vnet.flags = VnetHeader::kNeedsCsum;
  vnet.gso_type = VnetHeader::kGsoTcp4;
  vnet.gso_size = 1460;
  auto segment = Bench::tcp_segment(g.self, g.peer, g.seq, g.ack, kTcpAck, g.window, data);
  put16(&segment[16], 0x1234);
  b.inject(b.ip_frame(g.self.ip, g.peer.ip, kProtoTcp, segment), vnet);
  g.seq += 40'000;
  ASSERT_TRUE(g.until([&] { return g.peer_ack == g.seq; }));
  std::vector<u8> got(50'000);
  EXPECT_EQ(::recv(host.get(), got.data(), got.size(), 0), 40'000);
  EXPECT_EQ(::memcmp(got.data(), data.data(), 40'000), 0);

  // And to it.
  ASSERT_EQ(::send(host.get(), data.data(), data.size(), 0), 40'000);
  Seen seen;
  ASSERT_TRUE(b.until([&] {
    for (Seen& s : b.link.seen) {
      if (s.vnet.gso_type == VnetHeader::kGsoTcp4) {
        seen = s;
        seen.parsed = parse_ip(seen.frame, seen.ip);
        return true;
      }
    }
    return false;
  }));
  EXPECT_EQ(seen.vnet.flags, VnetHeader::kNeedsCsum);
  EXPECT_EQ(seen.vnet.gso_size, 1460);
  EXPECT_EQ(seen.vnet.csum_start, 34);
  EXPECT_EQ(seen.vnet.csum_offset, 16);
  EXPECT_EQ(seen.vnet.hdr_len, 54);
  EXPECT_GT(seen.frame.size(), 30'000u);
  // What the device would put into the checksum field makes it right.
  const std::size_t start = seen.vnet.csum_start;
  const u16 sum = checksum(std::span(seen.frame).subspan(start));
  put16(&seen.frame[start + 16], sum);
  EXPECT_EQ(transport_checksum(seen.ip.source, seen.ip.destination, kProtoTcp, seen.ip.payload), 0);
  ASSERT_TRUE(g.until([&] { return g.received.size() == data.size(); }));
  EXPECT_TRUE(g.received == data);
}

TEST(Tcp, WhatTheGuestLosesIsSentAgain) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40200), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  const auto data = pattern(20'000);

  // One of them lost, the others answered: three duplicates bring it back without a timer.
  ASSERT_EQ(::send(host.get(), data.data(), data.size(), 0), 20'000);
  ASSERT_TRUE(b.until([&] { return b.link.seen.size() >= 14; }));
  b.link.seen.pop_front();
  ASSERT_TRUE(g.until([&] { return g.received.size() == data.size() || g.received.size() >= 1460; }));
  EXPECT_GE(b.stack.stats().retransmitted, 1u);

  // The rest was thrown away by this plain guest: timers bring it.
  for (int i = 0; i < 60 && g.received.size() < data.size(); i++) {
    b.pass(1000);
    g.take();
    b.round();
    g.take();
  }
  EXPECT_TRUE(g.received == data);

  // All lost: the timer alone.
  ASSERT_EQ(::send(host.get(), "x", 1, 0), 1);
  ASSERT_TRUE(b.until([&] { return !b.link.seen.empty(); }));
  b.link.seen.clear();
  b.pass(1100);
  ASSERT_TRUE(g.until([&] { return g.received.size() == data.size() + 1; }));
}

TEST(Tcp, AGuestThatNeverAnswersIsGivenUp) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40201), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  ASSERT_EQ(::send(host.get(), "x", 1, 0), 1);
  b.round(10);
  u64 waited = 0;
  while (b.stack.tcp_connections() > 0 && waited < 3'600'000) {
    b.pass(1000);
    waited += 1000;
  }
  EXPECT_GT(waited, 300'000u);
  EXPECT_EQ(b.stack.tcp_connections(), 0u);
  char c;
  EXPECT_EQ(::recv(host.get(), &c, 1, 0), -1);
  EXPECT_EQ(errno, ECONNRESET);
}

TEST(Tcp, ZeroWindowIsProbedAndOpens) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40202), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  g.window = 0;
  g.send(kTcpAck);
  ASSERT_EQ(::send(host.get(), "waiting", 7, 0), 7);
  b.round(10);
  b.round(10);
  g.take();
  EXPECT_TRUE(g.received.empty());
  const u32 before = g.segments;
  b.pass(1100);
  g.take();
  EXPECT_GT(g.segments, before);  // a probe
  EXPECT_TRUE(g.received.empty());
  // Hours of it, answered: nothing is given up.
  for (int i = 0; i < 200; i++) {
    b.pass(60'000);
    g.take();
    g.send(kTcpAck);
  }
  EXPECT_EQ(b.stack.tcp_connections(), 1u);
  g.window = 65535;
  g.send(kTcpAck);
  ASSERT_TRUE(g.until([&] { return g.received.size() == 7; }));
}

TEST(Tcp, SmallWindowIsKept) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40203), {b.plan.gateway4, server.port, 0});
  g.window = 500;
  g.acknowledge = false;
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  ASSERT_EQ(::send(host.get(), pattern(5000).data(), 5000, 0), 5000);
  for (int i = 0; i < 20; i++) {
    b.round(1);
    g.take();
  }
  EXPECT_EQ(g.received.size(), 500u);
  g.send(kTcpAck);
  for (int i = 0; i < 20; i++) {
    b.round(1);
    g.take();
  }
  EXPECT_EQ(g.received.size(), 1000u);
}

TEST(Tcp, OutOfOrderOverlapAndBeyondTheWindow) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40204), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  const auto data = pattern(3000);
  const u32 start = g.seq;
  g.seq = start + 1000;  // ahead of its turn
  g.send(kTcpAck, std::span(data).subspan(1000, 1000));
  ASSERT_TRUE(g.until([&] { return b.stack.stats().out_of_order == 1; }));
  g.take();
  EXPECT_EQ(g.peer_ack, start);
  g.seq = start;
  g.send(kTcpAck, std::span(data).first(1200));
  g.seq = start + 600;  // overlaps what is known
  g.send(kTcpAck, std::span(data).subspan(600, 1400));
  g.seq = start + 2000;
  g.send(kTcpAck, std::span(data).subspan(2000, 1000));
  ASSERT_TRUE(g.until([&] { return g.peer_ack == start + 3000; }));
  std::vector<u8> got(4000);
  ASSERT_EQ(::recv(host.get(), got.data(), got.size(), 0), 3000);
  got.resize(3000);
  EXPECT_TRUE(got == data);
  // Far beyond the window, and acknowledging what was never sent: answered, not believed.
  g.seq = start + 3000 + (64u << 20);
  g.send(kTcpAck, std::span(data).first(10));
  g.seq = start + 3000;
  const u32 good = g.ack;
  g.ack = good + 100'000;
  g.send(kTcpAck, std::span(data).first(10));
  g.ack = good;
  b.round(10);
  g.take();
  EXPECT_EQ(g.peer_ack, start + 3000);
  EXPECT_EQ(::recv(host.get(), got.data(), got.size(), 0), -1);
}

TEST(Tcp, Resets) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40205), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  // One that only lies in the window is challenged.
  const u32 seq = g.seq;
  g.seq = seq + 10;
  g.send(kTcpRst);
  b.round(10);
  EXPECT_EQ(b.stack.tcp_connections(), 1u);
  g.seq = seq;
  g.send(kTcpRst);
  EXPECT_EQ(b.stack.tcp_connections(), 0u);
  char c;
  EXPECT_EQ(::recv(host.get(), &c, 1, 0), -1);
  EXPECT_EQ(errno, ECONNRESET);

  // The host's reset reaches the guest.
  TcpGuest h(b, guest4(40206), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(h.connect());
  UniqueFd other = server.accept();
  const linger now{1, 0};
  ::setsockopt(other.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
  other.reset();
  EXPECT_TRUE(h.until([&] { return h.reset; }));
  EXPECT_EQ(b.stack.tcp_connections(), 0u);

  // A segment of no connection.
  TcpGuest stray(b, guest4(40207), {b.plan.gateway4, server.port, 0});
  stray.send(kTcpAck, pattern(10));
  EXPECT_TRUE(stray.until([&] { return stray.reset; }));
}

TEST(Tcp, ManyConnectionsAndTheCap) {
  NatConfig config;
  config.max_tcp = 200;
  Bench b(config);
  Server server;
  std::vector<std::unique_ptr<TcpGuest>> guests;
  for (u16 i = 0; i < 200; i++) {
    guests.push_back(std::make_unique<TcpGuest>(b, guest4(static_cast<u16>(20000 + i)), Endpoint{b.plan.gateway4, server.port, 0}));
    ASSERT_TRUE(guests.back()->connect()) << i;
  }
  EXPECT_EQ(b.stack.tcp_connections(), 200u);
  TcpGuest more(b, guest4(30000), {b.plan.gateway4, server.port, 0});
  EXPECT_FALSE(more.connect());
  EXPECT_TRUE(more.reset);
  EXPECT_EQ(b.stack.stats().refused, 1u);
  std::vector<UniqueFd> hosts;
  for (int i = 0; i < 200; i++) hosts.push_back(server.accept());
  for (auto& h : hosts) ASSERT_EQ(::send(h.get(), "abc", 3, 0), 3);
  for (auto& g : guests) ASSERT_TRUE(g->until([&] { return g->received.size() == 3; }));
  hosts.clear();
  for (auto& g : guests) {
    ASSERT_TRUE(g->until([&] { return g->fin; }));
    g->send(kTcpAck | kTcpFin);
  }
  b.round(10);
  EXPECT_TRUE(more.b.until([&] { return b.stack.tcp_connections() <= 200; }));
  // Those that are over make room at once.
  TcpGuest again(b, guest4(30001), {b.plan.gateway4, server.port, 0});
  EXPECT_TRUE(again.connect());
}

TEST(Tcp, AFullLinkOnlyDelays) {
  Bench b;
  Server server;
  TcpGuest g(b, guest4(40208), {b.plan.gateway4, server.port, 0});
  ASSERT_TRUE(g.connect());
  UniqueFd host = server.accept();
  b.link.full = true;
  g.send(kTcpAck, pattern(100));
  ASSERT_EQ(::send(host.get(), "abc", 3, 0), 3);
  for (int i = 0; i < 5; i++) b.round(5);
  EXPECT_TRUE(b.stack.link_blocked(0));
  EXPECT_FALSE(b.stack.run());  // it waits, and does not spin
  b.link.full = false;
  b.stack.link_writable(0);
  ASSERT_TRUE(g.until([&] { return g.received.size() == 3 && g.peer_ack == g.seq; }));
}

TEST(Tcp, ForwardedPortLeadsToTheGuest) {
  Bench probe;
  auto forward = parse_forward("tcp:127.0.0.1:1-:22");
  ASSERT_TRUE(forward);
  forward->host.port = 0;
  auto listeners = open_listeners({*forward});
  ASSERT_TRUE(listeners);
  sockaddr_storage address;
  socklen_t size = sizeof address;
  ASSERT_EQ(::getsockname((*listeners)[0].fd.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  Bench b({}, nullptr, std::move(*listeners));
  UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  ::connect(client.get(), reinterpret_cast<sockaddr*>(&address), size);
  // The guest is not known yet: it is asked for, and the SYN comes again.
  ASSERT_TRUE(b.until([&] { return !b.link.seen.empty(); }));
  EXPECT_EQ(get16(&b.link.seen[0].frame[12]), kEtherArp);
  b.link.seen.clear();
  b.hello();
  b.pass(1100);
  Seen syn;
  ASSERT_TRUE(b.next(kProtoTcp, &syn));
  parse_ip(syn.frame, syn.ip);
  TcpSegment s;
  ASSERT_EQ(parse_tcp(syn.ip.payload, s), Drop::kNone);
  EXPECT_EQ(s.flags, kTcpSyn);
  EXPECT_EQ(s.destination, 22);
  EXPECT_EQ(syn.ip.source, b.plan.gateway4);
  TcpGuest g(b, guest4(22), {b.plan.gateway4, s.source, 0});
  g.ack = s.seq + 1;
  const u8 options[4] = {2, 4, 5, 0xb4};
  g.send(kTcpSyn | kTcpAck, {}, options);
  g.send(kTcpAck, pattern(10));
  char buffer[20];
  ASSERT_TRUE(g.until([&] { return ::recv(client.get(), buffer, sizeof buffer, 0) == 10; }));
  ASSERT_EQ(::send(client.get(), "hi", 2, 0), 2);
  ASSERT_TRUE(g.until([&] { return g.received.size() == 2; }));

  // A guest that refuses.
  UniqueFd second(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  ::connect(second.get(), reinterpret_cast<sockaddr*>(&address), size);
  ASSERT_TRUE(b.next(kProtoTcp, &syn));
  parse_ip(syn.frame, syn.ip);
  ASSERT_EQ(parse_tcp(syn.ip.payload, s), Drop::kNone);
  TcpGuest refusing(b, guest4(22), {b.plan.gateway4, s.source, 0});
  refusing.ack = s.seq + 1;
  refusing.seq = 0;
  refusing.send(kTcpRst | kTcpAck);
  EXPECT_TRUE(b.until([&] { return ::recv(second.get(), buffer, sizeof buffer, 0) == -1 && errno == ECONNRESET; }));
}

TEST(Tcp, RestrictRefusesEverythingOutgoing) {
  NatConfig config;
  config.restrict_outgoing = true;
  Bench b(config);
  Server server;
  TcpGuest g(b, guest4(40300), {b.plan.gateway4, server.port, 0});
  EXPECT_FALSE(g.connect());
  EXPECT_TRUE(g.reset);
  EXPECT_FALSE(server.accept());
}

}  // namespace
}  // namespace ring3::net::test
