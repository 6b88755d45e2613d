#include "stepped_loops.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <utility>

#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {
namespace {

std::vector<std::pair<EventLoop*, std::function<void()>>> started;
bool worked = false;

}  // namespace

bool step_loops() {
  worked = false;
  const auto now = started;
  for (const auto& [loop, round] : now) round();
  return worked;
}

Status EventLoop::prepare() {
  if (!epoll_) epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) return Error::from_errno("event loop");
  return Ok{};
}

Status EventLoop::add(int fd, u32 events, std::function<void(u32)> handler) {
  if (auto r = prepare(); !r) return r;
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0) return Error::from_errno("epoll_ctl");
  handlers_[fd] = std::make_shared<std::function<void(u32)>>(std::move(handler));
  return Ok{};
}

Status EventLoop::set_events(int fd, u32 events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) < 0) return Error::from_errno("epoll_ctl");
  return Ok{};
}

void EventLoop::remove(int fd) {
  if (handlers_.erase(fd) != 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

Status EventLoop::start(const std::string&) {
  if (auto r = prepare(); !r) return r;
  started.emplace_back(this, [this] { run(); });
  return Ok{};
}

void EventLoop::post(std::function<void()> task) { tasks_.push_back(std::move(task)); }

void EventLoop::stop() {
  std::erase_if(started, [this](const auto& s) { return s.first == this; });
  handlers_.clear();
  tasks_.clear();
  epoll_.reset();
}

void EventLoop::run() {
  epoll_event events[16];
  const int n = ::epoll_wait(epoll_.get(), events, 16, 0);
  for (int i = 0; i < n; i++) {
    const auto it = handlers_.find(events[i].data.fd);
    if (it == handlers_.end()) continue;
    const auto handler = it->second;
    (*handler)(events[i].events);
  }
  const auto tasks = std::exchange(tasks_, {});
  for (const auto& task : tasks) task();
  worked |= n > 0 || !tasks.empty();
}

}  // namespace ring3::virtio
