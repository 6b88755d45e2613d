#include "devices/virtio/blk/block_device.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.hpp"
#include "devices/virtio/blk/worker.hpp"

namespace ring3::virtio {
namespace {

struct BlockConfig {  // 5.2.4; every field is at its natural alignment
  u64 capacity = 0;
  u32 size_max = 0, seg_max = 0;
  u16 cylinders = 0;
  u8 heads = 0, sectors = 0;
  u32 block_size = 512;
  u8 physical_block_exponent = 0, alignment_offset = 0;
  u16 minimum_io = 0;
  u32 optimal_io = 0;
  u8 writeback = 0, unused = 0;
  u16 queues = 0;
  u32 discard_sectors = 0, discard_ranges = 0, discard_alignment = 0;
  u32 zero_sectors = 0, zero_ranges = 0;
  u8 zero_may_unmap = 0, unused_too[3] = {};
};
static_assert(sizeof(BlockConfig) == 64);

constexpr u64 bit(u64 n) { return u64{1} << n; }

}  // namespace

BlockDevice::BlockDevice(Config config) : config_(std::move(config)) {
  config_.read_only |= !config_.image->writable();
  config_.queues = std::clamp<u16>(config_.queues, 1, 64);
}

BlockDevice::~BlockDevice() { stop(); }

u64 BlockDevice::features() const {
  u64 f = bit(kSegMax) | bit(kBlockSize) | bit(kFlush) | bit(kTopology);
  if (config_.queues > 1) f |= bit(kMultiQueue);
  return f | (config_.read_only ? bit(kReadOnly) : bit(kDiscard) | bit(kWriteZeroes));
}

std::vector<u16> BlockDevice::queue_sizes() const { return std::vector<u16>(config_.queues, kQueueSize); }

void BlockDevice::read_config(u64 offset, std::span<u8> data) {
  BlockConfig c;
  c.capacity = config_.image->size() / 512;
  c.seg_max = kMostSegments;
  c.physical_block_exponent = 3;  // 4 KiB: what hosts write at once
  c.minimum_io = 8;
  c.queues = config_.queues;
  if (!config_.read_only) {
    c.discard_sectors = c.zero_sectors = kMostRangeSectors;
    c.discard_ranges = c.zero_ranges = kMostRanges;
    c.discard_alignment = std::max<u32>(8, config_.image->cluster_size() / 512);
    c.zero_may_unmap = 1;
  }
  read_config_struct(c, offset, data);
}

void BlockDevice::start(u64 features, std::span<Queue* const> queues) {
  negotiated_ = features;
  {
    const std::lock_guard lock(workers_mutex_);
    workers_.resize(queues.size());
  }
  for (Queue* q : queues) {
    if (q != nullptr) start_queue(q->index(), *q);
  }
}

void BlockDevice::start_queue(u16 index, Queue& queue) {
  const std::lock_guard lock(workers_mutex_);
  workers_[index] = std::make_unique<Worker>(*this, negotiated_, queue);
}

void BlockDevice::stop_queue(u16 index) {
  const std::lock_guard lock(workers_mutex_);
  workers_[index].reset();
}

bool BlockDevice::kicked(u16 index) {
  // Another vCPU is in here, or the device is started or stopped: the thread does it.
  const std::unique_lock lock(workers_mutex_, std::try_to_lock);
  return lock.owns_lock() && index < workers_.size() && workers_[index] && workers_[index]->kicked();
}

void BlockDevice::look(bool more) {
  if (!(more ? sent_ : quiet_).load(std::memory_order_relaxed)) return;
  std::unique_lock lock(workers_mutex_, std::defer_lock);
  if (!more) {
    lock.lock();
    quiet_.store(false, std::memory_order_relaxed);
  } else if (!lock.try_lock()) {
    return;
  }
  bool flies = false;
  for (const auto& worker : workers_) flies |= worker && worker->look(more);
  if (!more) return;
  sent_.store(flies, std::memory_order_relaxed);
  quiet_.store(true, std::memory_order_relaxed);
}

void BlockDevice::refused(int error) {
  const bool full = error == ENOSPC || error == EDQUOT;
  if ((full ? told_full_ : told_).exchange(true)) return;
  const std::string name = config_.name.empty() ? "a disk" : config_.name;
  if (full) {
    log::warn("{}: the host has no room left for it ({}); the guest gets I/O errors: free some and restart the guest", name, std::strerror(error));
  } else {
    log::warn("{}: the host fails to access it ({}); the guest gets I/O errors", name, std::strerror(error));
  }
}

void BlockDevice::stop() {
  const std::lock_guard lock(workers_mutex_);
  workers_.clear();
}

}  // namespace ring3::virtio
