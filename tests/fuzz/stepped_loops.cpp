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

Status EventLoop::start(const std::string&) {
  if (auto r = prepare(); !r) return r;
  started.emplace_back(this, [this] { run(); });
  return Ok{};
}

void EventLoop::post(std::function<void()> task) { tasks_.push_back(std::move(task)); }

void EventLoop::stop() {
  std::erase_if(started, [this](const auto& s) { return s.first == this; });
  clear();
}

void EventLoop::run() {
  epoll_event events[16];
  const int n = ::epoll_wait(epoll_.get(), events, 16, 0);
  for (int i = 0; i < n; i++) dispatch(events[i].data.fd, events[i].events);
  const auto tasks = std::exchange(tasks_, {});
  for (const auto& task : tasks) task();
  worked |= n > 0 || !tasks.empty();
}

}  // namespace ring3::virtio
