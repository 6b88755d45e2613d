#include "engine/abi/vm.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "engine/abi/newer_kvm.hpp"
#include "engine/abi/user_memory.hpp"
#include "engine/abi/vcpu.hpp"

namespace ring3::engine::abi {

Vm::Vm(const Config& config) : config_(config), timers_(*config.clock), clock_(*config.clock), xen_(*this, *config.clock, clock_) {
  if (config.windows_announced) {
    tracker_.restrict_windows({});
  } else {
    window_memory_.push_back({0, ~u64{0}});  // all, as long as nothing is taken away
  }
}

Vm::~Vm() {
  irqfds_.reset();
  pit_.store(nullptr);
  pit_owner_.reset();
  vcpus_.clear();
  irqchip_.store(nullptr);
  irqchip_owner_.reset();
}

Result<std::shared_ptr<Vm>> Vm::create(const Config& config) {
  std::shared_ptr<Vm> vm(new Vm(config));
  if (auto s = vm->coalesced_.create(); !s) return s.error();
  char name[32];
  std::snprintf(name, sizeof name, "kvm-%d", static_cast<int>(::getpid()));
  if (auto s = vm->stats_.create(name, vm_stat::kEntries); !s) return s.error();
  return vm;
}

bool Vm::write_memory(Gpa to, const void* from, std::size_t size, DirtySink* sink) {
  const auto table = memory_.table();
  for (std::size_t done = 0; done < size;) {
    const Gpa at = to + done;
    const std::size_t n = std::min<std::size_t>(size - done, kPageSize - at.page_offset());
    const memory::Slot* slot = table->find(at);
    if (slot == nullptr || slot->readonly()) return false;
    // The VMM may have unmapped it.
    if (!copy_bytes_out(reinterpret_cast<u64>(slot->host(at)), static_cast<const u8*>(from) + done, n)) return false;
    note_dirty(*slot, at, sink);
    done += n;
  }
  tracker_.host_wrote(to, size);
  return true;
}

/// A page that counts as dirty already is put into no ring: where there are rings, it is left clean when it can be put into none.
void Vm::note_dirty(const memory::Slot& slot, Gpa at, DirtySink* sink) {
  if (sink == nullptr && dirty_ring_entries_ != 0) return;
  if (slot.mark_dirty(at) && sink != nullptr) sink->page_dirtied(slot.id, (at - slot.gpa) >> kPageShift);
}

int Vm::set_memory_bits(Gpa at, u8 bits, DirtySink* sink) {
  const auto table = memory_.table();
  const memory::Slot* slot = table->find(at);
  if (slot == nullptr || slot->readonly()) return -1;
  const int before = abi::set_bits(reinterpret_cast<u64>(slot->host(at)), bits);
  if (before < 0 || (before & bits) == bits) return before;
  note_dirty(*slot, at, sink);
  tracker_.host_wrote(at, 1);
  return before;
}

bool Vm::read_memory(Gpa from, void* to, std::size_t size) const {
  const auto table = memory_.table();
  for (std::size_t done = 0; done < size;) {
    const Gpa at = from + done;
    const std::size_t n = std::min<std::size_t>(size - done, kPageSize - at.page_offset());
    const memory::Slot* slot = table->find(at);
    if (slot == nullptr || !copy_bytes_in(reinterpret_cast<u64>(slot->host(at)), static_cast<u8*>(to) + done, n)) return false;
    done += n;
  }
  return true;
}

// ---- hv::Host ----

void Vm::each_vp(const std::function<void(hv::Vp&)>& f) {
  for (auto& v : by_id_) {
    if (Vcpu* const vcpu = v.load(std::memory_order_acquire)) f(vcpu->hv());
  }
}
hv::Vp* Vm::find_vp(u32 vp_index) {
  if (Vcpu* const v = vcpu(vp_index); v != nullptr && v->hv().index() == vp_index) return &v->hv();
  hv::Vp* found = nullptr;
  each_vp([&](hv::Vp& vp) {
    if (found == nullptr && vp.index() == vp_index) found = &vp;
  });
  return found;
}
void Vm::sint_acked(u32 vp_index, u32 sint) { irqchip()->hv_sint_acked(vp_index, sint); }
int Vm::hv_sint(u32 vp_index, u32 sint) {
  hv::Vp* const vp = find_vp(vp_index);
  return vp != nullptr ? vp->synic().raise(sint) : -EINVAL;
}

// ---- VcpuSink ----

void Vm::wake(unsigned vcpu_id, Attention why) {
  if (Vcpu* v = vcpu(vcpu_id)) v->raise(why == Attention::kInterrupt ? kAttendInterrupt : kAttendExtInt);
}
void Vm::nmi(unsigned vcpu_id) {
  if (Vcpu* v = vcpu(vcpu_id)) v->queue_nmi();
}
void Vm::smi(unsigned) {}  // system management mode is not offered: its interrupt is lost
void Vm::init(unsigned vcpu_id) {
  if (Vcpu* v = vcpu(vcpu_id)) v->queue_init();
}
void Vm::sipi(unsigned vcpu_id, u8 vector) {
  if (Vcpu* v = vcpu(vcpu_id)) v->queue_sipi(vector);
}
void Vm::ioapic_eoi(unsigned vcpu_id, u8 vector) {
  if (Vcpu* v = vcpu(vcpu_id)) v->note_ioapic_eoi(vector);
}

// ---- ioctls ----

Result<Vcpu*> Vm::create_vcpu(u64 id) {
  std::lock_guard lock(mutex_);
  if (max_vcpu_id_ == 0) max_vcpu_id_ = kMaxVcpus;  // it can be set before the first vCPU only
  if (id >= max_vcpu_id_) return Error::of(EINVAL, "vCPU id out of range");
  if (vcpus_.size() >= kMaxVcpus) return Error::of(EINVAL, "too many vCPUs");
  const unsigned n = static_cast<unsigned>(id);
  if (vcpu(n) != nullptr) return Error::of(EEXIST, "a vCPU with this id exists");
  // The decoded-code budget is the VM's: half to the first vCPU, an ever smaller share to each later one, so that
  // the sum stays below it however many come.
  const std::size_t index = vcpus_.size();
  std::size_t cache = config_.cache_bytes / 2;
  for (std::size_t i = 0; i < index && cache > (1u << 20); i++) cache = cache * 3 / 4;
  std::size_t code = config_.code_bytes / 2;
  for (std::size_t i = 0; i < index && code > (4u << 20); i++) code = code * 3 / 4;
  auto vcpu = Vcpu::create(*this, n, static_cast<unsigned>(index), default_tsc_khz_, cache, code);
  if (!vcpu) return vcpu.error();
  Vcpu* raw = (*vcpu).get();
  vcpus_.push_back(std::move(*vcpu));
  by_id_[n].store(raw, std::memory_order_release);
  stats_.add(vm_stat::Vcpus);
  return raw;
}

long Vm::set_memory_region(unsigned long request, u64 arg) {
  kvm_userspace_memory_region2 r{};
  static_assert(offsetof(kvm_userspace_memory_region2, guest_memfd_offset) == sizeof(kvm_userspace_memory_region));
  const u64 size = request == KVM_SET_USER_MEMORY_REGION2 ? sizeof r : sizeof(kvm_userspace_memory_region);
  if (!copy_bytes_in(arg, &r, size)) return -EFAULT;
  std::lock_guard lock(memory_mutex_);
  // Until every vCPU has dropped what it knew, a fault in what the change takes away is a fault of guest memory.
  std::atomic_store(&retiring_, memory_.table());
  const int result = memory_.set_region(r.slot, r.flags, Gpa(r.guest_phys_addr), r.memory_size, Hva(r.userspace_addr));
  if (result == 0) {
    tracker_.memslots_changed();
    xen_.memory_changed();
    stats_.add(vm_stat::MemslotChanges);
  }
  std::atomic_store(&retiring_, std::shared_ptr<const memory::SlotTable>());
  return result;
}

bool Vm::window_memory(u64 begin, u64 size, bool may) {
  if (config_.windows == 0) return false;
  if (size == 0) return true;
  std::lock_guard lock(memory_mutex_);
  const u64 end = begin + size;
  std::vector<HostRange> left;
  bool had = false;
  for (const HostRange& r : window_memory_) {
    had = had || (r.begin < end && begin < r.end);
    if (r.begin < begin) left.push_back({r.begin, std::min(r.end, begin)});
    if (end < r.end) left.push_back({std::max(r.begin, end), r.end});
  }
  if (may) left.push_back({begin, end});
  std::sort(left.begin(), left.end(), [](const HostRange& a, const HostRange& b) { return a.begin < b.begin; });
  window_memory_.clear();
  for (const HostRange& r : left) {  // neighbours are one
    if (!window_memory_.empty() && window_memory_.back().end == r.begin) {
      window_memory_.back().end = r.end;
    } else {
      window_memory_.push_back(r);
    }
  }
  tracker_.restrict_windows(window_memory_);
  if (!may && had) tracker_.memslots_changed();
  return true;
}

bool Vm::owns_host(u64 host) const {
  const auto has = [host](const memory::SlotTable& table) {
    for (const memory::Slot& s : table.slots) {
      if (host >= s.hva.value && host - s.hva.value < s.size) return true;
    }
    return false;
  };
  // In this order: what a change takes from the one stands in the other until no vCPU uses it.
  if (has(*memory_.table())) return true;
  const auto retiring = std::atomic_load(&retiring_);
  return retiring != nullptr && has(*retiring);
}

std::size_t Vm::dirty_words(u32 slot) const {
  const auto table = memory_.table();
  for (const memory::Slot& s : table->slots) {
    if (s.id == (slot & 0xffff) && slot >> 16 == 0 && s.logs_dirty()) return static_cast<std::size_t>(((s.size >> 12) + 63) / 64);
  }
  return 0;
}

long Vm::dirty_log(unsigned long request, u64 arg) {
  std::lock_guard lock(memory_mutex_);
  if (request == KVM_GET_DIRTY_LOG) {
    kvm_dirty_log log;
    if (!copy_in(arg, &log)) return -EFAULT;
    if (dirty_ring_entries_ != 0) return -ENXIO;
    const bool manual = manual_dirty_log_.load(std::memory_order_relaxed) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    std::vector<u64> bits(dirty_words(log.slot));
    if (bits.empty()) return memory_.get_dirty_log(log.slot, nullptr, manual);  // which says why there is none
    // Before the bits are cleared: a VMM that gives a better pointer the next time has lost none.
    if (!copy_bytes_out(log.padding2, bits.data(), bits.size() * 8)) return -EFAULT;
    const int result = memory_.get_dirty_log(log.slot, bits.data(), manual);
    if (result != 0) return result;
    if (!manual) tracker_.dirty_log_changed();
    return copy_bytes_out(log.padding2, bits.data(), bits.size() * 8) ? 0 : -EFAULT;
  }
  kvm_clear_dirty_log log;
  if (!copy_in(arg, &log)) return -EFAULT;
  if (dirty_ring_entries_ != 0) return -ENXIO;
  // What the slot, the first page and their number have wrong is said before what the pointer has.
  if (const int error = memory_.clear_dirty_log(log.slot, log.first_page, log.num_pages, nullptr); error != 0) return error;
  std::vector<u64> bits((u64{log.num_pages} + 63) / 64);
  if (!copy_bytes_in(log.padding2, bits.data(), bits.size() * 8)) return -EFAULT;
  const int result = memory_.clear_dirty_log(log.slot, log.first_page, log.num_pages, bits.data());
  if (result == 0) tracker_.dirty_log_changed();
  return result;
}

long Vm::enable_dirty_ring(u64 bytes) {
  if (bytes == 0 || (bytes & (bytes - 1)) != 0 || bytes < kPageSize) return -EINVAL;
  if (bytes > u64{DirtyRing::kMaxEntries} * sizeof(kvm_dirty_gfn)) return -E2BIG;
  std::lock_guard lock(mutex_);
  if (dirty_ring_entries_ != 0 || !vcpus_.empty()) return -EINVAL;
  dirty_ring_entries_ = static_cast<u32>(bytes / sizeof(kvm_dirty_gfn));
  memory_.set_dirty_initially_set(false);  // a set bit means: in a ring
  return 0;
}

long Vm::reset_dirty_rings() {
  if (dirty_ring_entries_ == 0) return -EINVAL;
  long n = 0;
  std::lock_guard memory_lock(memory_mutex_);
  const auto table = memory_.table();
  const auto clear = [&](u32 slot, u64 offset) {
    for (const memory::Slot& s : table->slots) {
      if (s.id != slot || s.dirty == nullptr || offset >= s.size >> kPageShift) continue;
      (*s.dirty)[offset / 64].fetch_and(~(1ull << (offset % 64)), std::memory_order_seq_cst);
    }
  };
  {
    std::lock_guard lock(mutex_);
    for (auto& v : vcpus_) n += v->dirty_ring()->reset(clear);
  }
  if (n != 0) tracker_.dirty_log_changed();
  return n;
}

long Vm::enable_cap(u64 arg) {
  kvm_enable_cap cap;
  if (!copy_in(arg, &cap)) return -EFAULT;
  if (cap.flags != 0) return -EINVAL;
  const u64 value = cap.args[0];
  switch (cap.cap) {
    case KVM_CAP_SPLIT_IRQCHIP:
      if (value > RoutingTable::kMaxRoutes) return -EINVAL;
      return create_irqchip(IrqChip::Mode::kSplit, static_cast<unsigned>(value));
    case KVM_CAP_X2APIC_API:
      if (value & ~u64{KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK}) return -EINVAL;
      if (value & KVM_X2APIC_API_USE_32BIT_IDS) bus_.options().x2apic_format = true;
      if (value & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) bus_.options().no_broadcast_quirk = true;
      return 0;
    case KVM_CAP_EXCEPTION_PAYLOAD:
      exception_payload_.store(value != 0, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
      triple_fault_event_.store(value != 0, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_DISABLE_QUIRKS2:
      if (value & ~kQuirks) return -EINVAL;
      [[fallthrough]];
    case KVM_CAP_DISABLE_QUIRKS:  // the older one takes unknown ones too
      disabled_quirks_.store(value, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_DIRTY_LOG_RING:
    case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
      return enable_dirty_ring(value);
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: {
      u64 allowed = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
      if (value & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) allowed |= KVM_DIRTY_LOG_INITIALLY_SET;
      if (value & ~allowed) return -EINVAL;
      manual_dirty_log_.store(static_cast<u32>(value), std::memory_order_relaxed);
      memory_.set_dirty_initially_set((value & KVM_DIRTY_LOG_INITIALLY_SET) && dirty_ring_entries_ == 0);
      return 0;
    }
    case KVM_CAP_X86_DISABLE_EXITS:
      if (value & ~kDisabledExits) return -EINVAL;
      if (value & KVM_X86_DISABLE_EXITS_HLT) halts_in_guest_.store(true, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_EXIT_HYPERCALL:
      if (value & ~kHypercallExits) return -EINVAL;
      hypercall_exits_.store(value, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
      if (value > 1) return -EINVAL;
      exits_without_code_.store(value != 0, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_HALT_POLL:
      if (value != static_cast<u32>(value)) return -EINVAL;
      halt_poll_ns_.store(value, std::memory_order_relaxed);
      return 0;
    case KVM_CAP_X86_USER_SPACE_MSR:
      return msr_filter_.set_user_space(value);
    case KVM_CAP_MSR_PLATFORM_INFO:
      msr_filter_.set_platform_info(value != 0);
      return 0;
    case KVM_CAP_MAX_VCPU_ID: {
      if (value > kMaxVcpus) return -EINVAL;
      std::lock_guard lock(mutex_);
      if (boot_vcpu_ > value || (max_vcpu_id_ != 0 && max_vcpu_id_ != value)) return -EINVAL;
      max_vcpu_id_ = value;
      return 0;
    }
    default:
      return -EINVAL;
  }
}

long Vm::create_irqchip(IrqChip::Mode mode, unsigned pins) {
  std::lock_guard lock(mutex_);
  if (irqchip() != nullptr) return -EEXIST;
  if (!vcpus_.empty()) return mode == IrqChip::Mode::kSplit ? -EEXIST : -EINVAL;
  irqchip_owner_ = std::make_unique<IrqChip>(bus_, mode, pins);
  irqfds_ = std::make_unique<Irqfds>(*irqchip_owner_);
  split_pins_ = pins;
  irqchip_.store(irqchip_owner_.get(), std::memory_order_release);
  return 0;
}

long Vm::create_pit(u32 flags) {
  std::lock_guard lock(mutex_);
  if (!full_irqchip()) return -ENOENT;
  if (pit() != nullptr) return -EEXIST;
  IrqChip* chip = irqchip();
  pit_owner_ = std::make_unique<Pit>(timers_, [chip] { chip->pit_tick(); }, (flags & KVM_PIT_SPEAKER_DUMMY) != 0);
  Pit* p = pit_owner_.get();
  chip->add_ack_notifier(0, [p] { p->irq_acked(); });
  chip->set_unmask_notifier(0, [p] { p->irq_unmasked(); });
  pit_.store(p, std::memory_order_release);
  return 0;
}

long Vm::irqchip_ioctl(unsigned long request, u64 arg) {
  kvm_irqchip chip;
  if (!copy_in(arg, &chip)) return -EFAULT;
  if (!full_irqchip()) return -ENXIO;
  if (request == KVM_SET_IRQCHIP) return irqchip()->set_irqchip(chip);
  const u32 id = chip.chip_id;
  std::memset(&chip, 0, sizeof chip);
  chip.chip_id = id;
  if (const int error = irqchip()->get_irqchip(&chip); error != 0) return error;
  return copy_out(arg, chip) ? 0 : -EFAULT;
}

long Vm::pit_ioctl(unsigned long request, u64 arg) {
  // The kernel reads all of the argument before it looks for a PIT, but for KVM_GET_PIT2, which only writes it.
  kvm_reinject_control control;
  kvm_pit_state old{};
  kvm_pit_state2 state{};
  const bool older = request == KVM_GET_PIT || request == KVM_SET_PIT;
  if (request == KVM_REINJECT_CONTROL ? !copy_in(arg, &control)
      : older                         ? !copy_in(arg, &old)
                                      : request == KVM_SET_PIT2 && !copy_in(arg, &state)) {
    return -EFAULT;
  }
  if (pit() == nullptr) return -ENXIO;
  switch (request) {
    case KVM_REINJECT_CONTROL: pit()->set_reinject(control.pit_reinject != 0); return 0;
    case KVM_SET_PIT: return pit()->set_state(old);
    case KVM_SET_PIT2: return pit()->set_state(state);
    case KVM_GET_PIT:
      old = {};
      pit()->get_state(&old);
      return copy_out(arg, old) ? 0 : -EFAULT;
    default:
      pit()->get_state(&state);
      return copy_out(arg, state) ? 0 : -EFAULT;
  }
}

long Vm::irq_ioctl(unsigned long request, u64 arg) {
  switch (request) {
    case KVM_IRQ_LINE:
    case KVM_IRQ_LINE_STATUS: {
      kvm_irq_level line;
      if (!copy_in(arg, &line)) return -EFAULT;
      if (irqchip() == nullptr) return -ENXIO;
      const int status = irqchip()->set_irq(kIrqSourceUser, line.irq, line.level != 0);
      if (request == KVM_IRQ_LINE_STATUS) {
        line.status = status;
        if (!copy_out(arg, line)) return -EFAULT;
      }
      return 0;
    }
    case KVM_SIGNAL_MSI: {
      kvm_msi msi;
      if (!copy_in(arg, &msi)) return -EFAULT;
      if (irqchip() == nullptr || msi.flags != 0) return -EINVAL;
      const int taken = bus_.deliver_msi(msi.address_lo, msi.address_hi, msi.data);
      // One that nobody takes is "blocked", 0, as soon as there is a LAPIC that could.
      return taken == -1 && bus_.has_any() ? 0 : taken;
    }
    case KVM_SET_GSI_ROUTING: {
      kvm_irq_routing head;
      if (!copy_in(arg, &head)) return -EFAULT;
      if (irqchip() == nullptr) return -EINVAL;
      if (head.nr > RoutingTable::kMaxRoutes || head.flags != 0) return -EINVAL;
      const u64 at = arg + sizeof head;
      std::vector<kvm_irq_routing_entry> entries(head.nr);
      if (!copy_bytes_in(at, entries.data(), u64{head.nr} * sizeof(kvm_irq_routing_entry))) return -EFAULT;
      return irqchip()->set_routing(entries.data(), head.nr, head.flags);
    }
    case KVM_IRQFD: {
      kvm_irqfd irqfd;
      if (!copy_in(arg, &irqfd)) return -EFAULT;
      std::lock_guard lock(mutex_);
      return irqfds_ ? irqfds_->change(irqfd) : Irqfds::without_irqchip(irqfd);
    }
    default:
      return -ENOTTY;
  }
}

long Vm::clock_ioctl(unsigned long request, u64 arg) {
  if (request == KVM_GET_CLOCK) {
    kvm_clock_data data{};
    clock_.get(&data, tsc_sync_.all_matched());
    return copy_out(arg, data) ? 0 : -EFAULT;
  }
  kvm_clock_data data;
  if (!copy_in(arg, &data)) return -EFAULT;
  if (data.flags & ~static_cast<u32>(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC)) return -EINVAL;
  const int result = clock_.set(data);
  if (result == 0) request_clock_updates();
  return result;
}

void Vm::request_clock_updates() {
  std::lock_guard lock(mutex_);
  for (auto& v : vcpus_) v->request_clock_update();
}

/// As a kernel whose guests have no PMU: the filter is looked at and taken, and there is no event that it could keep away.
long Vm::set_pmu_event_filter(u64 arg) {
  constexpr u32 kMaxEvents = 300;
  kvm_pmu_event_filter filter;
  if (!copy_in(arg, &filter)) return -EFAULT;
  if ((filter.action != KVM_PMU_EVENT_ALLOW && filter.action != KVM_PMU_EVENT_DENY) || filter.flags != 0) return -EINVAL;
  if (filter.nevents > kMaxEvents) return -E2BIG;
  std::vector<u64> events(filter.nevents);
  return copy_bytes_in(arg + sizeof filter, events.data(), events.size() * sizeof events[0]) ? 0 : -EFAULT;
}

long Vm::ioctl(unsigned long request, u64 arg) {
  switch (request) {
    case KVM_CHECK_EXTENSION:
      return check_extension(arg);
    case KVM_SET_USER_MEMORY_REGION:
    case KVM_SET_USER_MEMORY_REGION2:
      return set_memory_region(request, arg);
    case KVM_GET_DIRTY_LOG:
    case KVM_CLEAR_DIRTY_LOG:
      return dirty_log(request, arg);
    case KVM_RESET_DIRTY_RINGS:
      return reset_dirty_rings();
    case KVM_SET_TSS_ADDR:
      if (arg > static_cast<u32>(-3 * static_cast<int>(kPageSize))) return -EINVAL;
      tss_addr_ = arg;  // hardware without unrestricted guests needs those pages; here nothing does
      return 0;
    case KVM_SET_IDENTITY_MAP_ADDR: {
      u64 address;
      std::lock_guard lock(mutex_);
      if (!vcpus_.empty()) return -EINVAL;
      if (!copy_in(arg, &address)) return -EFAULT;
      identity_map_addr_ = address == 0 ? 0xfffbc000 : address;
      return 0;
    }
    case KVM_SET_NR_MMU_PAGES:
      if (arg < 64) return -EINVAL;
      mmu_pages_.store(static_cast<u32>(arg), std::memory_order_relaxed);  // there are no shadow pages to limit
      return 0;
    case KVM_GET_NR_MMU_PAGES:
      return long{mmu_pages_.load(std::memory_order_relaxed)};
    case KVM_XEN_HVM_CONFIG:
    case KVM_XEN_HVM_SET_ATTR:
    case KVM_XEN_HVM_GET_ATTR:
    case KVM_XEN_HVM_EVTCHN_SEND:
      return xen_ioctl(request, arg);
    case KVM_SET_PMU_EVENT_FILTER:
      return set_pmu_event_filter(arg);
    case KVM_X86_SET_MSR_FILTER:
      return msr_filter_.set(arg);
    case KVM_GET_STATS_FD:
      return stats_.open();
    case KVM_CREATE_DEVICE: {
      kvm_create_device device;
      return copy_in(arg, &device) ? -ENODEV : -EFAULT;  // VFIO's is the only type x86 knows, and it is not offered
    }
    case KVM_ENABLE_CAP:
      return enable_cap(arg);
    case KVM_CREATE_IRQCHIP:
      return create_irqchip(IrqChip::Mode::kFull, 0);
    case KVM_CREATE_PIT:
      return create_pit(KVM_PIT_SPEAKER_DUMMY);
    case KVM_CREATE_PIT2: {
      kvm_pit_config config;
      if (!copy_in(arg, &config)) return -EFAULT;
      return create_pit(config.flags);
    }
    case KVM_GET_IRQCHIP:
    case KVM_SET_IRQCHIP:
      return irqchip_ioctl(request, arg);
    case KVM_GET_PIT:
    case KVM_SET_PIT:
    case KVM_GET_PIT2:
    case KVM_SET_PIT2:
    case KVM_REINJECT_CONTROL:
      return pit_ioctl(request, arg);
    case KVM_IRQ_LINE:
    case KVM_IRQ_LINE_STATUS:
    case KVM_SIGNAL_MSI:
    case KVM_SET_GSI_ROUTING:
    case KVM_IRQFD:
      return irq_ioctl(request, arg);
    case KVM_IOEVENTFD: {
      kvm_ioeventfd request_data;
      if (!copy_in(arg, &request_data)) return -EFAULT;
      return ioeventfds_.change(request_data);
    }
    case KVM_REGISTER_COALESCED_MMIO:
    case KVM_UNREGISTER_COALESCED_MMIO: {
      kvm_coalesced_mmio_zone zone;
      if (!copy_in(arg, &zone)) return -EFAULT;
      return request == KVM_REGISTER_COALESCED_MMIO ? coalesced_.add(zone) : coalesced_.remove(zone);
    }
    case KVM_HYPERV_EVENTFD: {
      kvm_hyperv_eventfd connection;
      if (!copy_in(arg, &connection)) return -EFAULT;
      if (connection.flags == 0) {
        if (const i64 id = eventfd_identity(connection.fd); id < 0) return id;
      }
      return hv_.change_connection(connection);
    }
    case KVM_GET_CLOCK:
    case KVM_SET_CLOCK:
      return clock_ioctl(request, arg);
    case KVM_SET_BOOT_CPU_ID: {
      std::lock_guard lock(mutex_);
      if (!vcpus_.empty()) return -EBUSY;
      if (arg > (max_vcpu_id_ != 0 ? max_vcpu_id_ : kMaxVcpus)) return -EINVAL;
      boot_vcpu_ = static_cast<unsigned>(arg);
      return 0;
    }
    case KVM_SET_TSC_KHZ: {
      std::lock_guard lock(mutex_);
      if (static_cast<u32>(arg) > Tsc::kMaxKhz) return -EINVAL;
      default_tsc_khz_ = static_cast<u32>(arg);
      return 0;
    }
    case KVM_GET_TSC_KHZ: {
      std::lock_guard lock(mutex_);
      return default_tsc_khz_ != 0 ? default_tsc_khz_ : config_.clock->host_tsc_khz();
    }
    default:
      return -ENOTTY;
  }
}

}  // namespace ring3::engine::abi
