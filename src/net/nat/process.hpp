#pragma once
#include <memory>
#include <string>
#include <vector>

#include "net/link/link.hpp"
#include "net/nat/config.hpp"
#include "net/nat/udp.hpp"

namespace ring3::net {

/// The user-mode network in a process of its own, jailed (docs/network.md), as a Link.
///
/// start() forks: call it before guest memory is mapped and, best, before there are threads, so that the child has
/// nothing of value. The child holds its ends of the link and the forwarded ports, nothing else, and ends when the
/// link does; the destructor closes it and waits.
/// Should the child die (its jail kills it when it is taken over), receive() reports the link's end.
class NatLink final : public Link {
 public:
  /// Binds the forwards' ports, reads the host's resolvers unless config.resolvers has some, forks.
  /// Returns when the child is jailed. Errors: EADDRINUSE and the like, with the port in the message; what the jail met.
  static Result<std::unique_ptr<NatLink>> start(NatConfig config, u32 queues);
  ~NatLink() override;

  bool send(u32 queue, std::span<const iovec> message) override;
  ssize_t receive(u32 queue, std::span<iovec> message) override;
  Status set_offloads(const Offloads& offloads) override;

  bool takes_udp_segments() const override { return true; }

  int process() const { return process_; }

 private:
  NatLink(std::vector<UniqueFd> fds, int process) : Link(std::move(fds)), process_(process) {}
  int process_;
};

/// Opens the ports of `forwards`.
Result<std::vector<Listener>> open_listeners(const std::vector<Forward>& forwards);

/// The child's work: serves `links` until their other ends are closed. Returns its exit status.
int serve_nat(NatConfig config, std::vector<UniqueFd> links, std::vector<Listener> listeners, bool jailed);

}  // namespace ring3::net
