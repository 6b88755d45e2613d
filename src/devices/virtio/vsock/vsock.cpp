#include "devices/virtio/vsock/vsock.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/event_fd.hpp"
#include "base/log.hpp"

namespace ring3::virtio {

namespace {

constexpr u64 kHostCid = 2;
constexpr u16 kStream = 1;
constexpr u16 kRequest = 1, kResponse = 2, kReset = 3, kShutdown = 4, kData = 5, kCreditUpdate = 6, kCreditRequest = 7;
constexpr u32 kNoReceive = 1, kNoSend = 2;

constexpr std::size_t kMostConnections = 512;
constexpr std::size_t kMostLines = 64;
constexpr std::size_t kMostResets = 256;
constexpr u32 kBuffer = 128 << 10;
constexpr std::size_t kMostPacket = 64 << 10;
constexpr std::size_t kLongestLine = 32;

Result<UniqueFd> unix_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return Error::from_errno("vsock: socket");
  return fd;
}

bool address_of(const std::string& path, sockaddr_un& out) {
  out = {};
  out.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof out.sun_path) return false;
  std::memcpy(out.sun_path, path.data(), path.size());
  return true;
}

}  // namespace

/// 5.10.6; little-endian.
struct Vsock::Header {
  u64 source_cid, target_cid;
  u32 source_port, target_port;
  u32 length;
  u16 type, op;
  u32 flags, buffer, forwarded;
} __attribute__((packed));

struct Vsock::Connection : std::enable_shared_from_this<Connection> {
  UniqueFd fd;
  Key key{};
  bool watched = false;
  u32 events = 0;
  bool asked = false;          // REQUEST is out, RESPONSE is awaited
  bool established = false;
  bool queued = false;

  std::string line;            // of a program that has not said CONNECT yet

  // To the guest.
  bool want_request = false, want_response = false, want_credit = false, want_shutdown = false, shutdown_sent = false;
  bool readable = false, eof = false;
  u32 sent = 0;                // bytes, free running
  u32 peer_buffer = 0, peer_forwarded = 0;

  // From the guest.
  std::deque<u8> kept;         // what the socket did not take
  u32 forwarded = 0, forwarded_told = 0;
  bool no_more = false;        // the guest sends no more
  bool both_down = false;      // the guest is done with it: a reset ends it when all is flushed

  u32 credit() const {
    const u32 flying = sent - peer_forwarded;
    return flying >= peer_buffer ? 0 : peer_buffer - flying;
  }
};

Result<std::unique_ptr<Vsock>> Vsock::create(u64 cid, const std::string& path) {
  if (cid < 3 || cid >= 0xffffffff) return Error::of(EINVAL, "--vsock: cid " + std::to_string(cid) + " will not do: 3 to 4294967294");
  sockaddr_un address;
  // The sockets of the guest's own connections have names that are longer by "_" and ten digits.
  if (path.size() + 11 >= sizeof address.sun_path || !address_of(path, address)) {
    return Error::of(EINVAL, "--vsock: the socket's path has to have 1 to " + std::to_string(sizeof address.sun_path - 12) + " characters");
  }
  auto listener = UnixListener::create(path);
  if (!listener) return Error::of(listener.error().code, "--vsock: " + listener.error().message);
  // In the background the working directory is another one.
  const std::string absolute = listener->path().size() + 11 < sizeof address.sun_path ? listener->path() : path;
  return std::unique_ptr<Vsock>(new Vsock(cid, absolute, std::move(*listener)));
}

Vsock::~Vsock() { stop(); }

void Vsock::read_config(u64 offset, std::span<u8> data) { read_config_struct(cid_, offset, data); }

void Vsock::start(u64, std::span<Queue* const> queues) {
  rx_ = !queues.empty() ? queues[0] : nullptr;
  tx_ = queues.size() > 1 ? queues[1] : nullptr;
  if (rx_ == nullptr || tx_ == nullptr) return;
  Status s = loop_.add(listener_.fd(), EPOLLIN, [this](u32) { on_accept(), pump(); });
  if (s) s = loop_.add(rx_->kick_fd(), EPOLLIN, [this](u32) { rx_->clear_kick(), pump(); });
  if (s) s = loop_.add(tx_->kick_fd(), EPOLLIN, [this](u32) { tx_->clear_kick(), receive(), pump(); });
  if (s && queues.size() > 2 && queues[2] != nullptr) {
    Queue* events = queues[2];
    s = loop_.add(events->kick_fd(), EPOLLIN, [events](u32) { events->clear_kick(); });
  }
  if (s) s = loop_.start("vsock");
  if (!s) {
    log::error("vsock: {}", s.error().message);
    transport_->needs_reset(s.error().message);
  }
}

