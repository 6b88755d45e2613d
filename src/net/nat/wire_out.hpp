#pragma once
#include <sys/uio.h>

#include <array>
#include <optional>
#include <span>
#include <vector>

#include "net/link/link.hpp"
#include "net/nat/config.hpp"
#include "net/packet/packet.hpp"

namespace ring3::net {

/// Where frames for the guest go.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  /// One message, as Link takes them. False: no room now (or the link is gone); the frame was not taken.
  virtual bool send(u32 queue, std::span<const iovec> message) = 0;
};

/// Counters, for tests and the log.
struct NatStats {
  u64 frames_in = 0, frames_out = 0, dropped = 0, refused = 0, retransmitted = 0, out_of_order = 0, no_room = 0;
  std::array<u64, 8> drops{};  ///< by Drop
};

/// What every part of the NAT shares: its plan, the time, the neighbours, and the way out to the guest.
///
/// Threading: the NAT's only thread.
/// Trust:     neighbours are what the guest says; the table is bounded.
class Wire {
 public:
  Wire(const NatConfig& config, FrameSink& sink) : config_(config), sink_(sink), blocked_(64, false) {}

  const NatConfig& config() const { return config_; }
  const Plan& plan() const { return config_.plan; }
  u64 now() const { return now_; }
  void set_now(u64 ms) { now_ = ms; }
  NatStats& stats() { return stats_; }

  void set_offloads(const Offloads& o) { offloads_ = o; }
  /// The most TCP payload one frame may hold, given the connection's MSS.
  std::size_t largest_segment(bool v4, u16 mss) const {
    const bool large = offloads_.checksum && (v4 ? offloads_.tcp4 : offloads_.tcp6);
    return large ? std::max<std::size_t>(mss, 65535 - kIp6Header - kTcpHeader - 80) : mss;
  }

  void learn(const Ip& ip, const Mac& mac, u32 queue);
  std::optional<Mac> neighbour(const Ip& ip) const;
  /// Asks for it (ARP, neighbour solicitation), once a second at most for all.
  void solicit(const Ip& ip);

  /// A transport segment. `header` is written into (its checksum, at `checksum_at`); `data` follows it.
  /// With gso_size nonzero it stands for several TCP segments of that size. False when the link has no room; without
  /// a neighbour of that address it is lost, and the neighbour asked for.
  bool send_segment(u32 queue, const Ip& source, const Ip& destination, u8 protocol, std::span<u8> header,
                    std::size_t checksum_at, std::span<const iovec> data, u16 gso_size);
  /// A UDP datagram, in fragments when it is larger than the MTU.
  bool send_udp(u32 queue, const Endpoint& source, const Endpoint& destination, std::span<const u8> data,
                const Mac* to = nullptr);
  /// An ICMP message without its checksum; the right family's is put in.
  bool send_icmp(u32 queue, const Ip& source, const Ip& destination, std::span<u8> message, u8 ttl = 64,
                 const Mac* to = nullptr);
  /// Tells the guest why `packet` went no further: ICMP type and code of its family. Rate-limited.
  void send_error(u32 queue, const IpPacket& packet, u8 type, u8 code);
  /// Destination unreachable, as errno tells it.
  void send_unreachable(u32 queue, const IpPacket& packet, int error);
  bool send_raw(u32 queue, std::span<const u8> frame);

  bool blocked(u32 queue) const { return blocked_[queue & 63]; }
  void unblock(u32 queue) { blocked_[queue & 63] = false; }

 private:
  struct Neighbour {
    Ip ip;
    Mac mac;
    u32 queue = 0;
    u64 seen = 0;
  };
  bool put(u32 queue, std::span<const iovec> message);
  bool send_fragments(u32 queue, const Ip& source, const Ip& destination, u8 protocol, std::span<const u8> segment, const Mac& to);

  const NatConfig& config_;
  FrameSink& sink_;
  u64 now_ = 0;
  NatStats stats_;
  Offloads offloads_;
  std::vector<Neighbour> neighbours_;
  std::vector<bool> blocked_;
  u64 last_solicit_ = 0;
  u64 error_second_ = 0;
  u32 errors_ = 0;
  u16 id_ = 1;
};

}  // namespace ring3::net
