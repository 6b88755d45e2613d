#include "devices/virtio/net/net.hpp"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>

#include "base/event_fd.hpp"
#include "base/log.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

namespace {

namespace f = net_feature;
using net::kMaxMessage;
using net::kVnetHeader;
using net::VnetHeader;

constexpr u16 kQueueSize = 256;
constexpr u16 kControlQueueSize = 64;
constexpr int kBudget = 128;            ///< frames of one direction before the other's turn
constexpr std::size_t kMostPieces = 1024;

struct NetConfig {
  u8 mac[6];
  u16 status;
  u16 pairs;
  u16 mtu;
};
static_assert(sizeof(NetConfig) == 12);

/// Whether a driver that negotiated `features` may send a frame of `length` bytes behind this header (5.1.6.2).
bool header_is_good(const VnetHeader& h, u64 features, std::size_t length) {
  if ((h.flags & VnetHeader::kNeedsCsum) != 0) {
    if ((features & f::kChecksum) == 0) return false;
    if (std::size_t{h.csum_start} + h.csum_offset + 2 > length) return false;
  }
  const u8 type = h.gso_type & static_cast<u8>(~VnetHeader::kGsoEcn);
  if (type == VnetHeader::kGsoNone) return h.gso_type == 0;
  if ((h.gso_type & VnetHeader::kGsoEcn) != 0 && (features & f::kHostEcn) == 0) return false;
  if ((h.flags & VnetHeader::kNeedsCsum) == 0 || h.gso_size == 0 || h.hdr_len > length) return false;
  switch (type) {
    case VnetHeader::kGsoTcp4: return (features & f::kHostTso4) != 0;
    case VnetHeader::kGsoTcp6: return (features & f::kHostTso6) != 0;
    case VnetHeader::kGsoUdpL4: return (features & f::kHostUso) != 0;
    default: return false;
  }
}

}  // namespace

/// A receive and a transmit queue, and the thread that serves them.
class Net::Pair {
 public:
  Pair(Net& net, u32 index, Queue& rx, Queue& tx, Queue* control)
      : net_(net), index_(index), rx_(rx), tx_(tx), control_(control), bounce_(kMaxMessage) {
    const u64 large = f::kGuestTso4 | f::kGuestTso6;
    need_ = (net.features_ & large) != 0 ? kMaxMessage : kVnetHeader + net::kEthHeader + 4 + net.config_.mtu;
    mergeable_ = (net.features_ & f::kMergeable) != 0;
  }

  Status start() {
    if (net_.up_) {
      if (auto s = loop_.add(net_.link_->fd(index_), EPOLLIN, [this](u32 events) { link_event(events); }); !s) return s;
    }
    if (auto s = loop_.add(rx_.kick_fd(), EPOLLIN, [this](u32) { rx_.clear_kick(), receive(); }); !s) return s;
    if (auto s = loop_.add(tx_.kick_fd(), EPOLLIN, [this](u32) { tx_.clear_kick(), send(); }); !s) return s;
    if (control_ != nullptr) {
      if (auto s = loop_.add(control_->kick_fd(), EPOLLIN, [this](u32) { control_->clear_kick(), net_.control(*control_); }); !s) return s;
    }
    return loop_.start(net_.config_.name + " q" + std::to_string(index_));
  }
  void stop() {
    loop_.stop();
    // The last one popped goes back first.
    while (!held_.empty()) {
      rx_.put_back(held_.back());
      held_.pop_back();
    }
  }

