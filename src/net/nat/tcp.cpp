#include "net/nat/tcp.hpp"

#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>

#include "net/nat/tcp_conn.hpp"

namespace ring3::net {

TcpTable::TcpTable(Wire& wire, Poller& poller, Host& host, u64 seed)
    : wire_(wire), poller_(poller), host_(host), random_(seed), by_key_(64, FlowHash{Random::mix(seed ^ 0x7463)}) {}

TcpTable::~TcpTable() = default;

TcpTable::Conn* TcpTable::find(const FlowKey& key) {
  const auto it = by_key_.find(key);
  return it == by_key_.end() ? nullptr : slots_[it->second].get();
}

TcpTable::Conn* TcpTable::make(const FlowKey& key, UniqueFd fd, u32 queue, State state) {
  u32 index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    index = static_cast<u32>(slots_.size());
    slots_.emplace_back();
  }
  auto c = std::make_unique<Conn>(key, &allocated_);
  c->fd = std::move(fd);
  c->index = index;
  c->generation = ++generation_ & 0xffffff;
  c->queue = queue;
  c->state = state;
  c->snd_una = c->snd_nxt = c->snd_max = static_cast<u32>(random_.next());
  Conn* raw = c.get();
  slots_[index] = std::move(c);
  by_key_.emplace(key, index);
  if (!poller_.add(raw->fd.get(), {Token::kTcp, index, raw->generation}, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)) {
    destroy(*raw);
    return nullptr;
  }
  return raw;
}

void TcpTable::destroy(Conn& c) {
  by_key_.erase(c.key);
  const u32 index = c.index;
  slots_[index].reset();  // ready_ may still name it; run() looks whether it is there
  free_.push_back(index);
}

/// Makes room for one more connection, at the cost of one that is over.
bool TcpTable::reclaim() {
  if (by_key_.size() < wire_.config().max_tcp) return true;
  Conn* oldest = nullptr;
  for (const auto& c : slots_) {
    if (c && c->state == State::kTimeWait && (oldest == nullptr || c->deadline < oldest->deadline)) oldest = c.get();
  }
  if (oldest == nullptr) return false;
  destroy(*oldest);
  return true;
}

void TcpTable::ready(Conn& c) {
  if (c.queued) return;
  c.queued = true;
  ready_.push_back(c.index);
}

// ---------------------------------------------------------------------------------------------- from the guest

void TcpTable::segment(const IpPacket& packet, const TcpSegment& s, u32 queue) {
  const FlowKey key{packet.source, packet.destination, s.source, s.destination};
  if (s.source == 0 || s.destination == 0) return;
  Conn* c = find(key);
  const std::size_t length = s.data.size() + ((s.flags & kTcpSyn) != 0 ? 1 : 0) + ((s.flags & kTcpFin) != 0 ? 1 : 0);
  if (c != nullptr && c->state == State::kTimeWait && (s.flags & (kTcpSyn | kTcpAck | kTcpRst)) == kTcpSyn && !before(s.seq, c->rcv_nxt)) {
    destroy(*c);  // RFC 9293, 3.10.7.4: a new one in place of the old
    c = nullptr;
  }
  if (c == nullptr) {
    if ((s.flags & kTcpRst) != 0) return;
    if ((s.flags & (kTcpSyn | kTcpAck)) == kTcpSyn) {
      open_from_guest(packet, s, queue);
    } else if ((s.flags & kTcpAck) != 0) {
      send_reset(queue, key, s.ack, 0, kTcpRst);
    } else {
      send_reset(queue, key, 0, s.seq + static_cast<u32>(length), kTcpRst | kTcpAck);
    }
    return;
  }
  c->queue = queue;
  switch (c->state) {
    case State::kConnecting:
      if ((s.flags & kTcpRst) != 0 && s.seq == c->rcv_nxt) abort(*c, false);
      return;
    case State::kSynSent:
      if ((s.flags & kTcpAck) != 0 && s.ack != c->snd_max) {
        if ((s.flags & kTcpRst) == 0) send_reset(queue, key, s.ack, 0, kTcpRst);
        return;
      }
      if ((s.flags & kTcpRst) != 0) {
        if ((s.flags & kTcpAck) != 0) abort(*c, false);
        return;
      }
      if ((s.flags & (kTcpSyn | kTcpAck)) != (kTcpSyn | kTcpAck)) return;
      c->rcv_nxt = s.seq + 1;
      c->rcv_adv = c->rcv_nxt + 65535;  // as the SYN said
      c->mss = static_cast<u16>(std::clamp<u32>(s.mss.value_or(536), 88, wire_.config().mtu - (key.guest.is_v4() ? 40 : 60)));
      c->snd_scale = s.window_scale.value_or(0);
      c->rcv_scale = s.window_scale ? kOurScale : 0;
      c->snd_una = c->snd_nxt = s.ack;
      c->snd_wnd = s.window;
      c->state = State::kOpen;
      c->need_ack = true;
      c->retries = 0;
      c->timer_kind = Timer::kNone;
      ready(*c);
      arm(*c, true);
      return;
    case State::kSynReceived:
      if ((s.flags & kTcpRst) != 0) {
        if (s.seq == c->rcv_nxt) abort(*c, false);
        return;
      }
      if ((s.flags & kTcpSyn) != 0) {
        if (s.seq + 1 == c->rcv_nxt) send_syn(*c);
        return;
      }
      if ((s.flags & kTcpAck) == 0) return;
      if (s.ack != c->snd_max) {
        send_reset(queue, key, s.ack, 0, kTcpRst);
        return;
      }
      c->snd_una = c->snd_nxt = s.ack;
      c->state = State::kOpen;
      c->retries = 0;
      c->timer_kind = Timer::kNone;
      c->snd_wnd = static_cast<u32>(s.window) << c->snd_scale;
      ready(*c);
      in_open(*c, s);
      return;
    case State::kOpen:
    case State::kTimeWait:
      in_open(*c, s);
      return;
  }
}

