#include "net/packet/address.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdio>

namespace ring3::net {

std::optional<Mac> parse_mac(const std::string& text) {
  if (text.size() != 17) return std::nullopt;
  Mac mac;
  const auto digit = [](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
  };
  for (std::size_t i = 0; i < 6; i++) {
    const int high = digit(text[3 * i]);
    const int low = digit(text[3 * i + 1]);
    if (high < 0 || low < 0 || (i < 5 && text[3 * i + 2] != ':')) return std::nullopt;
    mac.b[i] = static_cast<u8>(high * 16 + low);
  }
  if (mac.is_group() || mac.is_zero()) return std::nullopt;
  return mac;
}

std::string to_string(const Mac& mac) {
  char text[18];
  std::snprintf(text, sizeof text, "%02x:%02x:%02x:%02x:%02x:%02x", mac.b[0], mac.b[1], mac.b[2], mac.b[3], mac.b[4], mac.b[5]);
  return text;
}

std::optional<Ip> parse_ip_text(const std::string& text) {
  u8 bytes[16];
  if (inet_pton(AF_INET, text.c_str(), bytes) == 1) return Ip::from_v4_bytes(bytes);
  if (inet_pton(AF_INET6, text.c_str(), bytes) == 1) return Ip::from_v6_bytes(bytes);
  return std::nullopt;
}

std::string to_string(const Ip& ip) {
  char text[INET6_ADDRSTRLEN] = "?";
  if (ip.is_v4()) inet_ntop(AF_INET, ip.b.data() + 12, text, sizeof text);
  else inet_ntop(AF_INET6, ip.b.data(), text, sizeof text);
  return text;
}

std::string to_string(const Endpoint& e) {
  return (e.ip.is_v4() ? to_string(e.ip) : "[" + to_string(e.ip) + "]") + ":" + std::to_string(e.port);
}

unsigned to_sockaddr(const Endpoint& e, sockaddr_storage& out) {
  std::memset(&out, 0, sizeof out);
  if (e.ip.is_v4()) {
    sockaddr_in in{};
    in.sin_family = AF_INET;
    in.sin_port = htons(e.port);
    std::memcpy(&in.sin_addr, e.ip.b.data() + 12, 4);
    std::memcpy(&out, &in, sizeof in);
    return sizeof in;
  }
  sockaddr_in6 in{};
  in.sin6_family = AF_INET6;
  in.sin6_port = htons(e.port);
  in.sin6_scope_id = e.scope;
  std::memcpy(&in.sin6_addr, e.ip.b.data(), 16);
  std::memcpy(&out, &in, sizeof in);
  return sizeof in;
}

std::optional<Endpoint> from_sockaddr(const sockaddr_storage& from) {
  Endpoint e;
  if (from.ss_family == AF_INET) {
    sockaddr_in in;
    std::memcpy(&in, &from, sizeof in);
    u8 bytes[4];
    std::memcpy(bytes, &in.sin_addr, 4);
    e.ip = Ip::from_v4_bytes(bytes);
    e.port = ntohs(in.sin_port);
    return e;
  }
  if (from.ss_family == AF_INET6) {
    sockaddr_in6 in;
    std::memcpy(&in, &from, sizeof in);
    std::memcpy(e.ip.b.data(), &in.sin6_addr, 16);  // a mapped address is our IPv4 form already
    e.port = ntohs(in.sin6_port);
    if (!e.ip.is_v4()) e.scope = in.sin6_scope_id;
    return e;
  }
  return std::nullopt;
}

}  // namespace ring3::net
