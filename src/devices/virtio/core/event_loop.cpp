#include "devices/virtio/core/event_loop.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>

namespace ring3::virtio {

Status EventLoop::prepare() {
  if (epoll_) return Ok{};
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_) return Error::from_errno("event loop");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = wake_.get();
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) < 0) return Error::from_errno("epoll_ctl");
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

void EventLoop::dispatch(int fd, u32 events) {
  const auto it = handlers_.find(fd);
  if (it == handlers_.end()) return;
  const auto handler = it->second;
  (*handler)(events);
}

void EventLoop::clear() {
  handlers_.clear();
  tasks_.clear();
  epoll_.reset();
  wake_.reset();
}

}  // namespace ring3::virtio
