#include "net/nat/udp.hpp"

#include <sys/socket.h>

#include <cerrno>

namespace ring3::net {

namespace {

constexpr u64 kIdleMs = 60'000;
constexpr u64 kShortIdleMs = 10'000;
constexpr int kBatch = 64;  // datagrams of one flow before the others' turn

}  // namespace

struct UdpTable::Flow {
  FlowKey key;
  UniqueFd fd;          // empty: answers go through the listener
  int listener_fd = -1;
  Endpoint peer;        // of a listener's flow
  u32 index = 0, generation = 0, queue = 0;
  bool ping = false, dns = false;
  u16 ping_id = 0;
  u32 unanswered = 0;
  u64 last = 0;
  std::vector<u8> quoted;  // the guest's last datagram's IP header and beginning, for errors about it
};

UdpTable::UdpTable(Wire& wire, Poller& poller, Host& host, u64 seed)
    : wire_(wire), poller_(poller), host_(host), random_(seed ^ 0x756470), by_key_(64, FlowHash{Random::mix(seed ^ 0x7564)}) {}
UdpTable::~UdpTable() = default;

UdpTable::Flow* UdpTable::find(const FlowKey& key) {
  const auto it = by_key_.find(key);
  return it == by_key_.end() ? nullptr : slots_[it->second].get();
}

void UdpTable::make_room(bool ping) {
  const std::size_t count = ping ? pings_ : by_key_.size() - pings_;
  if (count < (ping ? wire_.config().max_ping : wire_.config().max_udp)) return;
  Flow* oldest = nullptr;
  for (const auto& f : slots_) if (f && f->ping == ping && (oldest == nullptr || f->last < oldest->last)) oldest = f.get();
  if (oldest != nullptr) destroy(*oldest);
}

UdpTable::Flow* UdpTable::make(const FlowKey& key, UniqueFd fd, u32 queue, bool ping) {
  make_room(ping);
  u32 index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    index = static_cast<u32>(slots_.size());
    slots_.emplace_back();
  }
  auto f = std::make_unique<Flow>();
  f->key = key;
  f->fd = std::move(fd);
  f->index = index;
  f->generation = ++generation_ & 0xffffff;
  f->queue = queue;
  f->ping = ping;
  Flow* raw = f.get();
  slots_[index] = std::move(f);
  by_key_.emplace(key, index);
  if (ping) pings_++;
  if (raw->fd && !poller_.add(raw->fd.get(), {ping ? Token::kPing : Token::kUdp, index, raw->generation}, EPOLLIN)) {
    destroy(*raw);
    return nullptr;
  }
  touch(*raw);
  return raw;
}

void UdpTable::destroy(Flow& f) {
  if (f.ping) pings_--;
  by_key_.erase(f.key);
  const u32 index = f.index;
  slots_[index].reset();
  free_.push_back(index);
}

void UdpTable::touch(Flow& f) {
  f.last = wire_.now();
  deadline_ = std::min(deadline_, f.last + (f.dns || f.ping ? kShortIdleMs : kIdleMs));
}

void UdpTable::datagram(const IpPacket& packet, const UdpDatagram& d, u32 queue, u16 gso_size) {
  const FlowKey key{packet.source, packet.destination, d.source, d.destination};
  if (d.source == 0 || d.destination == 0) return;
  Flow* f = find(key);
  const bool dns = wire_.plan().is_dns(packet.destination);
  if (f != nullptr && dns && f->unanswered >= 1 && wire_.config().resolvers.size() > 1) {
    resolver_++;
    destroy(*f);
    f = nullptr;
  }
  if (f == nullptr) {
    const Route route = route_out(wire_.config(), packet.destination, d.destination, resolver_);
    if (route.error != 0) {
      wire_.stats().refused++;
      wire_.send_unreachable(queue, packet, route.error);
      return;
    }
    make_room(false);
    UniqueFd fd = host_.connect_datagram(route.to);
    if (!fd) {
      wire_.stats().refused++;
      wire_.send_unreachable(queue, packet, errno);
      return;
    }
    f = make(key, std::move(fd), queue, false);
    if (f == nullptr) return;
    f->dns = dns;
  }
  f->queue = queue;
  f->unanswered++;
  touch(*f);
  f->quoted.assign(packet.whole.begin(), packet.whole.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(packet.whole.size(), 128)));
  const std::size_t piece = gso_size == 0 ? std::max<std::size_t>(d.data.size(), 1) : gso_size;
  std::size_t at = 0;
  do {
    const auto data = d.data.subspan(at, std::min(piece, d.data.size() - at));
    ssize_t n;
    if (f->fd) {
      n = ::send(f->fd.get(), data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      // An error that an earlier datagram met is told now; this one was not sent.
      if (n < 0 && errno == ECONNREFUSED) n = ::send(f->fd.get(), data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
      sockaddr_storage to;
      const socklen_t length = to_sockaddr(f->peer, to);
      n = ::sendto(f->listener_fd, data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&to), length);
    }
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != ENOBUFS) {
      wire_.send_unreachable(queue, packet, errno);
      return;
    }
    at += piece;
  } while (at < d.data.size());
}

