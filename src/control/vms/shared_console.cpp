#include "control/vms/shared_console.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/event_fd.hpp"
#include "control/vms/registry.hpp"

namespace ring3::vms {
namespace {

constexpr std::size_t kMostLine = 512;
constexpr std::size_t kHeader = 3;

}  // namespace

Result<std::unique_ptr<SharedConsole>> SharedConsole::create(int directory_fd, OnSize on_size, Serving serving) {
  std::unique_ptr<SharedConsole> console(new SharedConsole(directory_fd));
  console->on_size_ = std::move(on_size);
  if (auto status = console->start(serving); !status) return status.error();
  return console;
}

Status SharedConsole::start(Serving serving) {
  log_fd_.reset(openat(directory_fd_, "console.log", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC | O_APPEND, 0600));
  if (!log_fd_) return Error::from_errno("cannot make the console's log");
  ready_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  wake_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  listen_fd_.reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!ready_fd_ || !wake_fd_ || !listen_fd_) return Error::from_errno("cannot make the console");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = socket_path(directory_fd_);
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  if (bind(listen_fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      listen(listen_fd_.get(), kMostClients) != 0) {
    return Error::from_errno("cannot make the console's socket");
  }
  if (serving == Serving::kByCaller) return Ok{};
  thread_ = std::thread([this] { serve(); });
  pthread_setname_np(thread_.native_handle(), "console-socket");
  return Ok{};
}

SharedConsole::~SharedConsole() {
  {
    const std::lock_guard lock(mutex_);
    end_ = true;
  }
  signal_event(wake_fd_.get());
  if (thread_.joinable()) thread_.join();
}

void SharedConsole::log(std::span<const u8> bytes) {
  while (!bytes.empty()) {
    const ssize_t wrote = ::write(log_fd_.get(), bytes.data(), bytes.size());
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return;  // a full disk: the guest goes on without a log
    log_bytes_ += static_cast<u64>(wrote);
    bytes = bytes.subspan(static_cast<std::size_t>(wrote));
  }
  if (log_bytes_ < kLogBytes) return;
  if (renameat(directory_fd_, "console.log", directory_fd_, "console.log.1") != 0) return;
  UniqueFd next(openat(directory_fd_, "console.log", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC | O_APPEND, 0600));
  if (!next) return;
  log_fd_ = std::move(next);
  log_bytes_ = 0;
}

bool SharedConsole::write(std::span<const u8> bytes) {
  log(bytes);
  const std::lock_guard lock(mutex_);
  const auto newline = std::find(bytes.rbegin(), bytes.rend(), u8{'\n'});
  if (newline != bytes.rend()) line_.clear();
  line_.insert(line_.end(), newline.base(), bytes.end());
  if (line_.size() > kMostLine) line_.erase(line_.begin(), line_.end() - kMostLine);
  for (auto& client : clients_) {
    if (client->out.size() - client->sent + bytes.size() > kMostBehind) client->gone = true;
    if (client->gone) continue;
    // One that reads, but never to the end, does not keep what it has read.
    if (client->sent >= kMostBehind) {
      client->out.erase(client->out.begin(), client->out.begin() + static_cast<std::ptrdiff_t>(client->sent));
      client->sent = 0;
    }
    client->out.insert(client->out.end(), bytes.begin(), bytes.end());
  }
  if (!clients_.empty()) signal_event(wake_fd_.get());
  return true;
}

vmm::ConsoleInput SharedConsole::read(std::span<u8> into) {
  const std::lock_guard lock(mutex_);
  vmm::ConsoleInput input;
  input.bytes = std::min(into.size(), input_.size());
  if (input.bytes > 0) std::memcpy(into.data(), input_.data(), input.bytes);
  input_.erase(input_.begin(), input_.begin() + static_cast<std::ptrdiff_t>(input.bytes));
  if (input_.empty()) drain_event(ready_fd_.get());
  signal_event(wake_fd_.get());  // there is room again
  return input;
}

void SharedConsole::accept_one() {
  UniqueFd fd(accept4(listen_fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  deaf_ = !fd && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED;
  if (!fd || clients_.size() >= kMostClients) return;
  auto client = std::make_unique<Client>();
  client->fd = std::move(fd);
  client->out = line_;
  clients_.push_back(std::move(client));
}

/// Takes complete frames out of what has come. False: not our protocol.
bool SharedConsole::take_frames(Client& client) {
  std::size_t at = 0;
  while (client.in.size() - at >= kHeader) {
    const u8* frame = client.in.data() + at;
    const std::size_t length = frame[1] | static_cast<std::size_t>(frame[2]) << 8;
    if (client.in.size() - at - kHeader < length) break;
    const u8* body = frame + kHeader;
    if (frame[0] == kInput) {
      input_.insert(input_.end(), body, body + length);
      if (length > 0) signal_event(ready_fd_.get());
    } else if (frame[0] == kSize && length == 4) {
      const auto word = [&](int i) { return static_cast<u16>(body[i] | body[i + 1] << 8); };
      if (on_size_) on_size_(word(0), word(2));
    } else {
      return false;
    }
    at += kHeader + length;
  }
  client.in.erase(client.in.begin(), client.in.begin() + static_cast<std::ptrdiff_t>(at));
  return true;
}

void SharedConsole::receive(Client& client) {
  std::array<u8, 4096> buffer;
  const ssize_t got = recv(client.fd.get(), buffer.data(), buffer.size(), 0);
  if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (got <= 0) {
    client.gone = true;
    return;
  }
  client.in.insert(client.in.end(), buffer.begin(), buffer.begin() + got);
  if (!take_frames(client)) client.gone = true;
}

void SharedConsole::flush(Client& client) {
  while (client.sent < client.out.size()) {
    const ssize_t sent = send(client.fd.get(), client.out.data() + client.sent, client.out.size() - client.sent, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno == EAGAIN) return;
    if (sent <= 0) {
      client.gone = true;
      return;
    }
    client.sent += static_cast<std::size_t>(sent);
  }
  client.out.clear();
  client.sent = 0;
}

void SharedConsole::serve() {
  while (serve_once(-1) >= 0) {
  }
}

int SharedConsole::serve_once(int timeout_ms) {
  std::vector<pollfd> fds;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(clients_, [](const auto& client) { return client->gone; });
    if (end_) {
      for (auto& client : clients_) flush(*client);
      return -1;
    }
    fds.push_back({wake_fd_.get(), POLLIN, 0});
    // Who cannot be let in stays at the door: it is looked for now and then, not all the time.
    fds.push_back({deaf_ ? -1 : listen_fd_.get(), POLLIN, 0});
    for (const auto& client : clients_) {
      const bool room = input_.size() < kMostInput;
      fds.push_back({client->fd.get(), static_cast<short>((room ? POLLIN : 0) | (client->out.empty() ? 0 : POLLOUT)), 0});
    }
  }
  constexpr int kPatience = 1000;  // ms
  const int ready = ::poll(fds.data(), fds.size(), deaf_ && (timeout_ms < 0 || timeout_ms > kPatience) ? kPatience : timeout_ms);
  deaf_ = false;
  if (ready < 0) return errno == EINTR ? 0 : -1;
  const std::lock_guard lock(mutex_);
  if (fds[0].revents != 0) drain_event(wake_fd_.get());
  // Clients are added and removed on this thread only, so the order still holds.
  for (std::size_t i = 2; i < fds.size(); i++) {
    Client& client = *clients_[i - 2];
    if ((fds[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !client.gone) receive(client);
    if (!client.gone) flush(client);
  }
  if (fds[1].revents != 0) accept_one();
  return ready;
}

}  // namespace ring3::vms
