#include "engine/abi/vcpu.hpp"

#include <sys/mman.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/event_fd.hpp"
#include "engine/abi/msr_list.hpp"
#include "engine/abi/user_memory.hpp"
#include "engine/abi/vm.hpp"
#include "engine/interp/features.hpp"
#include "engine/interp/msr.hpp"
#include "engine/interp/system.hpp"

namespace ring3::engine::abi {
namespace {
constexpr u64 kCmciPresent = 1u << 10;  // MCG_CAP
constexpr u64 kCmciEnable = 1u << 30;   // MCi_CTL2
constexpr u32 kMc0Ctl2 = 0x280;
}  // namespace

Vcpu::Vcpu(Vm& vm, unsigned id, unsigned index, u32 tsc_khz)
    : vm_(vm),
      id_(id),
      index_(index),
      all_features_(make_features(supported_cpuid())),
      tsc_(*vm.config().clock, vm.tsc_sync(), tsc_khz),
      pvclock_(vm.clock(), vm.tsc_sync(), tsc_,
               [this](Gpa to, const void* from, std::size_t n) { return vm_.write_memory(to, from, n, this); }, id == vm.boot_vcpu()),
      steal_([this](Gpa to, const void* from, std::size_t n) { return vm_.write_memory(to, from, n, this); }),
      pv_eoi_(vm.memory(), vm.tracker(), *this),
      env_(*this),
      mmu_(state_, vm.memory(), vm.tracker(), index),
      apic_base_(Lapic::kDefaultBase | Lapic::kBaseEnable | (id == vm.boot_vcpu() ? Lapic::kBaseBsp : 0)),
      mp_state_(KVM_MP_STATE_RUNNABLE) {}

Result<std::unique_ptr<Vcpu>> Vcpu::create(Vm& vm, unsigned id, unsigned index, u32 tsc_khz, std::size_t cache_bytes,
                                           std::size_t code_bytes) {
  std::unique_ptr<Vcpu> v(new Vcpu(vm, id, index, tsc_khz));
  if (const int error = v->wake_.create(); error != 0) return Error::from_errno("pipe2", -error);
  auto run = Mapping::shared_anonymous(kRunSize);
  if (!run) return run.error();
  v->run_ = std::move(*run);
  if (auto s = vm.coalesced().map_at(v->run_.data() + KVM_COALESCED_MMIO_PAGE_OFFSET * kPageSize); !s) return s.error();

  if (const u32 entries = vm.dirty_ring_entries(); entries != 0) {
    v->ring_ = std::make_unique<DirtyRing>();
    if (auto s = v->ring_->create(entries); !s) return s.error();
    v->mmu_.set_dirty_sink(v.get());
  }

  char name[32];
  std::snprintf(name, sizeof name, "kvm-%d/vcpu-%u", static_cast<int>(::getpid()), id);
  if (auto s = v->stats_.create(name, vcpu_stat::kEntries); !s) return s.error();
  const bool boot = id == vm.boot_vcpu();
  if (vm.irqchip() != nullptr) {
    v->lapic_ = std::make_unique<Lapic>(vm.bus(), vm.timers(), v->tsc_, id, boot);
    if (boot && (vm.disabled_quirks() & KVM_X86_QUIRK_LINT0_REENABLED)) v->lapic_->mask_lint0_at_reset();
    if (!boot) v->mp_state_ = KVM_MP_STATE_UNINITIALIZED;
  }
  hv::Processor& processor = *v;
  v->hv_ = std::make_unique<hv::Vp>(vm.hv(), vm, processor, vm.timers(), v->tsc_, v->lapic_.get(), id, index);
  xen::Processor& xen_processor = *v;
  v->xen_ = std::make_unique<xen::Vcpu>(vm.xen(), xen_processor, vm.timers(), v->tsc_, vm.tsc_sync(), v->lapic_.get(), id, index);
  v->state_.reset();
  // The kernel's vCPUs begin with the x87 state after FNINIT, not with that after RESET, whose exceptions are unmasked.
  v->state_.xsave.fcw() = 0x37f;
  v->state_.xsave.ftw_abridged() = 0;
  Msrs& m = v->state_.msr;
  m.mcg_cap = 32;  // banks, and nothing else, until KVM_X86_SETUP_MCE
  if (v->lapic_) v->lapic_->set_cmci(false);
  feature_msr(msr::ARCH_CAPABILITIES, &m.arch_capabilities);
  feature_msr(msr::UCODE_REV, &m.microcode_rev);
  feature_msr(msr::AMD_DE_CFG, &m.de_cfg);
  m.hwcr = 1u << 24;  // the TSC counts at the P0 frequency
  v->mmu_.set_port(&v->env_);
  v->interp_ = Interpreter::create(v->state_, v->mmu_, v->env_, cache_bytes);
  v->mmu_.set_code_observer(v->interp_.get());
  if (vm.config().translate) {
    TranslatorVcpu::Options options;
    options.arena_bytes = code_bytes;
    options.lockstep_every = vm.config().lockstep;
    options.window_samples = vm.config().windows;
    options.kept = vm.config().kept.get();
    options.perf_map = vm.config().perf_map.get();
    options.interpreted_ops = vm.config().interpreted_ops.get();
    // Another vCPU's stores could not be told from differences, and would be undone while one is looked into.
    if (options.lockstep_every != 0 && index != 0) {
      return Error::of(EINVAL, "engine option lockstep: a VM that is checked has one vCPU");
    }
    auto translator =
        TranslatorVcpu::create(v->state_, v->mmu_, *v->interp_, create_block_translator(), options);
    if (!translator) return translator.error();
    v->translator_ = std::move(*translator);
  }
  v->use_features(v->all_features_);
  vm.tracker().register_vcpu(index, &v->mmu_, &v->interp_->context().attention(), kAttendMmu);
  v->registered_ = true;
  kvm_run& page = *v->run_page();
  page.apic_base = v->apic_base();
  page.ready_for_interrupt_injection = 0;
  return v;
}

Vcpu::~Vcpu() {
  hv_.reset();
  xen_.reset();
  lapic_.reset();  // first: its timer raises attention in what the members below hold
  if (registered_) vm_.tracker().unregister_vcpu(index_);
}

// ---- any thread ----

void Vcpu::raise(u32 bits) {
  interp_->context().attention().raise(bits);
  if (waiting_.load(std::memory_order_seq_cst) != 0) wake_.signal();
}

void Vcpu::kick() {
  __atomic_store_n(&run_page()->immediate_exit, u8{1}, __ATOMIC_SEQ_CST);
  raise(kAttendKick);
}

void Vcpu::signal_came() {
  signalled_.store(true, std::memory_order_seq_cst);
  raise(kAttendKick);
}

void Vcpu::page_dirtied(u32 slot, u64 offset) {
  if (!ring_) return;
  ring_->push(slot, offset);
  if (ring_->nearly_full()) raise(kAttendExit);
}

void Vcpu::apply_quirks() {
  const u64 off = vm_.disabled_quirks();
  env_.other_hypercall = off & KVM_X86_QUIRK_FIX_HYPERCALL_INSN ? Environment::OtherHypercall::Faults
                                                               : Environment::OtherHypercall::IsPatched;
  env_.mwait_without_feature = !(off & KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS);
  env_.mwait_by_misc_enable = off & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
  env_.lapic_mmio_hole = !(off & KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
  env_.exits_without_code = vm_.exits_without_code();
}

std::span<u8> Vcpu::mappable(u64 offset) const {
  if (ring_ && offset >= DirtyRing::kMmapPage * kPageSize) {
    const std::span<u8> all = ring_->memory();
    const u64 at = offset - DirtyRing::kMmapPage * kPageSize;
    return at < all.size() ? all.subspan(at) : std::span<u8>();
  }
  if (offset >= run_.size()) return {};
  return {run_.data() + offset, run_.size() - static_cast<std::size_t>(offset)};
}

void Vcpu::queue_nmi() {
  u32 n = nmis_.load();
  while (n < 2 && !nmis_.compare_exchange_weak(n, n + 1)) {
  }
  raise(kAttendNmi);
}
void Vcpu::queue_init() {
  sipi_.store(false);
  init_.store(true);
  raise(kAttendInit);
}
void Vcpu::queue_sipi(u8 vector) {
  sipi_vector_.store(vector);
  sipi_.store(true);
  raise(kAttendInit);
}
void Vcpu::unhalt() {
  unhalted_.store(true);
  raise(kAttendKick);
}
void Vcpu::request_clock_update() {
  pvclock_.request_update();
  xen_->request_time_update();
  vm_.hv().clock_changed();
  raise(kAttendClock);
}

// ---- owner ----

void Vcpu::set_cr8(u64 value) {
  if (lapic_) {
    lapic_->set_cr8(value);
  } else {
    cr8_ = value & 15;
  }
}

void Vcpu::note_ioapic_eoi(u8 vector) {
  eoi_exit_ = vector;
  raise(kAttendExit);
}

void Vcpu::use_features(const GuestFeatures& f) {
  interp_->context().features = f;
  mmu_.set_features(f.maxphyaddr, f.nx, f.page1g, f.pcid, f.amd);
  interp_->code_flush();
  state_changed();
}

void Vcpu::state_changed() { interp_->context().mode_changed(); }

void Vcpu::reset(bool init) {
  if (init) {
    state_.init();
  } else {
    state_.reset();
  }
  if (const kvm_cpuid_entry2* e = cpuid_.find(1, 0)) state_.gpr[RDX] = e->eax;
  if (lapic_) lapic_->reset(init);
  nmis_.store(0);
  nmi_injected_ = exception_injected_ = triple_fault_pending_ = false;
  // What the guest shares with the host is its to set up anew: it may have other plans for that memory.
  pvclock_.reset();
  steal_.reset();
  pv_eoi_.reset();
  async_pf_.reset();
  env_.drop();
  if (xen_->polling()) xen_->end_poll();
  mmu_.flush_all();
  state_changed();
}

std::vector<kvm_cpuid_entry2> Vcpu::live_cpuid() {
  std::vector<kvm_cpuid_entry2> live = cpuid_.entries();
  for (kvm_cpuid_entry2& e : live) {
    if (e.function != 1 && e.function != 7 && e.function != 0xd) continue;
    u32 r[4];
    guest_cpuid(interp_->context(), e.function, e.index, r);
    e.eax = r[0];
    e.ebx = r[1];
    e.ecx = r[2];
    e.edx = r[3];
  }
  return live;
}

long Vcpu::cpuid_ioctl(unsigned long request, u64 arg) {
  kvm_cpuid2 head;
  if (!copy_in(arg, &head)) return -EFAULT;
  const u64 at = arg + sizeof head;
  if (request == KVM_GET_CPUID2) {
    const u32 have = static_cast<u32>(cpuid_.entries().size());
    if (head.nent < have) return -E2BIG;
    head.nent = have;
    if (!copy_out(arg, head)) return -EFAULT;
    return copy_bytes_out(at, live_cpuid().data(), have * sizeof(kvm_cpuid_entry2)) ? 0 : -EFAULT;
  }
  if (head.nent > kMaxCpuidEntries) return -E2BIG;
  std::vector<kvm_cpuid_entry2> entries(head.nent);
  if (request == KVM_SET_CPUID) {  // the older struct, without sub-leaves
    std::vector<kvm_cpuid_entry> old_entries(head.nent);
    if (!copy_bytes_in(at, old_entries.data(), head.nent * sizeof(kvm_cpuid_entry))) return -EFAULT;
    for (u32 i = 0; i < head.nent; i++) {
      const kvm_cpuid_entry& old = old_entries[i];
      entries[i] = kvm_cpuid_entry2{old.function, 0, 0, old.eax, old.ebx, old.ecx, old.edx, {}};
    }
  } else {
    if (!copy_bytes_in(at, entries.data(), head.nent * sizeof(kvm_cpuid_entry2))) return -EFAULT;
  }
  if (vm_.halts_in_guest()) Cpuid::drop_pv_feature(&entries, pv::kUnhalt);  // a vCPU that runs hears no kick
  if (has_run_) {
    // The kernel's rule: after the first KVM_RUN the table may only be set to what it is, as it was set or as it shows.
    const auto same = [](const kvm_cpuid_entry2& a, const kvm_cpuid_entry2& b) {
      return a.function == b.function && a.index == b.index && a.flags == b.flags && a.eax == b.eax && a.ebx == b.ebx &&
             a.ecx == b.ecx && a.edx == b.edx;
    };
    const auto& now = cpuid_.entries();
    const auto live = live_cpuid();
    if (entries.size() != now.size()) return -EINVAL;
    for (std::size_t i = 0; i < now.size(); i++) {
      if (!same(entries[i], now[i]) && !same(entries[i], live[i])) return -EINVAL;
    }
    return 0;
  }
  if (const int error = cpuid_.set(entries); error != 0) return error;
  GuestFeatures features = all_features_;
  if (!cpuid_.empty()) {
    features = make_features(cpuid_.entries());
    features.has &= all_features_.has;  // never what the host or the engine lacks
    features.xcr0_supported &= all_features_.xcr0_supported;
    features.cr4_reserved |= all_features_.cr4_reserved;
    features.efer_reserved |= all_features_.efer_reserved;
  }
  if (lapic_) {
    Lapic::Features f;
    f.x2apic = cpuid_.x2apic();
    f.tsc_deadline = cpuid_.tsc_deadline();
    f.eoi_suppression = !vm_.full_irqchip() && f.x2apic;
    f.physical_bits = cpuid_.physical_bits();
    lapic_->set_features(f);
  }
  hv_->set_cpuid(hv::Cpuid::from([this](u32 leaf) { return cpuid_.find(leaf, 0); }), features.amd);
  use_features(features);
  return 0;
}

long Vcpu::set_guest_debug(u64 arg) {
  kvm_guest_debug dbg;
  if (!copy_in(arg, &dbg)) return -EFAULT;
  if (dbg.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP)) {
    if (state_.exception.pending) return -EBUSY;
    state_.exception = PendingException{};
    state_.exception.pending = true;
    state_.exception.vector = dbg.control & KVM_GUESTDBG_INJECT_DB ? vec::DB : vec::BP;
    exception_injected_ = false;
  }
  guest_debug_ = dbg.control & KVM_GUESTDBG_ENABLE ? dbg.control : 0;
  Context& c = interp_->context();
  c.guest_debug_step = guest_debug_ & KVM_GUESTDBG_SINGLESTEP;
  c.guest_debug_sw_bp = guest_debug_ & KVM_GUESTDBG_USE_SW_BP;
  c.guest_debug_hw_bp = guest_debug_ & KVM_GUESTDBG_USE_HW_BP;
  for (unsigned i = 0; i < 4; i++) c.guest_dr[i] = c.guest_debug_hw_bp ? dbg.arch.debugreg[i] : 0;
  c.guest_dr7 = c.guest_debug_hw_bp ? (dbg.arch.debugreg[7] & 0xffff23ff) | 0x400 : 0x400;
  state_changed();
  return 0;
}

long Vcpu::set_signal_mask(u64 arg) {
  if (arg == 0) {
    have_sigmask_ = false;
    return 0;
  }
  kvm_signal_mask head;
  if (!copy_in(arg, &head)) return -EFAULT;
  if (head.len != 8) return -EINVAL;  // the kernel's sigset_t
  u64 set;
  if (!copy_in(arg + sizeof head, &set)) return -EFAULT;
  if (vm_.config().signals_announced) return 0;  // who announces them also knows which
  sigemptyset(&sigmask_);
  for (int n = 1; n <= 64; n++) {
    if (set >> (n - 1) & 1) sigaddset(&sigmask_, n);
  }
  sigdelset(&sigmask_, SIGKILL);
  sigdelset(&sigmask_, SIGSTOP);
  sigset_t through;
  sigemptyset(&through);
  for (int n = 1; n <= 64; n++) {
    if (!sigismember(&sigmask_, n) && n != SIGKILL && n != SIGSTOP) sigaddset(&through, n);
  }
  const int fd = ::signalfd(signal_fd_.get(), &through, SFD_CLOEXEC | SFD_NONBLOCK);
  if (fd < 0) return -errno;
  if (fd != signal_fd_.get()) signal_fd_.reset(fd);
  have_sigmask_ = true;
  return 0;
}

/// Lapic::set_apic_base(); a LAPIC that the VMM models is held to the same rules.
bool Vcpu::set_apic_base(u64 value, bool host) {
  if (lapic_) return lapic_->set_apic_base(value, host);
  Lapic::Features f;
  f.x2apic = cpuid_.x2apic();
  f.physical_bits = cpuid_.physical_bits();
  if (!Lapic::allows_base(apic_base_, value, host, f)) return false;
  apic_base_ = value;
  return true;
}

long Vcpu::interrupt(u64 arg) {
  kvm_interrupt irq;
  if (!copy_in(arg, &irq)) return -EFAULT;
  if (irq.irq >= KVM_NR_INTERRUPTS) return -EINVAL;
  if (vm_.full_irqchip()) return -ENXIO;
  if (lapic_) {  // split irqchip: from the VMM's 8259, through LINT0
    if (user_extint_ >= 0) return -EEXIST;
    user_extint_ = static_cast<int>(irq.irq);
    raise(kAttendExtInt);
    return 0;
  }
  state_.injected_interrupt = true;
  state_.injected_vector = static_cast<u8>(irq.irq);
  state_.injected_soft = false;
  return 0;
}

long Vcpu::translate(u64 arg) {
  kvm_translation t;
  if (!copy_in(arg, &t)) return -EFAULT;
  constexpr u64 kNone = ~0ull;
  // Without paging every address is its own translation, all 64 bits of it, as with the kernel; but for the one that stands for "none".
  const bool paging = (state_.cr0 & cr0::PG) != 0;
  const Mmu::Translation r = mmu_.translate(t.linear_address);
  t.physical_address = !paging ? t.linear_address : r.valid ? r.gpa.value : kNone;
  t.valid = t.physical_address != kNone;
  t.writeable = t.valid && r.writable;
  t.usermode = t.valid && r.user;
  return copy_out(arg, t) ? 0 : -EFAULT;
}

bool Vcpu::mci_ctl2(u32 index, bool host, bool write, u64* value) {
  constexpr u64 kThreshold = 0x7fff;
  const u32 bank = index - kMc0Ctl2;
  const u64 cap = state_.msr.mcg_cap;
  if (bank >= std::min<u64>(cap & 0xff, mci_ctl2_.size())) return false;
  if (!(cap & kCmciPresent) && (!host || (write && *value != 0))) return false;
  if (!write) {
    *value = mci_ctl2_[bank];
    return true;
  }
  if (*value & ~(kCmciEnable | kThreshold)) return false;
  mci_ctl2_[bank] = *value;
  return true;
}

long Vcpu::mce_ioctl(unsigned long request, u64 arg) {
  Msrs& m = state_.msr;
  if (request == KVM_X86_SETUP_MCE) {
    u64 cap;
    if (!copy_in(arg, &cap)) return -EFAULT;
    const u64 banks = cap & 0xff;
    if (banks == 0 || banks > 32) return -EINVAL;
    if (cap & ~(mce_cap_supported() | 0xff | 0xff0000)) return -EINVAL;
    m.mcg_cap = cap;
    m.mcg_ctl = cap & (1u << 8) ? ~0ull : 0;
    for (u64 bank = 0; bank < banks; bank++) m.mc_banks[bank * 4] = ~0ull;
    mci_ctl2_.fill(0);
    if (lapic_) lapic_->set_cmci(cap & kCmciPresent);
    return 0;
  }
  kvm_x86_mce mce;
  if (!copy_in(arg, &mce)) return -EFAULT;
  constexpr u64 kValid = 1ull << 63, kOverflow = 1ull << 62, kUncorrected = 1ull << 61;
  constexpr u64 kMcip = 1u << 2;
  if (mce.bank >= std::min<u64>(m.mcg_cap & 0xff, 32) || !(mce.status & kValid)) return -EINVAL;
  u64* bank = &m.mc_banks[static_cast<std::size_t>(mce.bank) * 4];
  // Uncorrected, and nothing need be done: noted, and told by an interrupt where the guest wants it (SDM 16.5, 16.6.3).
  constexpr u64 kContextCorrupt = 1ull << 57, kSignaled = 1ull << 56, kActionRequired = 1ull << 55;
  if (mce.mcg_status == 0 && (mce.status & kUncorrected) && !(mce.status & (kContextCorrupt | kSignaled | kActionRequired))) {
    bank[1] = mce.status;
    bank[2] = mce.addr;
    bank[3] = mce.misc;
    m.mcg_status = 0;
    if ((m.mcg_cap & kCmciPresent) && (mci_ctl2_[mce.bank] & kCmciEnable) && lapic_) lapic_->local_event(Lapic::Source::kCmci);
    return 0;
  }
  // Uncorrected errors are reported only where the guest enabled them.
  if ((mce.status & kUncorrected) && (m.mcg_cap & (1u << 8)) && m.mcg_ctl != ~0ull) return 0;
  if ((mce.status & kUncorrected) && bank[0] != ~0ull) return 0;
  if (mce.status & kUncorrected) {
    if ((m.mcg_status & kMcip) || !(state_.cr4 & cr4::MCE)) {
      triple_fault_pending_ = true;
      raise(kAttendKick);
      return 0;
    }
    if (bank[1] & kValid) mce.status |= kOverflow;
    bank[1] = mce.status;
    bank[2] = mce.addr;
    bank[3] = mce.misc;
    m.mcg_status = mce.mcg_status;
    state_.exception = PendingException{};
    state_.exception.pending = true;
    state_.exception.vector = vec::MC;
    exception_injected_ = false;
  } else if (!(bank[1] & kValid) || !(bank[1] & kUncorrected)) {
    if (bank[1] & kValid) mce.status |= kOverflow;
    bank[1] = mce.status;
    bank[2] = mce.addr;
    bank[3] = mce.misc;
  } else {
    bank[1] |= kOverflow;
  }
  return 0;
}

long Vcpu::tpr_ioctl(unsigned long request, u64 arg) {
  if (request == KVM_SET_VAPIC_ADDR) {
    kvm_vapic_addr address;
    if (!lapic_) return -EINVAL;
    if (!copy_in(arg, &address)) return -EFAULT;
    if (address.vapic_addr != 0 && vm_.memory().table()->find(Gpa(address.vapic_addr)) == nullptr) return -EINVAL;
    vapic_addr_ = address.vapic_addr;
    return 0;
  }
  kvm_tpr_access_ctl ctl;
  if (!copy_in(arg, &ctl)) return -EFAULT;
  if (ctl.flags != 0) return -EINVAL;
  // Accesses to the TPR never leave the engine, so there is never one to report.
  return copy_out(arg, ctl) ? 0 : -EFAULT;
}

long Vcpu::enable_cap(u64 arg) {
  kvm_enable_cap cap;
  if (!copy_in(arg, &cap)) return -EFAULT;
  if (cap.flags != 0) return -EINVAL;
  switch (cap.cap) {
    case KVM_CAP_ENFORCE_PV_FEATURE_CPUID: enforce_pv_ = cap.args[0] != 0; return 0;
    case KVM_CAP_HYPERV_ENFORCE_CPUID: hv_->set_enforce_cpuid(cap.args[0] != 0); return 0;
    case KVM_CAP_HYPERV_SYNIC2:
      if (cap.args[0] != 0) return -EINVAL;
      [[fallthrough]];
    case KVM_CAP_HYPERV_SYNIC:
      if (!lapic_) return -EINVAL;
      hv_->activate_synic(cap.cap == KVM_CAP_HYPERV_SYNIC);
      return 0;
    default: return -EINVAL;
  }
}

long Vcpu::device_attr(unsigned long request, u64 arg) {
  kvm_device_attr attr;
  if (!copy_in(arg, &attr)) return -EFAULT;
  if (attr.group != KVM_VCPU_TSC_CTRL || attr.attr != KVM_VCPU_TSC_OFFSET) return -ENXIO;
  if (request == KVM_HAS_DEVICE_ATTR) return 0;
  if (request == KVM_GET_DEVICE_ATTR) return copy_out(attr.addr, tsc_.offset()) ? 0 : -EFAULT;
  u64 offset;
  if (!copy_in(attr.addr, &offset)) return -EFAULT;
  tsc_.set_offset(offset);
  if (lapic_) lapic_->tsc_changed();
  request_clock_update();
  return 0;
}

/// In a signal handler: what it takes may not be held by code that touches guest memory.
bool Vcpu::is_guest_memory(void* vcpu, u64 host) {
  return static_cast<const Vcpu*>(vcpu)->vm_.owns_host(host);
}

long Vcpu::ioctl(unsigned long request, u64 arg) {
  std::lock_guard lock(mutex_);
  if (request == KVM_RUN) return arg == 0 ? run() : -EINVAL;
  long result = 0;
  // Those that read page tables do it as guest code does: changes of memslots wait for them.
  const bool walks = request == KVM_TRANSLATE || request == KVM_SET_SREGS || request == KVM_SET_SREGS2;
  if (walks) vm_.tracker().enter_guest(index_);
  const bool whole = trap_.run([&] { result = ioctl_locked(request, arg); });
  if (walks) vm_.tracker().leave_guest(index_);
  return whole ? result : -EFAULT;
}

long Vcpu::ioctl_locked(unsigned long request, u64 arg) {
  switch (request) {
    case KVM_SET_CPUID:
    case KVM_SET_CPUID2:
    case KVM_GET_CPUID2: return cpuid_ioctl(request, arg);
    case KVM_GET_MSRS:
    case KVM_SET_MSRS: return msrs_ioctl(request, arg);
    case KVM_INTERRUPT: return interrupt(arg);
    case KVM_NMI: queue_nmi(); return 0;
    case KVM_TRANSLATE: return translate(arg);
    case KVM_SET_GUEST_DEBUG: return set_guest_debug(arg);
    case KVM_SET_SIGNAL_MASK: return set_signal_mask(arg);
    case KVM_X86_SETUP_MCE:
    case KVM_X86_SET_MCE: return mce_ioctl(request, arg);
    case KVM_TPR_ACCESS_REPORTING:
    case KVM_SET_VAPIC_ADDR: return tpr_ioctl(request, arg);
    case KVM_GET_TSC_KHZ: return tsc_.khz();
    case KVM_SET_TSC_KHZ: {
      const int result = tsc_.set_khz(static_cast<u32>(arg));
      if (result == 0) {
        if (lapic_) lapic_->tsc_changed();
        request_clock_update();
      }
      return result;
    }
    case KVM_KVMCLOCK_CTRL: {
      const int result = pvclock_.guest_stopped();
      if (result == 0) raise(kAttendClock);
      return result;
    }
    case KVM_GET_SUPPORTED_HV_CPUID:
      return answer_list<kvm_cpuid2>(arg, hv::supported_cpuid(kMaxVcpus, lapic_ != nullptr), &kvm_cpuid2::nent, false);
    case KVM_ENABLE_CAP: return enable_cap(arg);
    case KVM_HAS_DEVICE_ATTR:
    case KVM_GET_DEVICE_ATTR:
    case KVM_SET_DEVICE_ATTR: return device_attr(request, arg);
    case KVM_XEN_VCPU_SET_ATTR:
    case KVM_XEN_VCPU_GET_ATTR: return xen_ioctl(request, arg);
    case KVM_GET_STATS_FD: return stats_.open();
    case KVM_GET_NESTED_STATE:
    case KVM_SET_NESTED_STATE: return -EINVAL;  // as the kernel without nesting
    default: return registers_ioctl(request, arg);
  }
}

}  // namespace ring3::engine::abi
