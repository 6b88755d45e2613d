#include "net/backend/backend.hpp"

#include "net/nat/process.hpp"
#include "net/tap/tap.hpp"

namespace ring3::net {

namespace {

Result<u32> number(const std::string& key, const std::string& text, u32 least, u32 most) {
  u32 v = 0;
  bool good = !text.empty() && text.size() <= 9;
  for (const char c : text) {
    good = good && c >= '0' && c <= '9';
    if (good) v = v * 10 + static_cast<u32>(c - '0');
  }
  if (!good || v < least || v > most) {
    return Error::of(EINVAL, "--net: " + key + "=" + text + " will not do: " + std::to_string(least) + " to " + std::to_string(most));
  }
  return v;
}

}  // namespace

Result<NetSpec> parse_net(const std::string& text) {
  NetSpec spec;
  std::size_t at = 0;
  bool first = true;
  while (at <= text.size()) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, comma - at);
    at = comma + 1;
    if (first) {
      first = false;
      if (word == "user") spec.kind = NetSpec::Kind::kUser;
      else if (word == "tap") spec.kind = NetSpec::Kind::kTap;
      else if (word == "none") spec.kind = NetSpec::Kind::kNone;
      else return Error::of(EINVAL, "--net: there is no '" + word + "'; there are user, tap and none");
      continue;
    }
    const std::size_t equals = word.find('=');
    const std::string key = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    const bool user = spec.kind == NetSpec::Kind::kUser;
    if (key == "hostfwd" && user) {
      auto forward = parse_forward(value);
      if (!forward) return Error::of(EINVAL, "--net: " + forward.error().message);
      spec.forwards.push_back(*forward);
    } else if (key == "restrict" && user) {
      if (value != "on" && value != "off") return Error::of(EINVAL, "--net: restrict= wants on or off");
      spec.restrict_outgoing = value == "on";
    } else if (key == "ifname" && spec.kind == NetSpec::Kind::kTap) {
      spec.interface = value;
    } else if (spec.kind == NetSpec::Kind::kNone) {
      return Error::of(EINVAL, "--net none takes no options");
    } else if (key == "pcap") {
      if (value.empty()) return Error::of(EINVAL, "--net: pcap= wants the name of a file");
      spec.capture = value;
    } else if (key == "mac") {
      spec.mac = parse_mac(value);
      if (!spec.mac) return Error::of(EINVAL, "--net: mac=" + value + " is no address of a card, such as 52:54:00:12:34:56");
    } else if (key == "queues") {
      auto n = number(key, value, 1, 8);
      if (!n) return n.error();
      spec.queues = *n;
    } else if (key == "mtu") {
      auto n = number(key, value, 1280, user ? 1500 : 65535);
      if (!n) return n.error();
      spec.mtu = static_cast<u16>(*n);
    } else {
      return Error::of(EINVAL, "--net: there is no '" + key + "' for " + (user ? "user; there are hostfwd, restrict" : "tap; there are ifname") +
                                   ", pcap, mac, queues and mtu");
    }
  }
  if (spec.kind == NetSpec::Kind::kTap && spec.interface.empty()) return Error::of(EINVAL, "--net tap wants ifname=NAME");
  return spec;
}

Mac default_mac(const std::string& vm, u32 index) {
  u64 h = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : vm) h = (h ^ static_cast<u8>(c)) * 0x100000001b3;
  h = (h ^ index) * 0x100000001b3;
  h ^= h >> 32;
  return Mac{{0x52, 0x54, 0x00, static_cast<u8>(h), static_cast<u8>(h >> 8), static_cast<u8>(h >> 16)}};
}

Result<Backend> open_backend(const NetSpec& spec, const std::string& vm, u32 index) {
  Backend backend;
  backend.mac = spec.mac.value_or(default_mac(vm, index));
  backend.mtu = spec.mtu;
  if (!spec.capture.empty()) {
    auto capture = PcapWriter::create(spec.capture);
    if (!capture) return capture.error();
    backend.capture = std::move(*capture);
  }
  if (spec.kind == NetSpec::Kind::kTap) {
    auto link = TapLink::open(spec.interface, spec.queues);
    if (!link) return link.error();
    backend.link = std::move(*link);
    return backend;
  }
  NatConfig config;
  config.forwards = spec.forwards;
  config.restrict_outgoing = spec.restrict_outgoing;
  config.mtu = spec.mtu;
  auto link = NatLink::start(std::move(config), spec.queues);
  if (!link) return link.error();
  backend.link = std::move(*link);
  return backend;
}

}  // namespace ring3::net
