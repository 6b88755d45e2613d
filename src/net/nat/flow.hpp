#pragma once
#include <functional>
#include <optional>

#include "net/nat/config.hpp"
#include "net/nat/poller.hpp"

namespace ring3::net {

/// The two ends of a flow as the guest sees them.
struct FlowKey {
  Ip guest, remote;
  u16 guest_port = 0, remote_port = 0;
  friend bool operator==(const FlowKey&, const FlowKey&) = default;
};

struct FlowHash {
  u64 seed = 0;
  std::size_t operator()(const FlowKey& k) const {
    u64 w[4];
    std::memcpy(w, k.guest.b.data(), 16);
    std::memcpy(w + 2, k.remote.b.data(), 16);
    u64 h = seed ^ (static_cast<u64>(k.guest_port) << 16 | k.remote_port);
    for (const u64 v : w) h = Random::mix(h ^ v) + 0x9e3779b97f4a7c15;
    return h;
  }
};

/// Where on the host a destination of the guest's leads; `error` is set, as errno, when nowhere.
struct Route {
  Endpoint to;
  int error = 0;
};

/// `resolver`: which of the host's name servers stands for the plan's. EACCES for what the configuration forbids,
/// EHOSTUNREACH for addresses that lead nowhere: the guest's own network, loopback, group, link-local addresses
/// (which no router forwards: RFC 3927, 2.7; RFC 4291, 2.5.6), 0/8 and 240/4.
inline Route route_out(const NatConfig& config, const Ip& remote, u16 port, std::size_t resolver) {
  const Plan& plan = config.plan;
  if (config.restrict_outgoing) return {{}, EACCES};
  if (plan.is_dns(remote)) {
    if (port != 53 || config.resolvers.empty()) return {{}, ECONNREFUSED};
    return {config.resolvers[resolver % config.resolvers.size()], 0};
  }
  if (plan.is_gateway(remote)) return {{remote.is_v4() ? Ip::v4(127, 0, 0, 1) : Ip::v6(0, 1), port, 0}, 0};
  if (plan.in_network(remote) || remote.is_loopback() || remote.is_unspecified() || remote.is_multicast() || remote.is_link_local()) {
    return {{}, EHOSTUNREACH};
  }
  if (remote.is_v4() && (remote.as_v4() >> 24 == 0 || remote.as_v4() >> 28 == 15)) return {{}, EHOSTUNREACH};
  return {{remote, port, 0}, 0};
}

/// Who a peer on the host's side is to the guest: itself, or the gateway when it is the host or of the other family.
inline Ip seen_by_guest(const Plan& plan, const Ip& peer, const Ip& guest) {
  const Ip gateway = guest.is_v4() ? plan.gateway4 : plan.gateway6;
  if (peer.is_v4() != guest.is_v4() || peer.is_loopback() || peer.is_link_local() || peer.is_unspecified() || plan.in_network(peer)) return gateway;
  return peer;
}

}  // namespace ring3::net
