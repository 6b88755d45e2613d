#pragma once
#include <x86intrin.h>

#include <atomic>
#include <mutex>
#include <set>

#include "base/types.hpp"
#include "engine/timer/clock.hpp"

/// The guest's time-stamp counter: guest = host × ratio + offset.
///
/// Spec:      SDM vol. 3B 18.17 (TSC, IA32_TSC_ADJUST); virt/kvm/api KVM_GET/SET_TSC_KHZ,
/// KVM_VCPU_TSC_OFFSET. Threading: reads from any thread, lock-free; writes by the vCPU's owner.
namespace ring3::engine {

class Tsc;

/// VM-wide: keeps the TSCs of vCPUs that are set to nearly the same value exactly equal, as KVM does
/// for a VMM that writes each vCPU's TSC in turn. Internally locked.
class TscSync {
 public:
  /// Whether every vCPU's TSC has the same offset and rate (the pvclock "stable" condition).
  bool all_matched() const;

 private:
  friend class Tsc;
  mutable std::mutex mutex_;
  std::set<const Tsc*> vcpus_;
  // The last host-side write, and the offset it led to.
  u64 last_ns_ = 0, last_value_ = 0, last_ratio_ = 0, last_offset_ = 0;
};

class Tsc {
 public:
  static constexpr u32 kMaxKhz = 100'000'000;

  /// Starts at 0 (or in step with the VM's other vCPUs created within a second), at khz; 0 = the host's rate.
  Tsc(const Clock& clock, TscSync& sync, u32 khz = 0);
  ~Tsc();
  Tsc(const Tsc&) = delete;
  Tsc& operator=(const Tsc&) = delete;

  /// The guest's TSC now: RDTSC, RDTSCP, IA32_TSC. A few ns more than the host's RDTSC.
  u64 read() const { return at(rdtsc_ ? __rdtsc() : clock_.host_tsc()); }
  /// The guest's TSC when the host's is host_tsc.
  u64 at(u64 host_tsc) const {
    const u64 ratio = ratio_.load(std::memory_order_relaxed);
    if (ratio != kUnity) host_tsc = static_cast<u64>((static_cast<u128>(host_tsc) * ratio) >> 48);
    return host_tsc + offset_.load(std::memory_order_relaxed);
  }

  /// Whether read() is at() of the host's RDTSC, and what at() adds and multiplies by: both change at any time.
  bool is_rdtsc() const { return rdtsc_; }
  const std::atomic<u64>& ratio_word() const { return ratio_; }
  const std::atomic<u64>& offset_word() const { return offset_; }

  u32 khz() const {
    const u32 khz = khz_.load(std::memory_order_relaxed);
    return khz != 0 ? khz : clock_.host_tsc_khz();
  }
  /// KVM_SET_TSC_KHZ: 0 selects the host's rate. The count goes on from its present value.
  /// 0 or -EINVAL (above 100 GHz, or so far from the host's rate that it cannot be scaled).
  int set_khz(u32 khz);

  /// WRMSR IA32_TSC by the guest: TSC_ADJUST moves by the same amount.
  void guest_write(u64 value);
  /// KVM_SET_MSRS IA32_TSC: TSC_ADJUST stays; values within a second of another vCPU's are synchronised.
  void host_write(u64 value);
  u64 adjust() const { return adjust_.load(std::memory_order_relaxed); }
  /// WRMSR IA32_TSC_ADJUST by the guest: the TSC moves by the difference.
  void guest_write_adjust(u64 value);
  /// KVM_SET_MSRS IA32_TSC_ADJUST: only the register.
  void host_write_adjust(u64 value) { adjust_.store(value, std::memory_order_relaxed); }
  /// KVM_VCPU_TSC_OFFSET.
  u64 offset() const { return offset_.load(std::memory_order_relaxed); }
  void set_offset(u64 offset);

  /// The CLOCK_MONOTONIC time at which the guest's TSC reaches value; now when it already has; capped
  /// at about 100 years.
  u64 deadline_ns(u64 value) const;

  const Clock& clock() const { return clock_; }

 private:
  friend class TscSync;
  static constexpr u64 kUnity = 1ull << 48;
  u64 scaled(u64 host_tsc) const { return at(host_tsc) - offset_.load(std::memory_order_relaxed); }

  const Clock& clock_;
  TscSync& sync_;
  const bool rdtsc_;
  std::atomic<u64> ratio_{kUnity};  // guest ticks per host tick, 16.48 fixed point
  std::atomic<u64> offset_{0};
  std::atomic<u64> adjust_{0};
  std::atomic<u32> khz_{0};  // 0: the host's rate, which nobody has asked for yet
};

}  // namespace ring3::engine
