// The function: identity, capabilities, BAR, interrupts. The common structure's registers: registers.cpp.
#include "devices/virtio/pci/virtio_pci.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/event_fd.hpp"
#include "base/log.hpp"
#include "devices/bus/device.hpp"

namespace ring3::virtio {
namespace {

constexpr u16 kNoVector = 0xffff;
constexpr u8 kIsrQueue = 1, kIsrConfig = 2;
constexpr u16 kMostQueues = 256;

pci::Function::Identity identity_of(DeviceType type) {
  u32 class_code = 0x00ff00;
  switch (type) {
    case DeviceType::kNet: class_code = 0x020000; break;
    case DeviceType::kBlock: class_code = 0x010000; break;
    case DeviceType::kConsole: case DeviceType::kVsock: class_code = 0x078000; break;
    case DeviceType::kFs: class_code = 0x018000; break;
    case DeviceType::kEntropy: case DeviceType::kBalloon: break;
  }
  const u16 id = static_cast<u16>(type);
  return {0x1af4, static_cast<u16>(0x1040 + id), 1, class_code, 0x1af4, static_cast<u16>(0x1100)};
}

}  // namespace

Result<std::shared_ptr<VirtioPci>> VirtioPci::create(std::shared_ptr<Device> device, const memory::GuestMemory& memory) {
  const auto identity = identity_of(device->type());
  std::shared_ptr<VirtioPci> made(new VirtioPci(std::move(device), memory, identity));
  if (auto r = made->make_queues(); !r) return r.error();
  made->make_capabilities();
  made->device_->attach(*made);
  return made;
}

VirtioPci::VirtioPci(std::shared_ptr<Device> device, const memory::GuestMemory& memory, const Identity& identity)
    : Function(identity), device_(std::move(device)), memory_(memory),
      msix_(static_cast<u16>(device_->queue_sizes().size() + 1)), broken_(std::make_shared<std::atomic<bool>>(false)) {}

VirtioPci::~VirtioPci() {
  const std::lock_guard lock(mutex_);
  stop();
  set_ioeventfds(false);
}

Status VirtioPci::make_queues() {
  const auto sizes = device_->queue_sizes();
  if (sizes.size() > kMostQueues) return Error::of(EINVAL, "a virtio device of more than 256 queues");
  queues_.resize(sizes.size());
  queue_vectors_.assign(sizes.size(), kNoVector);
  for (std::size_t i = 0; i < sizes.size(); i++) {
    queues_[i].size = queues_[i].most = sizes[i];
    queues_[i].kick.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!queues_[i].kick) return Error::from_errno("eventfd");
  }
  return Ok{};
}

void VirtioPci::make_capabilities() {
  add_bar(0, kBarSize);
  use_intx_pin();
  std::vector<u8> msix = msix_.capability(0, kMsixTable, kMsixPba);
  std::vector<u8> msix_mask(msix.size());
  msix_mask[1] = 0xc0;
  msix_cap_ = add_capability(0x11, msix, msix_mask);
  // 4.1.4: cap_len, cfg_type, bar, id, padding[2], offset, length.
  const auto capability = [&](u8 type, u64 offset, u64 length, u32 extra_bytes) {
    std::vector<u8> body(14 + extra_bytes);
    body[0] = static_cast<u8>(16 + extra_bytes);
    body[1] = type;
    const u32 o = static_cast<u32>(offset), l = static_cast<u32>(length);
    std::memcpy(&body[6], &o, 4);
    std::memcpy(&body[10], &l, 4);
    return body;
  };
  add_capability(0x09, capability(1, kCommon, 64, 0));
  auto notify = capability(2, kNotify, 4 * u64{kMostQueues}, 4);
  notify[14] = 4;  // notify_off_multiplier: a place of its own for each queue
  add_capability(0x09, notify);
  add_capability(0x09, capability(3, kIsr, 1, 0));
  add_capability(0x09, capability(4, kDevice, 0x1000, 0));
  auto access = capability(5, 0, 0, 4);
  std::vector<u8> access_mask(access.size());
  access_mask[2] = 0xff;                                                          // bar
  std::fill(access_mask.begin() + 6, access_mask.begin() + 14, u8{0xff});         // offset, length
  cfg_access_ = add_capability(0x09, access, access_mask);
}

// 4.1.4.9: an access to pci_cfg_data is an access to the BAR.
void VirtioPci::config_read(u32 offset, std::span<u8> data) {
  if (offset == kStatus || (offset < kStatus && offset + data.size() > kStatus)) {
    const std::lock_guard lock(irq_mutex_);
    u8& low = data[kStatus - offset];
    low = static_cast<u8>(intx_level_ ? low | 8 : low & ~8);  // interrupt status
  }
  const u32 at = cfg_access_ + 16;
  if (cfg_access_ == 0 || offset != at) return;
  const u32 bar = config32(cfg_access_ + 4) & 0xff, from = config32(cfg_access_ + 8), length = config32(cfg_access_ + 12);
  if (bar != 0 || (length != 1 && length != 2 && length != 4) || length > data.size() || from % length != 0 || from >= kBarSize) return;
  read_bar(0, from, data.first(length));
}

