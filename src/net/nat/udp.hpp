#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/unique_fd.hpp"
#include "net/nat/flow.hpp"
#include "net/nat/host.hpp"
#include "net/nat/poller.hpp"
#include "net/nat/wire_out.hpp"

namespace ring3::net {

/// A forwarded port of the host, bound (and listening) before the NAT is jailed.
struct Listener {
  UniqueFd fd;
  Forward forward;
};

/// UDP and ping between the guest and sockets of the host: a flow for each pair of ends, with a connected socket, so
/// that only who was spoken to can answer, and an unreachable port is reported as one.
///
/// Lifetime:  a minute after the last datagram, ten seconds for names and pings. NatConfig::max_udp and max_ping
///            flows; past them the one idle longest ends.
/// Names:     the plan's DNS address stands for the host's resolvers in turn: a flow that asks again without having
///            been answered goes to the next.
/// Forwards:  a datagram to a forwarded port makes a flow without a socket of its own, which answers through the
///            forward's.
/// Threading: the NAT's only thread.
class UdpTable {
 public:
  UdpTable(Wire& wire, Poller& poller, Host& host, u64 seed);
  ~UdpTable();

  /// `gso_size` nonzero: the datagram stands for several of that size.
  void datagram(const IpPacket& packet, const UdpDatagram& datagram, u32 queue, u16 gso_size);
  /// An echo request; `message` is the ICMP message.
  void echo(const IpPacket& packet, std::span<const u8> message, u32 queue);
  void host_event(u32 index, u32 generation);
  /// A listener's socket is readable.
  void arrived(Listener& listener, u32 listener_index);
  void on_time();
  u64 deadline() const { return deadline_; }
  std::size_t flows() const { return by_key_.size(); }

 private:
  static constexpr std::size_t kLargest = 65536;  // datagram, bytes
  struct Flow;
  Flow* find(const FlowKey& key);
  Flow* make(const FlowKey& key, UniqueFd fd, u32 queue, bool ping);
  void destroy(Flow& f);
  void touch(Flow& f);
  void make_room(bool ping);

  Wire& wire_;
  Poller& poller_;
  Host& host_;
  Random random_;
  std::vector<std::unique_ptr<Flow>> slots_;
  std::vector<u32> free_;
  u32 generation_ = 0;
  u32 pings_ = 0;
  std::size_t resolver_ = 0;
  std::unordered_map<FlowKey, u32, FlowHash> by_key_;
  u64 deadline_ = ~u64{0};
  std::vector<u8> buffer_;  // kLargest once something came
};

}  // namespace ring3::net