void TcpTable::open_from_guest(const IpPacket& packet, const TcpSegment& s, u32 queue) {
  const FlowKey key{packet.source, packet.destination, s.source, s.destination};
  const auto refuse = [&] {
    wire_.stats().refused++;
    send_reset(queue, key, 0, s.seq + 1 + static_cast<u32>(s.data.size()), kTcpRst | kTcpAck);
  };
  const Route route = route_out(wire_.config(), packet.destination, s.destination, 0);
  if (route.error != 0 || !reclaim()) return refuse();
  UniqueFd fd = host_.connect_stream(route.to);
  if (!fd) {
    // No way there at all: the guest may try another address at once.
    if (errno == ENETUNREACH || errno == EHOSTUNREACH) wire_.send_unreachable(queue, packet, errno);
    return refuse();
  }
  Conn* c = make(key, std::move(fd), queue, State::kConnecting);
  if (c == nullptr) return refuse();
  c->rcv_nxt = s.seq + 1;
  c->rcv_adv = c->rcv_nxt;
  c->mss = static_cast<u16>(std::clamp<u32>(s.mss.value_or(536), 88, wire_.config().mtu - (key.guest.is_v4() ? 40 : 60)));
  if (s.window_scale) {
    c->snd_scale = *s.window_scale;
    c->rcv_scale = kOurScale;
  }
  c->snd_wnd = s.window;
}

void TcpTable::in_open(Conn& c, const TcpSegment& s) {
  const std::size_t length = s.data.size() + ((s.flags & kTcpFin) != 0 ? 1 : 0);
  if ((s.flags & kTcpRst) != 0) {
    if (s.seq == c.rcv_nxt) {
      abort(c, false);
    } else if (before(c.rcv_nxt, s.seq) && before(s.seq, c.rcv_adv)) {
      send_ack(c);
    }
    return;
  }
  if ((s.flags & kTcpSyn) != 0) {
    send_ack(c);
    return;
  }
  if ((s.flags & kTcpAck) == 0) return;
  // Of the window: anything that touches it, the byte before it (a probe) included. The rest is answered only.
  if (before(c.rcv_adv, s.seq) || (before(s.seq + static_cast<u32>(length), c.rcv_nxt))) {
    send_ack(c);
    return;
  }
  if (before(c.snd_max, s.ack)) {
    send_ack(c);
    return;
  }
  const u32 index = c.index;
  const u32 generation = c.generation;
  if (c.timer_kind == Timer::kKeepalive) {
    c.retries = 0;
    arm(c, true);
  }
  acknowledge(c, s);
  if (length > 0) take_data(c, s);
  if (slots_[index] && slots_[index]->generation == generation) maybe_finished(*slots_[index]);
}