 private:
  void link_event(u32 events) {
    if ((events & EPOLLOUT) != 0) {
      blocked_ = false;
      send();
    }
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) receive();
    // An end is told whatever is waited for, again and again, and a guest without buffers would never come to read it.
    if ((events & (EPOLLHUP | EPOLLERR)) != 0 && starved_) lost();
    watch();
  }
  void watch() {
    if (gone_) return;
    const u32 wanted = (starved_ ? 0 : static_cast<u32>(EPOLLIN)) | (blocked_ ? static_cast<u32>(EPOLLOUT) : 0);
    if (wanted == watched_) return;
    watched_ = wanted;
    if (!loop_.set_events(net_.link_->fd(index_), wanted)) lost();
  }
  void lost() {
    if (gone_) return;
    gone_ = true;
    loop_.remove(net_.link_->fd(index_));
    net_.link_down();
  }

  /// Takes buffers of the driver's until they hold `size` bytes; whether they do.
  bool gather(std::size_t size) {
    while (held_bytes_ < size && (mergeable_ || held_.empty())) {
      Chain chain;
      if (!spare_.empty()) {
        chain = std::move(spare_.back());
        spare_.pop_back();
      }
      if (rx_.pop(chain) != Queue::Pop::kChain) break;
      if (chain.writable_bytes() == 0) {  // of no use, but the driver's to have back
        rx_.complete(chain, 0);
        continue;
      }
      held_bytes_ += chain.writable_bytes();
      held_.push_back(std::move(chain));
    }
    return held_bytes_ >= size;
  }

  /// Hands out the first `size` bytes of the held buffers, which hold a message.
  void deliver(std::size_t size) {
    VnetHeader header;
    // The number of buffers stands in the first of them (5.1.6.4); flags are only for who asked for them.
    u16 buffers = 0;
    for (std::size_t left = size; left > 0; buffers++) left -= std::min<u64>(left, held_[buffers].writable_bytes());
    if ((net_.features_ & f::kGuestChecksum) == 0) {
      const u8 none = 0;
      held_[0].write(0, &none, 1);
    }
    held_[0].write(offsetof(VnetHeader, num_buffers), &buffers, sizeof header.num_buffers);
    for (std::size_t left = size; left > 0;) {
      Chain& chain = held_.front();
      const std::size_t n = std::min<u64>(left, chain.writable_bytes());
      rx_.complete(chain, static_cast<u32>(n));
      left -= n;
      held_bytes_ -= chain.writable_bytes();
      spare_.push_back(std::move(chain));
      held_.pop_front();
    }
    net_.counters_.received++;
  }

  /// Of the held buffers, as many pieces as fit one call and `size` bytes.
  std::size_t pieces(std::size_t size) {
    iov_.clear();
    std::size_t bytes = 0;
    for (const Chain& chain : held_) {
      for (const iovec& piece : chain.writable()) {
        if (bytes >= size || iov_.size() >= kMostPieces) return bytes;
        iov_.push_back(piece);
        bytes += piece.iov_len;
      }
    }
    return bytes;
  }

  enum class Step { kDone, kNothing, kNoBuffers, kGone };
  Step receive_one() {
    if (pending_ == 0) {
      ssize_t n;
      if (gather(need_) && pieces(need_) >= need_) {
        n = net_.link_->receive(index_, iov_);
        if (n > 0 && static_cast<std::size_t>(n) >= kVnetHeader + net::kEthHeader) {
          capture(iov_, static_cast<std::size_t>(n));
          deliver(static_cast<std::size_t>(n));
          return Step::kDone;
        }
      } else {
        // Few buffers: it may still fit, which only its length tells.
        if (held_.empty()) return Step::kNoBuffers;
        iovec whole{bounce_.data(), bounce_.size()};
        n = net_.link_->receive(index_, {&whole, 1});
        if (n > 0 && static_cast<std::size_t>(n) >= kVnetHeader + net::kEthHeader) pending_ = static_cast<std::size_t>(n);
      }
      if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? Step::kNothing : Step::kGone;
      if (n == 0) return Step::kGone;
      if (pending_ == 0) {
        net_.counters_.receive_dropped++;
        return Step::kDone;
      }
    }
    if (!gather(pending_)) {
      // More cannot come: this driver takes no frame of that size.
      if (!mergeable_ ? !held_.empty() : held_.size() >= rx_.size()) {
        pending_ = 0;
        net_.counters_.receive_dropped++;
        return Step::kDone;
      }
      return Step::kNoBuffers;
    }
    std::size_t at = 0;
    for (const Chain& chain : held_) {
      if (at >= pending_) break;
      at += chain.write(0, bounce_.data() + at, std::min<u64>(pending_ - at, chain.writable_bytes()));
    }
    iovec whole{bounce_.data(), pending_};
    capture({&whole, 1}, pending_);
    deliver(pending_);
    pending_ = 0;
    return Step::kDone;
  }

  void receive() {
    if (gone_) return;
    starved_ = false;
    rx_.disable_kicks();
    for (int i = 0; i < kBudget && !starved_; i++) {
      const Step step = receive_one();
      if (step == Step::kNothing) break;
      if (step == Step::kGone) {
        lost();
        break;
      }
      if (step == Step::kNoBuffers && !rx_.enable_kicks()) starved_ = true;
    }
    rx_.notify();
    watch();
  }

  void send() {
    if (blocked_) return;
    bool more = true;
    while (more) {
      tx_.disable_kicks();
      for (int i = 0;; i++) {
        if (i == kBudget) {  // the others' turn; this queue's comes again
          signal_event(tx_.kick_fd());
          tx_.notify();
          return;
        }
        if (tx_.pop(chain_) != Queue::Pop::kChain) break;
        if (!send_one(chain_)) {
          tx_.put_back(chain_);
          blocked_ = true;
          tx_.notify();
          watch();
          return;
        }
        tx_.complete(chain_, 0);
      }
      tx_.notify();
      more = tx_.enable_kicks();
    }
  }

  /// False when the link has no room now.
  bool send_one(const Chain& chain) {
    VnetHeader header;
    const u64 size = chain.readable_bytes();
    const auto drop = [&] {
      net_.counters_.send_dropped++;
      return true;
    };
    if (gone_ || size < kVnetHeader + net::kEthHeader || size > kMaxMessage || chain.read(0, &header, sizeof header) != sizeof header) {
      return drop();
    }
    if (!header_is_good(header, net_.features_, size - kVnetHeader)) return drop();
    header.num_buffers = 0;
    header.flags &= VnetHeader::kNeedsCsum;
    iov_.clear();
    iov_.push_back({&header, sizeof header});
    chain.readable_range(kVnetHeader, size - kVnetHeader, iov_);
    if (iov_.size() > kMostPieces) return drop();
    if (!net_.link_->send(index_, iov_)) {
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) return false;
      lost();
      return drop();
    }
    capture(iov_, size);
    net_.counters_.sent++;
    return true;
  }

  void capture(std::span<const iovec> message, std::size_t size) {
    if (net_.config_.capture) net_.config_.capture->write(message, kVnetHeader, size);
  }

  Net& net_;
  u32 index_;
  Queue& rx_;
  Queue& tx_;
  Queue* control_;
  EventLoop loop_;
  Chain chain_;
  std::deque<Chain> held_;      // popped of rx_, not used yet
  std::vector<Chain> spare_;    // for their memory
  std::size_t held_bytes_ = 0;
  std::vector<iovec> iov_;
  std::vector<u8> bounce_;      // a message that came while buffers were few
  std::size_t pending_ = 0;     // its size
  std::size_t need_;
  bool mergeable_;
  bool starved_ = false;        // of receive buffers
  bool blocked_ = false;        // by the link
  bool gone_ = false;
  u32 watched_ = EPOLLIN;
};

