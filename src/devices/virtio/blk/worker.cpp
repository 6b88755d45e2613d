#include "devices/virtio/blk/worker.hpp"

#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/event_fd.hpp"
#include "base/log.hpp"

namespace ring3::virtio {
namespace {

struct Header {  // 5.2.6
  u32 type = 0, reserved = 0;
  u64 sector = 0;
};
static_assert(sizeof(Header) == 16);
struct Range {
  u64 sector;
  u32 sectors, flags;
};
static_assert(sizeof(Range) == 16);

enum : u32 { kIn = 0, kOut = 1, kFlushRequest = 4, kGetId = 8, kDiscardRequest = 11, kWriteZeroesRequest = 13 };
enum : u8 { kOkay = 0, kIoError = 1, kUnsupported = 2 };
constexpr u64 kSector = 512;
constexpr u64 kIdBytes = 20;

}  // namespace

BlockDevice::Worker::Worker(BlockDevice& device, u64 features, Queue& queue)
    : device_(device), config_(device.config_), flush_each_((features & u64{1} << kFlush) == 0), read_only_(config_.read_only), queue_(queue) {
  if (config_.io_uring) uring_ = Uring::create(kQueueSize);
  Status status = loop_.add(queue_.kick_fd(), EPOLLIN, [this](u32) {
    const std::lock_guard lock(mutex_);
    queue_.clear_kick();
    serve();
  });
  if (status && uring_) {
    status = loop_.add(uring_->event_fd(), EPOLLIN, [this](u32) {
      const std::lock_guard lock(mutex_);
      drain_event(uring_->event_fd());
      reap(true);
      queue_.notify();
      serve();  // room again
    });
  }
  if (status) status = loop_.start("blk" + std::to_string(queue_.index()));
  if (!status) queue_.fail("no thread for it: " + status.error().message);
}

// After the thread has ended, accesses may still fly into guest memory: they are waited for, and never published.
BlockDevice::Worker::~Worker() {
  loop_.stop();
  if (!uring_) return;
  uring_->drain([this](void* tag, int) {
    Request& r = *static_cast<Request*>(tag);
    config_.image->end_direct(r.direct);
    if (!r.write) queue_.complete(r.chain, static_cast<u32>(r.length));
  });
}

BlockDevice::Worker::Request& BlockDevice::Worker::take() {
  if (free_.empty()) {
    all_.push_back(std::make_unique<Request>());
    free_.push_back(all_.back().get());
  }
  Request* r = free_.back();
  free_.pop_back();
  return *r;
}

bool BlockDevice::Worker::kicked() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  // Where several are under way, the thread does its part while the vCPU goes on.
  if (!lock.owns_lock() || alone_ < kSingle || (uring_ && uring_->in_flight() != 0)) return false;
  if (uring_) uring_->speak();
  Request& r = take();
  bool served = false, flies = false;
  if (queue_.pop(r.chain) == Queue::Pop::kChain) {
    if (config_.direct) {
      flies = begin(r);
    } else if (served = read_cached(r); served) {
      answer(r, kOkay);
      queue_.notify();
    }
    if (!served && !flies) queue_.put_back(r.chain);
  }
  if (!flies) free_.push_back(&r);
  const bool sent = flies && uring_->submit();
  if (sent) device_.sent_.store(true, std::memory_order_relaxed);
  if ((served || sent) && !queue_.enable_kicks()) return true;
  alone_ = 0;
  return false;
}

/// What kicked() has sent ends on the thread that sent it: where that looks by itself, the other one need not be woken. Who holds
/// the mutex meanwhile lets the ring speak again: the thread, which reaps whenever it serves, and kicked().
bool BlockDevice::Worker::look(bool more) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return true;
  if (!uring_ || flush_each_ || uring_->in_flight() == 0) return false;
  if (more) {
    uring_->hush();
  } else {
    uring_->speak();
  }
  if (uring_->ended()) {
    reap(true);
    queue_.notify();
  }
  return uring_->in_flight() != 0;
}

