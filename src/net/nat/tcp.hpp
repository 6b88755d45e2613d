#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/unique_fd.hpp"
#include "net/nat/byte_ring.hpp"
#include "net/nat/flow.hpp"
#include "net/nat/host.hpp"
#include "net/nat/poller.hpp"
#include "net/nat/wire_out.hpp"

namespace ring3::net {

/// TCP between the guest and sockets of the host: the guest's connection ends here, and its bytes go on in another.
///
/// Spec: RFC 9293; window scale (RFC 7323); RFC 5961's answers to blind resets. No timestamps, no selective
/// acknowledgement: the link loses nothing. What the guest loses itself is sent again (on three duplicate
/// acknowledgements, NewReno's partial ones, and a timer); what comes out of order is asked for again.
///
/// A guest's SYN is answered when the host's connection is there, so that refusals are real ones. Its bytes are
/// acknowledged when the host's socket, or a buffer of at most 1 MiB behind it, has them: the host's speed is the
/// window. The other way, at most what fits the guest's window is read from the host's socket.
///
/// Bounds: NatConfig's max_tcp connections, max_buffer bytes. Past them: a reset; data that is not acknowledged.
/// Threading: the NAT's only thread.
class TcpTable {
 public:
  TcpTable(Wire& wire, Poller& poller, Host& host, u64 seed);
  ~TcpTable();

  void segment(const IpPacket& packet, const TcpSegment& segment, u32 queue);
  void host_event(u32 index, u32 generation, u32 events);
  /// A connection to a forwarded port of the host.
  void accepted(UniqueFd fd, const Endpoint& peer, const Ip& guest, u16 guest_port);

  /// Does what has become possible; whether more is left to do at once.
  bool run();
  void on_time();
  u64 deadline() const { return deadline_; }

  std::size_t connections() const { return by_key_.size(); }
  u64 buffered() const { return allocated_; }

 private:
  enum class State : u8 { kConnecting, kSynReceived, kSynSent, kOpen, kTimeWait };
  enum class Timer : u8 { kNone, kSyn, kRetransmit, kPersist, kKeepalive, kTimeWait };
  struct Conn;

  Conn* find(const FlowKey& key);
  Conn* make(const FlowKey& key, UniqueFd fd, u32 queue, State state);
  void destroy(Conn& c);
  bool reclaim();

  void open_from_guest(const IpPacket& packet, const TcpSegment& s, u32 queue);
  void in_open(Conn& c, const TcpSegment& s);
  void acknowledge(Conn& c, const TcpSegment& s);
  void take_data(Conn& c, const TcpSegment& s);
  bool to_host(Conn& c, std::span<const u8> data, std::size_t* taken);
  bool flush_to_host(Conn& c);
  void shut_down_host(Conn& c);
  void host_failed(Conn& c, int error);
  void fill(Conn& c);
  bool output(Conn& c);
  bool emit(Conn& c, u32 seq, std::size_t offset, std::size_t length, u8 flags);
  void retransmit(Conn& c, std::size_t most);
  bool send_syn(Conn& c);
  void send_ack(Conn& c);
  void send_reset(u32 queue, const FlowKey& key, u32 seq, u32 ack, u8 flags);
  void abort(Conn& c, bool tell_guest);
  void maybe_finished(Conn& c);
  void ready(Conn& c);
  void arm(Conn& c, bool restart);
  void set_timer(Conn& c, Timer kind, u64 delay);
  void timer(Conn& c);
  u16 window(Conn& c);
  std::size_t in_flight(const Conn& c) const;

  Wire& wire_;
  Poller& poller_;
  Host& host_;
  Random random_;
  u64 allocated_ = 0;
  std::vector<std::unique_ptr<Conn>> slots_;
  std::vector<u32> free_;
  u32 generation_ = 0;
  std::unordered_map<FlowKey, u32, FlowHash> by_key_;
  std::vector<u32> ready_, working_;
  u64 deadline_ = ~u64{0};
};

}  // namespace ring3::net