void TcpTable::acknowledge(Conn& c, const TcpSegment& s) {
  const u32 window = static_cast<u32>(s.window) << c.snd_scale;
  if (before(c.snd_una, s.ack)) {
    std::size_t acked = s.ack - c.snd_una;
    const std::size_t data = std::min(acked, c.for_guest.size());
    c.for_guest.consume(data);
    if (acked > data && c.fin_sent) c.fin_acked = true;
    c.snd_una = s.ack;
    if (before(c.snd_nxt, c.snd_una)) c.snd_nxt = c.snd_una;
    c.snd_wnd = window;
    c.duplicate_acks = 0;
    c.retries = 0;
    if (c.in_recovery) {
      if (before(s.ack, c.recover)) {
        retransmit(c, std::size_t{4} * c.mss);
      } else {
        c.in_recovery = false;
      }
    }
    if (c.for_guest.empty() && c.fin_acked) c.for_guest.release();
    ready(c);
    arm(c, true);
    return;
  }
  if (s.ack != c.snd_una) return;  // an old one
  if (window == c.snd_wnd && s.data.empty() && (s.flags & kTcpFin) == 0 && in_flight(c) > 0 && window > 0) {
    if (++c.duplicate_acks == 3 && !c.in_recovery) {
      c.in_recovery = true;
      c.recover = c.snd_nxt;
      retransmit(c, c.mss);
      arm(c, true);
    }
    return;
  }
  if (window != c.snd_wnd) {
    // Only a segment that is not older than what has been seen may move the edge.
    c.snd_wnd = window;
    if (window > 0 && c.timer_kind == Timer::kPersist) c.timer_kind = Timer::kNone;
    ready(c);
    arm(c, false);
  } else if (c.timer_kind == Timer::kPersist) {
    c.retries = 0;  // it is alive
  }
}

void TcpTable::take_data(Conn& c, const TcpSegment& s) {
  std::span<const u8> data = s.data;
  u32 seq = s.seq;
  bool fin = (s.flags & kTcpFin) != 0;
  if (before(c.rcv_nxt, seq)) {
    wire_.stats().out_of_order++;
    send_ack(c);
    return;
  }
  const std::size_t old = c.rcv_nxt - seq;
  c.need_ack = true;
  ready(c);
  if (old > data.size() || c.guest_fin || c.state != State::kOpen) return;  // all of it is known
  data = data.subspan(old);
  const std::size_t promised = c.rcv_adv - c.rcv_nxt;
  if (data.size() > promised) {
    data = data.first(promised);
    fin = false;
  }
  if (!data.empty()) {
    std::size_t taken = 0;
    if (!to_host(c, data, &taken)) return;  // the connection is gone
    c.rcv_nxt += static_cast<u32>(taken);
    if (taken < data.size()) return;
  }
  if (fin) {
    c.rcv_nxt++;
    if (before(c.rcv_adv, c.rcv_nxt)) c.rcv_adv = c.rcv_nxt;
    c.guest_fin = true;
    if (c.for_host.empty()) shut_down_host(c);
  }
}

/// Hands the guest's bytes on, or keeps them; how many. False when the host's end broke, and the connection with it.
bool TcpTable::to_host(Conn& c, std::span<const u8> data, std::size_t* taken) {
  if (c.for_host.empty() && c.writable) {
    const ssize_t n = ::send(c.fd.get(), data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) {
      *taken = static_cast<std::size_t>(n);
      data = data.subspan(*taken);
      if (!data.empty()) c.writable = false;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
      c.writable = false;
    } else if (errno != EINTR) {
      host_failed(c, errno);
      return false;
    }
  }
  if (data.empty()) return true;
  const std::size_t wanted = c.for_host.size() + data.size();
  if (wanted > c.for_host.capacity() && (allocated_ < wire_.config().max_buffer || c.for_host.capacity() == 0)) {
    c.for_host.grow(std::max(wanted, kFirstBuffer));
  }
  const std::size_t kept = std::min(data.size(), c.for_host.room());
  c.for_host.append(data.first(kept));
  *taken += kept;
  return true;
}

/// False when the connection is gone.
bool TcpTable::flush_to_host(Conn& c) {
  while (c.writable && !c.for_host.empty()) {
    iovec pieces[2];
    msghdr message{};
    message.msg_iov = pieces;
    message.msg_iovlen = static_cast<std::size_t>(c.for_host.peek(0, c.for_host.size(), pieces));
    const ssize_t n = ::sendmsg(c.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
        c.writable = false;
        break;
      }
      host_failed(c, errno);
      return false;
    }
    c.for_host.consume(static_cast<std::size_t>(n));
  }
  if (c.for_host.empty() && c.for_host.capacity() > 0) {
    c.for_host.release();
    if (c.guest_fin) shut_down_host(c);
  }
  // Say that there is room again, once it is worth a segment.
  if (!c.guest_fin && c.state == State::kOpen) {
    const u32 edge = c.rcv_nxt + static_cast<u32>(kReceiveWindow - std::min(kReceiveWindow, c.for_host.size()));
    const u32 promised = c.rcv_adv - c.rcv_nxt;
    if (before(c.rcv_adv, edge) && promised < kReceiveWindow / 2 && edge - c.rcv_adv >= kReceiveWindow / 4) c.need_ack = true;
  }
  return true;
}

