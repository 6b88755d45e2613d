#pragma once
#include <sys/uio.h>

#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "net/packet/wire.hpp"

namespace ring3::net {

/// What the guest's driver takes and gives beyond plain frames: virtio's feature negotiation, seen from the link.
struct Offloads {
  bool checksum = false;  ///< the guest takes frames whose checksum is still to be completed
  bool tcp4 = false;      ///< and TCP segments larger than its MTU
  bool tcp6 = false;
  bool ecn = false;       ///< with ECN among their flags
  bool udp = false;       ///< and UDP in one piece that stands for several datagrams (USO)
  friend bool operator==(const Offloads&, const Offloads&) = default;
};

/// A network back-end as a network device sees it: one descriptor a queue, over which whole frames travel, each
/// behind a VnetHeader, one message a frame. A tap device is one, and a SOCK_SEQPACKET pair to the NAT.
///
/// Frames *to* the link may always carry partial checksums and TCP segments of up to 64 KiB; frames *from* it carry
/// them as far as set_offloads() allowed.
/// Threading: send and receive on one thread a queue; set_offloads on any.
/// Trust:     what is received comes from the network, and from the NAT's process, which may have fallen to the guest.
class Link {
 public:
  virtual ~Link() = default;

  u32 queues() const { return static_cast<u32>(fds_.size()); }
  /// Non-blocking, for poll: readable when receive() has something, writable when send() has room.
  int fd(u32 queue) const { return fds_[queue].get(); }

  /// One message. Returns false with errno: EAGAIN when there is no room, EPIPE and the like when the link is gone;
  /// a message that can never be sent (EMSGSIZE, EINVAL) counts as sent, the network being what it is.
  virtual bool send(u32 queue, std::span<const iovec> message) = 0;
  /// One message into `message`; its length, 0 at the link's end, -1 with errno (EAGAIN).
  virtual ssize_t receive(u32 queue, std::span<iovec> message) = 0;
  /// Errors: the host's.
  virtual Status set_offloads(const Offloads& offloads) = 0;
  /// The first `count` queues are in use: the others get nothing.
  virtual Status set_active_queues(u32 count) {
    (void)count;
    return Ok{};
  }
  /// Whether frames to the link may be UDP in one piece that stands for several datagrams.
  virtual bool takes_udp_segments() const { return false; }

 protected:
  explicit Link(std::vector<UniqueFd> fds) : fds_(std::move(fds)) {}
  std::vector<UniqueFd> fds_;
};

}  // namespace ring3::net
