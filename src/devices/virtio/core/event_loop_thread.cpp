// The thread of an EventLoop; the descriptors are event_loop.cpp's.
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>

#include <system_error>

#include "base/event_fd.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

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
  clear();
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
      dispatch(fd, events[i].events);
    }
    const std::lock_guard lock(mutex_);
    if (end_) return;
  }
}

}  // namespace ring3::virtio
