#include "devices/virtio/core/event_loop.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <system_error>

#include "base/event_fd.hpp"

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

Status EventLoop::start(const std::string& name) {
  if (auto r = prepare(); !r) return r;
  {
    const std::lock_guard lock(mutex_);
    end_ = false;
  }
  sigset_t all, old;
  sigfillset(&all);
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, s);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  Status status = Ok{};
  try {
    thread_ = std::thread([this, name] {
      pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
      run();
    });
  } catch (const std::system_error& e) {
    status = Error::of(EAGAIN, std::string("cannot start a thread: ") + e.what());
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return status;
}

void EventLoop::post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  if (wake_) signal_event(wake_.get());
}

void EventLoop::stop() {
  if (thread_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      end_ = true;
    }
    signal_event(wake_.get());
    thread_.join();
  }
  handlers_.clear();
  tasks_.clear();
  epoll_.reset();
  wake_.reset();
}

void EventLoop::run() {
  epoll_event events[16];
  for (;;) {
    const int n = ::epoll_wait(epoll_.get(), events, 16, -1);
    for (int i = 0; i < n; i++) {
      const int fd = events[i].data.fd;
      if (fd == wake_.get()) {
        drain_event(fd);
        std::vector<std::function<void()>> tasks;
        {
          const std::lock_guard lock(mutex_);
          if (end_) return;
          tasks.swap(tasks_);
        }
        for (auto& task : tasks) task();
        continue;
      }
      // An earlier handler of this round may have removed it; and a handler may remove itself.
      const auto it = handlers_.find(fd);
      if (it == handlers_.end()) continue;
      const auto handler = it->second;
      (*handler)(events[i].events);
    }
    const std::lock_guard lock(mutex_);
    if (end_) return;
  }
}

}  // namespace ring3::virtio
