#include "engine/xen/domain.hpp"

#include <cerrno>
#include <cstring>
#include <vector>

#include "base/event_fd.hpp"
#include "engine/xen/vcpu.hpp"

namespace ring3::engine::xen {
namespace {

constexpr u32 kTwoLevel = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;

// x86 keeps stores in order; only the compiler must be told.
void order_stores() { std::atomic_signal_fence(std::memory_order_release); }

u8 bit_of(u32 port) { return static_cast<u8>(1u << (port & 7)); }

}  // namespace

int Area::place(Memory& memory, u64 address, u32 size) {
  if (address == kNowhere) {
    address_.store(kNowhere, std::memory_order_release);
    return 0;
  }
  if ((address & (kPageSize - 1)) + size > kPageSize) return -EINVAL;
  address_.store(address, std::memory_order_release);
  return memory.set_bits(Gpa(address), 0) < 0 ? -EFAULT : 0;
}

// ---- configuration ----

int Domain::configure(const kvm_xen_hvm_config& config) {
  constexpr u32 kChosen = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
  if (config.flags & ~kChosen) return -EINVAL;
  const bool intercept = config.flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
  // The pages are then the engine's, not the VMM's.
  if (intercept && (config.blob_addr_32 || config.blob_addr_64 || config.blob_size_32 || config.blob_size_64)) return -EINVAL;
  const std::lock_guard lock(mutex_);
  config_ = config;
  intercepts_.store(intercept, std::memory_order_release);
  sends_all_.store(config.flags & KVM_XEN_HVM_CONFIG_EVTCHN_SEND, std::memory_order_release);
  msr_.store(config.msr, std::memory_order_release);
  return 0;
}

bool Domain::write_page(u64 value, bool long_mode, bool amd, const GuestWriter& write) {
  kvm_xen_hvm_config config;
  {
    const std::lock_guard lock(mutex_);
    config = config_;
    long_mode_.store(long_mode, std::memory_order_release);  // it tells by this which layouts it knows
  }
  const u64 number = value & (kPageSize - 1);
  const Gpa to(value & ~(kPageSize - 1));
  std::vector<u8> page(kPageSize);
  if (config.flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL) {
    if (number != 0) return false;
    // Entry n: MOV EAX, n; VMCALL or VMMCALL; RET; the rest INT3.
    constexpr u32 kEntry = 32;
    for (u32 n = 0; n < kPageSize / kEntry; n++) {
      u8* const at = page.data() + std::size_t{n} * kEntry;
      std::memset(at, 0xcc, kEntry);
      at[0] = 0xb8;
      std::memcpy(at + 1, &n, sizeof n);
      const u8 call[] = {0x0f, 0x01, static_cast<u8>(amd ? 0xd9 : 0xc1), 0xc3};
      std::memcpy(at + 5, call, sizeof call);
    }
    return write(to, page.data(), page.size());
  }
  const u64 blob = long_mode ? config.blob_addr_64 : config.blob_addr_32;
  if (number >= (long_mode ? config.blob_size_64 : config.blob_size_32)) return false;
  return host_.read_vmm(blob + number * kPageSize, page.data(), page.size()) && write(to, page.data(), page.size());
}

int Domain::set_attr(const kvm_xen_hvm_attr& attr) {
  switch (attr.type) {
    case KVM_XEN_ATTR_TYPE_LONG_MODE: {
      const std::lock_guard lock(mutex_);
      long_mode_.store(attr.u.long_mode != 0, std::memory_order_release);
      return 0;
    }
    case KVM_XEN_ATTR_TYPE_SHARED_INFO:
      return share_page(attr.u.shared_info.gfn);
    case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR:
      if (!is_vector(attr.u.vector)) return -EINVAL;
      upcall_vector_.store(attr.u.vector, std::memory_order_release);
      return 0;
    case KVM_XEN_ATTR_TYPE_EVTCHN:
      return change_channel(attr);
    case KVM_XEN_ATTR_TYPE_XEN_VERSION:
      version_.store(attr.u.xen_version, std::memory_order_relaxed);
      return 0;
    default:
      return -ENOENT;
  }
}

int Domain::get_attr(kvm_xen_hvm_attr* attr) const {
  switch (attr->type) {
    case KVM_XEN_ATTR_TYPE_LONG_MODE: attr->u.long_mode = long_mode(); return 0;
    case KVM_XEN_ATTR_TYPE_SHARED_INFO: {
      const u64 at = shared_.address();
      attr->u.shared_info.gfn = at == Area::kNowhere ? Area::kNowhere : at >> kPageShift;
      return 0;
    }
    case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: attr->u.vector = upcall_vector(); return 0;
    case KVM_XEN_ATTR_TYPE_XEN_VERSION: attr->u.xen_version = version(); return 0;
    default: return -ENOENT;
  }
}

/// The page begins with the wall clock's time at which the guest's clock was 0.
int Domain::share_page(u64 gfn) {
  const std::lock_guard lock(mutex_);
  if (gfn == Area::kNowhere) return shared_.place(host_, Area::kNowhere, 0);
  if (gfn > Area::kNowhere >> kPageShift) return -EFAULT;
  const u64 at = gfn << kPageShift;
  if (const int error = shared_.place(host_, at, kPageSize); error != 0) return error;
  constexpr u64 kNsPerSecond = 1'000'000'000;
  const SharedInfoLayout& l = layout();
  const Gpa clock(at + l.wall_clock);
  const u64 ns = host_clock_.realtime_ns() - now_ns();
  u32 version;
  if (!host_.read(clock, &version, sizeof version)) return -EFAULT;
  version = (version + 1) | 1;
  const u32 time[2] = {static_cast<u32>(ns / kNsPerSecond), static_cast<u32>(ns % kNsPerSecond)};
  const u32 high = static_cast<u32>(ns / kNsPerSecond >> 32);
  if (!host_.write(clock, &version, sizeof version)) return -EFAULT;
  order_stores();
  if (!host_.write(clock + 4, time, sizeof time) || !host_.write(Gpa(at + l.seconds_high), &high, sizeof high)) return -EFAULT;
  order_stores();
  version++;
  return host_.write(clock, &version, sizeof version) ? 0 : -EFAULT;
}

// ---- events ----

int Domain::test_locked(u32 bitmap, u32 port) const {
  u8 byte;
  if (!shared_.set() || !host_.read(Gpa(shared_.address() + bitmap + port / 8), &byte, sizeof byte)) return -1;
  return (byte & bit_of(port)) != 0;
}

int Domain::deliver(u32 vcpu, u32 port) {
  const std::lock_guard lock(mutex_);
  return deliver_locked(vcpu, port);
}

int Domain::deliver_locked(u32 vcpu, u32 port) {
  Vcpu* const v = host_.find_vcpu(vcpu);
  if (v == nullptr || !v->has_info() || port >= layout().ports || !shared_.set()) return -EINVAL;
  const int before = host_.set_bits(Gpa(shared_.address() + layout().pending + port / 8), bit_of(port));
  if (before < 0) return -EFAULT;
  if (before & bit_of(port)) return 0;
  const int masked = test_locked(layout().mask, port);
  if (masked < 0) return -EFAULT;
  if (masked != 0) {
    v->masked_event(port);
    return -ENOTCONN;
  }
  v->event(port / layout().word_bits);
  return 1;
}

int Domain::send(const kvm_irq_routing_xen_evtchn& event) {
  if (event.port == 0 || event.port >= layout().ports || event.priority != kTwoLevel) return -EINVAL;
  const int result = deliver(event.vcpu, event.port);
  return result > 0 || result == -ENOTCONN ? 0 : result;
}

bool Domain::poll(Vcpu& vcpu, std::span<const u32> ports) {
  const std::lock_guard lock(mutex_);
  if (!shared_.set()) return false;
  for (const u32 port : ports) {
    if (test_locked(layout().pending, port) != 0) return false;
  }
  vcpu.begin_poll(ports.size() == 1 ? u64{ports[0]} : Vcpu::kAnyPort);
  return true;
}

// ---- what a guest sends ----

bool Domain::send_from_guest(u32 port) {
  const std::lock_guard lock(mutex_);
  const auto it = channels_.find(port);
  if (it == channels_.end()) return false;
  const Channel& c = it->second;
  if (c.port == 0) {
    signal_event(c.eventfd.get());
    return true;
  }
  const int result = deliver_locked(c.vcpu, c.port);
  return result >= 0 || result == -ENOTCONN;
}

int Domain::change_channel(const kvm_xen_hvm_attr& attr) {
  const auto& e = attr.u.evtchn;
  if (e.flags == KVM_XEN_EVTCHN_RESET) {
    std::map<u32, Channel> all;
    const std::lock_guard lock(mutex_);
    channels_.swap(all);
    return 0;
  }
  if (e.send_port == 0 || e.send_port >= layout().ports) return -EINVAL;
  switch (e.flags) {
    case 0: return assign_channel(attr);
    case KVM_XEN_EVTCHN_UPDATE: return update_channel(attr);
    case KVM_XEN_EVTCHN_DEASSIGN: {
      const std::lock_guard lock(mutex_);
      return channels_.erase(e.send_port) == 1 ? 0 : -ENOENT;
    }
    default: return -EINVAL;
  }
}

int Domain::assign_channel(const kvm_xen_hvm_attr& attr) {
  const auto& e = attr.u.evtchn;
  Channel c{e.type, e.deliver.port.port, 0, {}};
  if (e.type == kIpi) {
    if (c.port != e.send_port) return -EINVAL;  // it comes back by its own number
  } else if (e.type != kInterdomain || c.port >= layout().ports) {
    return -EINVAL;
  }
  if (c.port != 0) {
    if (e.deliver.port.priority != kTwoLevel) return -EINVAL;
    c.vcpu = e.deliver.port.vcpu;
  } else {
    const int fd = host_.copy_eventfd(e.deliver.eventfd.fd);
    if (fd < 0) return fd;
    c.eventfd.reset(fd);
  }
  const std::lock_guard lock(mutex_);
  return channels_.try_emplace(e.send_port, std::move(c)).second ? 0 : -EEXIST;
}

/// Only the vCPU may change.
int Domain::update_channel(const kvm_xen_hvm_attr& attr) {
  const auto& e = attr.u.evtchn;
  const std::lock_guard lock(mutex_);
  const auto it = channels_.find(e.send_port);
  if (it == channels_.end()) return -ENOENT;
  Channel& c = it->second;
  if (c.type != e.type || c.port == 0 || c.port != e.deliver.port.port || e.deliver.port.priority != kTwoLevel) return -EINVAL;
  c.vcpu = e.deliver.port.vcpu;
  return 0;
}

}  // namespace ring3::engine::xen
