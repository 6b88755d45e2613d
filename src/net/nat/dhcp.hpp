#pragma once
#include <vector>

#include "net/nat/wire_out.hpp"

namespace ring3::net {

/// Addresses for the guest: DHCPv4 (RFC 2131), ARP (RFC 826), router advertisements and neighbour discovery
/// (RFC 4861, 8106), and DHCPv6 for what stands beside an address (RFC 8415, information requests).
///
/// Leases: the plan's guest4 for the first MAC address that asks, the following addresses for up to fifteen more;
///         past that nobody is answered. A lease is for ever in practice: a day, and renewed.
/// Trust:  the guest's.
class Configuration {
 public:
  explicit Configuration(Wire& wire) : wire_(wire) {}

  void arp(std::span<const u8> frame, u32 queue);
  /// A datagram to port 67.
  void dhcp4(const IpPacket& packet, const UdpDatagram& datagram, u32 queue);
  /// A datagram to port 547 of ff02::1:2 or the router.
  void dhcp6(const IpPacket& packet, const UdpDatagram& datagram, u32 queue);
  /// Router and neighbour solicitations, of hop limit 255. Whether it was one.
  bool discovery(const IpPacket& packet, u32 queue);

  void on_time();
  u64 deadline() const { return next_advertisement_; }

 private:
  std::optional<Ip> lease(const Mac& mac);
  void advertise(u32 queue, const Ip& to, const Mac& mac);

  Wire& wire_;
  std::vector<Mac> leases_;
  u64 next_advertisement_ = ~u64{0};
};

}  // namespace ring3::net
