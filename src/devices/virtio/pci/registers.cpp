// The common configuration structure (VIRTIO 1.2, 4.1.4.3) and the life of the device that it steers (3.1, 2.1).
#include <unistd.h>

#include <algorithm>

#include "base/event_fd.hpp"
#include "base/log.hpp"
#include "devices/bus/device.hpp"
#include "devices/virtio/pci/virtio_pci.hpp"

namespace ring3::virtio {
namespace {

constexpr u8 kFeaturesOk = 8, kDriverOk = 4, kNeedsReset = 64;

enum Register : u64 {
  kDeviceFeatureSelect = 0x00, kDeviceFeature = 0x04, kDriverFeatureSelect = 0x08, kDriverFeature = 0x0c,
  kConfigVector = 0x10, kNumQueues = 0x12, kDeviceStatus = 0x14, kConfigGeneration = 0x15, kQueueSelect = 0x16,
  kQueueSize = 0x18, kQueueVector = 0x1a, kQueueEnable = 0x1c, kQueueNotifyOff = 0x1e, kQueueDesc = 0x20,
  kQueueDriver = 0x28, kQueueDevice = 0x30, kQueueNotifyData = 0x38, kQueueReset = 0x3a, kEnd = 0x3c,
};

// A half of a 64-bit register, or all of it.
bool set_address(u64& field, u64 first, u64 offset, std::span<const u8> data) {
  if (offset < first || offset >= first + 8) return false;
  const u64 v = devices::load_le(data);
  if (offset == first && data.size() == 8) field = v;
  if (offset == first && data.size() == 4) field = (field & ~u64{0xffffffff}) | v;
  if (offset == first + 4 && data.size() == 4) field = (field & 0xffffffff) | v << 32;
  return true;
}

}  // namespace

u64 VirtioPci::offered() const {
  u64 f = device_->features() | feature::kIndirect | feature::kEventIndex | feature::kVersion1 | feature::kPacked;
  if (device_->can_reset_queues()) f |= feature::kRingReset;
  return f;
}

void VirtioPci::read_common(u64 offset, std::span<u8> data) {
  u8 image[kEnd] = {};
  const auto put = [&](u64 at, u64 v, u64 bytes) { devices::store_le(std::span(image).subspan(at, bytes), v); };
  const auto half = [](u64 v, u32 select) { return select > 1 ? 0 : v >> (32 * select) & 0xffffffff; };
  put(kDeviceFeatureSelect, device_feature_select_, 4);
  put(kDeviceFeature, half(offered(), device_feature_select_), 4);
  put(kDriverFeatureSelect, driver_feature_select_, 4);
  put(kDriverFeature, half(driver_features_, driver_feature_select_), 4);
  put(kNumQueues, queues_.size(), 2);
  put(kDeviceStatus, status_.load(), 1);
  put(kConfigGeneration, generation_.load(), 1);
  put(kQueueSelect, queue_select_, 2);
  {
    const std::lock_guard lock(irq_mutex_);
    put(kConfigVector, config_vector_, 2);
    put(kQueueVector, queue_select_ < queues_.size() ? queue_vectors_[queue_select_] : 0xffff, 2);
  }
  if (queue_select_ < queues_.size()) {
    const QueueRegisters& q = queues_[queue_select_];
    put(kQueueSize, q.size, 2);
    put(kQueueEnable, q.enabled ? 1 : 0, 2);
    put(kQueueNotifyOff, queue_select_, 2);
    put(kQueueDesc, q.descriptors, 8);
    put(kQueueDriver, q.driver, 8);
    put(kQueueDevice, q.device, 8);
    put(kQueueNotifyData, queue_select_, 2);
  }
  for (std::size_t i = 0; i < data.size(); i++) data[i] = offset + i < kEnd ? image[offset + i] : u8{0};
}

bool VirtioPci::queue_is_open_to_change(const QueueRegisters& q) const {
  if (q.enabled) return false;
  if (!running_) return (status_.load() & kDriverOk) == 0;
  return (driver_features_ & feature::kRingReset) != 0;  // after a queue reset
}

void VirtioPci::write_common(u64 offset, std::span<const u8> data) {
  const u64 v = devices::load_le(data);
  const std::size_t n = data.size();
  // Registers of one width each; the driver has to access them with it (4.1.3.1).
  if (offset == kDeviceFeatureSelect && n == 4) {
    device_feature_select_ = static_cast<u32>(v);
  } else if (offset == kDriverFeatureSelect && n == 4) {
    driver_feature_select_ = static_cast<u32>(v);
  } else if (offset == kDriverFeature && n == 4) {
    if ((status_.load() & kFeaturesOk) != 0 || driver_feature_select_ > 1) return;
    const u32 shift = 32 * driver_feature_select_;
    driver_features_ = (driver_features_ & ~(u64{0xffffffff} << shift)) | v << shift;
  } else if (offset == kDeviceStatus && n == 1) {
    write_status(static_cast<u8>(v));
  } else if (offset == kQueueSelect && n == 2) {
    queue_select_ = static_cast<u16>(v);
  } else if (offset == kConfigVector && n == 2) {
    const std::lock_guard lock(irq_mutex_);
    config_vector_ = v < msix_.vectors() ? static_cast<u16>(v) : u16{0xffff};
  } else if (queue_select_ < queues_.size()) {
    QueueRegisters& q = queues_[queue_select_];
    if (offset == kQueueVector && n == 2) {
      const std::lock_guard lock(irq_mutex_);
      queue_vectors_[queue_select_] = v < msix_.vectors() ? static_cast<u16>(v) : u16{0xffff};
    } else if (offset == kQueueEnable && n == 2) {
      if (v == 1) enable_queue(queue_select_);
    } else if (offset == kQueueReset && n == 2) {
      if (v == 1) reset_queue(queue_select_);
    } else if (!queue_is_open_to_change(q)) {
      return;
    } else if (offset == kQueueSize && n == 2) {
      if (v != 0 && v <= q.most) q.size = static_cast<u16>(v);
    } else if (set_address(q.descriptors, kQueueDesc, offset, data) || set_address(q.driver, kQueueDriver, offset, data) ||
               set_address(q.device, kQueueDevice, offset, data)) {
    }
  }
}

void VirtioPci::write_status(u8 value) {
  if (value == 0) {
    stop();
    set_ioeventfds(false);
    status_.store(0);
    broken_->store(false);
    driver_features_ = 0;
    device_feature_select_ = driver_feature_select_ = queue_select_ = 0;
    for (QueueRegisters& q : queues_) {
      q.size = q.most;
      q.descriptors = q.driver = q.device = 0;
      q.enabled = false;
    }
    msix_.reset();
    const std::lock_guard lock(irq_mutex_);
    isr_ = 0;
    config_vector_ = 0xffff;
    std::fill(queue_vectors_.begin(), queue_vectors_.end(), u16{0xffff});
    update_intx_locked();
    return;
  }
  const u8 before = status_.load();
  u8 added = static_cast<u8>(value & ~before & ~kNeedsReset);
  if ((added & kFeaturesOk) != 0) {
    // 2.2: a subset of what is offered, and no legacy driver.
    const bool good = (driver_features_ & ~offered()) == 0 && (driver_features_ & feature::kVersion1) != 0;
    if (!good) added = static_cast<u8>(added & ~kFeaturesOk);
  }
  if ((added & kDriverOk) != 0 && ((before | added) & kFeaturesOk) == 0) added = static_cast<u8>(added & ~kDriverOk);
  status_.fetch_or(added);
  if ((added & kDriverOk) != 0) start();
}

bool VirtioPci::open_queue(u16 index) {
  QueueRegisters& q = queues_[index];
  Queue::Setup s;
  s.index = index;
  s.size = q.size;
  s.descriptors = Gpa(q.descriptors);
  s.driver = Gpa(q.driver);
  s.device = Gpa(q.device);
  s.packed = (driver_features_ & feature::kPacked) != 0;
  s.event_index = (driver_features_ & feature::kEventIndex) != 0;
  s.indirect = (driver_features_ & feature::kIndirect) != 0;
  Queue::Hooks hooks;
  hooks.interrupt = [this, index] { interrupt_queue(index); };
  hooks.broken = [this](const std::string& why) { needs_reset(why); };
  hooks.device_broken = broken_;
  auto made = Queue::create(memory_, s, q.kick.get(), std::move(hooks));
  if (!made) {
    needs_reset(made.error().message);
    return false;
  }
  q.queue = std::move(*made);
  return true;
}

void VirtioPci::start() {
  std::vector<Queue*> list;
  for (u16 i = 0; i < queues_.size(); i++) {
    if (queues_[i].enabled && !open_queue(i)) {
      for (QueueRegisters& q : queues_) q.queue.reset();
      return;
    }
    list.push_back(queues_[i].queue.get());
  }
  running_ = true;
  msix_.connect(services_);
  device_->start(driver_features_, list);
  set_ioeventfds(true);
  for (u16 i = 0; i < queues_.size(); i++) {
    if (queues_[i].enabled) kick(i);
  }
}

void VirtioPci::stop() {
  if (running_) device_->stop();
  running_ = false;
  for (QueueRegisters& q : queues_) {
    q.queue.reset();
    drain_event(q.kick.get());  // a kick of before is none of the next driver
  }
}

void VirtioPci::enable_queue(u16 index) {
  QueueRegisters& q = queues_[index];
  if (!queue_is_open_to_change(q) || (status_.load() & kFeaturesOk) == 0) return;
  if (!running_) {
    q.enabled = true;
    return;
  }
  if (!open_queue(index)) return;
  q.enabled = true;
  device_->start_queue(index, *q.queue);
  set_ioeventfds(true);
  kick(index);
}

void VirtioPci::reset_queue(u16 index) {  // 2.6.1
  QueueRegisters& q = queues_[index];
  if ((driver_features_ & feature::kRingReset) == 0 || !running_ || !q.enabled) return;
  device_->stop_queue(index);
  q.queue.reset();
  q.enabled = false;
  q.size = q.most;
  q.descriptors = q.driver = q.device = 0;
  const std::lock_guard lock(irq_mutex_);
  queue_vectors_[index] = 0xffff;
}

}  // namespace ring3::virtio
