#include <sys/socket.h>

#include <cerrno>

#include "net/nat/tcp_conn.hpp"

namespace ring3::net {

std::size_t TcpTable::in_flight(const Conn& c) const { return c.snd_nxt - c.snd_una; }

/// What to put into the window field; moves the promise with it, never back.
u16 TcpTable::window(Conn& c) {
  const std::size_t room = kReceiveWindow - std::min(kReceiveWindow, c.for_host.size());
  u32 edge = c.rcv_nxt + static_cast<u32>(room);
  if (before(edge, c.rcv_adv)) edge = c.rcv_adv;
  const u32 field = std::min<u32>((edge - c.rcv_nxt) >> c.rcv_scale, 65535);
  const u32 promised = c.rcv_nxt + (field << c.rcv_scale);
  if (before(c.rcv_adv, promised)) c.rcv_adv = promised;
  return static_cast<u16>(field);
}

/// A segment of `length` bytes at `offset` of for_guest, or none; false when there is no room on the link.
bool TcpTable::emit(Conn& c, u32 seq, std::size_t offset, std::size_t length, u8 flags) {
  if (wire_.blocked(c.queue)) return false;
  u8 header[kTcpHeader] = {};
  put16(header, c.key.remote_port);
  put16(header + 2, c.key.guest_port);
  put32(header + 4, seq);
  put32(header + 8, c.rcv_nxt);
  header[12] = 5 << 4;
  header[13] = flags;
  put16(header + 14, window(c));
  iovec data[2];
  const int pieces = c.for_guest.peek(offset, length, data);
  const u16 gso = length > c.mss ? c.mss : static_cast<u16>(0);
  if (!wire_.send_segment(c.queue, c.key.remote, c.key.guest, kProtoTcp, header, 16, {data, static_cast<std::size_t>(pieces)}, gso)) {
    return false;
  }
  if ((flags & kTcpAck) != 0) c.need_ack = false;
  return true;
}

void TcpTable::send_ack(Conn& c) {
  if (!emit(c, c.snd_nxt, 0, 0, kTcpAck)) {
    c.need_ack = true;
    ready(c);
  }
}

bool TcpTable::send_syn(Conn& c) {
  u8 header[kTcpHeader + 8] = {};
  const bool v4 = c.key.guest.is_v4();
  const bool reply = c.state == State::kSynReceived;
  put16(header, c.key.remote_port);
  put16(header + 2, c.key.guest_port);
  put32(header + 4, c.snd_una);
  put32(header + 8, reply ? c.rcv_nxt : 0);
  const bool scale = c.rcv_scale != 0;
  header[12] = static_cast<u8>((scale ? 7 : 6) << 4);
  header[13] = reply ? kTcpSyn | kTcpAck : kTcpSyn;
  put16(header + 14, 65535);
  header[20] = 2;
  header[21] = 4;
  put16(header + 22, wire_.config().mtu - (v4 ? 40 : 60));
  header[24] = 1;
  header[25] = 3;
  header[26] = 3;
  header[27] = kOurScale;
  if (reply) c.rcv_adv = c.rcv_nxt + 65535;
  return wire_.send_segment(c.queue, c.key.remote, c.key.guest, kProtoTcp, {header, scale ? kTcpHeader + 8 : kTcpHeader + 4}, 16, {}, 0);
}

void TcpTable::send_reset(u32 queue, const FlowKey& key, u32 seq, u32 ack, u8 flags) {
  u8 header[kTcpHeader] = {};
  put16(header, key.remote_port);
  put16(header + 2, key.guest_port);
  put32(header + 4, seq);
  put32(header + 8, ack);
  header[12] = 5 << 4;
  header[13] = flags;
  wire_.send_segment(queue, key.remote, key.guest, kProtoTcp, header, 16, {}, 0);
}

/// Reads from the host as much as the guest may be sent.
void TcpTable::fill(Conn& c) {
  while (c.readable && !c.host_eof) {
    const std::size_t goal = std::min<std::size_t>(kSendBuffer, std::max<std::size_t>(c.snd_wnd, c.mss));
    if (c.for_guest.size() >= goal) return;
    if (c.for_guest.room() == 0) {
      const std::size_t next = std::max(kFirstBuffer, c.for_guest.capacity() * 2);
      if (next > kSendBuffer || (allocated_ >= wire_.config().max_buffer && c.for_guest.capacity() > 0)) return;
      c.for_guest.grow(allocated_ >= wire_.config().max_buffer ? 4096 : next);
    }
    iovec space[2];
    msghdr message{};
    message.msg_iov = space;
    message.msg_iovlen = static_cast<std::size_t>(c.for_guest.space(goal - c.for_guest.size(), space));
    const ssize_t n = ::recvmsg(c.fd.get(), &message, MSG_DONTWAIT);
    if (n > 0) {
      c.for_guest.commit(static_cast<std::size_t>(n));
    } else if (n == 0) {
      c.host_eof = true;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      c.readable = false;
    } else if (errno != EINTR) {
      // A reset: what it overtook is lost, as between any two hosts.
      c.hung_up = true;
      c.readable = false;
      c.for_guest.release();
      return;
    }
  }
}

/// Sends what the guest's window and the link take. Whether there is more to do, the link willing. The connection may
/// be gone afterwards.
bool TcpTable::output(Conn& c) {
  std::size_t sent = 0;
  const std::size_t most = wire_.largest_segment(c.key.guest.is_v4(), c.mss);
  while (sent < kTurn) {
    const std::size_t flying = in_flight(c);
    if (c.for_guest.size() <= flying || c.for_guest.size() - flying < most) fill(c);
    if (c.hung_up && !c.readable && !c.host_eof) {
      int error = 0;
      socklen_t size = sizeof error;
      ::getsockopt(c.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      host_failed(c, error != 0 ? error : ECONNRESET);
      return false;
    }
    if (c.fin_sent && c.snd_nxt == c.snd_max) break;  // nothing comes after it
    const std::size_t queued = c.for_guest.size() > flying ? c.for_guest.size() - flying : 0;
    const std::size_t window = c.snd_wnd > flying ? c.snd_wnd - flying : 0;
    std::size_t length = std::min({queued, window, most});
    if (length > c.mss && length < queued) length -= length % c.mss;
    const bool fin = c.host_eof && length == queued;
    if (length == 0 && !(fin && !c.fin_sent)) break;
    // Rather wait for the window than send crumbs (RFC 9293, 3.8.6.2.1), when something is under way.
    if (length < queued && length < c.mss && flying > 0) break;
    u8 flags = kTcpAck;
    if (length == queued) flags |= kTcpPsh;
    if (fin) flags |= kTcpFin;
    if (!emit(c, c.snd_nxt, flying, length, flags)) {
      arm(c, false);
      return true;
    }
    c.snd_nxt += static_cast<u32>(length) + (fin ? 1 : 0);
    if (fin) c.fin_sent = true;
    if (before(c.snd_max, c.snd_nxt)) c.snd_max = c.snd_nxt;
    sent += length;
  }
  if (c.for_guest.empty() && sent == 0) c.for_guest.release();
  arm(c, false);
  return sent >= kTurn;
}

/// The first bytes that are not acknowledged, again.
void TcpTable::retransmit(Conn& c, std::size_t most) {
  wire_.stats().retransmitted++;
  const std::size_t flying = in_flight(c);
  const std::size_t data = std::min(flying, c.for_guest.size());
  const std::size_t limit = std::min(most, wire_.largest_segment(c.key.guest.is_v4(), c.mss));
  const std::size_t length = std::min(data, limit);
  u8 flags = kTcpAck;
  if (c.fin_sent && length == c.for_guest.size()) flags |= kTcpFin;
  emit(c, c.snd_una, 0, length, flags);
}

// ---------------------------------------------------------------------------------------------- timers

void TcpTable::set_timer(Conn& c, Timer kind, u64 delay) {
  c.timer_kind = kind;
  c.deadline = kind == Timer::kNone ? ~u64{0} : wire_.now() + delay;
  deadline_ = std::min(deadline_, c.deadline);
}

void TcpTable::arm(Conn& c, bool restart) {
  if (c.state != State::kOpen) return;
  Timer kind;
  if (in_flight(c) > 0) kind = Timer::kRetransmit;
  else if (c.snd_wnd == 0 && !c.for_guest.empty()) kind = Timer::kPersist;
  else kind = Timer::kKeepalive;
  if (kind == c.timer_kind && !restart) return;
  if (kind != c.timer_kind) c.retries = 0;
  const u64 delay = kind == Timer::kKeepalive ? kIdleMs : std::min(kFirstRetry << std::min(c.retries, 6u), kLongestRetry);
  set_timer(c, kind, delay);
}

void TcpTable::timer(Conn& c) {
  const u64 backoff = std::min(kFirstRetry << std::min(c.retries + 1, 6u), kLongestRetry);
  switch (c.timer_kind) {
    case Timer::kNone:
      c.deadline = ~u64{0};
      return;
    case Timer::kTimeWait:
      destroy(c);
      return;
    case Timer::kSyn:
      if (++c.retries > 6) return abort(c, true);
      send_syn(c);
      set_timer(c, Timer::kSyn, backoff);
      return;
    case Timer::kRetransmit:
      if (wire_.blocked(c.queue)) {  // the guest does not take what is there: nothing is lost
        set_timer(c, Timer::kRetransmit, kFirstRetry);
        return;
      }
      if (++c.retries > kMaxRetries) return abort(c, true);
      c.in_recovery = true;
      c.recover = c.snd_nxt;
      c.duplicate_acks = 0;
      retransmit(c, c.mss);
      set_timer(c, Timer::kRetransmit, backoff);
      return;
    case Timer::kPersist:
    case Timer::kKeepalive: {
      const bool persist = c.timer_kind == Timer::kPersist;
      if (++c.retries > (persist ? kMaxRetries : kIdleProbes)) return abort(c, true);
      emit(c, c.snd_una - 1, 0, 0, kTcpAck);  // outside the window: it is answered
      set_timer(c, c.timer_kind, persist ? backoff : kLongestRetry);
      return;
    }
  }
}

void TcpTable::on_time() {
  if (wire_.now() < deadline_) return;
  deadline_ = ~u64{0};
  for (std::size_t i = 0; i < slots_.size(); i++) {
    if (!slots_[i]) continue;
    if (slots_[i]->deadline <= wire_.now()) timer(*slots_[i]);
    if (slots_[i]) deadline_ = std::min(deadline_, slots_[i]->deadline);
  }
}

}  // namespace ring3::net
