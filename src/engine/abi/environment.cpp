#include "engine/abi/environment.hpp"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"

namespace ring3::engine::abi {
namespace {
u32 size_mask(unsigned size) { return size >= 4 ? ~0u : (1u << (8 * size)) - 1; }

// Hypercalls (virt/kvm/x86/hypercalls).
constexpr u64 kHcVapicPollIrq = 1, kHcKickCpu = 5, kHcClockPairing = 9, kHcSendIpi = 10, kHcSchedYield = 11, kHcMapGpaRange = 12;
constexpr u64 kHcNoSys = static_cast<u64>(-1000);  // -KVM_ENOSYS
constexpr u64 kHcInvalid = static_cast<u64>(-EINVAL), kHcFault = static_cast<u64>(-EFAULT),
              kHcNotSupported = static_cast<u64>(-EOPNOTSUPP);
}  // namespace

VcpuEnvironment::VcpuEnvironment(Vcpu& vcpu) : vcpu_(vcpu), vm_(vcpu.vm()), ioeventfds_(vcpu.vm().ioeventfds()) {}

// ---- the log ----

const VcpuEnvironment::Access* VcpuEnvironment::replay(Kind kind, u64 address, unsigned size) {
  if (next_ >= log_.size()) return nullptr;
  const Access& a = log_[next_];
  if (a.kind != kind || a.address != address || a.size != size) {
    // Another path than last time (another vCPU changed memory it depends on): what follows is new.
    log_.resize(next_);
    return nullptr;
  }
  next_++;
  return &a;
}

void VcpuEnvironment::ask(Kind kind, u64 address, unsigned size, u64 data, u32 reason) {
  if (log_.size() >= kMaxLog) return;  // no instruction has so many: exit_pending() stays false, an internal error
  asked_ = Access{kind, static_cast<u8>(size), address, data, reason, false};
  exit_pending_ = true;
  replaying = true;
  kvm_run& run = *vcpu_.run_page();
  if (kind == Kind::PortIn || kind == Kind::PortOut) {
    run.exit_reason = KVM_EXIT_IO;
    run.io.direction = kind == Kind::PortIn ? KVM_EXIT_IO_IN : KVM_EXIT_IO_OUT;
    run.io.size = static_cast<u8>(size);
    run.io.port = static_cast<u16>(address);
    asked_count_ = kind == Kind::PortIn ? std::clamp(string_elements, 1u, static_cast<unsigned>(kPageSize) / size) : 1;
    run.io.count = asked_count_;
    run.io.data_offset = KVM_PIO_PAGE_OFFSET * kPageSize;
    u8* page = reinterpret_cast<u8*>(&run) + KVM_PIO_PAGE_OFFSET * kPageSize;
    if (kind == Kind::PortOut) std::memcpy(page, &data, size);
    vcpu_.stats_.add(vcpu_stat::IoExits);
  } else if (kind == Kind::MsrRead || kind == Kind::MsrWrite) {
    run.exit_reason = kind == Kind::MsrRead ? KVM_EXIT_X86_RDMSR : KVM_EXIT_X86_WRMSR;
    run.msr.error = 0;
    std::memset(run.msr.pad, 0, sizeof run.msr.pad);
    run.msr.reason = reason;
    run.msr.index = static_cast<u32>(address);
    run.msr.data = data;
  } else {
    vcpu_.stats_.add(vcpu_stat::MmioExits);
    run.exit_reason = KVM_EXIT_MMIO;
    run.mmio.phys_addr = address;
    run.mmio.len = size;
    run.mmio.is_write = kind == Kind::MmioWrite ? 1 : 0;
    std::memcpy(run.mmio.data, &data, 8);
  }
}

void VcpuEnvironment::ask_hypercall(u64 control, u64 input, u64 output) {
  asked_ = Access{Kind::HvCall, 8, control, 0};
  exit_pending_ = true;
  replaying = true;
  kvm_run& run = *vcpu_.run_page();
  run.exit_reason = KVM_EXIT_HYPERV;
  run.hyperv = kvm_hyperv_exit{};
  run.hyperv.type = KVM_EXIT_HYPERV_HCALL;
  run.hyperv.u.hcall.input = control;
  run.hyperv.u.hcall.params[0] = input;
  run.hyperv.u.hcall.params[1] = output;
}

void VcpuEnvironment::complete() {
  if (!exit_pending_) return;
  exit_pending_ = false;
  const kvm_run& run = *vcpu_.run_page();
  if (asked_.kind == Kind::PortIn) {
    asked_.data = 0;
    const u8* page = reinterpret_cast<const u8*>(&run) + KVM_PIO_PAGE_OFFSET * kPageSize;
    std::memcpy(&asked_.data, page, asked_.size);
    drop_batch();
    if (asked_count_ > 1) {
      batch_.assign(page + asked_.size, page + std::size_t{asked_count_} * asked_.size);
      batch_port_ = asked_.address | u64{asked_.size} << 16;
      string_ready = asked_count_ - 1;
    }
  } else if (asked_.kind == Kind::MmioRead) {
    asked_.data = 0;
    std::memcpy(&asked_.data, run.mmio.data, asked_.size);
  } else if (asked_.kind == Kind::HvCall) {
    asked_.data = run.hyperv.u.hcall.result;
  } else if (asked_.kind == Kind::XenCall) {
    asked_.data = run.xen.u.hcall.result;
  } else if (asked_.kind == Kind::Hypercall) {
    asked_.data = run.hypercall.ret;
  } else if (asked_.kind == Kind::MsrRead || asked_.kind == Kind::MsrWrite) {
    asked_.error = run.msr.error != 0;
    if (asked_.kind == Kind::MsrRead) asked_.data = run.msr.data;
  }
  log_.push_back(asked_);
  next_ = 0;
}

void VcpuEnvironment::drop_batch() {
  batch_.clear();
  batch_at_ = 0;
  string_ready = 0;
}

void VcpuEnvironment::drop() {
  drop_batch();
  log_.clear();
  next_ = 0;
  exit_pending_ = false;
  replaying = false;
}

void VcpuEnvironment::retired() {
  log_.clear();
  next_ = 0;
  replaying = false;
  // KVM_RUN with immediate_exit only finishes the instruction: stop before the next iteration of a string instruction.
  if (__atomic_load_n(&vcpu_.run_page()->immediate_exit, __ATOMIC_RELAXED) ||
      vcpu_.signalled_.load(std::memory_order_relaxed)) {
    vcpu_.raise(kAttendExit);
  }
}

// ---- ports ----

VcpuEnvironment::Answer VcpuEnvironment::port_in(u16 port, unsigned size, u32* value) {
  if (const Access* a = replay(Kind::PortIn, port, size)) {
    *value = static_cast<u32>(a->data) & size_mask(size);
    return Answer::Done;
  }
  if (string_ready != 0) [[unlikely]] {
    if (batch_port_ == (port | u64{size} << 16)) {
      *value = 0;
      std::memcpy(value, batch_.data() + batch_at_, size);
      batch_at_ += size;
      string_ready--;
      return Answer::Done;
    }
    drop_batch();  // another instruction: the rest of that one is void
  }
  IrqChip* chip = vm_.irqchip();
  Pit* pit = vm_.pit();
  const auto ours = [&](u16 p) {
    return (chip != nullptr && chip->mode() == IrqChip::Mode::kFull && Pic::handles(p)) || (pit != nullptr && pit->handles(p));
  };
  if (ours(port)) {
    u32 result = 0;
    for (unsigned i = 0; i < size; i++) {  // byte-wide devices: a wide access is one per byte
      const u16 p = static_cast<u16>(port + i);
      u8 byte = 0xff;
      if (pit != nullptr && pit->handles(p)) {
        byte = pit->read(p);
      } else if (ours(p)) {
        chip->pio_read(p, &byte, 1);
      }
      result |= u32{byte} << (8 * i);
    }
    *value = result;
    return Answer::Done;
  }
  ask(Kind::PortIn, port, size, 0);
  return Answer::Exit;
}

VcpuEnvironment::Answer VcpuEnvironment::port_out(u16 port, unsigned size, u32 value) {
  if (replay(Kind::PortOut, port, size) != nullptr) return Answer::Done;
  value &= size_mask(size);
  IrqChip* chip = vm_.irqchip();
  Pit* pit = vm_.pit();
  const auto ours = [&](u16 p) {
    return (chip != nullptr && chip->mode() == IrqChip::Mode::kFull && Pic::handles(p)) || (pit != nullptr && pit->handles(p));
  };
  if (ours(port)) {
    for (unsigned i = 0; i < size; i++) {
      const u16 p = static_cast<u16>(port + i);
      const u8 byte = static_cast<u8>(value >> (8 * i));
      if (pit != nullptr && pit->handles(p)) {
        pit->write(p, byte);
      } else if (ours(p)) {
        chip->pio_write(p, &byte, 1);
      }
    }
    return Answer::Done;
  }
  if (ioeventfds_.signal(true, port, size, &value)) return Answer::Done;
  if (vm_.coalesced().write(true, port, size, &value)) return Answer::Done;
  ask(Kind::PortOut, port, size, value);
  return Answer::Exit;
}

// ---- device memory ----

bool VcpuEnvironment::mmio_read(Gpa gpa, void* data, unsigned size) {
  // As KVM: parts of at most eight bytes, the device's own size when it is one.
  auto* out = static_cast<u8*>(data);
  for (unsigned done = 0; done < size;) {
    const unsigned n = std::min(size - done, 8u);
    if (!mmio_read_part(gpa.value + done, out + done, n)) return false;
    done += n;
  }
  return true;
}

bool VcpuEnvironment::mmio_write(Gpa gpa, const void* data, unsigned size) {
  const auto* in = static_cast<const u8*>(data);
  for (unsigned done = 0; done < size;) {
    const unsigned n = std::min(size - done, 8u);
    if (!mmio_write_part(gpa.value + done, in + done, n)) return false;
    done += n;
  }
  return true;
}

bool VcpuEnvironment::mmio_read_part(u64 address, u8* data, unsigned size) {
  if (const Access* a = replay(Kind::MmioRead, address, size)) {
    std::memcpy(data, &a->data, size);
    return true;
  }
  Lapic* lapic = vcpu_.lapic();
  if (lapic != nullptr && lapic->mmio_contains(Gpa(address)) && (lapic_mmio_hole || lapic->takes_mmio())) {
    vcpu_.settle_pv_eoi();
    lapic->mmio_read(static_cast<u32>(address & ~kPageMask), data, size);
    return true;
  }
  IrqChip* chip = vm_.irqchip();
  if (chip != nullptr && chip->mmio_read(Gpa(address), data, size)) return true;
  ask(Kind::MmioRead, address, size, 0);
  return false;
}

bool VcpuEnvironment::mmio_write_part(u64 address, const u8* data, unsigned size) {
  if (replay(Kind::MmioWrite, address, size) != nullptr) return true;
  Lapic* lapic = vcpu_.lapic();
  if (lapic != nullptr && lapic->mmio_contains(Gpa(address)) && (lapic_mmio_hole || lapic->takes_mmio())) {
    vcpu_.settle_pv_eoi();
    lapic->mmio_write(static_cast<u32>(address & ~kPageMask), data, size);
    return true;
  }
  IrqChip* chip = vm_.irqchip();
  if (chip != nullptr && chip->mmio_write(Gpa(address), data, size)) return true;
  if (ioeventfds_.signal(false, address, size, data)) return true;
  if (vm_.coalesced().write(false, address, size, data)) return true;
  u64 value = 0;
  std::memcpy(&value, data, size);
  ask(Kind::MmioWrite, address, size, value);
  return false;
}

// ---- the rest ----

VcpuEnvironment::Answer VcpuEnvironment::rdmsr(u32 index, u64* value) {
  const Vcpu::Msr result = vcpu_.read_msr(index, false, value);
  if (result == Vcpu::Msr::Ok) return Answer::Done;
  return msr_to_vmm(index, false, value, result == Vcpu::Msr::Unknown ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}
VcpuEnvironment::Answer VcpuEnvironment::wrmsr(u32 index, u64 value) {
  const Vcpu::Msr result = vcpu_.write_msr(index, false, value);
  if (result == Vcpu::Msr::Ok) return Answer::Done;
  return msr_to_vmm(index, true, &value, result == Vcpu::Msr::Unknown ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}
VcpuEnvironment::Answer VcpuEnvironment::msr_before(u32 index, bool write, u64* value, bool* handled) {
  *handled = false;
  if (vm_.msr_filter().allows(index, write)) return Answer::Done;
  *handled = true;
  return msr_to_vmm(index, write, value, KVM_MSR_EXIT_REASON_FILTER);
}
VcpuEnvironment::Answer VcpuEnvironment::msr_faulted(u32 index, bool write, u64* value) {
  return msr_to_vmm(index, write, value, KVM_MSR_EXIT_REASON_INVAL);
}
VcpuEnvironment::Answer VcpuEnvironment::msr_to_vmm(u32 index, bool write, u64* value, u32 reason) {
  const Kind kind = write ? Kind::MsrWrite : Kind::MsrRead;
  if (const Access* a = replay(kind, index, 8)) {
    const Access access = *a;
    if (!write) *value = access.data;
    if (!access.error) return Answer::Done;
    drop();  // the instruction faults: it does not retire
    return Answer::Fault;
  }
  if (!vm_.msr_filter().asks(reason)) return Answer::Fault;
  ask(kind, index, 8, write ? *value : 0, reason);
  return exit_pending_ ? Answer::Exit : Answer::Fault;
}
void VcpuEnvironment::cpuid(u32 leaf, u32 subleaf, u32 out[4]) {
  vcpu_.cpuid().lookup(leaf, subleaf, out);
  if (leaf == 1 && mwait_by_misc_enable) {
    out[2] = (out[2] & ~8u) | static_cast<u32>(vcpu_.state().msr.misc_enable >> 18 & 1) << 3;
  }
}
u64 VcpuEnvironment::rdtsc() { return vcpu_.tsc().read(); }
Environment::HostTsc VcpuEnvironment::host_tsc() const {
  const Tsc& tsc = vcpu_.tsc();
  return tsc.is_rdtsc() ? HostTsc{&tsc.ratio_word(), &tsc.offset_word()} : HostTsc{};
}
u64 VcpuEnvironment::get_cr8() { return vcpu_.cr8(); }
void VcpuEnvironment::set_cr8(u64 value) {
  const bool lowered = value < vcpu_.cr8();
  vcpu_.set_cr8(value);
  if (lowered && vcpu_.lapic() == nullptr) {
    vcpu_.set_tpr_exit_ = true;
    vcpu_.raise(kAttendExit);
  }
}

/// An ICR's IPI to the APIC ids args[2] + n whose bits n are set in two words of the caller's size. How many took it.
u64 VcpuEnvironment::send_ipis(const u64 args[4]) {
  constexpr u32 kLogical = 1u << 11, kAssert = 1u << 14, kLevel = 1u << 15, kShorthand = 3u << 18;
  const u32 icr = static_cast<u32>(args[3]);
  if (icr & (kLogical | kShorthand)) return kHcInvalid;
  InterruptMessage message;
  message.vector = static_cast<u8>(icr);
  message.mode = static_cast<DeliveryMode>(icr >> 8 & 7);
  message.level = icr & kLevel;
  message.assert_ = !message.level || (icr & kAssert);
  const VcpuState& s = vcpu_.state();
  const unsigned width = s.long_mode() && s.seg[CS].l ? 64 : 32;
  u64 taken = 0;
  for (unsigned word = 0; word < 2; word++) {
    for (unsigned n = 0; n < width; n++) {
      const u64 id = u64{static_cast<u32>(args[2])} + word * width + n;
      // Each is one LAPIC's: nothing stands for all.
      if (!(args[word] >> n & 1) || id >= ~0u || (id == 0xff && vm_.bus().lapic(0xff) == nullptr)) continue;
      message.dest = static_cast<u32>(id);
      if (const int result = vm_.bus().deliver(message, vcpu_.lapic()); result > 0) taken += static_cast<u64>(result);
    }
  }
  return taken;
}

/// The wall clock and the guest's TSC at one moment, written to args[0] (struct kvm_clock_pairing).
u64 VcpuEnvironment::pair_clocks(const u64 args[4]) {
  constexpr u64 kWallClock = 0, kNsPerSecond = 1'000'000'000;
  const Clock& clock = vcpu_.tsc().clock();
  if (args[1] != kWallClock || !clock.tsc_stable()) return kHcNotSupported;
  struct {
    i64 sec, nsec;
    u64 tsc;
    u32 flags, padding[9];
  } pairing{};
  // Between two readings of the TSC that stand close together, so that nothing came in between.
  u64 width = ~0ull;
  for (unsigned i = 0; i < 5; i++) {
    const u64 before = clock.host_tsc();
    const u64 now = clock.realtime_ns();
    const u64 after = clock.host_tsc();
    if (after - before >= width) continue;
    width = after - before;
    pairing.sec = static_cast<i64>(now / kNsPerSecond);
    pairing.nsec = static_cast<i64>(now % kNsPerSecond);
    pairing.tsc = vcpu_.tsc().at(before + width / 2);
  }
  return vm_.write_memory(Gpa(args[0]), &pairing, sizeof pairing, &vcpu_) ? 0 : kHcFault;
}

VcpuEnvironment::Answer VcpuEnvironment::hypercall(u64 nr, const u64 args[4], u64* result) {
  if (const Access* a = replay(Kind::Hypercall, nr, 8)) {
    *result = a->data;
    return Answer::Done;
  }
  vcpu_.stats_.add(vcpu_stat::Hypercalls);
  if (nr == kHcMapGpaRange && (vm_.hypercall_exits() >> kHcMapGpaRange & 1)) {
    const u64 first = args[0] >> kPageShift, pages = args[1];
    if ((args[0] & (kPageSize - 1)) != 0 || pages == 0 || first + pages <= first) {
      *result = kHcInvalid;
      return Answer::Done;
    }
    asked_ = Access{Kind::Hypercall, 8, nr, 0};
    exit_pending_ = true;
    replaying = true;
    kvm_run& run = *vcpu_.run_page();
    const VcpuState& s = vcpu_.state();
    run.exit_reason = KVM_EXIT_HYPERCALL;
    std::memset(&run.hypercall, 0, sizeof run.hypercall);
    run.hypercall.nr = nr;
    for (unsigned i = 0; i < 3; i++) run.hypercall.args[i] = args[i];
    run.hypercall.longmode = s.long_mode() && s.seg[CS].l;
    return Answer::Exit;
  }
  *result = own_hypercall(nr, args);
  return Answer::Done;
}

/// The result of a hypercall that is not the VMM's.
u64 VcpuEnvironment::own_hypercall(u64 nr, const u64 args[4]) {
  switch (nr) {
    case kHcVapicPollIrq:
      return 0;
    case kHcKickCpu:
      if (!vcpu_.pv_feature(pv::kUnhalt)) return kHcNoSys;
      if (Vcpu* target = vm_.vcpu(static_cast<unsigned>(std::min<u64>(args[1], kMaxVcpus)))) target->unhalt();
      return 0;
    case kHcClockPairing:
      return pair_clocks(args);
    case kHcSendIpi:
      return vcpu_.pv_feature(pv::kSendIpi) ? send_ipis(args) : kHcNoSys;
    case kHcSchedYield:
      if (!vcpu_.pv_feature(pv::kSchedYield)) return kHcNoSys;
      sched_yield();
      return 0;
    default:
      return kHcNoSys;
  }
}

bool VcpuEnvironment::xen_hypercalls(u64 number) {
  constexpr u64 kHypervBit = 1u << 31;  // by which a guest with both tells Hyper-V's
  return vm_.xen().intercepts() && !((number & kHypervBit) && vcpu_.hv_->hypercalls());
}

VcpuEnvironment::Answer VcpuEnvironment::xen_hypercall(u64 number, const u64 args[6], bool long_mode, unsigned cpl, u64* result) {
  if (const Access* a = replay(Kind::XenCall, number, 8)) {
    *result = a->data;
    return Answer::Done;
  }
  vcpu_.stats_.add(vcpu_stat::Hypercalls);
  if (cpl == 0) {  // of a guest's processes all are the VMM's
    if (const auto own = vcpu_.xen_->hypercall({number, args, long_mode})) {
      *result = *own;
      vcpu_.raise(kAttendXen);  // a guest makes one to be interrupted: it may have written itself that it has an event
      return Answer::Done;
    }
  }
  asked_ = Access{Kind::XenCall, 8, number, 0};
  exit_pending_ = true;
  replaying = true;
  kvm_run& run = *vcpu_.run_page();
  run.exit_reason = KVM_EXIT_XEN;
  run.xen = kvm_xen_exit{};
  run.xen.type = KVM_EXIT_XEN_HCALL;
  run.xen.u.hcall.longmode = long_mode;
  run.xen.u.hcall.cpl = cpl;
  run.xen.u.hcall.input = number;
  for (unsigned i = 0; i < 6; i++) run.xen.u.hcall.params[i] = args[i];
  return Answer::Exit;
}

bool VcpuEnvironment::hv_hypercalls() { return vcpu_.hv_->hypercalls(); }

VcpuEnvironment::Answer VcpuEnvironment::hv_hypercall(u64 control, u64 input, u64 output, u64* result) {
  if (const Access* a = replay(Kind::HvCall, control, 8)) {
    *result = a->data;
    return Answer::Done;
  }
  vcpu_.stats_.add(vcpu_stat::Hypercalls);
  const hv::HypercallResult r = vcpu_.hv_->hypercall({control, input, output, vcpu_.state().xsave.xmm(0)});
  switch (r.kind) {
    case hv::HypercallResult::Kind::kUndefined: return Answer::Fault;
    case hv::HypercallResult::Kind::kToVmm: ask_hypercall(control, input, output); return Answer::Exit;
    case hv::HypercallResult::Kind::kDone: break;
  }
  *result = r.status;
  return Answer::Done;
}

void VcpuEnvironment::nmi_unblocked() { vcpu_.raise(kAttendNmi); }

}  // namespace ring3::engine::abi