/// Prepares an access that bypasses the page cache; the thread answers it.
bool BlockDevice::Worker::begin(Request& r) {
  Header h;
  const bool write = r.chain.readable_bytes() > sizeof h;
  return uring_ && r.chain.read(0, &h, sizeof h) == sizeof h && h.type == (write ? kOut : kIn) && r.chain.writable_bytes() != 0 &&
         check(r, write, h.sector) && fly(r);
}

/// Hands an access to the ring. False: that cannot do it.
bool BlockDevice::Worker::fly(Request& r) {
  if (r.length == 0) return false;
  r.direct = config_.image->begin_direct(r.write, r.offset, r.buffers);
  if (r.direct.fd < 0) return false;
  if (!uring_->prepare(r.write, r.direct.fd, r.buffers, r.direct.host_offset, &r)) {
    config_.image->end_direct(r.direct);
    return false;
  }
  flying_bytes_ += r.length;
  return true;
}

/// A small read that the host can serve without waiting for its disk.
bool BlockDevice::Worker::read_cached(Request& r) {
  Header h;
  const u64 room = r.chain.writable_bytes();
  if (r.chain.read(0, &h, sizeof h) != sizeof h || h.type != kIn || room < 2 || room > kMostAtOnce + 1 || !check(r, false, h.sector)) return false;
  const auto direct = config_.image->begin_direct(false, r.offset, r.buffers);
  if (direct.fd < 0) return false;
  const ssize_t got = preadv2(direct.fd, r.buffers.data(), static_cast<int>(r.buffers.size()), static_cast<off_t>(direct.host_offset), RWF_NOWAIT);
  config_.image->end_direct(direct);
  return got >= 0 && static_cast<u64>(got) == r.length;
}

void BlockDevice::Worker::take_all() {
  for (unsigned n = 0;; n++) {
    Request& r = take();
    if (queue_.pop(r.chain) != Queue::Pop::kChain) {
      free_.push_back(&r);
      if (n == 1 && alone_ < kSingle) alone_++;
      return;
    }
    if (n != 0 || (uring_ && uring_->in_flight() != 0)) alone_ = 0;
    if (handle(r)) free_.push_back(&r);
    if (queue_.broken()) return;
  }
}

/// For how many ends to sleep in the kernel, without looking for what the driver adds: some of many small accesses, which spares
/// wake-ups here and interrupts in the guest. 0: none.
unsigned BlockDevice::Worker::worth_waiting_for() const {
  const unsigned flying = uring_->in_flight();
  return flying >= kDeep && flying_bytes_ / flying <= kMostAtOnce ? flying / 4 : 0;
}

void BlockDevice::Worker::serve() {
  unsigned rounds = kMostRounds;
  do {
    queue_.disable_kicks();
    for (bool waited = true; waited;) {
      take_all();
      if (queue_.broken()) return;
      waited = false;
      if (uring_) {
        if (const unsigned goal = worth_waiting_for(); goal != 0 && rounds != 0) {
          rounds--;
          waited = uring_->submit_and_wait(goal, kPatience);
        }
        if (!waited) uring_->submit();
        reap(true);  // what the page cache had is there already
      }
      queue_.notify();
    }
    if (rounds == 0) {  // the loop's other work comes first
      signal_event(queue_.kick_fd());
      return;
    }
  } while (queue_.enable_kicks());
}

void BlockDevice::Worker::reap(bool answers) {
  if (!uring_) return;
  uring_->reap([&](void* tag, int result) {
    Request& r = *static_cast<Request*>(tag);
    config_.image->end_direct(r.direct);
    flying_bytes_ -= r.length;
    if (!answers) return;
    u8 status = kOkay;
    // Short or refused: the slower way does all of it again, and says what is wrong.
    if (result < 0 || static_cast<u64>(result) != r.length) status = transfer(r);
    if (status == kOkay && r.write && flush_each_) status = this->status(config_.image->flush());
    answer(r, status);
    free_.push_back(&r);
  });
}

void BlockDevice::Worker::answer(Request& r, u8 status) {
  // The status is the last byte of what the device may write.
  const u64 last = r.chain.writable_bytes() - 1;
  r.chain.write(last, &status, 1);
  queue_.complete(r.chain, static_cast<u32>(last + 1));
}

