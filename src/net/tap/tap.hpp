#pragma once
#include <memory>
#include <string>

#include "net/link/link.hpp"

namespace ring3::net {

/// A tap interface of the host's as a Link: for bridges, routing and speed. Making one takes CAP_NET_ADMIN; opening one
/// that was made for this user (ip tuntap add dev NAME mode tap user USER) does not.
class TapLink final : public Link {
 public:
  /// Opens `name`, or makes it when it is not there. Several queues want an interface made with multi_queue.
  /// Errors: EPERM and the like, with what to do about it.
  static Result<std::unique_ptr<TapLink>> open(const std::string& name, u32 queues);

  bool send(u32 queue, std::span<const iovec> message) override;
  ssize_t receive(u32 queue, std::span<iovec> message) override;
  Status set_offloads(const Offloads& offloads) override;
  Status set_active_queues(u32 count) override;
  const std::string& name() const { return name_; }

 private:
  TapLink(std::vector<UniqueFd> fds, std::string name) : Link(std::move(fds)), name_(std::move(name)), attached_(queues(), true) {}
  std::string name_;
  std::vector<bool> attached_;
};

}  // namespace ring3::net
