// libFuzzer target: the guest's frames against the NAT, and what hosts answer.
//
// The input is a script: frames (with headers and checksums put right, or not), time that passes, bytes that the other
// ends send, ends that close. The host is fake: every socket the NAT opens is half of a pair, so that nothing leaves the
// process.
#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <vector>

#include "net/nat/stack.hpp"
#include "net/packet/checksum.hpp"

using namespace ring3;
using namespace ring3::net;

namespace {

class FakeHost final : public Host {
 public:
  UniqueFd connect_stream(const Endpoint&) override { return make(SOCK_STREAM); }
  UniqueFd connect_datagram(const Endpoint&) override { return make(SOCK_DGRAM); }
  UniqueFd connect_ping(const Ip&) override { return make(SOCK_DGRAM); }
  std::vector<UniqueFd> others;
  u32 refusals = 0;

 private:
  UniqueFd make(int type) {
    if (refusals > 0) {
      const int errors[] = {ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, EACCES, EMFILE};
      errno = errors[refusals-- % 5];
      return UniqueFd();
    }
    int fds[2];
    if (others.size() > 64 || ::socketpair(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) != 0) {
      errno = EMFILE;
      return UniqueFd();
    }
    others.emplace_back(fds[1]);
    return UniqueFd(fds[0]);
  }
};

/// What the guest is told is remembered so far that the script can answer with the right numbers.
class Sink final : public FrameSink {
 public:
  bool send(u32, std::span<const iovec> message) override {
    if (full) return false;
    static std::vector<u8> all(kMaxMessage);
    std::size_t length = 0;
    for (const iovec& piece : message) {
      if (piece.iov_len > all.size() - length) __builtin_trap();
      if (piece.iov_len != 0) std::memcpy(&all[length], piece.iov_base, piece.iov_len);
      length += piece.iov_len;
    }
    IpPacket ip;
    // What the NAT itself sends must parse.
    const std::span<const u8> frame = std::span(all).first(length).subspan(kVnetHeader);
    if (get16(frame.data() + 12) != kEtherArp && parse_ip(frame, ip) != Drop::kNone) __builtin_trap();
    TcpSegment s;
    if (ip.protocol == kProtoTcp && !ip.fragment) {
      if (parse_tcp(ip.payload, s) != Drop::kNone) __builtin_trap();
      seq = s.seq + static_cast<u32>(s.data.size()) + ((s.flags & (kTcpSyn | kTcpFin)) != 0 ? 1 : 0);
      ack = s.ack;
      remote_port = s.source;
    }
    return true;
  }
  bool full = false;
  u32 seq = 0, ack = 0;
  u16 remote_port = 80;
};

struct Script {
  const u8* p;
  std::size_t left;
  u8 byte() {
    if (left == 0) return 0;
    left--;
    return *p++;
  }
  u16 word() {
    const u8 high = byte();
    return static_cast<u16>(high << 8 | byte());
  }
  std::vector<u8> bytes(std::size_t n) {
    n = std::min(n, left);
    std::vector<u8> v(p, p + n);
    p += n;
    left -= n;
    return v;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Script script{data, size};
  FakeHost host;
  Sink sink;
  NatConfig config;
  const u8 options = script.byte();
  config.restrict_outgoing = (options & 0x0f) == 0x0f;
  config.max_tcp = 8;
  config.max_udp = 8;
  config.max_ping = 2;
  config.max_buffer = 1 << 20;
  if ((options & 0x10) != 0) config.resolvers = {{Ip::v4(192, 0, 2, 1), 53, 0}, {Ip::v4(192, 0, 2, 2), 53, 0}};
  const Plan plan = config.plan;
  Stack stack(config, sink, host, {}, 7);
  u64 now = 1'000'000;
  stack.set_now(now);
  const Mac mac{{0x52, 0x54, 0, 0x12, 0x34, 0x56}};
  const Ip self4 = plan.guest4;
  const Ip self6 = Ip::v6(0xfec0, 0x77);
  const Ip targets4[] = {plan.gateway4, plan.dns4, Ip::v4(192, 0, 2, 9), Ip::v4(0xffffffff)};
  const Ip targets6[] = {plan.gateway6, plan.dns6, Ip::v6(0x2001, 9), Ip::v6(0xff02, 2)};

  const auto inject = [&](const std::vector<u8>& frame, const VnetHeader& vnet) {
    std::vector<u8> message(kVnetHeader);
    std::memcpy(message.data(), &vnet, sizeof vnet);
    message.insert(message.end(), frame.begin(), frame.end());
    stack.receive(script.byte() & 3, message);
  };
  for (int step = 0; step < 200 && script.left > 0; step++) {
    const u8 what = script.byte();
    switch (what & 7) {
      case 0: {  // any bytes as a message
        const auto m = script.bytes(script.byte());
        stack.receive(what >> 3, m);
        break;
      }
      case 1: {  // any bytes as a frame to us
        std::vector<u8> frame(kEthHeader);
        std::memcpy(frame.data(), plan.mac.b.data(), 6);
        std::memcpy(frame.data() + 6, mac.b.data(), 6);
        const u16 types[] = {kEtherIp4, kEtherIp6, kEtherArp, 0x8100};
        put16(frame.data() + 12, types[what >> 3 & 3]);
        const auto rest = script.bytes(script.byte());
        frame.insert(frame.end(), rest.begin(), rest.end());
        VnetHeader vnet;
        vnet.flags = (what & 0x80) != 0 ? VnetHeader::kNeedsCsum : 0;
        inject(frame, vnet);
        break;
      }
      case 2:
      case 3:
      case 4: {  // an IP packet whose header and checksum are right, of a protocol that is carried
        const bool v4 = (what & 8) == 0;
        const Ip from = v4 ? self4 : self6;
        const Ip to = v4 ? targets4[what >> 4 & 3] : targets6[what >> 4 & 3];
        const u8 shape = script.byte();
        u8 protocol;
        std::vector<u8> segment;
        if ((what & 7) == 2) {
          protocol = kProtoTcp;
          segment.resize(kTcpHeader);
          put16(&segment[0], 1024u + (shape & 3));
          put16(&segment[2], (shape & 4) != 0 ? sink.remote_port : 80);
          put32(&segment[4], sink.ack + ((shape & 8) != 0 ? static_cast<u32>(static_cast<i8>(script.byte())) : 0));
          put32(&segment[8], sink.seq + ((shape & 16) != 0 ? static_cast<u32>(static_cast<i8>(script.byte())) : 0));
          segment[13] = script.byte();
          put16(&segment[14], (shape & 32) != 0 ? script.word() : 65535);
          const auto rest = script.bytes(script.byte());
          segment[12] = static_cast<u8>((5 + ((shape & 64) != 0 ? std::min<std::size_t>(rest.size() / 4, 10) : 0)) << 4);
          segment.insert(segment.end(), rest.begin(), rest.end());
          if ((shape & 128) != 0) segment.resize(segment.size() + 20000);
        } else if ((what & 7) == 3) {
          protocol = kProtoUdp;
          segment.resize(kUdpHeader);
          const u16 ports[] = {53, 67, 547, 9999};
          const u16 mine[] = {5000, 68, 546, script.byte()};
          put16(&segment[0], mine[shape & 3]);
          put16(&segment[2], ports[shape & 3]);
          const auto rest = script.bytes((shape & 4) != 0 ? 300 : script.byte());
          segment.insert(segment.end(), rest.begin(), rest.end());
          if ((shape & 8) != 0) {  // a DHCP message that gets past its first checks
            segment.resize(std::max<std::size_t>(segment.size(), kUdpHeader + 240));
            segment[8] = segment[9] = 1;
            segment[10] = 6;
            segment[8 + 28] &= 0xfe;
            put32(&segment[8 + 236], 0x63825363);
            const auto dhcp = script.bytes(script.byte());
            segment.insert(segment.end(), dhcp.begin(), dhcp.end());
          }
          put16(&segment[4], static_cast<u32>(segment.size()));
        } else {
          protocol = v4 ? kProtoIcmp : kProtoIcmp6;
          segment = script.bytes(script.byte());
          if (segment.size() < 4) segment.resize(4);
        }
        const bool fragment = (shape & 0xf0) == 0xf0;
        std::vector<u8> frame(kEthHeader + kIp6Header);
        const std::size_t at = protocol == kProtoTcp ? 16 : protocol == kProtoUdp ? 6 : 2;
        put16(&segment[at], 0);
        u16 sum = protocol == kProtoIcmp ? checksum(segment) : transport_checksum(from, to, protocol, segment);
        if (protocol == kProtoUdp && sum == 0) sum = 0xffff;
        put16(&segment[at], sum);
        frame.resize(put_headers(frame.data(), plan.mac, mac, from, to, protocol, segment.size(), script.byte() & 3,
                                 fragment ? static_cast<u16>(script.byte() << 8 | script.byte()) : 0x4000,
                                 protocol == kProtoIcmp6 && (shape & 1) != 0 ? 255 : 64));
        frame.insert(frame.end(), segment.begin(), segment.end());
        VnetHeader vnet;
        if (protocol == kProtoUdp && (shape & 0x80) != 0) {
          vnet.gso_type = VnetHeader::kGsoUdpL4;
          vnet.gso_size = script.word();
        }
        inject(frame, vnet);
        break;
      }
      case 5:
        now += static_cast<u64>(script.byte()) << (what >> 4);
        stack.set_now(now);
        break;
      case 6:  // the other end of a socket
        if (!host.others.empty()) {
          UniqueFd& other = host.others[script.byte() % host.others.size()];
          if ((what & 8) != 0) {
            other.reset();
          } else if ((what & 16) != 0) {
            if (other) ::shutdown(other.get(), SHUT_WR);
          } else if ((what & 32) != 0) {
            static u8 received[70000];
            if (other) [[maybe_unused]] const ssize_t n = ::recv(other.get(), received, sizeof received, MSG_DONTWAIT);
          } else {
            static const std::vector<u8> bytes(30000, 0x41);
            const std::size_t length = (what & 64) != 0 ? bytes.size() : script.byte();
            if (other) [[maybe_unused]] const ssize_t n = ::send(other.get(), bytes.data(), length, MSG_DONTWAIT | MSG_NOSIGNAL);
          }
        }
        host.refusals = (what & 128) != 0 ? 1 : host.refusals;
        break;
      case 7:
        sink.full = (what & 8) != 0;
        if (!sink.full) for (u32 q = 0; q < 4; q++) stack.link_writable(q);
        if ((what & 16) != 0) {
          const u8 control[3] = {Stack::kControl, Stack::kSetOffloads, static_cast<u8>(what >> 5)};
          stack.receive(0, control);
        }
        break;
    }
    epoll_event events[32];
    const int n = ::epoll_wait(stack.epoll_fd(), events, 32, 0);
    for (int i = 0; i < n; i++) stack.host_event(Token::unpack(events[i].data.u64), events[i].events);
    // It must come to rest.
    int rounds = 0;
    while (stack.run()) if (++rounds > 10000) __builtin_trap();
  }
  if (stack.tcp_connections() > 8 || stack.udp_flows() > 8 + 2) __builtin_trap();
  return 0;
}
