#include "devices/virtio/balloon/balloon_device.hpp"

#include <sys/epoll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "devices/bus/device.hpp"

namespace ring3::virtio {
namespace {

constexpr u64 kStatsQueue = 1 << 1, kDeflateOnOom = 1 << 2, kPageReporting = 1 << 5;

// SAFETY: [host, host + size) is guest RAM that MemoryView gave for this range: an anonymous mapping, whose pages
// read as zeroes after this. Pages of the host that lie in it only in part are left.
void drop(u8* host, u64 size) {
  const u64 start = (reinterpret_cast<u64>(host) + kPageSize - 1) & kPageMask;
  const u64 end = (reinterpret_cast<u64>(host) + size) & kPageMask;
  if (end <= start) return;
  void* const p = reinterpret_cast<void*>(start);
  if (::madvise(p, end - start, MADV_REMOVE) != 0) ::madvise(p, end - start, MADV_DONTNEED);  // private memory
}

}  // namespace

u64 BalloonDevice::features() const { return kStatsQueue | kDeflateOnOom | kPageReporting; }

void BalloonDevice::read_config(u64 offset, std::span<u8> data) {
  const struct {
    u32 pages, actual, hint, poison;
  } space{target_.load(), actual_.load(), 0, 0};
  read_config_struct(space, offset, data);
}

void BalloonDevice::write_config(u64 offset, std::span<const u8> data) {
  if (offset == 4 && data.size() == 4) {
    u32 v;
    std::memcpy(&v, data.data(), 4);
    actual_.store(v);
  }
}

void BalloonDevice::start(u64 features, std::span<Queue* const> queues) {
  std::size_t next = 2;
  const auto optional = [&](u64 bit) -> Queue* {
    if ((features & bit) == 0) return nullptr;
    Queue* q = next < queues.size() ? queues[next] : nullptr;
    next++;
    return q;
  };
  stats_queue_ = optional(kStatsQueue);
  report_queue_ = optional(kPageReporting);
  Status status = Ok{};
  Queue* any = nullptr;
  const auto serve = [&](Queue* q, std::function<void()> how) {
    if (q == nullptr || !status) return;
    any = q;
    status = loop_.add(q->kick_fd(), EPOLLIN, [q, how](u32) {
      q->clear_kick();
      how();
    });
  };
  Queue *inflate = queues[0], *deflate = queues[1];
  serve(inflate, [this, inflate] { serve_pages(*inflate, true); });
  serve(deflate, [this, deflate] { serve_pages(*deflate, false); });
  serve(stats_queue_, [this] { serve_stats(); });
  serve(report_queue_, [this] { serve_reports(); });
  if (status) status = loop_.start("balloon");
  if (!status && any != nullptr) any->fail("no thread for it: " + status.error().message);
  const std::lock_guard lock(mutex_);
  running_ = status.ok();
}

void BalloonDevice::stop() {
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
    stats_ = {};
  }
  loop_.stop();
  stats_buffer_.reset();
  stats_wanted_ = false;
  stats_queue_ = report_queue_ = nullptr;
  actual_.store(0);
}

void BalloonDevice::set_target(u64 bytes) {
  target_.store(static_cast<u32>(std::min<u64>(bytes / kPageSize, 0xffffffff)));
  const std::lock_guard lock(mutex_);
  if (running_) loop_.post([this] { transport_->config_changed(); });
}

BalloonDevice::Stats BalloonDevice::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void BalloonDevice::ask_for_stats() {
  const std::lock_guard lock(mutex_);
  if (!running_) return;
  loop_.post([this] {
    if (stats_queue_ == nullptr) return;
    stats_wanted_ = true;
    serve_stats();
  });
}

// Page numbers of 4 KiB each (5.5.6). A page that is not RAM is passed over.
void BalloonDevice::serve_pages(Queue& q, bool inflate) {
  constexpr u64 kMostPages = 4096;
  Chain chain;
  do {
    q.disable_kicks();
    while (q.pop(chain) == Queue::Pop::kChain) {
      const u64 count = std::min(chain.readable_bytes() / 4, kMostPages);
      for (u64 i = 0; inflate && i < count; i++) {
        u32 frame = 0;
        chain.read(4 * i, &frame, 4);
        const Gpa page(u64{frame} << kPageShift);
        u8* host = q.memory().range(page, kPageSize, true);
        if (host == nullptr) continue;
        drop(host, kPageSize);
        q.memory().stored(page, kPageSize);  // zeroes
      }
      q.complete(chain, 0);
    }
    q.notify();
  } while (q.enable_kicks());
}

// Free pages as writable buffers (5.5.6.8): dropped before they are handed back.
void BalloonDevice::serve_reports() {
  Queue& q = *report_queue_;
  Chain chain;
  do {
    q.disable_kicks();
    while (q.pop(chain) == Queue::Pop::kChain) {
      for (std::size_t i = 0; i < chain.writable().size(); i++) {
        const iovec& v = chain.writable()[i];
        drop(static_cast<u8*>(v.iov_base), v.iov_len);
        q.memory().stored(chain.writable_at()[i], v.iov_len);
      }
      reported_.fetch_add(chain.writable_bytes());
      q.complete(chain, 0);
    }
    q.notify();
  } while (q.enable_kicks());
}

// The driver lends one buffer with its figures; handing it back asks for new ones (5.5.6.2).
void BalloonDevice::serve_stats() {
  Queue& q = *stats_queue_;
  q.disable_kicks();
  Chain chain;
  do {
    while (q.pop(chain) == Queue::Pop::kChain) {
      Stats s;
      for (u64 at = 0; at + 10 <= std::min<u64>(chain.readable_bytes(), 1024); at += 10) {
        u8 raw[10];
        chain.read(at, raw, sizeof raw);
        const u64 tag = devices::load_le(std::span(raw).first(2)), value = devices::load_le(std::span(raw).subspan(2));
        std::optional<u64>* const fields[] = {&s.swap_in, &s.swap_out, &s.major_faults, &s.minor_faults,
                                              &s.free,    &s.total,    &s.available,    &s.disk_caches};
        if (tag < std::size(fields)) *fields[tag] = value;
      }
      {
        const std::lock_guard lock(mutex_);
        stats_ = s;
      }
      if (stats_buffer_) q.complete(*stats_buffer_, 0);
      stats_buffer_ = std::move(chain);
    }
    if (stats_wanted_ && stats_buffer_) {
      q.complete(*stats_buffer_, 0);
      stats_buffer_.reset();
      stats_wanted_ = false;
    }
    q.notify();
  } while (q.enable_kicks());
}

}  // namespace ring3::virtio
