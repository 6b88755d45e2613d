#pragma once
#include <liburing.h>

#include <functional>
#include <memory>
#include <span>

#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::virtio {

/// A small io_uring: vectored reads and writes, completions by an eventfd. One thread.
class Uring {
 public:
  /// Null where the host does not let us (an old kernel, seccomp, a sysctl).
  static std::unique_ptr<Uring> create(unsigned entries);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  /// Queues an access; submit() sends it. False: no room. The buffers' list stays valid until it is reaped.
  bool prepare(bool write, int fd, std::span<const iovec> buffers, u64 offset, void* tag);
  /// False: some stay queued, and the next submit() tries again.
  bool submit();
  /// submit(), and sleeps until `count` accesses have ended or the time is over; reap() has to follow. False: this kernel cannot, or
  /// none has ended.
  bool submit_and_wait(unsigned count, unsigned microseconds);
  /// Until speak() or reap() the event fd says nothing, if the kernel can do that: who calls it looks for himself.
  void hush();
  void speak();
  /// Whether reap() would find something.
  bool ended() const { return io_uring_cq_ready(&ring_) != 0; }
  /// Calls done(tag, result) for what has ended: bytes, or -errno.
  void reap(const std::function<void(void*, int)>& done);
  /// Waits until nothing flies.
  void drain(const std::function<void(void*, int)>& done);
  int event_fd() const { return event_.get(); }
  unsigned in_flight() const { return in_flight_; }

 private:
  Uring() = default;
  io_uring ring_{};
  bool live_ = false;
  bool silent_ = false;  // the eventfd says nothing until reap()
  UniqueFd event_;
  unsigned in_flight_ = 0, unsent_ = 0, entries_ = 0;
};

}  // namespace ring3::virtio
