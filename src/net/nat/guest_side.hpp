#pragma once
#include <gtest/gtest.h>
#include <poll.h>

#include <deque>
#include <functional>
#include <vector>

#include "net/nat/stack.hpp"
#include "net/packet/checksum.hpp"

/// The guest's side of the link, scripted: for tests.
namespace ring3::net::test {

inline const Mac kGuestMac{{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}};
inline const Ip kGuest4 = Ip::v4(10, 0, 2, 15);
inline const Ip kGuest6 = Ip::v6(0xfec0, 0x77);

struct Seen {
  VnetHeader vnet;
  std::vector<u8> frame;
  IpPacket ip;
  Drop parsed = Drop::kNone;
};

class Link : public FrameSink {
 public:
  bool send(u32 queue, std::span<const iovec> message) override {
    if (full) return false;
    Seen s;
    std::vector<u8> all;
    for (const iovec& piece : message) {
      const u8* p = static_cast<const u8*>(piece.iov_base);
      all.insert(all.end(), p, p + piece.iov_len);
    }
    EXPECT_LE(all.size(), kMaxMessage);
    std::memcpy(&s.vnet, all.data(), kVnetHeader);
    s.frame.assign(all.begin() + kVnetHeader, all.end());
    queues.push_back(queue);
    seen.push_back(std::move(s));
    seen.back().parsed = parse_ip(seen.back().frame, seen.back().ip);
    return true;
  }
  std::deque<Seen> seen;
  std::vector<u32> queues;
  bool full = false;
};

/// A stack on the host's loopback, with a guest that does what the test says.
class Bench {
 public:
  explicit Bench(NatConfig config = {}, Host* other = nullptr, std::vector<Listener> listeners = {})
      : stack(std::move(config), link, other != nullptr ? *other : host, std::move(listeners), 42) {
    stack.set_now(now);
  }

  RealHost host;
  Link link;
  u64 now = 1'000'000;
  Stack stack;
  Plan plan;
  u16 id = 1;

  void inject(std::vector<u8> frame, VnetHeader vnet = {}, u32 queue = 0) {
    std::vector<u8> message(kVnetHeader);
    std::memcpy(message.data(), &vnet, sizeof vnet);
    message.insert(message.end(), frame.begin(), frame.end());
    stack.receive(queue, message);
  }
  std::vector<u8> ip_frame(const Ip& from, const Ip& to, u8 protocol, std::span<const u8> payload, u16 flags = 0x4000, u8 ttl = 64) {
    std::vector<u8> f(kEthHeader + kIp6Header);
    f.resize(put_headers(f.data(), plan.mac, kGuestMac, from, to, protocol, payload.size(), id++, flags, ttl));
    f.insert(f.end(), payload.begin(), payload.end());
    return f;
  }
  void ip(const Ip& from, const Ip& to, u8 protocol, std::span<const u8> payload, u8 ttl = 64) {
    inject(ip_frame(from, to, protocol, payload, 0x4000, ttl));
  }
  static std::vector<u8> udp_segment(const Endpoint& from, const Endpoint& to, std::span<const u8> data) {
    std::vector<u8> s(kUdpHeader);
    put16(&s[0], from.port);
    put16(&s[2], to.port);
    put16(&s[4], static_cast<u32>(kUdpHeader + data.size()));
    s.insert(s.end(), data.begin(), data.end());
    put16(&s[6], transport_checksum(from.ip, to.ip, kProtoUdp, s));
    return s;
  }
  void udp(const Endpoint& from, const Endpoint& to, std::span<const u8> data) {
    ip(from.ip, to.ip, kProtoUdp, udp_segment(from, to, data));
  }
  void udp(const Endpoint& from, const Endpoint& to, const std::string& data) {
    udp(from, to, std::span(reinterpret_cast<const u8*>(data.data()), data.size()));
  }
  static std::vector<u8> tcp_segment(const Endpoint& from, const Endpoint& to, u32 seq, u32 ack, u8 flags, u16 window,
                                     std::span<const u8> data = {}, std::span<const u8> options = {}) {
    std::vector<u8> s(kTcpHeader);
    put16(&s[0], from.port);
    put16(&s[2], to.port);
    put32(&s[4], seq);
    put32(&s[8], ack);
    s[12] = static_cast<u8>((5 + options.size() / 4) << 4);
    s[13] = flags;
    put16(&s[14], window);
    s.insert(s.end(), options.begin(), options.end());
    s.insert(s.end(), data.begin(), data.end());
    put16(&s[16], transport_checksum(from.ip, to.ip, kProtoTcp, s));
    return s;
  }
  void hello() {  // makes the guest known, as its ARP reply does
    std::vector<u8> f(kEthHeader + 28);
    std::memcpy(&f[0], plan.mac.b.data(), 6);
    std::memcpy(&f[6], kGuestMac.b.data(), 6);
    put16(&f[12], kEtherArp);
    u8* p = &f[kEthHeader];
    put16(p, 1);
    put16(p + 2, kEtherIp4);
    p[4] = 6;
    p[5] = 4;
    put16(p + 6, 2);
    std::memcpy(p + 8, kGuestMac.b.data(), 6);
    std::memcpy(p + 14, kGuest4.b.data() + 12, 4);
    inject(f);
  }