bool BlockDevice::Worker::handle(Request& r) {
  Header h;
  if (r.chain.read(0, &h, sizeof h) != sizeof h || r.chain.writable_bytes() == 0) {
    queue_.fail("a block request without a header or a status byte");
    return true;
  }
  u8 status = kUnsupported;
  switch (h.type) {
    case kIn: return read_or_write(r, false, h.sector);
    case kOut: return read_or_write(r, true, h.sector);
    case kFlushRequest: status = this->status(config_.image->flush()); break;
    case kGetId: status = get_id(r); break;
    case kDiscardRequest: status = ranges(r, false); break;
    case kWriteZeroesRequest: status = ranges(r, true); break;
    default: break;
  }
  answer(r, status);
  return true;
}

/// Sets the request's place and buffers. False: there is no such place on the disk, or it may not be written.
bool BlockDevice::Worker::check(Request& r, bool write, u64 sector) {
  r.write = write;
  r.length = write ? r.chain.readable_bytes() - sizeof(Header) : r.chain.writable_bytes() - 1;
  const u64 sectors = config_.image->size() / kSector;
  if (r.length % kSector != 0 || sector > sectors || r.length / kSector > sectors - sector || (write && read_only_)) return false;
  r.offset = sector * kSector;
  r.buffers.clear();
  if (write) {
    r.chain.readable_range(sizeof(Header), r.length, r.buffers);
  } else {
    r.chain.writable_range(0, r.length, r.buffers);
  }
  return true;
}

bool BlockDevice::Worker::read_or_write(Request& r, bool write, u64 sector) {
  if (!check(r, write, sector)) {
    answer(r, kIoError);
    return true;
  }
  // Buffered writes go to the page cache at once: handing them to kernel threads would only cost.
  if (uring_ && (!write || config_.direct) && fly(r)) return false;
  u8 status = transfer(r);
  if (status == kOkay && write && flush_each_) status = this->status(config_.image->flush());
  answer(r, status);
  return true;
}

u8 BlockDevice::Worker::transfer(Request& r) {
  const int e = r.write ? config_.image->write(r.offset, std::span<const iovec>(r.buffers))
                        : config_.image->read(r.offset, std::span<const iovec>(r.buffers));
  if (e < 0) log::debug("disk: {} of {} bytes at {}: {}", r.write ? "write" : "read", r.length, r.offset, std::strerror(-e));
  return status(e);
}

u8 BlockDevice::Worker::status(int result) {
  if (result >= 0) return kOkay;
  device_.refused(-result);
  return kIoError;
}

u8 BlockDevice::Worker::get_id(Request& r) {
  char id[kIdBytes] = {};
  std::memcpy(id, config_.serial.data(), std::min<std::size_t>(config_.serial.size(), sizeof id));
  const u64 room = std::min<u64>(kIdBytes, r.chain.writable_bytes() - 1);
  r.chain.write(0, id, room);
  return kOkay;
}

u8 BlockDevice::Worker::ranges(Request& r, bool write_zeroes) {
  if (read_only_) return kUnsupported;
  const u64 bytes = r.chain.readable_bytes() - sizeof(Header);
  if (bytes == 0 || bytes % sizeof(Range) != 0 || bytes / sizeof(Range) > kMostRanges) return kIoError;
  Range list[kMostRanges];
  r.chain.read(sizeof(Header), list, bytes);  // once: what is checked is what is done
  const std::span<const Range> all(list, bytes / sizeof(Range));
  const u64 sectors = config_.image->size() / kSector;
  for (const Range& x : all) {
    if ((x.flags & ~(write_zeroes ? 1u : 0u)) != 0) return kUnsupported;
    if (x.sectors > kMostRangeSectors || x.sector > sectors || x.sectors > sectors - x.sector) return kIoError;
  }
  for (const Range& x : all) {
    if (x.sectors == 0) continue;
    const u64 offset = x.sector * kSector, length = u64{x.sectors} * kSector;
    const int e = write_zeroes ? config_.image->write_zeroes(offset, length, (x.flags & 1) != 0) : config_.image->discard(offset, length);
    if (e < 0) return status(e);
  }
  return flush_each_ ? status(config_.image->flush()) : static_cast<u8>(kOkay);
}

}  // namespace ring3::virtio
