#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::virtio {

/// A thread that waits for file descriptors: what a device's queues are served on.
///
/// Threading: add(), remove() and set_events() before start() or on the loop's own thread; post() and stop() on any
///            other. Handlers run on the loop's thread, one at a time.
/// Signals:   the thread takes none but those of faults.
class EventLoop {
 public:
  EventLoop() = default;
  ~EventLoop() { stop(); }
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  /// `handler` gets the epoll events. The fd is not owned. Level-triggered: consume what made it ready.
  Status add(int fd, u32 events, std::function<void(u32 events)> handler);
  Status set_events(int fd, u32 events);
  void remove(int fd);

  /// Starts the thread. name: at most 15 characters are seen.
  Status start(const std::string& name);
  /// Runs `task` on the loop's thread soon; dropped when the loop has ended.
  void post(std::function<void()> task);
  /// Ends and joins the thread after the handler that runs; forgets all descriptors. May be started again.
  void stop();
  bool running() const { return thread_.joinable(); }

 private:
  Status prepare();
  void run();
  /// To the descriptor's handler, if it has one still: an earlier one of the round may have removed it, and it may remove itself.
  void dispatch(int fd, u32 events);
  void clear();  ///< no thread runs: descriptors and tasks are forgotten

  UniqueFd epoll_, wake_;
  std::map<int, std::shared_ptr<std::function<void(u32)>>> handlers_;
  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;  // guarded by mutex_
  bool end_ = false;                          // guarded by mutex_
  std::thread thread_;
};

}  // namespace ring3::virtio
