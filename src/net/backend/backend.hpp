#pragma once
#include <memory>
#include <string>

#include "base/result.hpp"
#include "net/capture/pcap.hpp"
#include "net/link/link.hpp"
#include "net/nat/config.hpp"

namespace ring3::net {

/// One --net option, taken apart.
struct NetSpec {
  enum class Kind { kUser, kTap, kNone };
  Kind kind = Kind::kUser;
  std::vector<Forward> forwards;   ///< user
  bool restrict_outgoing = false;  ///< user
  std::string interface;           ///< tap
  std::string capture;             ///< path of a pcap file, or empty
  std::optional<Mac> mac;
  u32 queues = 1;
  u16 mtu = 1500;
};

/// "user[,hostfwd=…][,restrict=on]", "tap,ifname=NAME", "none"; and for both kinds pcap=FILE, mac=…, queues=N, mtu=N.
/// Errors: EINVAL, one line.
Result<NetSpec> parse_net(const std::string& text);

struct Backend {
  std::unique_ptr<Link> link;
  std::shared_ptr<PcapWriter> capture;  ///< or null
  Mac mac;
  u16 mtu = 1500;
};
/// Opens it; of kind kUser or kTap. `vm` and `index` give a card without a mac= its address, the same in every run.
/// The user kind forks: see NatLink::start.
Result<Backend> open_backend(const NetSpec& spec, const std::string& vm, u32 index);

/// 52:54:00 and three bytes that follow from the VM's name and the card's number.
Mac default_mac(const std::string& vm, u32 index);

}  // namespace ring3::net
