#include "devices/virtio/fs/fs.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/log.hpp"
#include "fs/fuse/deferred.hpp"

namespace ring3::virtio {

namespace {
struct Config {
  std::array<u8, Fs::kMostTag> tag;
  u32 request_queues;
};
}  // namespace

void Fs::read_config(u64 offset, std::span<u8> data) {
  Config config{};
  std::memcpy(config.tag.data(), tag_.data(), std::min(tag_.size(), config.tag.size()));
  config.request_queues = 1;
  read_config_struct(config, offset, data);
}

void Fs::start(u64, std::span<Queue* const> queues) {
  queues_.clear();
  gone_ = false;
  for (Queue* queue : queues) {
    if (queue != nullptr) queues_.push_back(queue);
  }
  Status status = Ok{};
  for (Queue* queue : queues_) {
    if (!status) break;
    status = loop_.add(queue->kick_fd(), EPOLLIN, [this, queue](u32) {
      Lock lock(mutex_);
      queue->clear_kick();
      serve(*queue, lock, false);
    });
  }
  if (status) {
    status = loop_.add(process_->fd(), EPOLLIN, [this](u32) {
      Lock lock(mutex_);
      take_answers(false);
      // Also when all that came was for requests from before a reset: their slots are free now.
      for (Queue* queue : queues_) serve(*queue, lock, false);
    });
  }
  timer_.reset(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (status && timer_) {
    status = loop_.add(timer_.get(), EPOLLIN, [this](u32) {
      Lock lock(mutex_);
      u64 times;
      [[maybe_unused]] const ssize_t got = ::read(timer_.get(), &times, sizeof times);
      timer_runs_ = false;
      process_->flush_deferred();
      tell();
    });
  }
  if (status) status = loop_.start("virtio-fs");
  if (!status) {
    log::error("share {}: {}", tag_, status.error().message);
    if (transport_ != nullptr) transport_->needs_reset("no thread for the share");
  }
  const Lock lock(mutex_);
  running_ = status.ok();
}

void Fs::stop() {
  {
    Lock lock(mutex_);
    running_ = false;
    left_.wait(lock, [this] { return kicks_ == 0; });
  }
  loop_.stop();
  process_->abandon();
  for (InFlight& request : in_flight_) request = {};
  timer_runs_ = false;
  untold_ = 0;
  queues_.clear();
}

bool Fs::kicked(u16 index) {
  Lock lock(mutex_);
  if (!running_) return false;
  const auto queue = std::find_if(queues_.begin(), queues_.end(), [&](const Queue* q) { return q->index() == index; });
  if (queue == queues_.end()) return false;
  kicks_++;
  serve(**queue, lock, true);
  if (std::exchange(starved_, false)) {
    for (Queue* other : queues_) serve(*other, lock, false);
  }
  if (--kicks_ == 0) left_.notify_all();
  return true;
}

/// Moves requests into slots. False: no slot is free, and requests may be left.
bool Fs::take_all(Queue& queue, Lock& lock, bool wait) {
  while (!gone_) {
    const auto slot = process_->acquire();
    if (!slot) {
      starved_ = true;
      return false;
    }
    InFlight& request = in_flight_[*slot];
    if (queue.pop(request.chain) != Queue::Pop::kChain) {
      process_->release(*slot);
      return true;
    }
    const auto part = process_->request(*slot);
    if (request.chain.readable_bytes() > part.size()) {
      process_->release(*slot);
      queue.fail("a FUSE request of " + std::to_string(request.chain.readable_bytes()) + " bytes");
      return true;
    }
    const std::size_t length = request.chain.read(0, part.data(), part.size());
    request.queue = &queue;
    if (defer(request, part.first(length))) {
      process_->release(*slot);
      continue;
    }
    const std::size_t room = static_cast<std::size_t>(std::min<u64>(request.chain.writable_bytes(), ~u32{0}));
    bool near = wait && length + room <= kMostWaitedFor;
    if (near && no_wait_ != 0) no_wait_--, near = false;
    if (near && process_->submit_near(*slot, length, room)) {
      (void)queue.enable_kicks();  // those of other vCPUs; what is there already is seen below
      lock.unlock();
      const bool there = process_->await(kMostWait);
      lock.lock();
      wait = false;  // the guest has other things to do
      if (there) take_answers(true);
      late_ = there ? 0 : std::min(late_ + 1, 10u);
      no_wait_ = there ? 0 : 1u << late_;
    } else if (!process_->submit(*slot, length, room)) {
      give_up("its process has ended");
    }
  }
  return true;
}

void Fs::serve(Queue& queue, Lock& lock, bool wait) {
  do {
    if (!wait) queue.disable_kicks();
    // Out of slots: an answer will bring us back, no kick is needed.
    if (gone_ || !take_all(queue, lock, wait)) return;
  } while (queue.enable_kicks());
}

/// Hands a request back whose answer is known. False: it is none, or there is no room for it.
bool Fs::defer(InFlight& request, std::span<const u8> message) {
  if (!timer_) return false;
  std::array<u8, 16> answer;
  const auto known = fs::deferred_answer(message, std::span(answer).first(static_cast<std::size_t>(std::min<u64>(answer.size(), request.chain.writable_bytes()))));
  if (!known || !process_->defer(message)) return false;
  request.queue->complete(request.chain, static_cast<u32>(request.chain.write(0, answer.data(), *known)));
  if (*known != 0) {
    request.queue->notify();
  } else {
    if (request.queue != untold_queue_) tell();
    untold_queue_ = request.queue;
    if (++untold_ >= kMostUntold) tell();
  }
  if (!std::exchange(timer_runs_, true)) {
    const itimerspec once{{}, {0, std::chrono::nanoseconds(kDeferral).count()}};
    timerfd_settime(timer_.get(), 0, &once, nullptr);
  }
  return true;
}

/// Tells the driver of what it was not told yet.
void Fs::tell() {
  if (std::exchange(untold_, 0) != 0) untold_queue_->notify();
}

void Fs::take_answers(bool near) {
  fs::ShareProcess::Answer answer;
  Queue* queue = nullptr;
  for (bool first = near; !gone_; first = false) {
    // A system call less for most requests: nothing else is under way. That the process is gone, the device's thread sees.
    if (near && !first && !process_->expects_more()) break;
    const auto received = first ? process_->receive_near(answer) : process_->receive(answer);
    if (received == fs::ShareProcess::Received::kGone) return give_up("its process has ended");
    if (received == fs::ShareProcess::Received::kNone) break;
    InFlight& request = in_flight_[answer.slot];
    const std::size_t written = request.chain.write(0, process_->reply(answer.slot).data(), answer.length);
    if (queue != nullptr && queue != request.queue) queue->notify();
    queue = request.queue;
    queue->complete(request.chain, static_cast<u32>(written));
    process_->release(answer.slot);
  }
  if (queue != nullptr) queue->notify();
}

void Fs::give_up(const char* why) {
  if (gone_) return;
  gone_ = true;
  loop_.post([this] { loop_.remove(process_->fd()); });
  log::error("share {}: {}", tag_, why);
  if (transport_ != nullptr) transport_->needs_reset(why);
}

}  // namespace ring3::virtio
