#include "net/nat/dhcp.hpp"

namespace ring3::net {

namespace {

constexpr std::size_t kMaxLeases = 16;
constexpr u32 kLeaseSeconds = 86400;
constexpr u64 kAdvertiseMs = 300'000;
constexpr u32 kRouterLifetime = 1800;
constexpr std::size_t kBootp = 236;
constexpr u32 kCookie = 0x63825363;

const Ip kAllNodes = Ip::v6(0xff02, 1);
constexpr Mac kAllNodesMac{{0x33, 0x33, 0, 0, 0, 1}};

struct Option {
  std::vector<u8>& out;
  void put(u8 code, std::span<const u8> value) const {
    out.push_back(code);
    out.push_back(static_cast<u8>(value.size()));
    out.insert(out.end(), value.begin(), value.end());
  }
  void ip(u8 code, const Ip& ip) const { put(code, std::span(ip.b).subspan(12)); }
  void number(u8 code, u32 v) const {
    u8 b[4];
    put32(b, v);
    put(code, b);
  }
};

}  // namespace

void Configuration::arp(std::span<const u8> frame, u32 queue) {
  if (frame.size() < kEthHeader + 28) return;
  const u8* p = frame.data() + kEthHeader;
  if (get16(p) != 1 || get16(p + 2) != kEtherIp4 || p[4] != 6 || p[5] != 4) return;
  const u16 operation = get16(p + 6);
  Mac sender;
  std::memcpy(sender.b.data(), p + 8, 6);
  const Ip sender_ip = Ip::from_v4_bytes(p + 14);
  const Ip target = Ip::from_v4_bytes(p + 24);
  const Plan& plan = wire_.plan();
  if (plan.in_network(sender_ip) && !plan.is_ours(sender_ip) && sender_ip != plan.broadcast4 && sender_ip != plan.network4) {
    wire_.learn(sender_ip, sender, queue);
  }
  if (operation != 1 || !plan.is_ours(target) || sender.is_group()) return;
  u8 reply[kEthHeader + 28];
  std::memcpy(reply, frame.data(), sizeof reply);
  std::memcpy(reply, sender.b.data(), 6);
  std::memcpy(reply + 6, plan.mac.b.data(), 6);
  u8* r = reply + kEthHeader;
  put16(r + 6, 2);
  std::memcpy(r + 8, plan.mac.b.data(), 6);
  std::memcpy(r + 14, p + 24, 4);
  std::memcpy(r + 18, p + 8, 10);
  wire_.send_raw(queue, reply);
}

std::optional<Ip> Configuration::lease(const Mac& mac) {
  for (std::size_t i = 0; i < leases_.size(); i++) {
    if (leases_[i] == mac) return Ip::v4(wire_.plan().guest4.as_v4() + static_cast<u32>(i));
  }
  if (leases_.size() >= kMaxLeases) return std::nullopt;
  leases_.push_back(mac);
  return Ip::v4(wire_.plan().guest4.as_v4() + static_cast<u32>(leases_.size()) - 1);
}

void Configuration::dhcp4(const IpPacket&, const UdpDatagram& datagram, u32 queue) {
  const auto m = datagram.data;
  if (m.size() < kBootp + 4 || m[0] != 1 || m[1] != 1 || m[2] != 6 || get32(m.data() + kBootp) != kCookie) return;
  Mac mac;
  std::memcpy(mac.b.data(), m.data() + 28, 6);
  if (mac.is_group() || mac.is_zero()) return;
  u8 type = 0;
  std::optional<Ip> requested;
  std::optional<Ip> server;
  for (std::size_t i = kBootp + 4; i < m.size();) {
    const u8 code = m[i];
    if (code == 0) {
      i++;
      continue;
    }
    if (code == 255 || i + 2 > m.size() || i + 2 + m[i + 1] > m.size()) break;
    const auto value = m.subspan(i + 2, m[i + 1]);
    if (code == 53 && value.size() == 1) type = value[0];
    if (code == 50 && value.size() == 4) requested = Ip::from_v4_bytes(value.data());
    if (code == 54 && value.size() == 4) server = Ip::from_v4_bytes(value.data());
    i += 2 + value.size();
  }
  const Plan& plan = wire_.plan();
  if (type != 1 && type != 3 && type != 8) return;                    // discover, request, inform
  if (type == 3 && server && *server != plan.gateway4) return;        // somebody else's offer
  const auto address = lease(mac);
  if (!address) return;
  const Ip current = Ip::from_v4_bytes(m.data() + 12);
  u8 answer = type == 1 ? 2 : 5;
  if (type == 3) {
    const Ip wanted = requested ? *requested : current;
    if (wanted != *address) answer = 6;  // a lease of another network: the guest starts anew
  }
  std::vector<u8> reply(kBootp + 4);
  reply[0] = 2;
  reply[1] = 1;
  reply[2] = 6;
  std::memcpy(reply.data() + 4, m.data() + 4, 4);    // xid
  std::memcpy(reply.data() + 10, m.data() + 10, 2);  // flags
  if (type == 8) std::memcpy(reply.data() + 12, m.data() + 12, 4);
  else if (answer != 6) std::memcpy(reply.data() + 16, address->b.data() + 12, 4);
  if (answer != 6) std::memcpy(reply.data() + 20, plan.gateway4.b.data() + 12, 4);
  std::memcpy(reply.data() + 28, m.data() + 28, 16);
  put32(reply.data() + kBootp, kCookie);
  const Option option{reply};
  const u8 kind[1] = {answer};
  option.put(53, kind);
  option.ip(54, plan.gateway4);
  if (answer != 6) {
    if (type != 8) option.number(51, kLeaseSeconds);
    option.ip(1, Ip::v4(0xffffffffu << (32 - Plan::kBits4)));
    option.ip(3, plan.gateway4);
    if (!wire_.config().resolvers.empty()) option.ip(6, plan.dns4);
    option.ip(28, plan.broadcast4);
    u8 mtu[2];
    put16(mtu, wire_.config().mtu);
    option.put(26, mtu);
  }
  reply.push_back(255);
  if (reply.size() < 300) reply.resize(300);
  // To the address itself where the client can take that already, else to all.
  const bool broadcast = (m[10] & 0x80) != 0 || answer == 6;
  Ip to = Ip::v4(0xffffffff);
  if (!current.is_unspecified() && answer != 6) to = current;
  else if (!broadcast) to = *address;
  wire_.send_udp(queue, {plan.gateway4, 67, 0}, {to, 68, 0}, reply, to == Ip::v4(0xffffffff) ? &kBroadcastMac : &mac);
}

void Configuration::dhcp6(const IpPacket& packet, const UdpDatagram& datagram, u32 queue) {
  const auto m = datagram.data;
  if (m.size() < 4 || m[0] != 11 || !packet.source.is_link_local()) return;
  const Plan& plan = wire_.plan();
  std::vector<u8> reply(m.begin(), m.begin() + 4);
  reply[0] = 7;
  const auto put = [&](u16 code, std::span<const u8> value) {
    u8 head[4];
    put16(head, code);
    put16(head + 2, static_cast<u32>(value.size()));
    reply.insert(reply.end(), head, head + 4);
    reply.insert(reply.end(), value.begin(), value.end());
  };
  u8 server_id[10] = {0, 3, 0, 1};  // DUID-LL, Ethernet
  std::memcpy(server_id + 4, plan.mac.b.data(), 6);
  put(2, server_id);
  for (std::size_t i = 4; i + 4 <= m.size();) {
    const u16 code = get16(m.data() + i);
    const std::size_t length = get16(m.data() + i + 2);
    if (i + 4 + length > m.size()) return;
    const auto value = m.subspan(i + 4, length);
    if (code == 1 && length <= 130) put(1, value);
    if (code == 2 && !std::equal(value.begin(), value.end(), server_id, server_id + sizeof server_id)) return;
    i += 4 + length;
  }
  if (!wire_.config().resolvers.empty()) put(23, plan.dns6.b);
  wire_.learn(packet.source, packet.source_mac, queue);
  wire_.send_udp(queue, {plan.link_local, 547, 0}, {packet.source, 546, 0}, reply);
}

void Configuration::advertise(u32 queue, const Ip& to, const Mac& mac) {
  const Plan& plan = wire_.plan();
  u8 m[16 + 8 + 8 + 32 + 24] = {};
  m[0] = 134;
  m[4] = 64;    // hop limit
  m[5] = 0x40;  // other configuration by DHCPv6
  put16(m + 6, wire_.config().restrict_outgoing ? 0 : kRouterLifetime);
  u8* o = m + 16;
  o[0] = 1;  // source link-layer address
  o[1] = 1;
  std::memcpy(o + 2, plan.mac.b.data(), 6);
  o += 8;
  o[0] = 5;  // MTU
  o[1] = 1;
  put32(o + 4, wire_.config().mtu);
  o += 8;
  o[0] = 3;  // prefix, on-link and for autonomous addresses
  o[1] = 4;
  o[2] = Plan::kBits6;
  o[3] = 0xc0;
  put32(o + 4, kLeaseSeconds);
  put32(o + 8, kLeaseSeconds / 2);
  std::memcpy(o + 16, plan.network6.b.data(), 16);
  o += 32;
  std::size_t length = static_cast<std::size_t>(o - m);
  if (!wire_.config().resolvers.empty()) {
    o[0] = 25;  // recursive DNS server
    o[1] = 3;
    put32(o + 4, kRouterLifetime);
    std::memcpy(o + 8, plan.dns6.b.data(), 16);
    length += 24;
  }
  wire_.send_icmp(queue, plan.link_local, to, {m, length}, 255, &mac);
}

bool Configuration::discovery(const IpPacket& packet, u32 queue) {
  const auto m = packet.payload;
  if (m.size() < 8 || packet.ttl != 255 || m[1] != 0) return m.size() >= 1 && m[0] >= 133 && m[0] <= 137;
  const Plan& plan = wire_.plan();
  // The link-layer address option, of type 1 or 2 as the message has it.
  const auto lladdr = [&](std::size_t at, u8 kind) -> std::optional<Mac> {
    while (at + 8 <= m.size() && m[at + 1] != 0) {
      if (m[at] == kind) {
        Mac mac;
        std::memcpy(mac.b.data(), m.data() + at + 2, 6);
        return mac;
      }
      at += static_cast<std::size_t>(m[at + 1]) * 8;
    }
    return std::nullopt;
  };
  const auto learn = [&](const Ip& ip, const Mac& mac) {
    if ((plan.in_network(ip) && !plan.is_ours(ip)) || (ip.is_link_local() && ip != plan.link_local)) wire_.learn(ip, mac, queue);
  };
  switch (m[0]) {
    case 133:  // router solicitation
      if (const auto mac = lladdr(8, 1); mac && !packet.source.is_unspecified()) learn(packet.source, *mac);
      advertise(queue, kAllNodes, kAllNodesMac);
      next_advertisement_ = wire_.now() + kAdvertiseMs;
      return true;
    case 135: {  // neighbour solicitation
      if (m.size() < 24) return true;
      const Ip target = Ip::from_v6_bytes(m.data() + 8);
      if (const auto mac = lladdr(24, 1); mac && !packet.source.is_unspecified()) learn(packet.source, *mac);
      if (target.is_v4() || !plan.is_ours(target)) return true;
      u8 reply[32] = {};
      reply[0] = 136;
      const bool unspecified = packet.source.is_unspecified();  // duplicate address detection: the address is taken
      reply[4] = static_cast<u8>(0x80 | (unspecified ? 0 : 0x40) | 0x20);
      std::memcpy(reply + 8, target.b.data(), 16);
      reply[24] = 2;
      reply[25] = 1;
      std::memcpy(reply + 26, plan.mac.b.data(), 6);
      const Mac to = unspecified ? kAllNodesMac : packet.source_mac;
      if (to.is_group() && !unspecified) return true;
      wire_.send_icmp(queue, target, unspecified ? kAllNodes : packet.source, reply, 255, &to);
      return true;
    }
    case 136: {  // neighbour advertisement
      if (m.size() < 24) return true;
      const Ip target = Ip::from_v6_bytes(m.data() + 8);
      if (const auto mac = lladdr(24, 2); mac && !target.is_v4()) learn(target, *mac);
      return true;
    }
    case 134:
    case 137: return true;
    default: return false;
  }
}

void Configuration::on_time() {
  if (wire_.now() < next_advertisement_) return;
  next_advertisement_ = wire_.now() + kAdvertiseMs;
  advertise(0, kAllNodes, kAllNodesMac);
}

}  // namespace ring3::net
