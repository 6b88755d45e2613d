#include "devices/virtio/console/console_device.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cstring>

namespace ring3::virtio {
namespace {

constexpr u64 kSize = 1, kMultiport = 2, kEmergencyWrite = 4;  // feature bits 0, 1, 2
enum : u16 { kDeviceReady = 0, kPortAdd = 1, kPortReady = 3, kConsolePort = 4, kResize = 5, kPortOpen = 6, kPortName = 7 };
constexpr std::size_t kMostPorts = 16, kMostControl = 256;

struct Space {
  u16 columns, rows;
  u32 ports, emergency;
};

}  // namespace

ConsoleDevice::ConsoleDevice(Config config) : config_(std::move(config)), columns_(config_.columns), rows_(config_.rows) {
  if (config_.ports.empty()) config_.ports.emplace_back();
  if (config_.ports.size() > kMostPorts) config_.ports.resize(kMostPorts);
  waiting_.resize(config_.ports.size());
  was_short_.resize(config_.ports.size());
  held_.resize(config_.ports.size());
  guest_open_.resize(config_.ports.size());
  told_open_.resize(config_.ports.size());
  ready_.resize(config_.ports.size());
  for (const Port& p : config_.ports) open_.push_back(p.open);
}

u64 ConsoleDevice::features() const { return kSize | kMultiport | kEmergencyWrite; }

std::vector<u16> ConsoleDevice::queue_sizes() const { return std::vector<u16>(2 + 2 * config_.ports.size(), 64); }

void ConsoleDevice::read_config(u64 offset, std::span<u8> data) {
  const std::lock_guard lock(mutex_);
  read_config_struct(Space{columns_, rows_, static_cast<u32>(config_.ports.size()), 0}, offset, data);
}

void ConsoleDevice::write_config(u64 offset, std::span<const u8> data) {
  if (offset == 8 && !data.empty() && config_.ports[0].output) config_.ports[0].output(data.first(1));
}

void ConsoleDevice::start(u64 features, std::span<Queue* const> queues) {
  multiport_ = (features & kMultiport) != 0;
  queues_.assign(queues.begin(), queues.end());
  if (!multiport_ && queues_.size() > 2) std::fill(queues_.begin() + 2, queues_.end(), nullptr);
  Status status = Ok{};
  Queue* any = nullptr;
  const auto serve = [&](std::size_t index, std::function<void()> how) {
    Queue* q = queues_[index];
    if (q == nullptr || !status) return;
    any = q;
    status = loop_.add(q->kick_fd(), EPOLLIN, [q, how](u32) {
      q->clear_kick();
      how();
    });
  };
  for (std::size_t p = 0; p < config_.ports.size(); p++) {
    serve(receive_queue(p), [this, p] { serve_input(p); });
    serve(receive_queue(p) + 1, [this, p] { serve_output(p); });
  }
  serve(2, [this] { flush_control(); });
  serve(3, [this] { serve_control(); });
  if (status) status = loop_.start("console");
  if (!status && any != nullptr) any->fail("no thread for it: " + status.error().message);
  const std::lock_guard lock(mutex_);
  running_ = status.ok();
}

void ConsoleDevice::stop() {
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
  }
  loop_.stop();
  queues_.clear();
  control_.clear();
  for (std::size_t p = 0; p < config_.ports.size(); p++) {
    held_[p] = Held();
    if (guest_open_[p] && config_.ports[p].opened) config_.ports[p].opened(false);
    guest_open_[p] = told_open_[p] = ready_[p] = false;
  }
}

std::size_t ConsoleDevice::room(std::size_t port) const {
  const std::lock_guard lock(mutex_);
  return port < waiting_.size() ? kMostWaiting - waiting_[port].size() : 0;
}

void ConsoleDevice::receive(std::size_t port, std::span<const u8> bytes) {
  const std::lock_guard lock(mutex_);
  if (port >= waiting_.size()) return;
  auto& w = waiting_[port];
  bytes = bytes.first(std::min(bytes.size(), kMostWaiting - w.size()));
  w.insert(w.end(), bytes.begin(), bytes.end());
  if (w.size() == kMostWaiting) was_short_[port] = true;
  if (running_) loop_.post([this, port] { serve_input(port); });
}

void ConsoleDevice::resize(u16 columns, u16 rows) {
  const std::lock_guard lock(mutex_);
  if (columns == columns_ && rows == rows_) return;
  columns_ = columns, rows_ = rows;
  if (!running_) return;
  loop_.post([this] {
    for (u32 p = 0; multiport_ && p < config_.ports.size(); p++) {
      if (config_.ports[p].console) send_size(p);
    }
    transport_->config_changed();
  });
}

void ConsoleDevice::output_room(std::size_t port) {
  const std::lock_guard lock(mutex_);
  if (running_ && port < held_.size()) loop_.post([this, port] { serve_output(port); });
}

void ConsoleDevice::set_open(std::size_t port, bool open) {
  const std::lock_guard lock(mutex_);
  if (port >= open_.size() || open_[port] == open) return;
  open_[port] = open;
  if (running_) loop_.post([this, port] { tell_open(port); });
}

// An end is told when the guest has what came before it.
void ConsoleDevice::tell_open(std::size_t port) {
  bool open = false;
  {
    const std::lock_guard lock(mutex_);
    open = open_[port];
    if (!ready_[port] || open == told_open_[port] || (!open && !waiting_[port].empty())) return;
  }
  told_open_[port] = open;
  send({static_cast<u32>(port), kPortOpen, open});
  flush_control();
}

