#include "devices/virtio/blk/uring.hpp"

#include <sys/eventfd.h>

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

void Uring::submit() {
  while (unsent_ != 0) {
    const int n = io_uring_submit(&ring_);
    if (n > 0) {
      unsent_ -= static_cast<unsigned>(n) < unsent_ ? static_cast<unsigned>(n) : unsent_;
    } else if (n != -EINTR && n != -EAGAIN && n != -EBUSY) {
      return;  // stays queued; the next submit() tries again
    } else if (n != -EINTR) {
      return;
    }
  }
}

void Uring::reap(const std::function<void(void*, int)>& done) {
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
