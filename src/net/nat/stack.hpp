#pragma once
#include <span>
#include <vector>

#include "net/nat/config.hpp"
#include "net/nat/dhcp.hpp"
#include "net/nat/host.hpp"
#include "net/nat/poller.hpp"
#include "net/nat/reassembly.hpp"
#include "net/nat/tcp.hpp"
#include "net/nat/udp.hpp"
#include "net/nat/wire_out.hpp"

namespace ring3::net {

/// The user-mode network: an Ethernet link with one router on it, which does what it can with ordinary sockets.
///
/// Who drives it waits on epoll_fd(), at most timeout_ms(), sets the time, hands in what came, and calls run().
/// Threading: one thread.
/// Trust:     every frame is hostile, and so is what the network sends.
class Stack {
 public:
  /// A message from the device that is shorter than any frame: {kControl, kSetOffloads, bits}, see link_control().
  static constexpr u8 kControl = 0xff;
  static constexpr u8 kSetOffloads = 1;
  static constexpr std::size_t kControlSize = 3;

  /// `seed` should be unpredictable to the guest.
  Stack(NatConfig config, FrameSink& sink, Host& host, std::vector<Listener> listeners, u64 seed);

  int epoll_fd() const { return poller_.fd(); }
  Poller& poller() { return poller_; }
  void set_now(u64 ms) { wire_.set_now(ms); }
  /// A message from the guest's device: VnetHeader and frame, or a control message.
  void receive(u32 queue, std::span<const u8> message);
  /// An event of epoll_fd() that is not the link's.
  void host_event(Token token, u32 events);
  void link_writable(u32 queue) { wire_.unblock(queue); }
  bool link_blocked(u32 queue) const { return wire_.blocked(queue); }
  /// After each round; whether there is more to do at once.
  bool run();
  /// Milliseconds to the next timer, -1 for none.
  int timeout_ms() const;

  const NatStats& stats() { return wire_.stats(); }
  std::size_t tcp_connections() const { return tcp_.connections(); }
  std::size_t udp_flows() const { return udp_.flows(); }

 private:
  Drop frame(u32 queue, std::span<const u8> frame, const VnetHeader& vnet);
  Drop ip(u32 queue, const IpPacket& packet, bool vouched, u16 udp_gso);

  NatConfig config_;
  Poller poller_;
  Wire wire_;
  Configuration configuration_;
  TcpTable tcp_;
  UdpTable udp_;
  Reassembly reassembly_;
  std::vector<Listener> listeners_;
};

}  // namespace ring3::net