void VirtioPci::config_written(u32 offset, std::span<const u8> data) {
  if (overlaps(offset, data.size(), msix_cap_ + 2, 2)) {
    msix_.connect(services_);
    const u16 control = config16(msix_cap_ + 2);
    msix_.set_control((control & 0x8000) != 0, (control & 0x4000) != 0);
    const std::lock_guard lock(irq_mutex_);
    update_intx_locked();
  }
  if (cfg_access_ == 0 || offset != cfg_access_ + 16) return;
  const u32 bar = config32(cfg_access_ + 4) & 0xff, to = config32(cfg_access_ + 8), length = config32(cfg_access_ + 12);
  if (bar != 0 || (length != 1 && length != 2 && length != 4) || length > data.size() || to % length != 0 || to >= kBarSize) return;
  write_bar(0, to, data.first(length));
}

void VirtioPci::decode_changed() {
  const auto bar = bars().front();
  bar_address_.store(bar.decoded ? bar.address : 0);
  {
    const std::lock_guard lock(irq_mutex_);
    intx_disabled_ = (config16(kCommand) & kIntxDisable) != 0;
    update_intx_locked();
  }
  const std::lock_guard lock(mutex_);
  if (running_ && bar_address_.load() != registered_at_) {
    set_ioeventfds(false);
    set_ioeventfds(true);
  }
}

void VirtioPci::read_bar(u8, u64 offset, std::span<u8> data) {
  std::fill(data.begin(), data.end(), u8{0});
  if (offset < kIsr) {
    const std::lock_guard lock(mutex_);
    read_common(offset, data);
  } else if (offset < kDevice) {
    if (offset != kIsr) return;
    const std::lock_guard lock(irq_mutex_);  // 4.1.4.5: reading takes the interrupt back
    data[0] = isr_;
    isr_ = 0;
    update_intx_locked();
  } else if (offset < kNotify) {
    const std::lock_guard lock(mutex_);
    device_->read_config(offset - kDevice, data);
  } else if (offset >= kMsixTable && offset < kMsixPba) {
    msix_.read_table(offset - kMsixTable, data);
  } else if (offset >= kMsixPba) {
    msix_.read_pba(offset - kMsixPba, data);
  }
}

void VirtioPci::write_bar(u8, u64 offset, std::span<const u8> data) {
  if (offset >= kNotify && offset < kMsixTable) {
    if ((offset - kNotify) % 4 == 0) kick((offset - kNotify) / 4);
  } else if (offset < kIsr) {
    const std::lock_guard lock(mutex_);
    write_common(offset, data);
  } else if (offset >= kDevice && offset < kNotify) {
    const std::lock_guard lock(mutex_);
    device_->write_config(offset - kDevice, data);
  } else if (offset >= kMsixTable && offset < kMsixPba) {
    msix_.connect(services_);
    msix_.write_table(offset - kMsixTable, data);
  }
}

// Without a lock: queues_ has its size for good, and so have the eventfds.
void VirtioPci::kick(u64 index) {
  if (index >= queues_.size() || device_->kicked(static_cast<u16>(index))) return;
  signal_event(queues_[index].kick.get());
}

void VirtioPci::set_ioeventfds(bool on) {
  if (services_ == nullptr || !services_->ioeventfd || device_->takes_kicks()) return;
  const u64 base = on ? bar_address_.load() : registered_at_;
  if (base == 0) return;
  for (std::size_t i = 0; i < queues_.size(); i++) {
    QueueRegisters& q = queues_[i];
    if (on == q.ioeventfd || (on && !q.enabled)) continue;
    const bool done = services_->ioeventfd(on, Gpa(base + kNotify + 4 * i), q.kick.get());
    q.ioeventfd = on && done;
  }
  registered_at_ = on ? base : 0;
}

// ---- interrupts: any thread ----

void VirtioPci::raise_locked(u16 vector, u8 isr) {
  if (msix_.enabled()) {
    if (vector != kNoVector) msix_.trigger(vector);
    return;
  }
  isr_ |= isr;
  update_intx_locked();
}

void VirtioPci::update_intx_locked() {
  const bool level = isr_ != 0 && !intx_disabled_ && !msix_.enabled();
  if (level == intx_level_) return;
  intx_level_ = level;
  if (intx_) intx_(level);
}

void VirtioPci::interrupt_queue(u16 index) {
  const std::lock_guard lock(irq_mutex_);
  raise_locked(queue_vectors_[index], kIsrQueue);
}

void VirtioPci::interrupt_config() {
  const std::lock_guard lock(irq_mutex_);
  raise_locked(config_vector_, kIsrConfig);
}

void VirtioPci::config_changed() {
  generation_.fetch_add(1);
  interrupt_config();
}

void VirtioPci::needs_reset(const std::string& why) {
  constexpr u8 kDriverOk = 4, kNeedsReset = 64;
  broken_->store(true);
  const u8 before = status_.fetch_or(kNeedsReset);
  if ((before & kNeedsReset) != 0) return;
  log::warn("virtio device {}: {}; it stands still until the guest resets it", static_cast<u16>(device_->type()), why);
  if ((before & kDriverOk) != 0) interrupt_config();
}

}  // namespace ring3::virtio