  /// One round of the NAT's loop.
  void round(int timeout_ms = 0) {
    epoll_event events[64];
    const int n = ::epoll_wait(stack.epoll_fd(), events, 64, timeout_ms);
    for (int i = 0; i < n; i++) stack.host_event(Token::unpack(events[i].data.u64), events[i].events);
    for (int i = 0; i < 8 && stack.run(); i++) {}
  }
  /// Rounds until something holds; false after two seconds.
  bool until(const std::function<bool()>& holds) {
    for (int i = 0; i < 200; i++) {
      round(0);
      if (holds()) return true;
      round(10);
      if (holds()) return true;
    }
    return false;
  }
  void pass(u64 ms) {
    now += ms;
    stack.set_now(now);
    stack.run();
  }
  /// The next frame for which the guest asks, dropping those before it.
  bool next(u8 protocol, Seen* out) {
    return until([&] {
      while (!link.seen.empty()) {
        Seen s = std::move(link.seen.front());
        link.seen.pop_front();
        if (s.parsed == Drop::kNone && s.ip.protocol == protocol) {
          // Views moved with the vector's buffer.
          *out = std::move(s);
          return true;
        }
      }
      return false;
    });
  }
};

/// A TCP client of the guest's, as plain as one can be. Checks what it receives: checksums, sequence.
class TcpGuest {
 public:
  TcpGuest(Bench& bench, Endpoint from, Endpoint to) : b(bench), self(from), peer(to) {}
  Bench& b;
  Endpoint self, peer;
  u32 seq = 1000, ack = 0;
  u16 window = 65535;
  u8 scale = 0;      ///< of what we announce
  u8 peer_scale = 0;
  u16 peer_mss = 0;
  u32 peer_window = 0, peer_ack = 0;
  bool reset = false, fin = false, connected = false;
  std::vector<u8> received;
  bool acknowledge = true;  ///< at once, each segment
  u32 segments = 0;

  void send(u8 flags, std::span<const u8> data = {}, std::span<const u8> options = {}) {
    b.ip(self.ip, peer.ip, kProtoTcp, Bench::tcp_segment(self, peer, seq, (flags & kTcpAck) != 0 ? ack : 0, flags, window, data, options));
    seq += static_cast<u32>(data.size()) + ((flags & kTcpSyn) != 0 ? 1 : 0) + ((flags & kTcpFin) != 0 ? 1 : 0);
  }
  void syn() {
    const u8 options[8] = {2, 4, 5, 0xb4, 1, 3, 3, scale};
    send(kTcpSyn, {}, options);
  }
  /// Takes what has come for this connection.
  void take() {
    std::deque<Seen> all;
    all.swap(b.link.seen);  // what we send may be answered at once
    std::deque<Seen> others;
    for (Seen& seen : all) {
      TcpSegment s;
      if (seen.parsed != Drop::kNone || seen.ip.protocol != kProtoTcp || parse_tcp(seen.ip.payload, s) != Drop::kNone ||
          s.destination != self.port || s.source != peer.port || seen.ip.destination != self.ip) {
        others.push_back(std::move(seen));
        continue;
      }
      if ((seen.vnet.flags & VnetHeader::kNeedsCsum) == 0) {
        EXPECT_EQ(transport_checksum(seen.ip.source, seen.ip.destination, kProtoTcp, seen.ip.payload), 0);
      }
      handle(s);
    }
    for (Seen& seen : b.link.seen) others.push_back(std::move(seen));
    b.link.seen = std::move(others);
  }
  void handle(const TcpSegment& s) {
    segments++;
    if ((s.flags & kTcpRst) != 0) {
      reset = true;
      return;
    }
    if ((s.flags & kTcpSyn) != 0) {
      peer_mss = s.mss.value_or(0);
      peer_scale = s.window_scale.value_or(0);
      ack = s.seq + 1;
      peer_ack = s.ack;
      peer_window = s.window;
      connected = true;
      send((s.flags & kTcpAck) != 0 ? kTcpAck : kTcpSyn | kTcpAck);
      return;
    }
    peer_ack = s.ack;
    peer_window = static_cast<u32>(s.window) << peer_scale;
    if (s.seq != ack) {
      if (!s.data.empty()) send(kTcpAck);
      return;
    }
    received.insert(received.end(), s.data.begin(), s.data.end());
    ack += static_cast<u32>(s.data.size());
    if ((s.flags & kTcpFin) != 0) {
      fin = true;
      ack++;
    }
    if (acknowledge && (!s.data.empty() || (s.flags & kTcpFin) != 0)) send(kTcpAck);
  }
  bool until(const std::function<bool()>& holds) {
    return b.until([&] {
      take();
      return holds();
    });
  }
  bool connect() {
    syn();
    return until([&] { return connected || reset; }) && connected;
  }
};

}  // namespace ring3::net::test