void TcpTable::shut_down_host(Conn& c) {
  if (c.shut || !c.fd) return;
  c.shut = true;
  ::shutdown(c.fd.get(), SHUT_WR);
}

// ---------------------------------------------------------------------------------------------- from the host

void TcpTable::accepted(UniqueFd fd, const Endpoint& peer, const Ip& guest, u16 guest_port) {
  const auto reset_peer = [&] {
    const linger now{1, 0};
    ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
    wire_.stats().refused++;
  };
  if (!reclaim()) return reset_peer();
  FlowKey key{guest, seen_by_guest(wire_.plan(), peer.ip, guest), guest_port, peer.port};
  for (u32 tries = 0; find(key) != nullptr || key.remote_port == 0; tries++) {
    if (tries == 1000) return reset_peer();
    key.remote_port = static_cast<u16>(32768 + random_.next() % 28000);
  }
  Conn* c = make(key, std::move(fd), 0, State::kSynSent);
  if (c == nullptr) return;
  c->writable = true;
  c->rcv_scale = kOurScale;
  send_syn(*c);
  c->snd_max = c->snd_una + 1;
  set_timer(*c, Timer::kSyn, kFirstRetry);
}

void TcpTable::host_event(u32 index, u32 generation, u32 events) {
  if (index >= slots_.size() || !slots_[index] || slots_[index]->generation != generation) return;
  Conn& c = *slots_[index];
  if (c.state == State::kConnecting) {
    int error = 0;
    socklen_t size = sizeof error;
    if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0) return;
    ::getsockopt(c.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return host_failed(c, error);
    if ((events & EPOLLOUT) == 0) return;
    c.state = State::kSynReceived;
    send_syn(c);
    c.snd_max = c.snd_una + 1;
    set_timer(c, Timer::kSyn, kFirstRetry);
  }
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) c.readable = true;
  if ((events & EPOLLOUT) != 0) c.writable = true;
  if ((events & (EPOLLHUP | EPOLLERR)) != 0) c.hung_up = true;
  ready(c);
}

void TcpTable::host_failed(Conn& c, int error) {
  if (c.state == State::kConnecting) wire_.stats().refused++;
  (void)error;
  abort(c, true);
}

/// Ends both sides at once. The guest is told by a reset, the host by one too.
void TcpTable::abort(Conn& c, bool tell_guest) {
  if (tell_guest && c.state == State::kConnecting) {
    send_reset(c.queue, c.key, 0, c.rcv_nxt, kTcpRst | kTcpAck);
  } else if (tell_guest && c.state != State::kTimeWait) {
    send_reset(c.queue, c.key, c.snd_nxt, c.rcv_nxt, kTcpRst | kTcpAck);
  }
  if (c.fd) {
    const linger now{1, 0};
    ::setsockopt(c.fd.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
  }
  destroy(c);
}

void TcpTable::maybe_finished(Conn& c) {
  if (c.state != State::kOpen || !c.guest_fin || !c.for_host.empty() || !c.host_eof || !c.fin_acked) return;
  c.state = State::kTimeWait;
  c.fd.reset();
  c.for_guest.release();
  c.for_host.release();
  set_timer(c, Timer::kTimeWait, kTimeWaitMs);
}

bool TcpTable::run() {
  working_.swap(ready_);
  for (std::size_t i = 0; i < working_.size(); i++) {
    const u32 index = working_[i];
    if (index >= slots_.size() || !slots_[index] || !slots_[index]->queued) continue;
    Conn& c = *slots_[index];
    c.queued = false;
    const u32 generation = c.generation;
    if (c.state == State::kSynReceived || c.state == State::kSynSent) {
      // The host may give up on it meanwhile.
      if (c.hung_up) host_failed(c, ECONNRESET);
      continue;
    }
    if (c.state == State::kConnecting) continue;
    if (c.state == State::kOpen) {
      if (!flush_to_host(c)) continue;
      if (output(c)) ready(c);
      if (!slots_[index] || slots_[index]->generation != generation) continue;
    }
    if (c.need_ack) send_ack(c);
    if (c.need_ack) ready(c);  // there was no room
    maybe_finished(c);
  }
  working_.clear();
  for (const u32 index : ready_) {
    if (slots_[index] && !wire_.blocked(slots_[index]->queue)) return true;
  }
  return false;
}

}  // namespace ring3::net