void ConsoleDevice::serve_output(std::size_t port) {
  const std::size_t index = receive_queue(port) + 1;
  if (index >= queues_.size() || queues_[index] == nullptr) return;
  Queue& q = *queues_[index];
  Held& held = held_[port];
  bool full = false;
  do {
    q.disable_kicks();
    while (!full && (held.any || q.pop(held.chain) == Queue::Pop::kChain)) {
      held.any = true;
      full = !pass_output(port, held);
      if (full) break;
      q.complete(held.chain, 0);
      held.any = false, held.done = 0;
    }
    q.notify();
  } while (q.enable_kicks() && !full);
}

// False: not all of it was taken.
bool ConsoleDevice::pass_output(std::size_t port, Held& held) {
  const Port& p = config_.ports[port];
  while (held.done < held.chain.readable_bytes()) {
    u8 bytes[4096];
    const std::size_t n = held.chain.read(held.done, bytes, sizeof bytes);
    const std::span<const u8> some(bytes, n);
    if (n == 0) return true;
    std::size_t taken = n;
    if (p.try_output) taken = std::min(n, p.try_output(some));
    else if (p.output) p.output(some);
    held.done += taken;
    if (taken < n) return false;
  }
  return true;
}

void ConsoleDevice::serve_input(std::size_t port) {
  const std::size_t index = receive_queue(port);
  if (index >= queues_.size() || queues_[index] == nullptr) return;
  Queue& q = *queues_[index];
  Chain chain;
  bool grew = false;
  {
    const std::lock_guard lock(mutex_);
    auto& w = waiting_[port];
    while (!w.empty() && q.pop(chain) == Queue::Pop::kChain) {
      u8 bytes[4096];
      const std::size_t n = std::min({w.size(), sizeof bytes, static_cast<std::size_t>(chain.writable_bytes())});
      std::copy_n(w.begin(), n, bytes);
      w.erase(w.begin(), w.begin() + static_cast<std::ptrdiff_t>(n));
      chain.write(0, bytes, n);
      q.complete(chain, static_cast<u32>(n));
      if (n == 0) {
        q.fail("a receive buffer without room");
        break;
      }
    }
    if (was_short_[port] && w.size() <= kMostWaiting / 2) grew = true, was_short_[port] = false;
  }
  q.notify();
  // Buffers that come while nothing waits need not be announced; those that are waited for do.
  if (q.enable_kicks()) {
    const std::lock_guard lock(mutex_);
    if (!waiting_[port].empty() && running_) loop_.post([this, port] { serve_input(port); });
  }
  tell_open(port);
  if (grew && config_.ports[port].has_room) config_.ports[port].has_room();
}

// ---- the control queues (5.3.6.2) ----

void ConsoleDevice::serve_control() {
  Queue& q = *queues_[3];
  Chain chain;
  do {
    q.disable_kicks();
    while (q.pop(chain) == Queue::Pop::kChain) {
      Control m{};
      if (chain.read(0, &m, sizeof m) != sizeof m) {
        q.fail("a control message that is too short");
        return;
      }
      q.complete(chain, 0);
      handle(m);
    }
    q.notify();
  } while (q.enable_kicks());
  flush_control();
}

void ConsoleDevice::handle(const Control& m) {
  if (m.event == kDeviceReady) {
    for (u32 p = 0; m.value == 1 && p < config_.ports.size(); p++) send({p, kPortAdd, 1});
    return;
  }
  if (m.id >= config_.ports.size()) return;
  const Port& port = config_.ports[m.id];
  if (m.event == kPortReady && m.value == 1) {
    if (port.console) {
      send({m.id, kConsolePort, 1});
      send_size(m.id);
    }
    if (!port.name.empty()) {
      send({m.id, kPortName, 1}, std::span(reinterpret_cast<const u8*>(port.name.data()), port.name.size()));
    }
    ready_[m.id] = true, told_open_[m.id] = false;
    tell_open(m.id);
  } else if (m.event == kPortOpen) {
    guest_open_[m.id] = m.value != 0;
    if (port.opened) port.opened(m.value != 0);
  }
}

void ConsoleDevice::send_size(u32 port) {
  u16 size[2];
  {
    const std::lock_guard lock(mutex_);
    size[0] = columns_, size[1] = rows_;
  }
  if (size[0] == 0 || size[1] == 0) return;
  send({port, kResize, 0}, std::span(reinterpret_cast<const u8*>(size), sizeof size));
  flush_control();
}

// A driver that asks and asks without taking answers gets no more of them.
void ConsoleDevice::send(const Control& m, std::span<const u8> extra) {
  if (control_.size() >= kMostControl) return;
  std::vector<u8> bytes(sizeof m);
  std::memcpy(bytes.data(), &m, sizeof m);
  bytes.insert(bytes.end(), extra.begin(), extra.end());
  control_.push_back(std::move(bytes));
}

void ConsoleDevice::flush_control() {
  Queue* q = queues_.size() > 2 ? queues_[2] : nullptr;
  if (q == nullptr) return;
  Chain chain;
  do {
    while (!control_.empty() && q->pop(chain) == Queue::Pop::kChain) {
      const auto& m = control_.front();
      const std::size_t n = chain.write(0, m.data(), m.size());
      q->complete(chain, static_cast<u32>(n));
      control_.pop_front();
    }
    q->notify();
  } while (q->enable_kicks() && !control_.empty());
}

}  // namespace ring3::virtio
