#pragma once
#include <memory>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "net/backend/backend.hpp"
#include "vmm/machine/machine.hpp"


namespace ring3::control {

/// --vsock cid=N,socket=PATH; the order does not matter.
struct VsockOption {
  u32 cid = 0;
  std::string socket;
};
Result<VsockOption> parse_vsock_option(const std::string& text);

/// The back-ends of `ring3 run --net` and `--vsock`. They outlive a reset of the guest.
class Networks {
 public:
  /// Forks for user networks: before other threads are there and before guest memory is mapped.
  static Result<Networks> open(const std::vector<net::NetSpec>& specs, const std::string& vm);
  /// Adds a network card each, in order.
  void add_to(vmm::MachineConfig& config) const;

 private:
  struct Card {
    std::shared_ptr<net::Link> link;
    std::shared_ptr<net::PcapWriter> capture;
    net::Mac mac;
    u16 mtu;
  };
  std::vector<Card> cards_;
};

/// Opens the socket and adds the device.
Status add_vsock(const VsockOption& option, vmm::MachineConfig& config);

}  // namespace ring3::control