Net::Net(std::shared_ptr<net::Link> link, Config config) : link_(std::move(link)), config_(std::move(config)), mac_(config_.mac) {}
Net::~Net() { stop(); }

u64 Net::features() const {
  u64 bits = f::kChecksum | f::kGuestChecksum | f::kGuestOffloads | f::kMtu | f::kMac | f::kGuestTso4 | f::kGuestTso6 | f::kGuestEcn |
             f::kHostTso4 | f::kHostTso6 | f::kHostEcn | f::kMergeable | f::kStatus | f::kControl | f::kControlRx | f::kControlMac;
  if (link_->queues() > 1) bits |= f::kMultiqueue;
  if (link_->takes_udp_segments()) bits |= f::kHostUso;
  return bits;
}

std::vector<u16> Net::queue_sizes() const {
  std::vector<u16> sizes(2 * std::size_t{link_->queues()}, kQueueSize);
  sizes.push_back(kControlQueueSize);
  return sizes;
}

void Net::read_config(u64 offset, std::span<u8> data) {
  NetConfig config{};
  {
    const std::lock_guard lock(mutex_);
    std::copy(mac_.b.begin(), mac_.b.end(), config.mac);
  }
  config.status = up_ ? 1 : 0;
  config.pairs = static_cast<u16>(link_->queues());
  config.mtu = config_.mtu;
  read_config_struct(config, offset, data);
}

