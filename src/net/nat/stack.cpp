#include "net/nat/stack.hpp"

#include <sys/socket.h>

#include <cerrno>

#include "net/packet/checksum.hpp"

namespace ring3::net {

namespace {

NatConfig with_targets(NatConfig config, std::vector<Listener>& listeners) {
  for (Listener& l : listeners) {
    if (l.forward.guest == Ip{}) l.forward.guest = config.plan.guest4;
  }
  return config;
}

}  // namespace

Stack::Stack(NatConfig config, FrameSink& sink, Host& host, std::vector<Listener> listeners, u64 seed)
    : config_(with_targets(std::move(config), listeners)), wire_(config_, sink), configuration_(wire_),
      tcp_(wire_, poller_, host, seed), udp_(wire_, poller_, host, Random::mix(seed)), listeners_(std::move(listeners)) {
  for (std::size_t i = 0; i < listeners_.size(); i++) {
    poller_.add(listeners_[i].fd.get(), {Token::kListener, static_cast<u32>(i), 0}, EPOLLIN);
  }
}

void Stack::receive(u32 queue, std::span<const u8> message) {
  if (message.size() == kControlSize && message[0] == kControl) {
    if (message[1] == kSetOffloads) {
      const u8 bits = message[2];
      wire_.set_offloads({(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, false, (bits & 8) != 0});
    }
    return;
  }
  if (message.size() < kVnetHeader + kEthHeader) return;
  wire_.stats().frames_in++;
  VnetHeader vnet;
  std::memcpy(&vnet, message.data(), sizeof vnet);
  const Drop drop = frame(queue, message.subspan(kVnetHeader), vnet);
  if (drop != Drop::kNone) {
    wire_.stats().dropped++;
    wire_.stats().drops[static_cast<std::size_t>(drop)]++;
  }
}

Drop Stack::frame(u32 queue, std::span<const u8> frame, const VnetHeader& vnet) {
  Mac to;
  std::memcpy(to.b.data(), frame.data(), 6);
  const Plan& plan = config_.plan;
  if (to != plan.mac && !to.is_group()) return Drop::kAddress;
  if (get16(frame.data() + 12) == kEtherArp) {
    configuration_.arp(frame, queue);
    return Drop::kNone;
  }
  IpPacket packet;
  if (const Drop drop = parse_ip(frame, packet); drop != Drop::kNone) return drop;
  if (packet.source_mac.is_group() || packet.source_mac.is_zero()) return Drop::kAddress;
  const bool vouched = (vnet.flags & (VnetHeader::kNeedsCsum | VnetHeader::kDataValid)) != 0;
  const u16 udp_gso = (vnet.gso_type & ~VnetHeader::kGsoEcn) == VnetHeader::kGsoUdpL4 ? vnet.gso_size : static_cast<u16>(0);
  if (packet.fragment) {
    IpPacket whole;
    if (vouched || !reassembly_.add(packet, wire_.now(), &whole)) return Drop::kNone;
    return ip(queue, whole, false, 0);
  }
  return ip(queue, packet, vouched, udp_gso);
}

Drop Stack::ip(u32 queue, const IpPacket& packet, bool vouched, u16 udp_gso) {
  const Plan& plan = config_.plan;
  const Ip& source = packet.source;
  const bool v4 = source.is_v4();

  // Before an address is there: DHCP and neighbour discovery.
  if (packet.protocol == kProtoUdp) {
    UdpDatagram d;
    if (const Drop drop = parse_udp(packet.payload, d); drop != Drop::kNone) return drop;
    const bool has_sum = get16(packet.payload.data() + 6) != 0;
    if (!has_sum && !v4) return Drop::kChecksum;
    if (!vouched && has_sum &&
        transport_checksum(source, packet.destination, kProtoUdp, packet.payload.first(kUdpHeader + d.data.size())) != 0) {
      return Drop::kChecksum;
    }
    if (v4 && d.destination == 67 && d.source == 68 && (packet.destination == Ip::v4(0xffffffff) || packet.destination == plan.gateway4)) {
      configuration_.dhcp4(packet, d, queue);
      return Drop::kNone;
    }
    if (!v4 && d.destination == 547 && d.source == 546) {
      configuration_.dhcp6(packet, d, queue);
      return Drop::kNone;
    }
  }
  if (packet.protocol == kProtoIcmp6 && !v4) {
    if (packet.payload.size() < 8) return Drop::kTruncated;
    if (!vouched && transport_checksum(source, packet.destination, kProtoIcmp6, packet.payload) != 0) return Drop::kChecksum;
    if (configuration_.discovery(packet, queue)) return Drop::kNone;
  }

  const bool own = plan.in_network(source) && !plan.is_ours(source) && source != plan.broadcast4 && source != plan.network4;
  const bool local = !v4 && source.is_link_local() && source != plan.link_local && plan.is_ours(packet.destination);
  if (!own && !local) return Drop::kAddress;
  if (packet.destination.is_multicast() || packet.destination == plan.broadcast4 || packet.destination == Ip::v4(0xffffffff)) {
    return Drop::kNone;  // nobody else is there to hear it
  }
  wire_.learn(source, packet.source_mac, queue);
  if (packet.ttl <= 1 && !plan.is_ours(packet.destination)) {
    wire_.send_error(queue, packet, v4 ? 11 : 3, 0);
    return Drop::kNone;
  }

  switch (packet.protocol) {
    case kProtoTcp: {
      TcpSegment s;
      if (const Drop drop = parse_tcp(packet.payload, s); drop != Drop::kNone) return drop;
      if (!vouched && transport_checksum(source, packet.destination, kProtoTcp, packet.payload) != 0) return Drop::kChecksum;
      tcp_.segment(packet, s, queue);
      return Drop::kNone;
    }
    case kProtoUdp: {
      UdpDatagram d;
      if (const Drop drop = parse_udp(packet.payload, d); drop != Drop::kNone) return drop;
      udp_.datagram(packet, d, queue, udp_gso);
      return Drop::kNone;
    }
    case kProtoIcmp:
      if (!v4) return Drop::kUnsupported;
      if (packet.payload.size() < 8) return Drop::kTruncated;
      if (checksum(packet.payload) != 0) return Drop::kChecksum;
      if (packet.payload[0] == 8 && packet.payload[1] == 0) udp_.echo(packet, packet.payload, queue);
      return Drop::kNone;
    case kProtoIcmp6:
      if (v4) return Drop::kUnsupported;
      if (packet.payload[0] == 128 && packet.payload[1] == 0) udp_.echo(packet, packet.payload, queue);
      return Drop::kNone;
    default:
      wire_.send_error(queue, packet, v4 ? 3 : 4, v4 ? 2 : 1);  // protocol unreachable, unknown next header
      return Drop::kUnsupported;
  }
}

void Stack::host_event(Token token, u32 events) {
  switch (token.kind) {
    case Token::kLink: return;
    case Token::kTcp: tcp_.host_event(token.index, token.generation, events); return;
    case Token::kUdp:
    case Token::kPing: udp_.host_event(token.index, token.generation); return;
    case Token::kListener: break;
  }
  if (token.index >= listeners_.size()) return;
  Listener& l = listeners_[token.index];
  if (!l.forward.tcp) {
    udp_.arrived(l, token.index);
    return;
  }
  for (int i = 0; i < 64; i++) {
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    UniqueFd fd(::accept4(l.fd.get(), reinterpret_cast<sockaddr*>(&from), &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) return;
    const auto peer = from_sockaddr(from);
    if (peer) tcp_.accepted(std::move(fd), *peer, l.forward.guest, l.forward.guest_port);
  }
}

bool Stack::run() {
  tcp_.on_time();
  udp_.on_time();
  configuration_.on_time();
  return tcp_.run();
}

int Stack::timeout_ms() const {
  const u64 next = std::min({tcp_.deadline(), udp_.deadline(), configuration_.deadline()});
  if (next == ~u64{0}) return -1;
  if (next <= wire_.now()) return 0;
  return static_cast<int>(std::min<u64>(next - wire_.now(), 60'000));
}

}  // namespace ring3::net
