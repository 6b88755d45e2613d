#pragma once
#include <string>
#include <vector>

#include "base/result.hpp"
#include "net/packet/address.hpp"

namespace ring3::net {

/// The network the NAT shows the guest: that of QEMU's user mode, so that what people know holds.
struct Plan {
  static constexpr unsigned kBits4 = 24;
  static constexpr unsigned kBits6 = 64;
  Ip network4 = Ip::v4(10, 0, 2, 0);
  Ip gateway4 = Ip::v4(10, 0, 2, 2);   ///< reaches the host's 127.0.0.1
  Ip dns4 = Ip::v4(10, 0, 2, 3);       ///< port 53 reaches the host's resolvers
  Ip guest4 = Ip::v4(10, 0, 2, 15);    ///< the first DHCP lease; further MAC addresses get the next ones
  Ip broadcast4 = Ip::v4(10, 0, 2, 255);
  Ip network6 = Ip::v6(0xfec0, 0);
  Ip gateway6 = Ip::v6(0xfec0, 2);     ///< reaches the host's ::1
  Ip dns6 = Ip::v6(0xfec0, 3);
  Ip link_local = Ip::v6(0xfe80, 2);   ///< the router, of which the advertisements tell
  Mac mac{{0x52, 0x55, 0x0a, 0x00, 0x02, 0x02}};  ///< of all of these

  bool is_gateway(const Ip& ip) const { return ip == gateway4 || ip == gateway6 || ip == link_local; }
  bool is_dns(const Ip& ip) const { return ip == dns4 || ip == dns6; }
  bool is_ours(const Ip& ip) const { return is_gateway(ip) || is_dns(ip); }
  bool in_network(const Ip& ip) const { return ip.is_v4() ? ip.in(network4, 96 + kBits4) : ip.in(network6, kBits6); }
};

/// One port of the host that leads to one of the guest.
struct Forward {
  bool tcp = true;
  Endpoint host;       ///< what is listened on
  Ip guest;            ///< unspecified IPv6 (all zero): the plan's guest4
  u16 guest_port = 0;
  friend bool operator==(const Forward&, const Forward&) = default;
};

struct NatConfig {
  Plan plan;
  std::vector<Forward> forwards;
  std::vector<Endpoint> resolvers;  ///< of the host, in order; none: names are not resolved
  bool restrict_outgoing = false;   ///< only DHCP, neighbour discovery, ping of the gateway, and forwards
  u32 mtu = 1500;
  u32 max_tcp = 4096;               ///< connections; one more is refused with a reset
  u32 max_udp = 1024;               ///< flows; one more takes the place of the one idle longest
  u32 max_ping = 64;
  u64 max_buffer = u64{256} << 20;  ///< bytes kept for all connections together
};

/// "tcp:[HOSTADDR]:PORT-[GUESTADDR]:PORT", as QEMU's hostfwd and product.md's short form "tcp:2222:22".
/// HOSTADDR defaults to 127.0.0.1; IPv6 addresses stand in brackets. Errors: EINVAL, what is wrong.
Result<Forward> parse_forward(const std::string& text);

/// nameserver lines, at most three as the resolver library takes; port 53 each.
std::vector<Endpoint> parse_resolv_conf(const std::string& text);

}  // namespace ring3::net
