#include "net/nat/stack.hpp"

#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>

#include <map>

#include "net/nat/guest_side.hpp"
#include "net/nat/process.hpp"

namespace ring3::net::test {
namespace {

UniqueFd udp_server(bool v4, u16* port) {
  const Endpoint any{v4 ? Ip::v4(127, 0, 0, 1) : Ip::v6(0, 1), 0, 0};
  sockaddr_storage address;
  socklen_t length = to_sockaddr(any, address);
  UniqueFd fd(::socket(address.ss_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length), 0);
  length = sizeof address;
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length);
  *port = from_sockaddr(address)->port;
  return fd;
}

/// Sends what it receives back to where it came from.
void echo(int fd) {
  std::vector<u8> buffer(65536);
  sockaddr_storage from;
  socklen_t size = sizeof from;
  ssize_t n;
  while ((n = ::recvfrom(fd, buffer.data(), buffer.size(), 0, reinterpret_cast<sockaddr*>(&from), &size)) >= 0) {
    ::sendto(fd, buffer.data(), static_cast<std::size_t>(n), 0, reinterpret_cast<sockaddr*>(&from), size);
  }
}

Ip guest(bool v4) { return v4 ? kGuest4 : kGuest6; }
Ip gateway(const Plan& plan, bool v4) { return v4 ? plan.gateway4 : plan.gateway6; }

void reparse(Seen& s) { s.parsed = parse_ip(s.frame, s.ip); }

std::vector<u8> icmp4_echo(u16 id, u16 sequence, std::size_t size) {
  std::vector<u8> m(8 + size, 0x5a);
  m[0] = 8;
  m[1] = 0;
  put16(&m[2], 0);
  put16(&m[4], id);
  put16(&m[6], sequence);
  put16(&m[2], checksum(m));
  return m;
}
std::vector<u8> icmp6(const Ip& from, const Ip& to, std::vector<u8> m) {
  put16(&m[2], 0);
  put16(&m[2], transport_checksum(from, to, kProtoIcmp6, m));
  return m;
}

TEST(Forwards, Text) {
  auto f = parse_forward("tcp:2222:22");
  ASSERT_TRUE(f);
  EXPECT_EQ(*f, (Forward{true, {Ip::v4(127, 0, 0, 1), 2222, 0}, {}, 22}));
  f = parse_forward("udp:0.0.0.0:53-10.0.2.16:5353");
  ASSERT_TRUE(f);
  EXPECT_EQ(*f, (Forward{false, {Ip::v4(0, 0, 0, 0), 53, 0}, Ip::v4(10, 0, 2, 16), 5353}));
  f = parse_forward("tcp:[::1]:80-[fec0::77]:8080");
  ASSERT_TRUE(f);
  EXPECT_EQ(*f, (Forward{true, {Ip::v6(0, 1), 80, 0}, kGuest6, 8080}));
  EXPECT_TRUE(parse_forward("tcp::2222-:22"));
  for (const char* bad : {"", "tcp", "tcp:", "tcp:2222", "tcp:2222:", "tcp:0:22", "tcp:65536:22", "sctp:1:2", "tcp:1.2.3:5-:6",
                          "tcp::1-", "tcp:::1:80-:80", "tcp::22-224.0.0.1:22", "tcp::22-127.0.0.1:22", "tcp:[1.2.3.4]:1-:2", "tcp:22:22:22"}) {
    EXPECT_FALSE(parse_forward(bad)) << bad;
  }
}

TEST(Resolvers, Text) {
  const auto r = parse_resolv_conf("# a\nsearch x\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver bad\n"
                                   "nameserver 0.0.0.0\nnameserver 9.9.9.9\n");
  ASSERT_EQ(r.size(), 3u);
  EXPECT_EQ(r[0], (Endpoint{Ip::v4(192, 0, 2, 1), 53, 0}));
  EXPECT_EQ(to_string(r[1].ip), "2001:db8::1");
  EXPECT_EQ(r[2].ip, Ip::v4(127, 0, 0, 1));
}

TEST(Routes, WhereAGuestMayGo) {
  NatConfig c;
  c.resolvers = {{Ip::v4(192, 0, 2, 53), 53, 0}, {Ip::v4(192, 0, 2, 54), 53, 0}};
  const auto to = [&](const char* ip, u16 port, std::size_t resolver = 0) {
    const Route r = route_out(c, *parse_ip_text(ip), port, resolver);
    return r.error != 0 ? "error " + std::to_string(r.error) : to_string(r.to);
  };
  EXPECT_EQ(to("10.0.2.2", 80), "127.0.0.1:80");
  EXPECT_EQ(to("fec0::2", 80), "[::1]:80");
  EXPECT_EQ(to("10.0.2.3", 53), "192.0.2.53:53");
  EXPECT_EQ(to("10.0.2.3", 53, 3), "192.0.2.54:53");
  EXPECT_EQ(to("fec0::3", 53), "192.0.2.53:53");
  EXPECT_EQ(to("10.0.2.3", 80), "error " + std::to_string(ECONNREFUSED));
  EXPECT_EQ(to("192.0.2.80", 80), "192.0.2.80:80");
  EXPECT_EQ(to("2001:db8::80", 80), "[2001:db8::80]:80");
  for (const char* nowhere : {"127.0.0.1", "127.1.2.3", "0.0.0.0", "0.1.2.3", "10.0.2.99", "10.0.2.255", "169.254.169.254", "224.0.0.251",
                              "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "ff02::fb", "fec0::99"}) {
    EXPECT_EQ(to(nowhere, 80), "error " + std::to_string(EHOSTUNREACH)) << nowhere;
  }
  c.restrict_outgoing = true;
  EXPECT_EQ(to("192.0.2.80", 80), "error " + std::to_string(EACCES));
  EXPECT_EQ(to("10.0.2.3", 53), "error " + std::to_string(EACCES));
}

TEST(Arp, AnswersForTheRouterOnly) {
  Bench b;
  const auto ask = [&](const Ip& ip) {
    std::vector<u8> f(kEthHeader + 28);
    std::memcpy(&f[0], kBroadcastMac.b.data(), 6);
    std::memcpy(&f[6], kGuestMac.b.data(), 6);
    put16(&f[12], kEtherArp);
    u8* p = &f[kEthHeader];
    put16(p, 1);
    put16(p + 2, kEtherIp4);
    p[4] = 6;
    p[5] = 4;
    put16(p + 6, 1);
    std::memcpy(p + 8, kGuestMac.b.data(), 6);
    std::memcpy(p + 14, kGuest4.b.data() + 12, 4);
    std::memcpy(p + 24, ip.b.data() + 12, 4);
    b.link.seen.clear();
    b.inject(f);
    if (b.link.seen.empty()) return std::string("nothing");
    const auto& r = b.link.seen[0].frame;
    EXPECT_EQ(get16(&r[kEthHeader + 6]), 2);
    Mac mac;
    std::memcpy(mac.b.data(), &r[kEthHeader + 8], 6);
    EXPECT_EQ(Ip::from_v4_bytes(&r[kEthHeader + 14]), ip);
    return to_string(mac);
  };
  EXPECT_EQ(ask(b.plan.gateway4), to_string(b.plan.mac));
  EXPECT_EQ(ask(b.plan.dns4), to_string(b.plan.mac));
  EXPECT_EQ(ask(kGuest4), "nothing");
  EXPECT_EQ(ask(Ip::v4(10, 0, 2, 99)), "nothing");
}

std::vector<u8> dhcp(u8 type, const Mac& mac, std::vector<u8> options = {}) {
  std::vector<u8> m(240);
  m[0] = m[1] = 1;
  m[2] = 6;
  put32(&m[4], 0xdeadbeef);
  std::memcpy(&m[28], mac.b.data(), 6);
  put32(&m[236], 0x63825363);
  m.insert(m.end(), {53, 1, type});
  m.insert(m.end(), options.begin(), options.end());
  m.push_back(255);
  return m;
}

struct Lease {
  u8 type = 0;
  Ip address;
  std::map<u8, std::vector<u8>> options;
};
std::optional<Lease> answer(Bench& b) {
  if (b.link.seen.empty()) return std::nullopt;
  Seen s = std::move(b.link.seen.front());
  b.link.seen.clear();
  reparse(s);
  UdpDatagram d;
  if (s.parsed != Drop::kNone || parse_udp(s.ip.payload, d) != Drop::kNone || d.destination != 68) return std::nullopt;
  EXPECT_EQ(transport_checksum(s.ip.source, s.ip.destination, kProtoUdp, s.ip.payload), 0);
  EXPECT_EQ(get32(&d.data[4]), 0xdeadbeefu);
  Lease l;
  l.address = Ip::from_v4_bytes(&d.data[16]);
  for (std::size_t i = 240; i + 1 < d.data.size() && d.data[i] != 255; i += 2u + d.data[i + 1]) {
    l.options[d.data[i]] = {d.data.begin() + static_cast<std::ptrdiff_t>(i + 2), d.data.begin() + static_cast<std::ptrdiff_t>(i + 2 + d.data[i + 1])};
  }
  l.type = l.options[53].at(0);
  return l;
}

TEST(Dhcp, DiscoverRequestAndTheWrongNetwork) {
  NatConfig c;
  c.resolvers = {{Ip::v4(192, 0, 2, 53), 53, 0}};
  Bench b(c);
  const Endpoint from{Ip::v4(0), 68, 0};
  const Endpoint to{Ip::v4(0xffffffff), 67, 0};
  b.udp(from, to, dhcp(1, kGuestMac));
  auto l = answer(b);
  ASSERT_TRUE(l);
  EXPECT_EQ(l->type, 2);
  EXPECT_EQ(l->address, kGuest4);
  EXPECT_EQ(l->options[1], (std::vector<u8>{255, 255, 255, 0}));
  EXPECT_EQ(l->options[3], (std::vector<u8>{10, 0, 2, 2}));
  EXPECT_EQ(l->options[6], (std::vector<u8>{10, 0, 2, 3}));
  EXPECT_EQ(l->options[54], (std::vector<u8>{10, 0, 2, 2}));
  EXPECT_EQ(l->options[26], (std::vector<u8>{5, 220}));
  b.udp(from, to, dhcp(3, kGuestMac, {50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2}));
  l = answer(b);
  ASSERT_TRUE(l);
  EXPECT_EQ(l->type, 5);
  EXPECT_EQ(l->address, kGuest4);
  b.udp(from, to, dhcp(3, kGuestMac, {50, 4, 192, 168, 0, 7}));
  l = answer(b);
  ASSERT_TRUE(l);
  EXPECT_EQ(l->type, 6);
  b.udp(from, to, dhcp(3, kGuestMac, {50, 4, 10, 0, 2, 15, 54, 4, 10, 9, 9, 9}));  // another server's
  EXPECT_FALSE(answer(b));
  // Sixteen addresses, and no more.
  for (u8 i = 1; i < 20; i++) {
    Mac other = kGuestMac;
    other.b[5] = i;
    b.udp(from, to, dhcp(1, other));
    l = answer(b);
    ASSERT_EQ(l.has_value(), i < 16) << int(i);
    EXPECT_TRUE(!l || l->address == Ip::v4(10, 0, 2, static_cast<u8>(15 + i)));
  }
}

TEST(Dhcp, HostileOptions) {
  Bench b;
  const Endpoint from{Ip::v4(0), 68, 0};
  const Endpoint to{Ip::v4(0xffffffff), 67, 0};
  b.udp(from, to, dhcp(1, kGuestMac, {50}));
  b.udp(from, to, dhcp(1, kGuestMac, {50, 200, 1}));
  b.udp(from, to, dhcp(1, kGuestMac, {50, 0, 54, 3, 1, 2, 3}));
  auto m = dhcp(1, kGuestMac);
  for (std::size_t n = 0; n < m.size(); n++) b.udp(from, to, std::span(m).first(n));
  m[2] = 16;
  b.udp(from, to, m);
  m = dhcp(1, Mac{});
  b.udp(from, to, m);
  for (const Seen& s : b.link.seen) EXPECT_EQ(s.parsed, Drop::kNone);
}

TEST(Discovery, RouterAndNeighbour) {
  NatConfig c;
  c.resolvers = {{Ip::v4(192, 0, 2, 53), 53, 0}};
  Bench b(c);
  Ip self = Ip::v6(0xfe80, 0x77);
  Ip routers = Ip::v6(0xff02, 2);
  std::vector<u8> m(16);
  m[0] = 133;
  m[8] = m[9] = 1;
  std::memcpy(&m[10], kGuestMac.b.data(), 6);
  b.ip(self, routers, kProtoIcmp6, icmp6(self, routers, m), 255);
  Seen s;
  ASSERT_TRUE(b.next(kProtoIcmp6, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], 134);
  EXPECT_EQ(s.ip.ttl, 255);
  EXPECT_EQ(transport_checksum(s.ip.source, s.ip.destination, kProtoIcmp6, s.ip.payload), 0);
  EXPECT_EQ(s.ip.payload.size(), 16u + 8 + 8 + 32 + 24);
  // A hop limit of less comes from elsewhere.
  b.ip(self, routers, kProtoIcmp6, icmp6(self, routers, m), 64);
  EXPECT_TRUE(b.link.seen.empty());
  // It is told again from time to time.
  b.pass(301'000);
  EXPECT_EQ(b.link.seen.size(), 1u);
  b.link.seen.clear();

  const auto solicit = [&](const Ip& target) {
    std::vector<u8> n(32);
    n[0] = 135;
    std::memcpy(&n[8], target.b.data(), 16);
    n[24] = n[25] = 1;
    std::memcpy(&n[26], kGuestMac.b.data(), 6);
    b.link.seen.clear();
    b.ip(kGuest6, b.plan.gateway6, kProtoIcmp6, icmp6(kGuest6, b.plan.gateway6, n), 255);
    return b.link.seen.size();
  };
  EXPECT_EQ(solicit(b.plan.gateway6), 1u);
  EXPECT_EQ(solicit(b.plan.dns6), 1u);
  EXPECT_EQ(solicit(b.plan.link_local), 1u);
  EXPECT_EQ(solicit(kGuest6), 0u);
}

TEST(Discovery, InformationRequest) {
  NatConfig c;
  c.resolvers = {{Ip::v4(192, 0, 2, 53), 53, 0}};
  Bench b(c);
  Ip self = Ip::v6(0xfe80, 0x77);
  Ip servers = Ip::v6(0xff02, 2);
  servers.b[13] = 1;
  const std::vector<u8> request{11, 1, 2, 3, 0, 1, 0, 4, 9, 8, 7, 6};
  b.udp({self, 546, 0}, {servers, 547, 0}, request);
  Seen s;
  ASSERT_TRUE(b.next(kProtoUdp, &s));
  reparse(s);
  UdpDatagram d;
  ASSERT_EQ(parse_udp(s.ip.payload, d), Drop::kNone);
  EXPECT_EQ(d.data[0], 7);
  EXPECT_EQ(d.data[3], 3);
  const std::vector<u8> dns{0, 23, 0, 16};
  EXPECT_NE(std::search(d.data.begin(), d.data.end(), dns.begin(), dns.end()), d.data.end());
}

class UdpBothFamilies : public testing::TestWithParam<bool> {};

TEST_P(UdpBothFamilies, ThereAndBack) {
  Bench b;
  u16 port;
  UniqueFd server = udp_server(GetParam(), &port);
  const Endpoint from{guest(GetParam()), 5000, 0};
  const Endpoint to{gateway(b.plan, GetParam()), port, 0};
  b.udp(from, to, "question");
  Seen s;
  ASSERT_TRUE(b.until([&] {
    echo(server.get());
    return !b.link.seen.empty();
  }));
  s = b.link.seen[0];
  reparse(s);
  EXPECT_EQ(s.ip.source, to.ip);
  EXPECT_EQ(transport_checksum(s.ip.source, s.ip.destination, kProtoUdp, s.ip.payload), 0);
  UdpDatagram d;
  ASSERT_EQ(parse_udp(s.ip.payload, d), Drop::kNone);
  EXPECT_EQ(d.source, port);
  EXPECT_EQ(d.destination, 5000);
  EXPECT_EQ(std::string(d.data.begin(), d.data.end()), "question");
  EXPECT_EQ(b.stack.udp_flows(), 1u);
  b.pass(61'000);
  EXPECT_EQ(b.stack.udp_flows(), 0u);
}

TEST_P(UdpBothFamilies, UnreachablePortIsReported) {
  Bench b;
  u16 port;
  { UniqueFd server = udp_server(GetParam(), &port); }
  b.udp({guest(GetParam()), 5001, 0}, {gateway(b.plan, GetParam()), port, 0}, "question");
  Seen s;
  ASSERT_TRUE(b.next(GetParam() ? kProtoIcmp : kProtoIcmp6, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], GetParam() ? 3 : 1);
  EXPECT_EQ(s.ip.payload[1], GetParam() ? 3 : 4);
  // It quotes the datagram's header: the guest finds the socket by it.
  const auto quoted = s.ip.payload.subspan(8);
  const std::size_t header = GetParam() ? kIp4Header : kIp6Header;
  ASSERT_GE(quoted.size(), header + 8);
  EXPECT_EQ(get16(&quoted[header]), 5001);
  EXPECT_EQ(get16(&quoted[header + 2]), port);
}

TEST_P(UdpBothFamilies, LargeOnesTravelInPieces) {
  Bench b;
  u16 port;
  UniqueFd server = udp_server(GetParam(), &port);
  const bool v4 = GetParam();
  const Endpoint from{guest(v4), 5002, 0};
  const Endpoint to{gateway(b.plan, v4), port, 0};
  std::vector<u8> data(5000);
  for (std::size_t i = 0; i < data.size(); i++) data[i] = static_cast<u8>(i * 7);
  const auto segment = Bench::udp_segment(from, to, data);
  // The guest's pieces, the last one first.
  std::vector<std::vector<u8>> pieces;
  for (std::size_t at = 0; at < segment.size(); at += 1480) {
    const std::size_t n = std::min<std::size_t>(1480, segment.size() - at);
    const bool more = at + n < segment.size();
    if (v4) {
      b.id = 77;
      pieces.push_back(b.ip_frame(from.ip, to.ip, kProtoUdp, std::span(segment).subspan(at, n),
                                  static_cast<u16>(at / 8 | (more ? 0x2000 : 0))));
    } else {
      std::vector<u8> payload{kProtoUdp, 0, 0, 0, 0, 0, 0, 77};
      put16(&payload[2], static_cast<u32>(at) | (more ? 1 : 0));
      payload.insert(payload.end(), segment.begin() + static_cast<std::ptrdiff_t>(at), segment.begin() + static_cast<std::ptrdiff_t>(at + n));
      pieces.push_back(b.ip_frame(from.ip, to.ip, kProtoFragment, payload));
    }
  }
  b.hello();
  b.udp(from, {to.ip, 9, 0}, "so that the neighbour is known");
  for (auto it = pieces.rbegin(); it != pieces.rend(); ++it) b.inject(*it);
  Reassembly back;
  std::vector<u8> got;
  ASSERT_TRUE(b.until([&] {
    echo(server.get());
    while (!b.link.seen.empty()) {
      Seen s = std::move(b.link.seen.front());
      b.link.seen.pop_front();
      reparse(s);
      EXPECT_LE(s.frame.size(), kEthHeader + 1500u);
      IpPacket whole;
      if (s.parsed == Drop::kNone && s.ip.fragment && back.add(s.ip, b.now, &whole)) {
        EXPECT_EQ(transport_checksum(whole.source, whole.destination, kProtoUdp, whole.payload), 0);
        got.assign(whole.payload.begin() + kUdpHeader, whole.payload.end());
      }
    }
    return !got.empty();
  }));
  EXPECT_TRUE(got == data);
}

INSTANTIATE_TEST_SUITE_P(Families, UdpBothFamilies, testing::Bool(), [](const auto& i) { return i.param ? "v4" : "v6"; });

TEST(Udp, OneOfManyForSeveral) {
  Bench b;
  u16 port;
  UniqueFd server = udp_server(true, &port);
  std::vector<u8> data(2500, 1);
  VnetHeader vnet;
  vnet.flags = VnetHeader::kNeedsCsum;
  vnet.gso_type = VnetHeader::kGsoUdpL4;
  vnet.gso_size = 1000;
  const Endpoint from{kGuest4, 5000, 0};
  const Endpoint to{b.plan.gateway4, port, 0};
  b.inject(b.ip_frame(from.ip, to.ip, kProtoUdp, Bench::udp_segment(from, to, data)), vnet);
  u8 buffer[4000];
  EXPECT_EQ(::recv(server.get(), buffer, sizeof buffer, 0), 1000);
  EXPECT_EQ(::recv(server.get(), buffer, sizeof buffer, 0), 1000);
  EXPECT_EQ(::recv(server.get(), buffer, sizeof buffer, 0), 500);
}

TEST(Udp, TheOldestFlowGivesWay) {
  NatConfig c;
  c.max_udp = 8;
  Bench b(c);
  u16 port;
  UniqueFd server = udp_server(true, &port);
  for (u16 i = 0; i < 50; i++) {
    b.pass(1);
    b.udp({kGuest4, static_cast<u16>(6000 + i), 0}, {b.plan.gateway4, port, 0}, "x");
  }
  EXPECT_EQ(b.stack.udp_flows(), 8u);
}

TEST(Udp, NamesGoToTheNextResolverWhenOneIsSilent) {
  u16 first, second;
  UniqueFd silent = udp_server(true, &first);
  UniqueFd good = udp_server(true, &second);
  NatConfig c;
  c.resolvers = {{Ip::v4(127, 0, 0, 1), first, 0}, {Ip::v4(127, 0, 0, 1), second, 0}};
  Bench b(c);
  b.udp({kGuest4, 5000, 0}, {b.plan.dns4, 53, 0}, "name?");
  b.round(10);
  EXPECT_TRUE(b.link.seen.empty());
  b.udp({kGuest4, 5000, 0}, {b.plan.dns4, 53, 0}, "name?");
  Seen s;
  ASSERT_TRUE(b.until([&] {
    echo(good.get());
    return !b.link.seen.empty();
  }));
  s = b.link.seen[0];
  reparse(s);
  EXPECT_EQ(s.ip.source, b.plan.dns4);
}

TEST(Udp, ForwardedPort) {
  auto forward = parse_forward("udp:127.0.0.1:1-:53");
  forward->host.port = 0;
  auto listeners = open_listeners({*forward});
  ASSERT_TRUE(listeners);
  sockaddr_storage address;
  socklen_t size = sizeof address;
  ::getsockname((*listeners)[0].fd.get(), reinterpret_cast<sockaddr*>(&address), &size);
  Bench b({}, nullptr, std::move(*listeners));
  b.hello();
  u16 port;
  UniqueFd client = udp_server(true, &port);
  ASSERT_EQ(::sendto(client.get(), "ask", 3, 0, reinterpret_cast<sockaddr*>(&address), size), 3);
  Seen s;
  ASSERT_TRUE(b.next(kProtoUdp, &s));
  reparse(s);
  UdpDatagram d;
  ASSERT_EQ(parse_udp(s.ip.payload, d), Drop::kNone);
  EXPECT_EQ(s.ip.source, b.plan.gateway4);
  EXPECT_EQ(d.source, port);
  EXPECT_EQ(d.destination, 53);
  b.udp({kGuest4, 53, 0}, {b.plan.gateway4, d.source, 0}, "answer");
  char buffer[20];
  EXPECT_EQ(::recv(client.get(), buffer, sizeof buffer, 0), 6);
}

TEST(Icmp, TheRouterAnswers) {
  Bench b;
  b.ip(kGuest4, b.plan.gateway4, kProtoIcmp, icmp4_echo(7, 1, 56));
  Seen s;
  ASSERT_TRUE(b.next(kProtoIcmp, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], 0);
  EXPECT_EQ(checksum(s.ip.payload), 0);
  EXPECT_EQ(s.ip.payload.size(), 64u);
  std::vector<u8> m(20);
  m[0] = 128;
  b.ip(kGuest6, b.plan.gateway6, kProtoIcmp6, icmp6(kGuest6, b.plan.gateway6, m));
  ASSERT_TRUE(b.next(kProtoIcmp6, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], 129);
  EXPECT_EQ(transport_checksum(s.ip.source, s.ip.destination, kProtoIcmp6, s.ip.payload), 0);
}

TEST(Icmp, TimeExceededAndProtocolUnreachable) {
  Bench b;
  b.ip(kGuest4, Ip::v4(192, 0, 2, 1), kProtoUdp, Bench::udp_segment({kGuest4, 1, 0}, {Ip::v4(192, 0, 2, 1), 2, 0}, {}), 1);
  Seen s;
  ASSERT_TRUE(b.next(kProtoIcmp, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], 11);
  b.ip(kGuest4, Ip::v4(192, 0, 2, 1), 132, std::vector<u8>(20));
  ASSERT_TRUE(b.next(kProtoIcmp, &s));
  reparse(s);
  EXPECT_EQ(s.ip.payload[0], 3);
  EXPECT_EQ(s.ip.payload[1], 2);
  // No error about an error, and not more than so many a second.
  b.link.seen.clear();
  std::vector<u8> error(16);
  error[0] = 3;
  put16(&error[2], checksum(error));
  b.ip(kGuest4, Ip::v4(192, 0, 2, 1), kProtoIcmp, error, 1);
  EXPECT_TRUE(b.link.seen.empty());
  for (int i = 0; i < 1000; i++) b.ip(kGuest4, Ip::v4(192, 0, 2, 1), 132, std::vector<u8>(20));
  EXPECT_LE(b.link.seen.size(), 200u);
}

TEST(Hostile, SpoofedSourcesAndStrayFrames) {
  Bench b;
  u16 port;
  UniqueFd server = udp_server(true, &port);
  const Endpoint to{b.plan.gateway4, port, 0};
  for (const Ip& source : {Ip::v4(127, 0, 0, 1), Ip::v4(10, 0, 2, 2), Ip::v4(10, 0, 2, 3), Ip::v4(10, 0, 2, 255), Ip::v4(10, 0, 2, 0),
                           Ip::v4(192, 0, 2, 1), Ip::v4(0), Ip::v4(0xffffffff), Ip::v4(224, 0, 0, 1)}) {
    b.udp({source, 5000, 0}, to, "x");
  }
  b.udp({kGuest4, 5000, 0}, {Ip::v4(224, 0, 0, 251), 5353, 0}, "x");
  // A bad checksum.
  auto segment = Bench::udp_segment({kGuest4, 5000, 0}, to, std::vector<u8>(10));
  segment[7] ^= 1;
  b.ip(kGuest4, to.ip, kProtoUdp, segment);
  // Another machine's address on the link.
  auto frame = b.ip_frame(kGuest4, to.ip, kProtoUdp, Bench::udp_segment({kGuest4, 5000, 0}, to, std::vector<u8>(10)));
  frame[5] ^= 1;
  b.inject(frame);
  for (int i = 0; i < 3; i++) b.round(1);
  char c;
  EXPECT_EQ(::recv(server.get(), &c, 1, 0), -1);
  EXPECT_EQ(b.stack.udp_flows(), 0u);
}

TEST(Hostile, FragmentsThatOverlapNeverArrive) {
  Reassembly r;
  IpPacket p;
  p.source = kGuest4;
  p.destination = Ip::v4(10, 0, 2, 2);
  p.protocol = kProtoUdp;
  p.fragment = true;
  p.fragment_id = 5;
  const std::vector<u8> a(64, 1), other(64, 2);
  IpPacket out;
  const auto add = [&](u32 offset, bool more, const std::vector<u8>& data) {
    p.fragment_offset = offset;
    p.more_fragments = more;
    p.payload = data;
    return r.add(p, 1000, &out);
  };
  EXPECT_FALSE(add(0, true, a));
  EXPECT_FALSE(add(0, true, a));      // a repetition is none
  EXPECT_FALSE(add(32, true, other)); // an overlap
  EXPECT_FALSE(add(64, false, a));
  p.fragment_id = 6;
  EXPECT_FALSE(add(65528, false, a)); // past the end
  EXPECT_FALSE(add(8, false, a));
  EXPECT_FALSE(add(128, true, a));    // behind the last one
  p.fragment_id = 7;
  EXPECT_FALSE(add(64, false, a));
  EXPECT_TRUE(add(0, true, a));
  EXPECT_EQ(out.payload.size(), 128u);
  for (u32 i = 0; i < 1000; i++) {
    p.fragment_id = 1000 + i;
    add(0, true, a);
  }
  EXPECT_LE(r.pending(), 16u);
}

TEST(Hostile, RandomFrames) {
  Bench b;
  u64 x = 1;
  for (int i = 0; i < 200'000; i++) {
    x = Random::mix(x + static_cast<u64>(i));
    std::vector<u8> f(static_cast<std::size_t>(x % 120));
    for (std::size_t k = 0; k < f.size(); k++) f[k] = static_cast<u8>(Random::mix(x + k) >> 32);
    if (f.size() > kEthHeader + 20) {  // most of them get past the first door
      std::memcpy(&f[0], b.plan.mac.b.data(), 6);
      std::memcpy(&f[6], kGuestMac.b.data(), 6);
      put16(&f[12], (x >> 40 & 1) != 0 ? kEtherIp4 : kEtherIp6);
      if (f[12] == 8 && f[13] == 0) {
        f[kEthHeader] = 0x45;
        put16(&f[kEthHeader + 2], static_cast<u32>(f.size() - kEthHeader));
        put16(&f[kEthHeader + 6], 0);
        // Nothing of this may leave the machine: only the router is addressed.
        std::memcpy(&f[kEthHeader + 12], kGuest4.b.data() + 12, 4);
        std::memcpy(&f[kEthHeader + 16], b.plan.gateway4.b.data() + 12, 4);
        f[kEthHeader + 9] = static_cast<u8>(x >> 50) % 3 == 0 ? kProtoIcmp : 200;
        put16(&f[kEthHeader + 10], 0);
        put16(&f[kEthHeader + 10], checksum({&f[kEthHeader], kIp4Header}));
      }
    }
    b.inject(f);
    if (b.link.seen.size() > 1000) b.link.seen.clear();
  }
  EXPECT_GT(b.stack.stats().dropped, 1000u);
}

TEST(Process, ServesFramesAndEndsWithItsLink) {
  NatConfig c;
  auto link = NatLink::start(c, 2);
  ASSERT_TRUE(link);
  const int pid = (*link)->process();
  ASSERT_TRUE((*link)->set_offloads({true, true, true, false, false}));
  Bench b;  // for its frames only
  for (u32 queue = 0; queue < 2; queue++) {
    const auto frame = b.ip_frame(kGuest4, b.plan.gateway4, kProtoIcmp, icmp4_echo(7, 1, 56));
    VnetHeader vnet;
    const iovec message[2] = {{&vnet, sizeof vnet}, {const_cast<u8*>(frame.data()), frame.size()}};
    ASSERT_TRUE((*link)->send(queue, message));
    pollfd p{(*link)->fd(queue), POLLIN, 0};
    ASSERT_EQ(::poll(&p, 1, 5000), 1);
    std::vector<u8> buffer(kMaxMessage);
    iovec into{buffer.data(), buffer.size()};
    ASSERT_EQ((*link)->receive(queue, {&into, 1}), static_cast<ssize_t>(kVnetHeader + frame.size()));
    EXPECT_EQ(buffer[kVnetHeader + kEthHeader + kIp4Header], 0);
  }
  // A connection, so that sockets work behind the jail.
  u16 port;
  UniqueFd server = udp_server(true, &port);
  const Endpoint from{kGuest4, 5000, 0};
  const Endpoint to{b.plan.gateway4, port, 0};
  const auto frame = b.ip_frame(from.ip, to.ip, kProtoUdp, Bench::udp_segment(from, to, std::vector<u8>(10)));
  VnetHeader vnet;
  const iovec message[2] = {{&vnet, sizeof vnet}, {const_cast<u8*>(frame.data()), frame.size()}};
  ASSERT_TRUE((*link)->send(0, message));
  pollfd p{server.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&p, 1, 5000), 1);
  EXPECT_EQ(::kill(pid, 0), 0);
  link->reset();
  EXPECT_EQ(::kill(pid, 0), -1);
  EXPECT_EQ(errno, ESRCH);
}

TEST(Process, APortInUseIsSaid) {
  u16 port;
  UniqueFd taken = udp_server(true, &port);
  NatConfig c;
  c.forwards.push_back({false, {Ip::v4(127, 0, 0, 1), port, 0}, {}, 53});
  auto link = NatLink::start(c, 1);
  ASSERT_FALSE(link);
  EXPECT_EQ(link.error().code, EADDRINUSE);
  EXPECT_NE(link.error().message.find(std::to_string(port)), std::string::npos);
}

}  // namespace
}  // namespace ring3::net::test