void Vsock::stop() {
  loop_.stop();
  open_.clear();
  lines_.clear();
  ready_.clear();
  resets_.clear();
  held_up_ = false;
  rx_ = tx_ = nullptr;
}

// ------------------------------------------------------------------------------------------ the host's programs

void Vsock::on_accept() {
  for (;;) {
    UniqueFd fd(::accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      // Out of descriptors: the oldest that has not said what it wants gives way.
      if ((errno == EMFILE || errno == ENFILE) && !lines_.empty()) {
        close(*lines_.front(), false);
        continue;
      }
      if (errno == EMFILE || errno == ENFILE) loop_.remove(listener_.fd());
      return;
    }
    if (lines_.size() >= kMostLines) close(*lines_.front(), false);
    auto c = std::make_shared<Connection>();
    c->fd = std::move(fd);
    lines_.push_back(c);
    watch(*c);
  }
}

void Vsock::watch(Connection& c) {
  if (!c.fd) return;
  u32 wanted = 0;
  if (!c.established && !c.asked) wanted = EPOLLIN;  // its line
  if (c.established && !c.readable && !c.eof) wanted |= EPOLLIN;
  if (!c.kept.empty()) wanted |= EPOLLOUT;
  // A hang-up is always told: one that is nothing new must not be listened to at all.
  if (c.watched && wanted == 0) {
    loop_.remove(c.fd.get());
    c.watched = false;
  } else if (!c.watched && wanted != 0) {
    std::weak_ptr<Connection> self = c.weak_from_this();
    c.watched = bool(loop_.add(c.fd.get(), wanted, [this, self](u32 events) {
      if (auto alive = self.lock()) on_socket(*alive, events);
      pump();
    }));
  } else if (c.watched && wanted != c.events) {
    (void)loop_.set_events(c.fd.get(), wanted);
  }
  c.events = wanted;
}

void Vsock::on_socket(Connection& c, u32 events) {
  if (!c.fd) return;
  if (!c.established && !c.asked) return on_line(c);
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) c.readable = true;
  if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0 && !c.kept.empty()) {
    const auto keep = c.shared_from_this();
    flush(c);
    if (!c.fd) return;
  }
  ready(c);
  watch(c);
}

void Vsock::on_line(Connection& c) {
  const auto keep = c.shared_from_this();
  // Byte by byte, so that what follows the line stays in the socket.
  for (;;) {
    char byte;
    const ssize_t n = ::recv(c.fd.get(), &byte, 1, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) return close(c, false);
    if (byte == '\n') break;
    c.line += byte;
    if (c.line.size() > kLongestLine) return close(c, false);
  }
  if (!c.line.empty() && c.line.back() == '\r') c.line.pop_back();
  u64 port = 0;
  bool good = c.line.rfind("CONNECT ", 0) == 0 && c.line.size() > 8 && c.line.size() <= 18;
  for (std::size_t i = 8; good && i < c.line.size(); i++) {
    good = c.line[i] >= '0' && c.line[i] <= '9';
    port = port * 10 + static_cast<u64>(c.line[i] - '0');
  }
  if (!good || port > 0xfffffffe || open_.size() >= kMostConnections) return close(c, false);
  Key key{next_port_, static_cast<u32>(port)};
  while (open_.count(key) != 0) key.host++;
  next_port_ = key.host + 1 < (u32{1} << 30) ? u32{1} << 30 : key.host + 1;
  std::erase(lines_, keep);
  c.key = key;
  c.asked = c.want_request = true;
  open_[key] = keep;
  ready(c);
  watch(c);
}

void Vsock::close(Connection& c, bool tell_guest) {
  const auto keep = c.shared_from_this();
  if (c.watched) loop_.remove(c.fd.get());
  c.watched = false;
  c.fd.reset();
  std::erase(lines_, keep);
  // A guest that takes nothing leaves them there, as many as it likes.
  if (c.queued) std::erase_if(ready_, [&](const auto& waiting) { return waiting.lock() == keep; });
  c.queued = false;
  if (const auto it = open_.find(c.key); it != open_.end() && it->second == keep) {
    open_.erase(it);
    if (tell_guest) reset(c.key, kStream);
  }
}

void Vsock::reset(const Key& key, u16 type) { resets_.push_back({key, type}); }

