#pragma once
#include <algorithm>
#include <array>
#include <compare>
#include <cstring>
#include <optional>
#include <string>

#include "base/types.hpp"

struct sockaddr_storage;

/// Addresses of the network, as values.
namespace ring3::net {

struct Mac {
  std::array<u8, 6> b{};
  friend auto operator<=>(const Mac&, const Mac&) = default;
  bool is_group() const { return (b[0] & 1) != 0; }
  bool is_zero() const { return b == std::array<u8, 6>{}; }
};
inline constexpr Mac kBroadcastMac{{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}};

/// "52:54:00:12:34:56"; nothing when it is something else or a group address.
std::optional<Mac> parse_mac(const std::string& text);
std::string to_string(const Mac& mac);

/// An IPv4 or IPv6 address. IPv4 is kept as ::ffff:a.b.c.d, which no packet may carry as an IPv6 address
/// (parse_ip refuses it), so the two families never meet.
struct Ip {
  std::array<u8, 16> b{};
  friend auto operator<=>(const Ip&, const Ip&) = default;

  static constexpr Ip v4(u32 host_order) {
    Ip ip;
    ip.b[10] = ip.b[11] = 0xff;
    for (int i = 0; i < 4; i++) ip.b[static_cast<std::size_t>(12 + i)] = static_cast<u8>(host_order >> (24 - 8 * i));
    return ip;
  }
  static constexpr Ip v4(u8 a, u8 b, u8 c, u8 d) {
    return v4(static_cast<u32>(a) << 24 | static_cast<u32>(b) << 16 | static_cast<u32>(c) << 8 | d);
  }
  /// From sixteen groups' worth of bytes: the first `n` given, the last one separately.
  static constexpr Ip v6(u16 first, u8 last) {
    Ip ip;
    ip.b[0] = static_cast<u8>(first >> 8);
    ip.b[1] = static_cast<u8>(first);
    ip.b[15] = last;
    return ip;
  }
  static Ip from_v4_bytes(const u8* p) {
    Ip ip = v4(0);
    std::memcpy(ip.b.data() + 12, p, 4);
    return ip;
  }
  static Ip from_v6_bytes(const u8* p) {
    Ip ip;
    std::memcpy(ip.b.data(), p, 16);
    return ip;
  }

  bool is_v4() const {
    for (std::size_t i = 0; i < 10; i++) if (b[i] != 0) return false;
    return b[10] == 0xff && b[11] == 0xff;
  }
  u32 as_v4() const { return static_cast<u32>(b[12]) << 24 | static_cast<u32>(b[13]) << 16 | static_cast<u32>(b[14]) << 8 | b[15]; }
  bool is_unspecified() const { return is_v4() ? as_v4() == 0 : b == std::array<u8, 16>{}; }
  bool is_multicast() const { return is_v4() ? (as_v4() >> 28) == 0xe : b[0] == 0xff; }
  /// 169.254.0.0/16 and fe80::/10.
  bool is_link_local() const {
    return is_v4() ? (as_v4() >> 16) == 0xa9fe : (b[0] == 0xfe && (b[1] & 0xc0) == 0x80);
  }
  /// 127.0.0.0/8 and ::1.
  bool is_loopback() const {
    if (is_v4()) return (as_v4() >> 24) == 127;
    for (std::size_t i = 0; i < 15; i++) if (b[i] != 0) return false;
    return b[15] == 1;
  }
  /// The first `bits` bits are those of `network`.
  bool in(const Ip& network, unsigned bits) const {
    const unsigned whole = bits / 8;
    if (std::memcmp(b.data(), network.b.data(), whole) != 0) return false;
    if (bits % 8 == 0) return true;
    const u8 mask = static_cast<u8>(0xff << (8 - bits % 8));
    return ((b[whole] ^ network.b[whole]) & mask) == 0;
  }
};

std::optional<Ip> parse_ip_text(const std::string& text);
std::string to_string(const Ip& ip);

struct Endpoint {
  Ip ip;
  u16 port = 0;
  u32 scope = 0;  ///< interface index of a link-local IPv6 address of the host; else 0
  friend auto operator<=>(const Endpoint&, const Endpoint&) = default;
};
std::string to_string(const Endpoint& endpoint);

/// As the socket calls want it; the length is returned.
unsigned to_sockaddr(const Endpoint& endpoint, sockaddr_storage& out);
/// Mapped IPv4 becomes IPv4. Nothing for other families.
std::optional<Endpoint> from_sockaddr(const sockaddr_storage& in);

}  // namespace ring3::net