void Net::start(u64 features, std::span<Queue* const> queues) {
  features_ = features;
  {
    const std::lock_guard lock(mutex_);
    mac_ = config_.mac;
  }
  apply_offloads(features);
  if (auto s = link_->set_active_queues(1); !s) log::warn("{}: {}", config_.name, s.error().message);
  // Without multiqueue the control queue comes right after the first pair (5.1.2), a control queue of a pair otherwise.
  const bool multi = (features & f::kMultiqueue) != 0;
  const u32 pairs = multi ? link_->queues() : 1;
  const std::size_t control_index = std::size_t{2} * pairs;
  Queue* control = (features & f::kControl) != 0 && control_index < queues.size() ? queues[control_index] : nullptr;
  for (u32 i = 0; i < pairs && 2 * i + 1 < queues.size(); i++) {
    Queue* rx = queues[2 * i];
    Queue* tx = queues[2 * i + 1];
    if (rx == nullptr || tx == nullptr) continue;
    auto pair = std::make_unique<Pair>(*this, i, *rx, *tx, control);
    control = nullptr;
    if (auto s = pair->start(); !s) {
      log::error("{}: {}", config_.name, s.error().message);
      pair->stop();
      transport_->needs_reset(s.error().message);
      return;
    }
    pairs_.push_back(std::move(pair));
  }
}

void Net::stop() {
  for (auto& pair : pairs_) pair->stop();
  pairs_.clear();
  if (config_.capture) config_.capture->flush();
}

void Net::link_down() {
  if (!up_.exchange(false)) return;
  log::error("{}: the network back-end has ended; the guest's link is down", config_.name);
  if (transport_ != nullptr) transport_->config_changed();
}

void Net::apply_offloads(u64 bits) {
  net::Offloads offloads;
  offloads.checksum = (bits & f::kGuestChecksum) != 0;
  offloads.tcp4 = offloads.checksum && (bits & f::kGuestTso4) != 0;
  offloads.tcp6 = offloads.checksum && (bits & f::kGuestTso6) != 0;
  offloads.ecn = (offloads.tcp4 || offloads.tcp6) && (bits & f::kGuestEcn) != 0;
  if (auto s = link_->set_offloads(offloads); !s) log::warn("{}: {}", config_.name, s.error().message);
}

// 5.1.6.5: class, command, data; then one byte for the answer.
void Net::control(Queue& queue) {
  Chain chain;
  do {
    queue.disable_kicks();
    while (queue.pop(chain) == Queue::Pop::kChain) {
      u8 message[2 + 4096];
      const std::size_t size = chain.read(0, message, sizeof message);
      u8 answer = 1;
      if (size >= 2 && chain.readable_bytes() <= sizeof message) answer = command(message[0], message[1], {message + 2, size - 2});
      chain.write(0, &answer, 1);
      queue.complete(chain, 1);
    }
    queue.notify();
  } while (queue.enable_kicks());
}

u8 Net::command(u8 kind, u8 code, std::span<const u8> data) {
  constexpr u8 kOk = 0, kError = 1;
  switch (kind) {
    case 0:  // receive modes: everything is delivered anyway
      return code <= 5 && data.size() == 1 ? kOk : kError;
    case 1: {
      if (code == 0) {  // two tables: a count of 32 bits, and as many addresses
        for (int table = 0; table < 2; table++) {
          if (data.size() < 4) return kError;
          const u64 count = data[0] | static_cast<u64>(data[1]) << 8 | static_cast<u64>(data[2]) << 16 | static_cast<u64>(data[3]) << 24;
          data = data.subspan(4);
          if (count * 6 > data.size()) return kError;
          data = data.subspan(count * 6);
        }
        return kOk;
      }
      if (code != 1 || data.size() != 6 || (data[0] & 1) != 0) return kError;
      const std::lock_guard lock(mutex_);
      std::copy(data.begin(), data.end(), mac_.b.begin());
      return kOk;
    }
    case 4: {
      if (code != 0 || data.size() != 2 || (features_ & f::kMultiqueue) == 0) return kError;
      const u32 pairs = static_cast<u32>(data[0] | data[1] << 8);
      if (pairs == 0 || pairs > link_->queues()) return kError;
      return link_->set_active_queues(pairs) ? kOk : kError;
    }
    case 5: {
      if (code != 0 || data.size() != 8 || (features_ & f::kGuestOffloads) == 0) return kError;
      u64 bits = 0;
      for (std::size_t i = 0; i < 8; i++) bits |= static_cast<u64>(data[i]) << (8 * i);
      if ((bits & ~features_) != 0) return kError;
      apply_offloads(bits);
      return kOk;
    }
    default: return kError;
  }
}

}  // namespace ring3::virtio
