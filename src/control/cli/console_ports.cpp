#include "control/cli/console_ports.hpp"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <optional>

#include "base/log.hpp"
#include "base/unix_listener.hpp"
#include "devices/virtio/console/console_device.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::control {
namespace {

using Where = ConsolePortOption::Where;
constexpr i64 kLookForReader = 200'000'000;  // ns between looks whether somebody has opened a pseudo-terminal

struct Port {
  ConsolePortOption option;
  std::optional<UnixListener> listener;
  // On the loop's thread but for what is marked.
  UniqueFd peer;               // the file, the terminal's master, the client
  UniqueFd timer;              // of a terminal
  u32 events = 0;              // that peer is watched for; 0: not watched
  bool lost = false;           // its output cannot be written for good, which was said
  std::mutex mutex;
  std::vector<u8> held;        // output; guarded by mutex
  bool there = false;          // somebody takes output; guarded by mutex
  bool was_full = false;       // guarded by mutex
  bool guest_open = false;     // guarded by mutex
};

Result<UniqueFd> make_terminal(const std::string& name) {
  UniqueFd master(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
  char path[128];
  if (!master || grantpt(master.get()) != 0 || unlockpt(master.get()) != 0 || ptsname_r(master.get(), path, sizeof path) != 0) {
    return Error::from_errno("--console-port " + name + ": cannot make a pseudo-terminal");
  }
  // Raw; and opened and closed once, so that the master tells whether somebody has it open.
  const UniqueFd slave(::open(path, O_RDWR | O_NOCTTY | O_CLOEXEC));
  termios mode;
  if (!slave || tcgetattr(slave.get(), &mode) != 0) return Error::from_errno("--console-port " + name + ": " + path);
  cfmakeraw(&mode);
  if (tcsetattr(slave.get(), TCSANOW, &mode) != 0) return Error::from_errno("--console-port " + name + ": " + path);
  std::fprintf(stderr, "ring3: the port %s is on %s\n", name.c_str(), path);
  return master;
}

}  // namespace

struct ConsolePorts::Impl {
  std::vector<std::unique_ptr<Port>> ports;
  std::shared_ptr<virtio::ConsoleDevice> device;
  virtio::EventLoop loop;

  ~Impl() {
    device.reset();  // its thread calls us
    loop.stop();
  }

  // ---- on the device's thread ----

