#include "net/packet/packet.hpp"

#include "net/packet/checksum.hpp"

namespace ring3::net {

const char* to_string(Drop drop) {
  switch (drop) {
    case Drop::kNone: return "none";
    case Drop::kTruncated: return "truncated";
    case Drop::kMalformed: return "malformed";
    case Drop::kChecksum: return "checksum";
    case Drop::kAddress: return "address";
    case Drop::kOption: return "option";
    case Drop::kUnsupported: return "unsupported";
  }
  return "?";
}

namespace {

Drop parse_ip4(std::span<const u8> bytes, IpPacket& out) {
  if (bytes.size() < kIp4Header) return Drop::kTruncated;
  const u8* p = bytes.data();
  if (p[0] >> 4 != 4) return Drop::kMalformed;
  const std::size_t header = static_cast<std::size_t>(p[0] & 15) * 4;
  const std::size_t total = get16(p + 2);
  if (header < kIp4Header || total < header) return Drop::kMalformed;
  if (bytes.size() < total) return Drop::kTruncated;
  if (checksum(bytes.first(header)) != 0) return Drop::kChecksum;
  for (std::size_t i = kIp4Header; i < header;) {
    const u8 kind = p[i];
    if (kind == 0) break;
    if (kind == 1) {
      i++;
      continue;
    }
    if (i + 1 >= header || p[i + 1] < 2 || i + p[i + 1] > header) return Drop::kMalformed;
    if (kind == 131 || kind == 137) return Drop::kOption;  // loose and strict source route
    i += p[i + 1];
  }
  out.protocol = p[9];
  out.ttl = p[8];
  out.source = Ip::from_v4_bytes(p + 12);
  out.destination = Ip::from_v4_bytes(p + 16);
  out.whole = bytes.first(total);
  out.payload = out.whole.subspan(header);
  const u16 flags = get16(p + 6);
  out.fragment_offset = static_cast<u32>(flags & 0x1fff) * 8;
  out.more_fragments = (flags & 0x2000) != 0;
  out.fragment = out.more_fragments || out.fragment_offset != 0;
  out.fragment_id = get16(p + 4);
  return Drop::kNone;
}

Drop parse_ip6(std::span<const u8> bytes, IpPacket& out) {
  if (bytes.size() < kIp6Header) return Drop::kTruncated;
  const u8* p = bytes.data();
  if (p[0] >> 4 != 6) return Drop::kMalformed;
  const std::size_t total = kIp6Header + get16(p + 4);
  if (bytes.size() < total) return Drop::kTruncated;
  out.ttl = p[7];
  out.source = Ip::from_v6_bytes(p + 8);
  out.destination = Ip::from_v6_bytes(p + 24);
  if (out.source.is_v4() || out.destination.is_v4()) return Drop::kAddress;
  out.whole = bytes.first(total);
  u8 next = p[6];
  std::size_t at = kIp6Header;
  for (int i = 0;; i++) {
    if (next != kProtoHopByHop && next != kProtoRouting && next != kProtoFragment && next != kProtoDestOptions) break;
    if (i == 8) return Drop::kOption;
    if (total - at < 8) return Drop::kTruncated;
    const u8* h = p + at;
    if (next == kProtoFragment) {
      if (out.fragment) return Drop::kMalformed;
      const u16 field = get16(h + 2);
      out.fragment_offset = field & 0xfff8u;
      out.more_fragments = (field & 1) != 0;
      out.fragment = out.more_fragments || out.fragment_offset != 0;
      out.fragment_id = get32(h + 4);
      next = h[0];
      at += 8;
      if (out.fragment) break;  // what follows is a piece
      continue;
    }
    const std::size_t length = (static_cast<std::size_t>(h[1]) + 1) * 8;
    if (total - at < length) return Drop::kTruncated;
    if (next == kProtoRouting && h[3] != 0) return Drop::kOption;
    next = h[0];
    at += length;
  }
  out.protocol = next;
  out.payload = out.whole.subspan(at);
  return Drop::kNone;
}

}  // namespace

Drop parse_ip(std::span<const u8> frame, IpPacket& out) {
  out = IpPacket{};
  if (frame.size() < kEthHeader) return Drop::kTruncated;
  std::memcpy(out.destination_mac.b.data(), frame.data(), 6);
  std::memcpy(out.source_mac.b.data(), frame.data() + 6, 6);
  const u16 type = get16(frame.data() + 12);
  if (type == kEtherIp4) return parse_ip4(frame.subspan(kEthHeader), out);
  if (type == kEtherIp6) return parse_ip6(frame.subspan(kEthHeader), out);
  return Drop::kUnsupported;
}

Drop parse_tcp(std::span<const u8> segment, TcpSegment& out) {
  out = TcpSegment{};
  if (segment.size() < kTcpHeader) return Drop::kTruncated;
  const u8* p = segment.data();
  const std::size_t header = static_cast<std::size_t>(p[12] >> 4) * 4;
  if (header < kTcpHeader) return Drop::kMalformed;
  if (header > segment.size()) return Drop::kTruncated;
  out.source = get16(p);
  out.destination = get16(p + 2);
  out.seq = get32(p + 4);
  out.ack = get32(p + 8);
  out.flags = p[13];
  out.window = get16(p + 14);
  out.data = segment.subspan(header);
  for (std::size_t i = kTcpHeader; i < header;) {
    const u8 kind = p[i];
    if (kind == 0) break;
    if (kind == 1) {
      i++;
      continue;
    }
    if (i + 1 >= header || p[i + 1] < 2 || i + p[i + 1] > header) break;
    if (kind == 2 && p[i + 1] == 4) out.mss = get16(p + i + 2);
    if (kind == 3 && p[i + 1] == 3) out.window_scale = std::min<u8>(p[i + 2], 14);  // RFC 7323, 2.3
    i += p[i + 1];
  }
  return Drop::kNone;
}

Drop parse_udp(std::span<const u8> segment, UdpDatagram& out) {
  out = UdpDatagram{};
  if (segment.size() < kUdpHeader) return Drop::kTruncated;
  const std::size_t length = get16(segment.data() + 4);
  if (length < kUdpHeader) return Drop::kMalformed;
  if (length > segment.size()) return Drop::kTruncated;
  out.source = get16(segment.data());
  out.destination = get16(segment.data() + 2);
  out.data = segment.subspan(kUdpHeader, length - kUdpHeader);
  return Drop::kNone;
}

std::size_t put_headers(u8* out, const Mac& to, const Mac& from, const Ip& source, const Ip& destination, u8 protocol,
                        std::size_t length, u16 id, u16 fragment_flags, u8 ttl) {
  std::memcpy(out, to.b.data(), 6);
  std::memcpy(out + 6, from.b.data(), 6);
  u8* p = out + kEthHeader;
  if (source.is_v4()) {
    put16(out + 12, kEtherIp4);
    p[0] = 0x45;
    p[1] = 0;
    put16(p + 2, static_cast<u32>(kIp4Header + length));
    put16(p + 4, id);
    put16(p + 6, fragment_flags);
    p[8] = ttl;
    p[9] = protocol;
    put16(p + 10, 0);
    std::memcpy(p + 12, source.b.data() + 12, 4);
    std::memcpy(p + 16, destination.b.data() + 12, 4);
    put16(p + 10, checksum({p, kIp4Header}));
    return kEthHeader + kIp4Header;
  }
  put16(out + 12, kEtherIp6);
  put32(p, 0x60000000);
  put16(p + 4, static_cast<u32>(length));
  p[6] = protocol;
  p[7] = ttl;
  std::memcpy(p + 8, source.b.data(), 16);
  std::memcpy(p + 24, destination.b.data(), 16);
  return kEthHeader + kIp6Header;
}

}  // namespace ring3::net
