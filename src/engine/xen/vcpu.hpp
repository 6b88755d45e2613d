#pragma once
#include <atomic>
#include <optional>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/irq/lapic.hpp"
#include "engine/timer/pvclock.hpp"
#include "engine/timer/timer_queue.hpp"
#include "engine/timer/tsc.hpp"
#include "engine/xen/domain.hpp"
#include "engine/xen/runstate.hpp"

/// What Xen calls a vCPU: events that are pending for it, its clock's pages, runstate, one-shot timer and hypercalls.
///
/// Spec:      virt/kvm/api KVM_XEN_VCPU_SET_ATTR; Xen's public headers vcpu.h, sched.h, event_channel.h.
/// Threading: the vCPU's owner, but for what stands under "any thread".
/// Trust:     registers and guest memory are the guest's, areas' addresses the VMM's.
/// Deviation: SCHEDOP_poll's timeout counts from the call, as KVM's, where Xen's is a time of the guest's clock.
namespace ring3::engine::xen {

/// What a Xen vCPU needs of its vCPU.
class Processor : public Memory {
 public:
  /// Look at events and timers before the next instruction, and wake when halted. Any thread.
  virtual void attend_events() = 0;
  /// Write the clock's pages before the next instruction.
  virtual void attend_time() = 0;
  /// Guest-physical address of a linear one. False: it is not mapped.
  virtual bool translate(u64 linear, Gpa* at) = 0;
};

/// Vectors below 16 are exceptions'; 0 stands for none.
inline constexpr bool is_vector(u8 vector) { return vector == 0 || vector >= 0x10; }

class Vcpu {
 public:
  /// lapic may be null. id: KVM's; index: the number that the guest's hypercalls call it by until the VMM sets another.
  Vcpu(Domain& domain, Processor& processor, TimerQueue& timers, const Tsc& tsc, const TscSync& sync, Lapic* lapic, unsigned id,
       u32 index);
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  /// KVM_XEN_VCPU_SET_ATTR, KVM_XEN_VCPU_GET_ATTR: 0 or -errno.
  int set_attr(const kvm_xen_vcpu_attr& attr);
  int get_attr(kvm_xen_vcpu_attr* attr);

  /// A hypercall at CPL 0. number: RAX; args: Xen's registers of the mode. None: the VMM's.
  struct Hypercall {
    u64 number;
    const u64* args;
    bool long_mode;
  };
  std::optional<u64> hypercall(const Hypercall& call);

  /// The domain's vector is to be delivered: the guest has an event, and has not taken note yet.
  bool upcall_pending();
  /// Between instructions: a timer that has expired, events that could not be told before.
  void attend();
  /// Writes the clock's pages when they are due. Between instructions.
  void update_time();
  /// The vCPU's thread is in KVM_RUN: it runs, and what it has waited for a CPU since is counted. Tells the guest.
  void running();

  /// SCHEDOP_poll: the vCPU waits, as in HLT, until poll_over() or an interrupt; then end_poll().
  bool polling() const { return poll_.load(std::memory_order_relaxed) != Poll::kNone; }
  bool poll_over() const { return poll_.load(std::memory_order_acquire) == Poll::kOver; }
  void end_poll();

  // --- any thread ---

  /// The TSC or the VM's clock was set.
  void request_time_update() { time_due_.store(true, std::memory_order_release); }
  bool has_info() const { return info_.set(); }
  /// With the domain's lock held: a port became pending, of this word of the bitmap; or one that is masked.
  void event(u32 word);
  void masked_event(u32 port);
  /// The same, by the vCPU's owner.
  static constexpr u64 kAnyPort = ~0ull;
  void begin_poll(u64 port);

 private:
  enum class Poll : u8 { kNone, kWaiting, kOver };

  /// False: no area is there, or the guest knew already. *told: the area could be written.
  bool mark_pending(u32 word, bool* told);
  void inject_vector();
  void wake_poll();
  bool write_time(u64 at, PvclockTimeInfo info);
  int set_runstate(const kvm_xen_vcpu_attr& attr);

  // hypercall.cpp
  bool read_linear(u64 linear, void* to, std::size_t size, bool long_mode);
  std::optional<u64> sched_op(const Hypercall& call);
  std::optional<u64> start_poll(u64 argument);
  std::optional<u64> vcpu_op(const Hypercall& call);
  std::optional<u64> set_timer_op(u64 deadline_ns);
  /// deadline_ns: of the guest's clock; in_ns: from now.
  void start_timer(u64 deadline_ns, i64 in_ns);
  void stop_timer();

  Domain& domain_;
  Processor& processor_;
  TimerQueue& timers_;
  const Tsc& tsc_;
  const TscSync& sync_;
  Lapic* const lapic_;
  const unsigned id_;
  u32 number_;
  Area info_, time_info_, runstate_area_;
  Runstate runstate_;
  RunDelay run_delay_;
  u32 timer_port_ = 0;
  u64 timer_deadline_ = 0;  // of the guest's clock; 0: not running
  TimerQueue::Timer timer_, poll_timer_;
  u64 poll_port_ = 0;  // guarded by the domain's lock

  std::atomic<bool> time_due_{false}, timer_expired_{false};
  std::atomic<u8> upcall_vector_{0};
  std::atomic<u64> untold_{0};  // bits of pending_sel that could not be written
  std::atomic<Poll> poll_{Poll::kNone};
};

}  // namespace ring3::engine::xen
