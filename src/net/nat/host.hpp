#pragma once
#include "base/unique_fd.hpp"
#include "net/packet/address.hpp"

namespace ring3::net {

/// What the NAT wants of the host's network: new sockets. Everything else it does with the descriptors themselves.
/// Tests and the fuzzer put their own in its place, so that no packet they make leaves the process.
class Host {
 public:
  virtual ~Host() = default;
  /// Non-blocking; connected or on the way. On failure an empty descriptor and errno.
  virtual UniqueFd connect_stream(const Endpoint& to) = 0;
  virtual UniqueFd connect_datagram(const Endpoint& to) = 0;
  /// A connected ping socket (icmp(7), IPPROTO_ICMP datagrams).
  virtual UniqueFd connect_ping(const Ip& to) = 0;
};

class RealHost final : public Host {
 public:
  UniqueFd connect_stream(const Endpoint& to) override;
  UniqueFd connect_datagram(const Endpoint& to) override;
  UniqueFd connect_ping(const Ip& to) override;
};

}  // namespace ring3::net