void UdpTable::echo(const IpPacket& packet, std::span<const u8> message, u32 queue) {
  const Plan& plan = wire_.plan();
  std::vector<u8> copy(message.begin(), message.end());
  const bool v4 = packet.source.is_v4();
  if (plan.is_ours(packet.destination)) {
    copy[0] = v4 ? 0 : 129;
    wire_.send_icmp(queue, packet.destination, packet.source, copy);
    return;
  }
  const u16 id = get16(message.data() + 4);
  const FlowKey key{packet.source, packet.destination, id, 0};  // port 0: no UDP flow has it
  Flow* f = find(key);
  if (f == nullptr) {
    const Route route = route_out(wire_.config(), packet.destination, 0, 0);
    if (route.error != 0) {
      wire_.stats().refused++;
      wire_.send_unreachable(queue, packet, route.error);
      return;
    }
    make_room(true);
    UniqueFd fd = host_.connect_ping(route.to.ip);
    if (!fd) {
      wire_.stats().refused++;
      wire_.send_unreachable(queue, packet, errno);  // EACCES where the host does not allow ping sockets
      return;
    }
    f = make(key, std::move(fd), queue, true);
    if (f == nullptr) return;
    f->ping_id = id;
  }
  f->queue = queue;
  touch(*f);
  if (::send(f->fd.get(), copy.data(), copy.size(), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN) {
    wire_.send_unreachable(queue, packet, errno);
  }
}

void UdpTable::host_event(u32 index, u32 generation) {
  for (int i = 0; i < kBatch; i++) {
    if (index >= slots_.size() || !slots_[index] || slots_[index]->generation != generation) return;
    Flow& f = *slots_[index];
    buffer_.resize(kLargest);
    const ssize_t n = ::recv(f.fd.get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return;
      if (!f.quoted.empty() && !f.ping) {
        IpPacket packet;
        packet.source = f.key.guest;
        packet.destination = f.key.remote;
        packet.protocol = kProtoUdp;
        packet.whole = f.quoted;
        packet.payload = f.quoted;
        wire_.send_unreachable(f.queue, packet, errno);
      }
      return;
    }
    touch(f);
    f.unanswered = 0;
    const std::span<u8> data(buffer_.data(), static_cast<std::size_t>(n));
    if (f.ping) {
      const u8 reply = f.key.guest.is_v4() ? 0 : 129;
      if (n < 8 || data[0] != reply) continue;
      put16(data.data() + 4, f.ping_id);
      wire_.send_icmp(f.queue, f.key.remote, f.key.guest, data);
      continue;
    }
    wire_.send_udp(f.queue, {f.key.remote, f.key.remote_port, 0}, {f.key.guest, f.key.guest_port, 0}, data);
  }
}

void UdpTable::arrived(Listener& listener, u32) {
  for (int i = 0; i < kBatch; i++) {
    sockaddr_storage from;
    socklen_t size = sizeof from;
    buffer_.resize(kLargest);
    const ssize_t n = ::recvfrom(listener.fd.get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT, reinterpret_cast<sockaddr*>(&from), &size);
    if (n < 0) return;
    const auto peer = from_sockaddr(from);
    if (!peer || peer->port == 0) continue;
    const Forward& forward = listener.forward;
    const Ip guest = forward.guest;
    FlowKey key{guest, seen_by_guest(wire_.plan(), peer->ip, guest), forward.guest_port, peer->port};
    // Two peers of one port behind the gateway's address: the second is shown with another port, always the same.
    Flow* f = nullptr;
    for (u32 tries = 0; tries < 64; tries++) {
      f = find(key);
      if (f == nullptr || (f->listener_fd == listener.fd.get() && f->peer == *peer)) break;
      key.remote_port = static_cast<u16>(32768 + Random::mix(peer->port * 64u + tries) % 28000);
      f = nullptr;
    }
    if (f == nullptr) {
      if (find(key) != nullptr) continue;
      f = make(key, UniqueFd(), 0, false);
      if (f == nullptr) continue;
      f->listener_fd = listener.fd.get();
      f->peer = *peer;
    }
    touch(*f);
    wire_.send_udp(f->queue, {key.remote, key.remote_port, 0}, {key.guest, key.guest_port, 0},
                   {buffer_.data(), static_cast<std::size_t>(n)});
  }
}

void UdpTable::on_time() {
  if (wire_.now() < deadline_) return;
  deadline_ = ~u64{0};
  for (std::size_t i = 0; i < slots_.size(); i++) {
    if (!slots_[i]) continue;
    Flow& f = *slots_[i];
    const u64 end = f.last + (f.dns || f.ping ? kShortIdleMs : kIdleMs);
    if (end <= wire_.now()) destroy(f);
    else deadline_ = std::min(deadline_, end);
  }
}

}  // namespace ring3::net
