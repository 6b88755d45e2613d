#include "devices/virtio/fs/fs.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cstring>

#include "base/log.hpp"

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
    if (status) status = loop_.add(queue->kick_fd(), EPOLLIN, [this, queue](u32) { kicked(*queue); });
  }
  if (status) status = loop_.add(process_->fd(), EPOLLIN, [this](u32) { answered(); });
  if (status) status = loop_.start("virtio-fs");
  if (!status) {
    log::error("share {}: {}", tag_, status.error().message);
    if (transport_ != nullptr) transport_->needs_reset("no thread for the share");
  }
}

void Fs::stop() {
  loop_.stop();
  process_->abandon();
  for (InFlight& request : in_flight_) request = {};
  queues_.clear();
}

/// Moves requests into slots. False: no slot is free, and requests may be left.
bool Fs::take_all(Queue& queue) {
  for (;;) {
    const auto slot = process_->acquire();
    if (!slot) return false;
    InFlight& request = in_flight_[*slot];
    if (queue.pop(request.chain) != Queue::Pop::kChain) {
      process_->release(*slot);
      return true;
    }
    const auto room = process_->request(*slot);
    if (request.chain.readable_bytes() > room.size()) {
      process_->release(*slot);
      queue.fail("a FUSE request of " + std::to_string(request.chain.readable_bytes()) + " bytes");
      return true;
    }
    const std::size_t length = request.chain.read(0, room.data(), room.size());
    request.queue = &queue;
    if (!process_->submit(*slot, length, static_cast<std::size_t>(std::min<u64>(request.chain.writable_bytes(), ~u32{0})))) {
      give_up("its process has ended");
      return true;
    }
  }
}

void Fs::kicked(Queue& queue) {
  queue.clear_kick();
  if (gone_) return;
  do {
    queue.disable_kicks();
    // Out of slots: an answer will bring us back, no kick is needed.
    if (!take_all(queue)) return;
  } while (queue.enable_kicks());
}

void Fs::answered() {
  fs::ShareProcess::Answer answer;
  bool answered_any = false;
  for (;;) {
    const auto received = process_->receive(answer);
    if (received == fs::ShareProcess::Received::kGone) return give_up("its process has ended");
    if (received == fs::ShareProcess::Received::kNone) break;
    InFlight& request = in_flight_[answer.slot];
    const std::size_t written = request.chain.write(0, process_->reply(answer.slot).data(), answer.length);
    request.queue->complete(request.chain, static_cast<u32>(written));
    process_->release(answer.slot);
    answered_any = true;
  }
  if (answered_any) {
    for (Queue* queue : queues_) queue->notify();
  }
  // Also when all that came was for requests from before a reset: their slots are free now.
  for (Queue* queue : queues_) kicked(*queue);
}

void Fs::give_up(const char* why) {
  if (gone_) return;
  gone_ = true;
  loop_.remove(process_->fd());
  log::error("share {}: {}", tag_, why);
  if (transport_ != nullptr) transport_->needs_reset(why);
}

}  // namespace ring3::virtio