void Vsock::ready(Connection& c) {
  if (c.queued) return;
  c.queued = true;
  ready_.push_back(c.weak_from_this());
}

// ---------------------------------------------------------------------------------------------- from the guest

void Vsock::receive() {
  Chain chain;
  held_up_ = false;
  int budget = 256;
  do {
    tx_->disable_kicks();
    for (;;) {
      if (resets_.size() >= kMostResets) {  // the guest does not take what it caused: no more of it
        held_up_ = true;
        break;
      }
      if (budget-- == 0) {
        signal_event(tx_->kick_fd());
        tx_->notify();
        return;
      }
      if (tx_->pop(chain) != Queue::Pop::kChain) break;
      Header h;
      if (chain.read(0, &h, sizeof h) == sizeof h && h.length <= kMostPacket && sizeof h + u64{h.length} <= chain.readable_bytes()) {
        handle(h, chain);
      }
      tx_->complete(chain, 0);
    }
    tx_->notify();
  } while (!held_up_ && tx_->enable_kicks());
}

void Vsock::handle(const Header& h, const Chain& chain) {
  const Key key{h.target_port, h.source_port};
  if (h.source_cid != cid_) return;
  if (h.target_cid != kHostCid || h.type != kStream) {
    if (h.op != kReset) reset(key, h.type);
    return;
  }
  const auto it = open_.find(key);
  if (it == open_.end()) {
    if (h.op == kRequest) request(key, h);
    else if (h.op != kReset) reset(key, kStream);
    return;
  }
  const auto keep = it->second;
  Connection& c = *keep;
  c.peer_buffer = h.buffer;
  // A count that is ahead of what was sent is a lie that would make credit of nothing.
  if (static_cast<i32>(h.forwarded - c.sent) <= 0) c.peer_forwarded = h.forwarded;
  switch (h.op) {
    case kResponse: {
      if (!c.asked || c.established) return close(c, true);
      c.established = true;
      const std::string answer = "OK " + std::to_string(key.host) + "\n";
      if (::send(c.fd.get(), answer.data(), answer.size(), MSG_DONTWAIT | MSG_NOSIGNAL) != static_cast<ssize_t>(answer.size())) {
        return close(c, true);
      }
      break;
    }
    case kData:
      if (!c.established || c.no_more) return close(c, true);
      data(c, h, chain);
      if (!c.fd) return;
      break;
    case kShutdown:
      if ((h.flags & kNoSend) != 0) c.no_more = true;
      if ((h.flags & (kNoSend | kNoReceive)) == (kNoSend | kNoReceive)) c.both_down = true;
      else if ((h.flags & kNoReceive) != 0) ::shutdown(c.fd.get(), SHUT_RD);
      flush(c);
      if (!c.fd) return;
      break;
    case kCreditUpdate: break;
    case kCreditRequest: c.want_credit = true; break;
    case kReset: return close(c, false);
    default: return close(c, true);
  }
  ready(c);
  watch(c);
}

