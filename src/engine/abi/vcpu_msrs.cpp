// MSRs behind Environment: the LAPIC's, the TSC's, kvmclock's, and those KVM answers although they do nothing.
// The core's own stand in engine/interp/msr.hpp and are asked first.
#include <cstring>
#include <vector>

#include "engine/abi/msr_list.hpp"
#include "engine/abi/user_memory.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"
#include "engine/interp/msr.hpp"

namespace ring3::engine::abi {
namespace {

constexpr u32 kTsc = 0x10, kApicBase = 0x1b, kSmiCount = 0x34, kFeatureControl = 0x3a, kTscAdjust = 0x3b, kFsbFreq = 0xcd,
              kBblCrCtl3 = 0x11e, kPerfStatus = 0x198, kPowerCtl = 0x1fc, kTscDeadline = 0x6e0, kK7ClkCtl = 0xc001001b;

// Reads as zero; writes are dropped.
bool silent(u32 index) {
  switch (index) {
    case 0x00: case 0x01:              // P5_MC_ADDR, P5_MC_TYPE
    case 0x17: case 0x2a:              // PLATFORM_ID, EBL_CR_POWERON
    case 0x79:                         // UCODE_WRITE
    case 0x199:                        // PERF_CTL
    case 0x1db: case 0x1dc: case 0x1dd: case 0x1de:  // last branch and interrupt records
    case 0x606: case 0x611: case 0x619: case 0x639: case 0x641:  // RAPL
    case 0xc0010010:                   // SYSCFG
    case 0xc001001f: case 0xc0010020:  // NB_CFG, PATCH_LOADER
    case 0xc0010055: case 0xc0010058:  // INT_PENDING_MSG, MMIO_CONF_BASE
    case 0xc0010112: case 0xc0010113:  // TSEG_ADDR, TSEG_MASK
    case 0xc0010117:                   // VM_HSAVE_PA
    case 0xc0011022: case 0xc0011023: case 0xc001102a: case 0xc001102c:  // DC_CFG, TW_CFG, BU_CFG2, EX_CFG
      return true;
    default:
      // Performance counters of CPUs without a PMU leaf: P6, K7.
      return index == 0xc1 || index == 0xc2 || index == 0x186 || index == 0x187 || (index >= 0xc0010000 && index <= 0xc0010007);
  }
}

u32 async_pf_feature(u32 index) {
  return index == AsyncPf::kEnable ? pv::kAsyncPf : index == AsyncPf::kPollControl ? pv::kPollControl : pv::kAsyncPfInt;
}

}  // namespace

bool Vcpu::pv_feature(u32 bit) const {
  if (!enforce_pv_) return (pv::kOffered & bit) != 0;
  const kvm_cpuid_entry2* e = cpuid_.pv_features();
  return e != nullptr && (e->eax & bit) != 0;
}

Vcpu::Msr Vcpu::read_msr(u32 index, bool host, u64* value) {
  *value = 0;
  if (index >= 0x800 && index <= 0x8ff) {
    settle_pv_eoi();
    return lapic_ && lapic_->read_x2apic(index, value) ? Msr::Ok : Msr::Fault;
  }
  if (index >= 0x280 && index < 0x2a0) return mci_ctl2(index, host, false, value) ? Msr::Ok : Msr::Fault;
  if (hv::Vp::is_msr(index)) return hv_->read_msr(index, host, value) ? Msr::Ok : Msr::Fault;
  if (PvClock::is_msr(index)) {
    const u32 feature = index < 0x100 ? pv::kClockSource : pv::kClockSource2;
    if (!host && !pv_feature(feature)) return Msr::Fault;
    *value = pvclock_.read_msr(index);
    return Msr::Ok;
  }
  if (AsyncPf::is_msr(index)) {
    if (!host && !pv_feature(async_pf_feature(index))) return Msr::Fault;
    *value = async_pf_.read(index);
    return Msr::Ok;
  }
  switch (index) {
    case kTsc: *value = tsc_.read(); return Msr::Ok;
    case kTscAdjust: *value = tsc_.adjust(); return Msr::Ok;
    case kTscDeadline: *value = lapic_ ? lapic_->tsc_deadline() : 0; return Msr::Ok;
    case kApicBase: *value = apic_base(); return Msr::Ok;
    case StealTime::kMsr:
      if (!host && !pv_feature(pv::kStealTime)) return Msr::Fault;
      *value = steal_.read_msr();
      return Msr::Ok;
    case PvEoi::kMsr:
      if (!host && !pv_feature(pv::kPvEoi)) return Msr::Fault;
      *value = pv_eoi_.read_msr();
      return Msr::Ok;
    case kSmiCount: *value = smi_count_; return Msr::Ok;
    case kFeatureControl: *value = feature_control_; return Msr::Ok;
    case kPowerCtl: *value = power_ctl_; return Msr::Ok;
    case kFsbFreq: *value = 3; return Msr::Ok;
    case kPerfStatus: *value = 1000ull | 4ull << 40; return Msr::Ok;
    case kBblCrCtl3: *value = 0xbe702111; return Msr::Ok;
    case kK7ClkCtl: *value = 0x20000000; return Msr::Ok;
    default: return silent(index) ? Msr::Ok : Msr::Unknown;
  }
}

Vcpu::Msr Vcpu::write_msr(u32 index, bool host, u64 value) {
  if (index >= 0x800 && index <= 0x8ff) {
    settle_pv_eoi();
    return lapic_ && lapic_->write_x2apic(index, value) ? Msr::Ok : Msr::Fault;
  }
  if (vm_.xen().is_msr(index)) {
    const auto write = [this](Gpa to, const void* from, std::size_t size) { return vm_.write_memory(to, from, size, this); };
    return vm_.xen().write_page(value, state_.long_mode(), interp_->context().features.amd, write) ? Msr::Ok : Msr::Fault;
  }
  if (index >= 0x280 && index < 0x2a0) return mci_ctl2(index, host, true, &value) ? Msr::Ok : Msr::Fault;
  if (hv::Vp::is_msr(index)) {
    settle_pv_eoi();  // the LAPIC's EOI and ICR are among them
    return hv_->write_msr(index, host, value) ? Msr::Ok : Msr::Fault;
  }
  if (PvClock::is_msr(index)) {
    const u32 feature = index < 0x100 ? pv::kClockSource : pv::kClockSource2;
    if (!host && !pv_feature(feature)) return Msr::Fault;
    pvclock_.write_msr(index, value, host);
    raise(kAttendClock);
    return Msr::Ok;
  }
  if (AsyncPf::is_msr(index)) {
    if (!host && !pv_feature(async_pf_feature(index))) return Msr::Fault;
    // Ways of delivery that the guest has not been offered.
    constexpr u64 kAsVmexit = 1u << 2, kAsInterrupt = 1u << 3;
    if (index == AsyncPf::kEnable && !host && (((value & kAsVmexit) && !pv_feature(pv::kAsyncPfVmexit)) ||
                                               ((value & kAsInterrupt) && !pv_feature(pv::kAsyncPfInt)))) {
      return Msr::Fault;
    }
    const auto backed = [this](Gpa at) { return vm_.memory().table()->find(at) != nullptr; };
    if (!async_pf_.write(index, value, lapic_ != nullptr, backed)) return Msr::Fault;
    if (async_pf_.due()) raise(kAttendInterrupt);
    return Msr::Ok;
  }
  switch (index) {
    case kTsc:
      if (host) {
        tsc_.host_write(value);
      } else {
        tsc_.guest_write(value);
      }
      if (lapic_) lapic_->tsc_changed();
      request_clock_update();
      return Msr::Ok;
    case kTscAdjust:
      if (host) {
        tsc_.host_write_adjust(value);
        return Msr::Ok;
      }
      tsc_.guest_write_adjust(value);
      if (lapic_) lapic_->tsc_changed();
      request_clock_update();
      return Msr::Ok;
    case kTscDeadline:
      if (lapic_) lapic_->set_tsc_deadline(value);
      return Msr::Ok;
    case kApicBase:
      if (!set_apic_base(value, host)) return Msr::Fault;
      if (lapic_) raise(kAttendExtInt);  // a LAPIC that is off lets external interrupts through
      return Msr::Ok;
    case StealTime::kMsr:
      if (!host && !pv_feature(pv::kStealTime)) return Msr::Fault;
      if (!steal_.write_msr(value)) return Msr::Fault;
      raise(kAttendClock);
      return Msr::Ok;
    case PvEoi::kMsr:
      if (!host && !pv_feature(pv::kPvEoi)) return Msr::Fault;
      settle_pv_eoi();
      return pv_eoi_.write_msr(value) ? Msr::Ok : Msr::Fault;
    case kSmiCount:
      if (!host) return Msr::Fault;
      smi_count_ = value;
      return Msr::Ok;
    case kFeatureControl:
      if (!host && (feature_control_ & 1)) return Msr::Fault;  // locked
      feature_control_ = value;
      return Msr::Ok;
    case kPowerCtl: power_ctl_ = value; return Msr::Ok;
    case kPerfStatus: case kBblCrCtl3: case kK7ClkCtl: return Msr::Ok;
    default: return silent(index) ? Msr::Ok : Msr::Unknown;
  }
}

bool Vcpu::get_one_msr(u32 index, u64* value) {
  switch (engine::read_msr(state_, interp_->context().features, index, true, value)) {
    case MsrAccess::Ok: return true;
    case MsrAccess::Fault: return false;
    case MsrAccess::Unknown: break;
  }
  return read_msr(index, true, value) == Msr::Ok;
}

bool Vcpu::set_one_msr(u32 index, u64 value) {
  switch (engine::write_msr(state_, interp_->context().features, index, value, true)) {
    case MsrAccess::Ok:
      if (index == msr::EFER) {
        mmu_.flush_all();
        state_changed();
      } else if (index == msr::FS_BASE || index == msr::GS_BASE || index == msr::DEBUGCTL) {
        state_changed();
      }
      return true;
    case MsrAccess::Fault: return false;
    case MsrAccess::Unknown: break;
  }
  return write_msr(index, true, value) == Msr::Ok;
}

long Vcpu::msrs_ioctl(unsigned long request, u64 arg) {
  kvm_msrs head;
  if (!copy_in(arg, &head)) return -EFAULT;
  if (head.nmsrs >= 256) return -E2BIG;
  const u64 at = arg + sizeof head;
  std::vector<kvm_msr_entry> entries(head.nmsrs);
  if (!copy_bytes_in(at, entries.data(), head.nmsrs * sizeof(kvm_msr_entry))) return -EFAULT;
  u32 i = 0;
  for (; i < head.nmsrs; i++) {
    kvm_msr_entry& e = entries[i];
    if (request == KVM_SET_MSRS) {
      if (!set_one_msr(e.index, e.data)) break;
    } else {
      u64 value = 0;
      if (!get_one_msr(e.index, &value)) break;
      e.data = value;
    }
  }
  if (request == KVM_GET_MSRS && !copy_bytes_out(at, entries.data(), head.nmsrs * sizeof(kvm_msr_entry))) return -EFAULT;
  return i;
}

}  // namespace ring3::engine::abi
