#include "devices/virtio/blk/uring.hpp"

#include <sys/eventfd.h>

#include <atomic>

namespace ring3::virtio {

std::unique_ptr<Uring> Uring::create(unsigned entries) {
  std::unique_ptr<Uring> u(new Uring);
  if (io_uring_queue_init(entries, &u->ring_, 0) < 0) return nullptr;
  u->live_ = true;
  u->entries_ = entries;
  u->event_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!u->event_ || io_uring_register_eventfd(&u->ring_, u->event_.get()) < 0) return nullptr;
  return u;
}

Uring::~Uring() {
  if (live_) io_uring_queue_exit(&ring_);
}

bool Uring::prepare(bool write, int fd, std::span<const iovec> buffers, u64 offset, void* tag) {
  if (in_flight_ >= entries_) return false;
  io_uring_sqe* e = io_uring_get_sqe(&ring_);
  if (e == nullptr) return false;
  if (write) {
    io_uring_prep_writev(e, fd, buffers.data(), static_cast<unsigned>(buffers.size()), offset);
  } else {
    io_uring_prep_readv(e, fd, buffers.data(), static_cast<unsigned>(buffers.size()), offset);
  }
  io_uring_sqe_set_data(e, tag);
  in_flight_++;
  unsent_++;
  return true;
}

bool Uring::submit() {
  while (unsent_ != 0) {
    const int n = io_uring_submit(&ring_);
    if (n > 0) {
      unsent_ -= static_cast<unsigned>(n) < unsent_ ? static_cast<unsigned>(n) : unsent_;
    } else if (n != -EINTR) {
      return false;
    }
  }
  return true;
}

bool Uring::submit_and_wait(unsigned count, unsigned microseconds) {
  if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) return false;
  // What ends meanwhile is looked for here, not waited for elsewhere.
  hush();
  __kernel_timespec time{0, i64{microseconds} * 1000};
  io_uring_cqe* c;
  const int n = io_uring_submit_and_wait_timeout(&ring_, &c, count, &time, nullptr);
  unsent_ = io_uring_sq_ready(&ring_);
  return n >= 0 && io_uring_cq_ready(&ring_) != 0;  // n: how many were submitted, though the time may be over
}

void Uring::hush() { silent_ = silent_ || io_uring_cq_eventfd_toggle(&ring_, false) == 0; }

void Uring::speak() {
  if (!silent_) return;
  silent_ = false;
  (void)io_uring_cq_eventfd_toggle(&ring_, true);
  // What ended before that was not announced, and is seen afterwards: the kernel makes an entry first, then looks whether to tell.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Uring::reap(const std::function<void(void*, int)>& done) {
  speak();
  io_uring_cqe* c;
  while (in_flight_ != 0 && io_uring_peek_cqe(&ring_, &c) == 0) {
    void* tag = io_uring_cqe_get_data(c);
    const int result = c->res;
    io_uring_cqe_seen(&ring_, c);
    in_flight_--;
    done(tag, result);
  }
}

void Uring::drain(const std::function<void(void*, int)>& done) {
  while (in_flight_ != 0) {
    submit();
    io_uring_cqe* c;
    const int r = io_uring_wait_cqe(&ring_, &c);
    if (r < 0 && r != -EINTR && r != -EAGAIN) return;
    reap(done);
  }
}

}  // namespace ring3::virtio
