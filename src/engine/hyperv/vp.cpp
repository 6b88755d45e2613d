#include "engine/hyperv/vp.hpp"

#include <ctime>

#include "engine/hyperv/tlfs.hpp"

namespace ring3::engine::hv {
namespace {

/// CPU time of the calling thread, in 100 ns.
u64 thread_time() {
  timespec t{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<u64>(t.tv_sec) * 10'000'000 + static_cast<u64>(t.tv_nsec) / 100;
}

constexpr u64 kApicHz = 1'000'000'000;  // Lapic's timer

}  // namespace

Vp::Vp(Partition& partition, Host& host, Processor& processor, TimerQueue& timers, const Tsc& tsc, Lapic* lapic, unsigned id,
       u32 index)
    : partition_(partition),
      host_(host),
      processor_(processor),
      tsc_(tsc),
      lapic_(lapic),
      id_(id),
      index_(index),
      synic_(partition, host, processor, timers, tsc, lapic, index_) {}

Vp::~Vp() = default;

void Vp::set_cpuid(const Cpuid& cpuid, bool amd) {
  cpuid_ = cpuid;
  amd_ = amd;
}

void Vp::activate_synic(bool zero_pages) { synic_.activate(zero_pages); }

// ---- MSRs ----

bool Vp::read_msr(u32 index, bool host, u64* value) {
  *value = 0;
  if (!host && (!cpuid_.present || (enforce_ && !cpuid_.allows_msr(index)))) return false;
  if (Partition::owns_msr(index)) {
    return partition_.read_msr(index, {host, cpuid_.syndbg(), amd_, tsc_, processor_}, value);
  }
  switch (index) {
    case msr::kVpIndex: *value = this->index(); return true;
    case msr::kVpRuntime: *value = thread_time() + runtime_offset_; return true;
    case msr::kTscFrequency: *value = u64{tsc_.khz()} * 1000; return true;
    case msr::kApicFrequency: *value = kApicHz; return true;
    case msr::kEoi: return false;  // write-only
    case msr::kIcr: return lapic_ != nullptr && (*value = lapic_->icr(), true);
    case msr::kTpr: return lapic_ != nullptr && (*value = lapic_->tpr(), true);
    case msr::kVpAssistPage: *value = assist_page_; return true;
    default: break;
  }
  if (index >= msr::kStimer0Config && index <= msr::kStimer3Count) {
    *value = synic_.read_stimer(index);
    return true;
  }
  return synic_.read_msr(index, host, value);
}

bool Vp::write_msr(u32 index, bool host, u64 value) {
  if (!host && (!cpuid_.present || (enforce_ && !cpuid_.allows_msr(index)))) return false;
  if (Partition::owns_msr(index)) {
    if (!partition_.write_msr(index, {host, cpuid_.syndbg(), amd_, tsc_, processor_}, value)) return false;
    if (index == msr::kReferenceTsc) processor_.attend_clock();
    if (host) return true;
    if (index == msr::kSyndbgControl || index == msr::kSyndbgPendingBuffer) note_syndbg_exit(index);
    if (index == msr::kReset && value == 1) exits_ |= kExitReset;
    if (index == msr::kCrashCtl && (value & kCrashNotify)) exits_ |= kExitCrash;
    if (exits_ != 0) processor_.attend_exit();
    return true;
  }
  switch (index) {
    case msr::kVpIndex:
      if (!host || value >= ApicBus::kMaxVcpus) return false;
      index_.store(static_cast<u32>(value), std::memory_order_relaxed);
      return true;
    case msr::kVpRuntime:
      if (!host) return false;
      runtime_offset_ = value - thread_time();
      return true;
    case msr::kTscFrequency:
    case msr::kApicFrequency: return host;  // read-only; a VMM that restores them means no harm
    case msr::kEoi:
      if (lapic_ == nullptr) return false;
      lapic_->write_eoi();
      return true;
    case msr::kIcr:
      if (lapic_ == nullptr) return false;
      lapic_->write_icr(value);
      return true;
    case msr::kTpr:
      if (lapic_ == nullptr) return false;
      lapic_->write_tpr(static_cast<u32>(value));
      return true;
    case msr::kVpAssistPage: return write_assist_page(value);
    default: break;
  }
  if (index >= msr::kStimer0Config && index <= msr::kStimer3Count) {
    const bool direct = !enforce_ || (cpuid_.features_edx & feature::kDirectStimer) != 0;
    return synic_.write_stimer(index, host, direct, value);
  }
  if (!synic_.write_msr(index, host, value)) return false;
  if (!host && (index == msr::kScontrol || index == msr::kSiefp || index == msr::kSimp)) note_synic_exit(index);
  return true;
}

bool Vp::write_assist_page(u64 value) {
  if (value & kPageEnable) {
    const u32 none = 0;  // "no EOI required": never; the rest of the page is the guest's and stays
    if (!processor_.write(Gpa(value & kPageMask), &none, sizeof none)) return false;
  }
  assist_page_ = value;
  return true;
}

// ---- exits ----

void Vp::note_synic_exit(u32 index) {
  exit_ = kvm_hyperv_exit{};
  exit_.type = KVM_EXIT_HYPERV_SYNIC;
  exit_.u.synic.msr = index;
  exit_.u.synic.control = synic_.control();
  exit_.u.synic.evt_page = synic_.event_page();
  exit_.u.synic.msg_page = synic_.message_page();
  exits_ |= kExitHyperv;
  processor_.attend_exit();
}

void Vp::note_syndbg_exit(u32 index) {
  const Partition::Syndbg s = partition_.syndbg();
  exit_ = kvm_hyperv_exit{};
  exit_.type = KVM_EXIT_HYPERV_SYNDBG;
  exit_.u.syndbg.msr = index;
  exit_.u.syndbg.control = s.control;
  exit_.u.syndbg.send_page = s.send_page;
  exit_.u.syndbg.recv_page = s.recv_page;
  exit_.u.syndbg.pending_page = s.pending_page;
  syndbg_waits_ = index == msr::kSyndbgControl;
  exits_ |= kExitHyperv;
}

Exit Vp::take_exit() {
  Exit e{Exit::Kind::kHyperv, exit_};
  if (exits_ & kExitCrash) {
    e.kind = Exit::Kind::kCrash;
    exits_ &= static_cast<u8>(~kExitCrash);
  } else if (exits_ & kExitReset) {
    e.kind = Exit::Kind::kReset;
    exits_ &= static_cast<u8>(~kExitReset);
  } else {
    exits_ &= static_cast<u8>(~kExitHyperv);
  }
  if (exits_ != 0) processor_.attend_exit();
  return e;
}

void Vp::complete(const kvm_hyperv_exit& answer) {
  if (!syndbg_waits_ || exit_pending()) return;
  syndbg_waits_ = false;
  if (answer.type == KVM_EXIT_HYPERV_SYNDBG) partition_.set_syndbg_status(answer.u.syndbg.status);
}

}  // namespace ring3::engine::hv