  std::size_t take(std::size_t index, std::span<const u8> bytes) {
    Port& p = *ports[index];
    const std::lock_guard lock(p.mutex);
    if (!p.there) return bytes.size();
    const std::size_t n = std::min(bytes.size(), kMostHeld - p.held.size());
    if (n < bytes.size()) p.was_full = true;
    if (p.held.empty() && n != 0) loop.post([this, index] { flush(index); });
    p.held.insert(p.held.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
    return n;
  }

  void opened(std::size_t index, bool open) {
    {
      const std::lock_guard lock(ports[index]->mutex);
      ports[index]->guest_open = open;
    }
    loop.post([this, index] { watch(index); });
  }

  // ---- on the loop's thread ----

  void flush(std::size_t index) {
    Port& p = *ports[index];
    int code = 0;
    bool room = false;
    {
      const std::lock_guard lock(p.mutex);
      std::size_t done = 0;
      while (done < p.held.size()) {
        const ssize_t n = p.listener ? ::send(p.peer.get(), &p.held[done], p.held.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT)
                                     : ::write(p.peer.get(), &p.held[done], p.held.size() - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
          code = errno;
          break;
        }
        done += static_cast<std::size_t>(n);
      }
      p.held.erase(p.held.begin(), p.held.begin() + static_cast<std::ptrdiff_t>(done));
      if (p.was_full && p.held.size() <= kMostHeld / 2) room = true, p.was_full = false;
    }
    if (code != 0 && code != EAGAIN) return gone(index, code);
    if (room) device->output_room(index);
    watch(index);
  }

  /// Waits for what can be done with the peer now.
  void watch(std::size_t index) {
    Port& p = *ports[index];
    u32 events = 0;
    {
      const std::lock_guard lock(p.mutex);
      if (!p.there || p.option.where == Where::kFile) return;
      if (!p.held.empty()) events |= EPOLLOUT;
      // What comes before the guest listens would be lost there.
      if (p.guest_open && device->room(index) > 0) events |= EPOLLIN;
    }
    events |= EPOLLRDHUP;
    if (events == p.events) return;
    const Status done = p.events == 0 ? loop.add(p.peer.get(), events, [this, index](u32 what) { ready(index, what); })
                                      : loop.set_events(p.peer.get(), events);
    if (done) p.events = events;
    else log::warn("--console-port {}: {}", p.option.name, done.error().message);
  }

  void ready(std::size_t index, u32 what) {
    Port& p = *ports[index];
    const std::size_t room = device->room(index);
    constexpr u32 kEnds = EPOLLHUP | EPOLLERR | EPOLLRDHUP;
    if ((p.events & EPOLLIN) != 0 && (what & (EPOLLIN | kEnds)) != 0 && room > 0) {
      u8 bytes[4096];
      const ssize_t n = ::read(p.peer.get(), bytes, std::min(sizeof bytes, room));
      if (n > 0) {
        device->receive(index, std::span(bytes, static_cast<std::size_t>(n)));
      } else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
        return gone(index, 0);
      }
    } else if ((what & kEnds) != 0) {
      u8 byte;
      if (!p.listener || ::recv(p.peer.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0) return gone(index, 0);
      // The end is behind bytes that the guest does not take yet: it comes again when the guest does.
      loop.remove(p.peer.get());
      p.events = 0;
      return;
    }
    if ((what & EPOLLOUT) != 0) return flush(index);
    watch(index);
  }

  /// Nobody is at the other end any more.
  void gone(std::size_t index, int code) {
    Port& p = *ports[index];
    {
      const std::lock_guard lock(p.mutex);
      p.there = p.was_full = false;
      p.held.clear();
    }
    if (p.events != 0) loop.remove(p.peer.get());
    p.events = 0;
    if (p.option.where == Where::kUnix) {
      p.peer.reset();
      device->set_open(index, false);
      (void)loop.set_events(p.listener->fd(), EPOLLIN);
    } else if (p.option.where == Where::kPty) {
      itimerspec again{{0, kLookForReader}, {0, kLookForReader}};
      timerfd_settime(p.timer.get(), 0, &again, nullptr);
    } else if (!p.lost) {
      p.lost = true;
      log::error("--console-port {}: cannot write {}: {}; what the guest writes from now on is lost", p.option.name, p.option.path, std::strerror(code));
    }
    device->output_room(index);
  }

  void come(std::size_t index) {
    {
      const std::lock_guard lock(ports[index]->mutex);
      ports[index]->there = true;
    }
    watch(index);
  }

  void accept(std::size_t index) {
    Port& p = *ports[index];
    UniqueFd client(::accept4(p.listener->fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!client) return;
    p.peer = std::move(client);
    (void)loop.set_events(p.listener->fd(), 0);
    // In this order: what the guest writes as soon as it is told is the client's already.
    come(index);
    device->set_open(index, true);
  }

  void look_for_reader(std::size_t index) {
    Port& p = *ports[index];
    u64 times;
    (void)!::read(p.timer.get(), &times, sizeof times);
    pollfd now{p.peer.get(), POLLIN, 0};
    if (::poll(&now, 1, 0) > 0 && (now.revents & POLLHUP) != 0) return;
    const itimerspec never{};
    timerfd_settime(p.timer.get(), 0, &never, nullptr);
    come(index);
  }
};

ConsolePorts::ConsolePorts(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ConsolePorts::ConsolePorts(ConsolePorts&&) noexcept = default;
ConsolePorts::~ConsolePorts() = default;

Result<ConsolePorts> ConsolePorts::open(const std::vector<ConsolePortOption>& options) {
  auto impl = std::make_unique<Impl>();
  for (const ConsolePortOption& o : options) {
    auto port = std::make_unique<Port>();
    port->option = o;
    if (o.where == Where::kUnix) {
      auto listener = UnixListener::create(o.path);
      if (!listener) return Error::of(listener.error().code, "--console-port " + o.name + ": " + listener.error().message);
      port->listener.emplace(std::move(*listener));
    } else if (o.where == Where::kPty) {
      auto master = make_terminal(o.name);
      if (!master) return master.error();
      port->peer = std::move(*master);
      port->timer.reset(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
      if (!port->timer) return Error::from_errno("timerfd");
    } else {
      port->peer.reset(::open(o.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, 0644));
      if (!port->peer) return Error::from_errno("--console-port " + o.name + ": cannot write " + o.path);
      port->there = true;
    }
    impl->ports.push_back(std::move(port));
  }
  return ConsolePorts(std::move(impl));
}

Status ConsolePorts::add_to(vmm::MachineConfig& config) {
  Impl& i = *impl_;
  if (i.ports.empty()) return Ok{};
  virtio::ConsoleDevice::Config console;
  for (std::size_t k = 0; k < i.ports.size(); k++) {
    virtio::ConsoleDevice::Port port;
    port.name = i.ports[k]->option.name;
    port.try_output = [&i, k](std::span<const u8> bytes) { return i.take(k, bytes); };
    port.has_room = [&i, k] { i.loop.post([&i, k] { i.watch(k); }); };
    port.opened = [&i, k](bool open) { i.opened(k, open); };
    port.open = i.ports[k]->option.where != Where::kUnix;
    console.ports.push_back(std::move(port));
  }
  i.device = std::make_shared<virtio::ConsoleDevice>(std::move(console));
  for (std::size_t k = 0; k < i.ports.size(); k++) {
    Port& p = *i.ports[k];
    Status status = Ok{};
    if (p.listener) status = i.loop.add(p.listener->fd(), EPOLLIN, [&i, k](u32) { i.accept(k); });
    if (p.timer) {
      status = i.loop.add(p.timer.get(), EPOLLIN, [&i, k](u32) { i.look_for_reader(k); });
      const itimerspec soon{{0, kLookForReader}, {0, kLookForReader}};
      timerfd_settime(p.timer.get(), 0, &soon, nullptr);
    }
    if (!status) return status;
  }
  if (auto status = i.loop.start("console-ports"); !status) return status;
  // One object for all boots: between them it uses nothing of a machine.
  config.devices.push_back([device = i.device]() -> Result<std::shared_ptr<virtio::Device>> { return std::shared_ptr<virtio::Device>(device); });
  return Ok{};
}

}  // namespace ring3::control