void Vsock::request(const Key& key, const Header& h) {
  sockaddr_un address;
  auto fd = unix_socket();
  if (!fd || open_.size() >= kMostConnections || !address_of(path_ + "_" + std::to_string(key.host), address) ||
      ::connect(fd->get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return reset(key, kStream);
  }
  auto c = std::make_shared<Connection>();
  c->fd = std::move(*fd);
  c->key = key;
  c->established = c->want_response = true;
  c->peer_buffer = h.buffer;
  c->peer_forwarded = 0;
  open_[key] = c;
  ready(*c);
  watch(*c);
}

void Vsock::data(Connection& c, const Header& h, const Chain& chain) {
  if (c.kept.size() + h.length > kBuffer) return close(c, true);
  std::vector<iovec> pieces;
  chain.readable_range(sizeof h, h.length, pieces);
  for (const iovec& piece : pieces) {
    const u8* p = static_cast<const u8*>(piece.iov_base);
    std::size_t at = 0;
    if (c.kept.empty()) {
      const ssize_t n = ::send(c.fd.get(), p, piece.iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && errno != EAGAIN && errno != EINTR && errno != ENOBUFS) return close(c, true);
      at = n > 0 ? static_cast<std::size_t>(n) : 0;
      c.forwarded += static_cast<u32>(at);
    }
    c.kept.insert(c.kept.end(), p + at, p + piece.iov_len);
  }
  if (c.forwarded - c.forwarded_told >= kBuffer / 4) c.want_credit = true;
}

void Vsock::flush(Connection& c) {
  while (!c.kept.empty()) {
    u8 block[16384];
    const std::size_t n = std::min(c.kept.size(), sizeof block);
    std::copy_n(c.kept.begin(), n, block);
    const ssize_t done = ::send(c.fd.get(), block, n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (done < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == ENOBUFS) break;
      return close(c, true);
    }
    c.kept.erase(c.kept.begin(), c.kept.begin() + done);
    c.forwarded += static_cast<u32>(done);
  }
  if (c.forwarded - c.forwarded_told >= kBuffer / 4) c.want_credit = true;
  if (!c.kept.empty()) return;
  if (c.both_down) return close(c, true);
  if (c.no_more) ::shutdown(c.fd.get(), SHUT_WR);
}

// ------------------------------------------------------------------------------------------------ to the guest

bool Vsock::put(Chain& chain, const Key& key, u16 type, u16 op, u32 flags, u32 length, const Connection* c) {
  Header h{};
  h.source_cid = kHostCid;
  h.target_cid = cid_;
  h.source_port = key.host;
  h.target_port = key.guest;
  h.length = length;
  h.type = type;
  h.op = op;
  h.flags = flags;
  h.buffer = kBuffer;
  h.forwarded = c != nullptr ? c->forwarded : 0;
  const bool good = chain.write(0, &h, sizeof h) == sizeof h;
  rx_->complete(chain, static_cast<u32>(sizeof h) + length);
  return good;
}

/// One packet of the connection's into `chain`, if it has one; whether it may have more.
bool Vsock::send_one(Connection& c, Chain& chain, bool* used) {
  *used = true;
  const auto simple = [&](bool& want, u16 op, u32 flags) {
    want = false;
    c.forwarded_told = c.forwarded;
    put(chain, c.key, kStream, op, flags, 0, &c);
    return true;
  };
  if (c.want_request) return simple(c.want_request, kRequest, 0);
  if (c.want_response) return simple(c.want_response, kResponse, 0);
  if (c.established && c.readable && !c.eof) {
    const u64 room = chain.writable_bytes() > sizeof(Header) ? chain.writable_bytes() - sizeof(Header) : 0;
    const u32 most = static_cast<u32>(std::min<u64>({room, c.credit(), kMostPacket}));
    if (most > 0) {
      std::vector<iovec> pieces;
      chain.writable_range(sizeof(Header), most, pieces);
      if (pieces.size() > 1024) pieces.resize(1024);
      msghdr m{};
      m.msg_iov = pieces.data();
      m.msg_iovlen = pieces.size();
      const ssize_t n = ::recvmsg(c.fd.get(), &m, MSG_DONTWAIT);
      if (n > 0) {
        c.sent += static_cast<u32>(n);
        c.want_credit = false;
        c.forwarded_told = c.forwarded;
        put(chain, c.key, kStream, kData, 0, static_cast<u32>(n), &c);
        return true;
      }
      if (n == 0) {
        c.eof = c.want_shutdown = true;
      } else if (errno == EAGAIN || errno == EINTR) {
        c.readable = errno == EINTR;
      } else {
        c.eof = c.want_shutdown = true;
      }
    }
  }
  if (c.want_credit) return simple(c.want_credit, kCreditUpdate, 0);
  if (c.want_shutdown) return simple(c.want_shutdown, kShutdown, kNoSend);
  *used = false;
  return false;
}

void Vsock::pump() {
  if (rx_ == nullptr) return;
  Chain chain;
  rx_->disable_kicks();
  bool any = true;
  while (any) {
    any = false;
    while (!resets_.empty() || !ready_.empty()) {
      if (rx_->pop(chain) != Queue::Pop::kChain) {
        if (rx_->enable_kicks()) {
          rx_->disable_kicks();
          any = true;
        }
        break;
      }
      if (chain.writable_bytes() < sizeof(Header)) {
        rx_->complete(chain, 0);
        continue;
      }
      if (!resets_.empty()) {
        const Reset r = resets_.front();
        resets_.pop_front();
        put(chain, r.key, r.type, kReset, 0, 0, nullptr);
        continue;
      }
      const auto c = ready_.front().lock();
      ready_.pop_front();
      bool used = false;
      if (c && c->fd) {
        c->queued = false;
        if (send_one(*c, chain, &used)) ready(*c);
        watch(*c);
      }
      if (!used) rx_->put_back(chain);
    }
  }
  rx_->notify();
  if (held_up_ && resets_.size() < kMostResets / 2) {
    held_up_ = false;
    signal_event(tx_->kick_fd());
  }
}

}  // namespace ring3::virtio
