#include "net/nat/wire_out.hpp"

#include <cerrno>

#include "net/packet/checksum.hpp"

namespace ring3::net {

namespace {

constexpr std::size_t kMaxNeighbours = 256;
constexpr u32 kErrorsASecond = 200;

}  // namespace

void Wire::learn(const Ip& ip, const Mac& mac, u32 queue) {
  if (mac.is_group() || mac.is_zero()) return;
  for (Neighbour& n : neighbours_) {
    if (n.ip == ip) {
      n.mac = mac;
      n.queue = queue;
      n.seen = now_;
      // The one that speaks most stands first.
      if (&n != &neighbours_.front()) std::swap(n, neighbours_.front());
      return;
    }
  }
  if (neighbours_.size() >= kMaxNeighbours) {
    auto oldest = std::min_element(neighbours_.begin(), neighbours_.end(),
                                   [](const Neighbour& a, const Neighbour& b) { return a.seen < b.seen; });
    neighbours_.erase(oldest);
  }
  neighbours_.push_back({ip, mac, queue, now_});
}

std::optional<Mac> Wire::neighbour(const Ip& ip) const {
  for (const Neighbour& n : neighbours_) if (n.ip == ip) return n.mac;
  return std::nullopt;
}

void Wire::solicit(const Ip& ip) {
  if (last_solicit_ != 0 && now_ - last_solicit_ < 200) return;
  last_solicit_ = now_;
  if (ip.is_v4()) {
    u8 frame[kEthHeader + 28] = {};
    std::memcpy(frame, kBroadcastMac.b.data(), 6);
    std::memcpy(frame + 6, plan().mac.b.data(), 6);
    put16(frame + 12, kEtherArp);
    u8* p = frame + kEthHeader;
    put16(p, 1);
    put16(p + 2, kEtherIp4);
    p[4] = 6;
    p[5] = 4;
    put16(p + 6, 1);
    std::memcpy(p + 8, plan().mac.b.data(), 6);
    std::memcpy(p + 14, plan().gateway4.b.data() + 12, 4);
    std::memcpy(p + 24, ip.b.data() + 12, 4);
    send_raw(0, frame);
    return;
  }
  // RFC 4861, 4.3, to the solicited-node group.
  u8 message[32] = {};
  message[0] = 135;
  std::memcpy(message + 8, ip.b.data(), 16);
  message[24] = 1;
  message[25] = 1;
  std::memcpy(message + 26, plan().mac.b.data(), 6);
  Ip group = Ip::v6(0xff02, 0);
  group.b[11] = 1;
  group.b[12] = 0xff;
  std::memcpy(group.b.data() + 13, ip.b.data() + 13, 3);
  const Mac to{{0x33, 0x33, 0xff, ip.b[13], ip.b[14], ip.b[15]}};
  send_icmp(0, plan().link_local, group, message, 255, &to);
}

bool Wire::put(u32 queue, std::span<const iovec> message) {
  if (blocked(queue) || !sink_.send(queue, message)) {
    blocked_[queue & 63] = true;
    stats_.no_room++;
    return false;
  }
  stats_.frames_out++;
  return true;
}

bool Wire::send_raw(u32 queue, std::span<const u8> frame) {
  VnetHeader vnet;
  const iovec message[2] = {{&vnet, sizeof vnet}, {const_cast<u8*>(frame.data()), frame.size()}};
  return put(queue, message);
}

bool Wire::send_segment(u32 queue, const Ip& source, const Ip& destination, u8 protocol, std::span<u8> header,
                        std::size_t checksum_at, std::span<const iovec> data, u16 gso_size) {
  const auto to = neighbour(destination);
  if (!to) {  // lost on the way, like any packet to a host that is not there
    solicit(destination);
    return true;
  }
  std::size_t length = header.size();
  for (const iovec& piece : data) length += piece.iov_len;
  u8 front[kEthHeader + kIp6Header];
  const std::size_t front_size = put_headers(front, *to, plan().mac, source, destination, protocol, length, id_++);
  VnetHeader vnet;
  const u64 pseudo = pseudo_sum(source, destination, protocol, length);
  put16(header.data() + checksum_at, 0);
  if (offloads_.checksum) {
    vnet.flags = VnetHeader::kNeedsCsum;
    vnet.csum_start = static_cast<u16>(front_size);
    vnet.csum_offset = static_cast<u16>(checksum_at);
    put16(header.data() + checksum_at, sum_fold(pseudo));
  } else {
    u64 sum = sum_add(pseudo, header);
    bool odd = false;
    for (const iovec& piece : data) {
      u64 part = sum_fold(sum_add(0, {static_cast<const u8*>(piece.iov_base), piece.iov_len}));
      // A piece that begins at an odd byte counts with its bytes swapped (RFC 1071, 2 B).
      if (odd) part = (part >> 8 | part << 8) & 0xffff;
      sum += part;
      odd ^= (piece.iov_len & 1) != 0;
    }
    put16(header.data() + checksum_at, static_cast<u16>(~sum_fold(sum)));
  }
  if (gso_size != 0) {
    vnet.gso_type = source.is_v4() ? VnetHeader::kGsoTcp4 : VnetHeader::kGsoTcp6;
    vnet.gso_size = gso_size;
    vnet.hdr_len = static_cast<u16>(front_size + header.size());
  }
  iovec message[5];
  std::size_t n = 0;
  message[n++] = {&vnet, sizeof vnet};
  message[n++] = {front, front_size};
  message[n++] = {header.data(), header.size()};
  for (const iovec& piece : data) if (n < 5) message[n++] = piece;
  return put(queue, {message, n});
}

bool Wire::send_fragments(u32 queue, const Ip& source, const Ip& destination, u8 protocol, std::span<const u8> segment, const Mac& to) {
  const bool v4 = source.is_v4();
  const std::size_t most = v4 ? config_.mtu - kIp4Header : config_.mtu - kIp6Header;
  VnetHeader vnet;
  u8 front[kEthHeader + kIp6Header + 8];
  if (segment.size() <= most) {
    const std::size_t n = put_headers(front, to, plan().mac, source, destination, protocol, segment.size(), id_++);
    const iovec message[3] = {{&vnet, sizeof vnet}, {front, n}, {const_cast<u8*>(segment.data()), segment.size()}};
    return put(queue, message);
  }
  const std::size_t piece = (v4 ? most : most - 8) & ~std::size_t{7};
  const u16 id = id_++;
  for (std::size_t at = 0; at < segment.size(); at += piece) {
    const std::size_t length = std::min(piece, segment.size() - at);
    const bool more = at + length < segment.size();
    std::size_t n;
    if (v4) {
      n = put_headers(front, to, plan().mac, source, destination, protocol, length, id,
                      static_cast<u16>(at / 8 | (more ? 0x2000 : 0)));
    } else {
      n = put_headers(front, to, plan().mac, source, destination, kProtoFragment, length + 8);
      front[n] = protocol;
      front[n + 1] = 0;
      put16(front + n + 2, static_cast<u32>(at) | (more ? 1 : 0));
      put32(front + n + 4, id);
      n += 8;
    }
    const iovec message[3] = {{&vnet, sizeof vnet}, {front, n}, {const_cast<u8*>(segment.data()) + at, length}};
    if (!put(queue, message)) return false;
  }
  return true;
}

bool Wire::send_udp(u32 queue, const Endpoint& source, const Endpoint& destination, std::span<const u8> data, const Mac* to) {
  if (data.size() > 65507) return false;
  std::optional<Mac> found;
  if (to == nullptr) {
    found = neighbour(destination.ip);
    if (!found) {
      solicit(destination.ip);
      return false;
    }
    to = &*found;
  }
  std::vector<u8> segment(kUdpHeader + data.size());
  put16(segment.data(), source.port);
  put16(segment.data() + 2, destination.port);
  put16(segment.data() + 4, static_cast<u32>(segment.size()));
  if (!data.empty()) std::memcpy(segment.data() + kUdpHeader, data.data(), data.size());
  u16 sum = transport_checksum(source.ip, destination.ip, kProtoUdp, segment);
  if (sum == 0) sum = 0xffff;
  put16(segment.data() + 6, sum);
  return send_fragments(queue, source.ip, destination.ip, kProtoUdp, segment, *to);
}

bool Wire::send_icmp(u32 queue, const Ip& source, const Ip& destination, std::span<u8> message, u8 ttl, const Mac* to) {
  std::optional<Mac> found;
  if (to == nullptr) {
    found = neighbour(destination);
    if (!found) return false;
    to = &*found;
  }
  put16(message.data() + 2, 0);
  const bool v4 = source.is_v4();
  put16(message.data() + 2, v4 ? checksum(message) : transport_checksum(source, destination, kProtoIcmp6, message));
  if (ttl != 64) {  // neighbour discovery: short, and never in pieces
    u8 front[kEthHeader + kIp6Header];
    const std::size_t n = put_headers(front, *to, plan().mac, source, destination, v4 ? kProtoIcmp : kProtoIcmp6,
                                      message.size(), id_++, 0x4000, ttl);
    VnetHeader vnet;
    const iovec parts[3] = {{&vnet, sizeof vnet}, {front, n}, {message.data(), message.size()}};
    return put(queue, parts);
  }
  return send_fragments(queue, source, destination, v4 ? kProtoIcmp : kProtoIcmp6, message, *to);
}

void Wire::send_error(u32 queue, const IpPacket& packet, u8 type, u8 code) {
  // RFC 1122, 3.2.2: never about an ICMP error, a group address or a later fragment.
  if (packet.destination.is_multicast() || packet.destination == plan().broadcast4) return;
  if (packet.fragment_offset != 0 || packet.whole.empty() || packet.source.is_unspecified()) return;
  if (packet.protocol == kProtoIcmp && (packet.payload.empty() || packet.payload[0] != 8)) return;
  if (packet.protocol == kProtoIcmp6 && (packet.payload.empty() || packet.payload[0] < 128)) return;
  if (now_ / 1000 != error_second_) {
    error_second_ = now_ / 1000;
    errors_ = 0;
  }
  if (++errors_ > kErrorsASecond) return;
  const bool v4 = packet.source.is_v4();
  u8 message[8 + 1024] = {};
  message[0] = type;
  message[1] = code;
  const std::size_t quoted = std::min<std::size_t>(packet.whole.size(), v4 ? 548 : 1024);
  std::memcpy(message + 8, packet.whole.data(), quoted);
  send_icmp(queue, v4 ? plan().gateway4 : plan().gateway6, packet.source, {message, 8 + quoted});
}

void Wire::send_unreachable(u32 queue, const IpPacket& packet, int error) {
  const bool v4 = packet.source.is_v4();
  const u8 type = v4 ? 3 : 1;
  u8 code;
  switch (error) {
    case ECONNREFUSED: code = v4 ? 3 : 4; break;                   // port
    case EHOSTUNREACH: code = v4 ? 1 : 3; break;                   // host, address
    case EACCES: case EPERM: code = v4 ? 13 : 1; break;            // prohibited
    default: code = 0; break;                                      // network, no route
  }
  send_error(queue, packet, type, code);
}

}  // namespace ring3::net
