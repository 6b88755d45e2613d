#include "net/nat/config.hpp"

#include <net/if.h>

#include <sstream>

namespace ring3::net {

namespace {

bool parse_port(const std::string& text, u16* out) {
  if (text.empty() || text.size() > 5) return false;
  u32 v = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
    v = v * 10 + static_cast<u32>(c - '0');
  }
  if (v == 0 || v > 65535) return false;
  *out = static_cast<u16>(v);
  return true;
}

/// "[v6]:80", "1.2.3.4:80", ":80", "80". The address is left alone when there is none.
bool parse_side(const std::string& text, Ip* ip, u16* port) {
  const auto colon = text.rfind(':');
  if (colon == std::string::npos) return parse_port(text, port);
  std::string address = text.substr(0, colon);
  if (!parse_port(text.substr(colon + 1), port)) return false;
  if (address.empty()) return true;
  if (address.front() == '[') {
    if (address.back() != ']') return false;
    address = address.substr(1, address.size() - 2);
    const auto parsed = parse_ip_text(address);
    if (!parsed || parsed->is_v4()) return false;
    *ip = *parsed;
    return true;
  }
  const auto parsed = parse_ip_text(address);
  if (!parsed || !parsed->is_v4()) return false;
  *ip = *parsed;
  return true;
}

}  // namespace

Result<Forward> parse_forward(const std::string& text) {
  const auto bad = [&] {
    return Error::of(EINVAL, "hostfwd: '" + text + "' will not do: tcp|udp:[HOSTADDR]:PORT-[GUESTADDR]:PORT, such as tcp::2222-:22");
  };
  const auto colon = text.find(':');
  if (colon == std::string::npos) return bad();
  Forward f;
  const std::string kind = text.substr(0, colon);
  if (kind == "udp") f.tcp = false;
  else if (kind != "tcp") return bad();
  const std::string rest = text.substr(colon + 1);
  f.host.ip = Ip::v4(127, 0, 0, 1);
  std::size_t dash = std::string::npos;
  bool bracket = false;
  for (std::size_t i = 0; i < rest.size(); i++) {
    if (rest[i] == '[') bracket = true;
    else if (rest[i] == ']') bracket = false;
    else if (rest[i] == '-' && !bracket) {
      dash = i;
      break;
    }
  }
  if (dash == std::string::npos) {  // tcp:2222:22
    const auto middle = rest.find(':');
    if (middle == std::string::npos || !parse_port(rest.substr(0, middle), &f.host.port) ||
        !parse_port(rest.substr(middle + 1), &f.guest_port)) {
      return bad();
    }
    return f;
  }
  if (!parse_side(rest.substr(0, dash), &f.host.ip, &f.host.port)) return bad();
  if (!parse_side(rest.substr(dash + 1), &f.guest, &f.guest_port)) return bad();
  if (f.guest.is_multicast() || f.guest.is_loopback() || (f.guest.is_v4() && f.guest.is_unspecified())) return bad();
  if (f.host.ip.is_multicast()) return bad();
  return f;
}

std::vector<Endpoint> parse_resolv_conf(const std::string& text) {
  std::vector<Endpoint> found;
  std::istringstream lines(text);
  std::string line;
  while (found.size() < 3 && std::getline(lines, line)) {
    std::istringstream words(line);
    std::string key, address;
    if (!(words >> key >> address) || key != "nameserver") continue;
    Endpoint e;
    e.port = 53;
    if (const auto percent = address.find('%'); percent != std::string::npos) {
      e.scope = ::if_nametoindex(address.substr(percent + 1).c_str());
      address.resize(percent);
    }
    const auto ip = parse_ip_text(address);
    if (!ip || ip->is_multicast()) continue;
    e.ip = ip->is_unspecified() ? (ip->is_v4() ? Ip::v4(127, 0, 0, 1) : Ip::v6(0, 1)) : *ip;
    found.push_back(e);
  }
  return found;
}

}  // namespace ring3::net
