#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/timer/clock.hpp"
#include "engine/timer/tsc.hpp"

/// kvmclock: paravirtual time that the guest reads from a page and its TSC.
///
/// Spec:      virt/kvm/x86/msr (MSR_KVM_WALL_CLOCK[_NEW], MSR_KVM_SYSTEM_TIME[_NEW], MSR_KVM_STEAL_TIME),
///            virt/kvm/api KVM_GET/SET_CLOCK, KVM_KVMCLOCK_CTRL.
/// Trust:     MSR values (guest addresses) come from the guest; the writer given by the abi refuses
///            what is not guest memory.
namespace ring3::engine {

/// Writes size bytes at a guest-physical address; false when that is not writable guest memory.
using GuestWriter = std::function<bool(Gpa, const void*, std::size_t)>;

/// struct pvclock_vcpu_time_info, the guest's view.
struct PvclockTimeInfo {
  u32 version;
  u32 pad0;
  u64 tsc_timestamp;
  u64 system_time;
  u32 tsc_to_system_mul;
  i8 tsc_shift;
  u8 flags;
  u8 pad[2];
};
static_assert(sizeof(PvclockTimeInfo) == 32);

inline constexpr u8 kPvclockTscStable = 1, kPvclockGuestStopped = 2;

/// mul and shift such that ns = ((ticks << shift) * mul) >> 32 (a negative shift is to the right).
struct TscScale {
  u32 mul;
  i8 shift;
};
/// khz > 0.
TscScale tsc_to_ns_scale(u32 khz);
u64 scale_tsc_delta(u64 ticks, TscScale scale);

/// The VM's clock. All methods from any thread; internally locked.
class KvmClock {
 public:
  explicit KvmClock(const Clock& clock);

  /// KVM_GET_CLOCK: flags KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC, and KVM_CLOCK_TSC_STABLE when stable() is.
  void get(kvm_clock_data* out, bool stable) const;
  /// KVM_SET_CLOCK. 0 or -EINVAL (unknown flags). The caller then requests an update of every vCPU's PvClock.
  int set(const kvm_clock_data& in);
  u64 now_ns() const;
  /// The clock as a line over a vCPU's TSC, by one point of it and its slope (version 0); kPvclockTscStable when the same
  /// line holds on every vCPU.
  PvclockTimeInfo line(const Tsc& tsc, const TscSync& sync) const;

 private:
  friend class PvClock;
  struct Reference {  // one instant, so that all vCPUs' pages describe one line
    u64 host_tsc, clock_ns;
  };
  Reference reference() const;
  u64 at_locked(u64 host_tsc, u64 mono_ns) const;

  const Clock& clock_;
  mutable std::mutex mutex_;
  mutable TscScale scale_{};  // host TSC to ns; mul 0: not asked for yet
  // The clock read ref_clock_ at this instant. With a stable host TSC it advances by that, so that the host's
  // view and the guest's stay the same line; otherwise by CLOCK_MONOTONIC.
  u64 ref_tsc_, ref_mono_, ref_clock_ = 0;
  std::atomic<bool> old_msr_{false};  // the boot vCPU uses MSR 0x12: its guest may not know the stable flag
  u32 wall_version_ = 0;
};

/// One vCPU's kvmclock MSRs and page. Owned by the vCPU's thread; request_update from any thread.
class PvClock {
 public:
  PvClock(KvmClock& vm, const TscSync& sync, const Tsc& tsc, GuestWriter writer, bool boot_vcpu);

  static bool is_msr(u32 index) {
    return index == 0x11 || index == 0x12 || index == 0x4b564d00 || index == 0x4b564d01;
  }
  /// For is_msr() only. Writing the wall clock MSR writes that structure at once; the system time page is
  /// written by the next update().
  void write_msr(u32 index, u64 value, bool host_initiated);
  u64 read_msr(u32 index) const;

  /// The page must be rewritten before the guest runs on: the TSC or the VM's clock was set. Any
  /// thread; the caller also gives the vCPU attention.
  void request_update() { pending_.store(true, std::memory_order_release); }
  bool update_pending() const { return pending_.load(std::memory_order_relaxed); }
  /// Writes the page when an update is pending (version odd, fields, version even). vCPU thread.
  void update();

  /// KVM_KVMCLOCK_CTRL: tells the guest that it was stopped. 0, or -EINVAL when no page is set.
  int guest_stopped();
  /// At vCPU reset: no page.
  void reset();

 private:
  KvmClock& vm_;
  const TscSync& sync_;
  const Tsc& tsc_;
  const GuestWriter writer_;
  const bool boot_vcpu_;
  u64 system_time_msr_ = 0, wall_clock_msr_ = 0;
  bool stopped_ = false;
  u32 version_ = 0;
  std::atomic<bool> pending_{false};
};

/// How long the calling thread was runnable but not running. One thread at a time.
class RunDelay {
 public:
  RunDelay() = default;
  ~RunDelay();
  RunDelay(const RunDelay&) = delete;
  RunDelay& operator=(const RunDelay&) = delete;

  /// In ns, since the thread began; 0 where the kernel does not tell. Reads /proc/thread-self/schedstat (one system call).
  /// False: of another thread than the last time.
  bool read(u64* ns);

 private:
  int fd_ = -1;
  long tid_ = 0;  // thread that fd_ belongs to
};

/// MSR_KVM_STEAL_TIME: how long this vCPU's thread was runnable but not running. vCPU thread only.
class StealTime {
 public:
  static constexpr u32 kMsr = 0x4b564d03;
  explicit StealTime(GuestWriter writer) : writer_(std::move(writer)) {}
  StealTime(const StealTime&) = delete;
  StealTime& operator=(const StealTime&) = delete;

  /// False: reserved bits are set, #GP.
  bool write_msr(u64 value);
  u64 read_msr() const { return msr_; }
  /// Adds the thread's run delay since the last call to the record: call it rarely, e.g. after a HLT or every few ms.
  void update();
  /// update() with a given total run delay in ns (of one thread; it may restart at a lower value).
  void update_to(u64 run_delay_ns);
  void reset() { msr_ = 0; }

 private:
  const GuestWriter writer_;
  u64 msr_ = 0, steal_ = 0, last_delay_ = 0;
  u32 version_ = 0;
  bool have_last_ = false;
  RunDelay delay_;
};

}  // namespace ring3::engine
