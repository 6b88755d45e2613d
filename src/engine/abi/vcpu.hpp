#pragma once
#include "base/linux_kvm.hpp"

#include <signal.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "base/mapping.hpp"
#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "base/wake_pipe.hpp"
#include "engine/abi/async_pf.hpp"
#include "engine/abi/cpuid.hpp"
#include "engine/abi/dirty_ring.hpp"
#include "engine/abi/environment.hpp"
#include "engine/abi/halt_poll.hpp"
#include "engine/abi/pv_eoi.hpp"
#include "engine/abi/stats.hpp"
#include "engine/hyperv/vp.hpp"
#include "engine/interp/host_fault.hpp"
#include "engine/interp/interpreter.hpp"
#include "engine/translate/translator_vcpu.hpp"
#include "engine/irq/lapic.hpp"
#include "engine/mmu/mmu.hpp"
#include "engine/timer/pvclock.hpp"
#include "engine/timer/tsc.hpp"
#include "engine/xen/vcpu.hpp"

namespace ring3::engine::abi {

class Vm;

/// Bits of Context::attention. The first two are Attention's.
enum AttentionBit : u32 {
  kAttendInterrupt = 1u << 0,
  kAttendExtInt = 1u << 1,
  kAttendKick = 1u << 2,
  kAttendMmu = 1u << 3,
  kAttendNmi = 1u << 4,
  kAttendInit = 1u << 5,   ///< INIT or SIPI
  kAttendClock = 1u << 6,  ///< the kvmclock page is out of date
  kAttendHyperv = 1u << 8,  ///< SynIC timers; TLBs to drop
  kAttendXen = 1u << 9,    ///< event channels, Xen's timer
  kAttendExit = 1u << 7,   ///< leave after the current instruction: EOI exits, immediate_exit during a replay
};

/// One vCPU.
///
/// Spec:      virt/kvm/api, "vcpu ioctl" entries.
/// Threading: ioctl() from any thread, serialised by mutex_; KVM_RUN holds it, and the guest runs on its caller's thread.
///            raise() and what stands beside it: any thread, at any time.
class Vcpu final : private DirtySink, private hv::Processor, private xen::Processor {
 public:
  static constexpr std::size_t kRunSize = 3 * kPageSize;

  static Result<std::unique_ptr<Vcpu>> create(Vm& vm, unsigned id, unsigned index, u32 tsc_khz, std::size_t cache_bytes,
                                              std::size_t code_bytes);
  ~Vcpu() override;

  long ioctl(unsigned long request, u64 arg);
  kvm_run* run_page() const { return reinterpret_cast<kvm_run*>(run_.data()); }
  void kick();
  /// Endpoint::signal_came(), Endpoint::mappable().
  void signal_came();
  std::span<u8> mappable(u64 offset) const;
  /// Null without KVM_CAP_DIRTY_LOG_RING.
  DirtyRing* dirty_ring() const { return ring_.get(); }

  // --- any thread ---------------------------------------------------------------------------------

  /// Sets attention bits, and wakes the vCPU's thread when it waits.
  void raise(u32 bits);
  void queue_nmi();
  void queue_init();
  void queue_sipi(u8 vector);
  /// KVM_HC_KICK_CPU: ends a HLT.
  void unhalt();
  void request_clock_update();
  unsigned id() const { return id_; }

  // --- the vCPU's owner -----------------------------------------------------------------------------

  Vm& vm() { return vm_; }
  VcpuState& state() { return state_; }
  Lapic* lapic() { return lapic_.get(); }
  Tsc& tsc() { return tsc_; }
  PvClock& pvclock() { return pvclock_; }
  StealTime& steal_time() { return steal_; }
  const Cpuid& cpuid() const { return cpuid_; }
  u64 cr8() const { return lapic_ ? lapic_->cr8() : cr8_; }
  void set_cr8(u64 value);
  u64 apic_base() const { return lapic_ ? lapic_->apic_base() : apic_base_; }
  bool set_apic_base(u64 value, bool host);
  bool pv_feature(u32 bit) const;
  /// Before anything looks at the LAPIC or changes what is in service there.
  void settle_pv_eoi() {
    if (pv_eoi_.offered() && pv_eoi_.take_back()) lapic_->write_eoi();
  }
  void note_ioapic_eoi(u8 vector);
  hv::Vp& hv() { return *hv_; }
  xen::Vcpu& xen() { return *xen_; }
  enum class Msr { Ok, Fault, Unknown };
  /// MSRs that are not the core's; Unknown for those that nobody knows. (vcpu_msrs.cpp)
  Msr read_msr(u32 index, bool host, u64* value);
  Msr write_msr(u32 index, bool host, u64 value);

 private:
  friend class VcpuEnvironment;
  Vcpu(Vm& vm, unsigned id, unsigned index, u32 tsc_khz);

  void page_dirtied(u32 slot, u64 offset) override;
  void apply_quirks();

  // hv::Processor (vcpu_hyperv.cpp)
  bool read(Gpa from, void* to, std::size_t size) override;
  bool write(Gpa to, const void* from, std::size_t size) override;
  void attend_timers() override;
  void attend_exit() override;
  void attend_clock() override;
  void flush_tlbs(const std::vector<unsigned>& vcpus) override;
  /// Before guest code: TLBs that a hypercall wants dropped, this vCPU's and, until they are, the others'.
  void serve_flushes();
  void fill_hyperv_exit();

  // xen::Processor, with the two of hv::Processor's that it has too (xen.cpp)
  int set_bits(Gpa at, u8 bits) override;
  void attend_events() override;
  void attend_time() override;
  bool translate(u64 linear, Gpa* at) override;
  long xen_ioctl(unsigned long request, u64 arg);

  // vcpu.cpp
  long ioctl_locked(unsigned long request, u64 arg);
  static bool is_guest_memory(void* vcpu, u64 host);
  void reset(bool init);
  void use_features(const GuestFeatures& features);
  void state_changed();
  long set_guest_debug(u64 arg);
  long set_signal_mask(u64 arg);
  long interrupt(u64 arg);
  long translate(u64 arg);
  long mce_ioctl(unsigned long request, u64 arg);
  /// IA32_MCi_CTL2. False: #GP.
  bool mci_ctl2(u32 index, bool host, bool write, u64* value);
  long tpr_ioctl(unsigned long request, u64 arg);
  /// The table with the bits that follow live state, as KVM_GET_CPUID2 shows it.
  std::vector<kvm_cpuid_entry2> live_cpuid();
  long cpuid_ioctl(unsigned long request, u64 arg);
  long enable_cap(u64 arg);
  long device_attr(unsigned long request, u64 arg);

  // vcpu_run.cpp
  long run();
  long run_guest();
  long run_loop();
  long interrupted();
  void count_translation();  // into stats_
  long memory_gone();
  long run_uninitialised();
  enum class Step { Again, Exit, Run };
  Step prepare(long* result);
  Step halt(long* result);
  bool inject_events(bool* want_window);
  bool deliver(const Event& event);
  bool interrupt_allowed() const;
  bool nmi_allowed() const;
  bool has_interrupt() const;
  bool runnable() const;
  bool accept_init_sipi();
  /// Waits until an attention bit is set or a signal arrives. False: a signal came.
  bool wait();
  /// What a HLT's wait begins with, before the thread sleeps. True: an attention bit is set, or a signal has come.
  bool poll_halt(u64 begin_ns, u64 time_ns);
  bool signal_pending() const;
  void fill_exit_state();
  /// Whether KVM_INTERRUPT's vector would come through, RFLAGS.IF and the like apart.
  bool accepts_user_extint() const;
  bool ready_for_injection() const;
  void update_guest_time(bool after_wait);
  long internal_error(u32 suberror);
  void apply_payload();
  void collect_nmis();
  void tell_pages_are_there();

  // vcpu_state_io.cpp
  void get_regs(kvm_regs* out) const;
  void set_regs(const kvm_regs& in);
  void get_sregs(kvm_sregs* out) const;
  template <class S>
  int set_sregs_common(const S& in);
  int set_sregs(const kvm_sregs& in);
  void get_sregs2(kvm_sregs2* out) const;
  int set_sregs2(const kvm_sregs2& in);
  void get_fpu(kvm_fpu* out) const;
  int set_fpu(const kvm_fpu& in);
  void get_xsave(u8* out) const;
  int set_xsave(const u8* in);
  int set_xcrs(const kvm_xcrs& in);
  void get_debugregs(kvm_debugregs* out) const;
  int set_debugregs(const kvm_debugregs& in);
  void get_events(kvm_vcpu_events* out);
  int set_events(const kvm_vcpu_events& in);
  u32 get_mp_state();
  int set_mp_state(u32 state);
  long registers_ioctl(unsigned long request, u64 arg);
  long msrs_ioctl(unsigned long request, u64 arg);
  bool get_one_msr(u32 index, u64* value);
  bool set_one_msr(u32 index, u64 value);

  Vm& vm_;
  const unsigned id_, index_;
  std::mutex mutex_;
  GuestMemoryTrap trap_{is_guest_memory, this};  // around whatever touches guest memory
  Mapping run_;
  Stats stats_;

  VcpuState state_;
  Cpuid cpuid_;
  GuestFeatures all_features_;  // before KVM_SET_CPUID2: what the engine has
  Tsc tsc_;
  PvClock pvclock_;
  StealTime steal_;
  PvEoi pv_eoi_;
  AsyncPf async_pf_;
  std::unique_ptr<Lapic> lapic_;
  std::unique_ptr<hv::Vp> hv_;
  std::unique_ptr<xen::Vcpu> xen_;
  std::unique_ptr<DirtyRing> ring_;
  VcpuEnvironment env_;
  Mmu mmu_;
  std::unique_ptr<Interpreter> interp_;
  std::unique_ptr<TranslatorVcpu> translator_;  // null: guest code is interpreted
  bool registered_ = false;

  u64 cr8_ = 0, apic_base_;      // without a LAPIC
  u32 mp_state_;
  bool has_run_ = false;
  bool exception_injected_ = false;  // state_.exception: its side effects were applied already
  bool nmi_injected_ = false;        // taken from nmi_pending, not yet delivered
  int user_extint_ = -1;             // split irqchip: KVM_INTERRUPT's vector
  std::optional<u8> eoi_exit_;
  bool triple_fault_pending_ = false;
  bool delivering_ = false;          // what the environment replays is the delivery of an event
  u32 put_off_ = 0;  ///< bits of attention that came while an instruction was half done, for when it is done
  bool want_window_ = false, look_for_signals_ = false;
  HaltPoll halt_poll_;
  bool set_tpr_exit_ = false;        // CR8 was lowered without an irqchip
  u32 guest_debug_ = 0;
  bool enforce_pv_ = false;          // KVM_CAP_ENFORCE_PV_FEATURE_CPUID
  bool have_sigmask_ = false;
  sigset_t sigmask_{};
  sigset_t thread_mask_{};           // during KVM_RUN: the thread's own mask
  UniqueFd signal_fd_;               // readable when a signal that sigmask_ lets through is pending
  u64 vapic_addr_ = 0;
  u64 last_steal_ns_ = 0;
  std::array<u64, 32> mci_ctl2_{};   // the machine-check banks' thresholds and their interrupt's enable
  u64 power_ctl_ = 0, smi_count_ = 0, feature_control_ = 0;

  /// Flushes that this vCPU asked others for, and waits for: their vCPUs and the number that they serve.
  std::vector<std::pair<Vcpu*, u64>> flush_waits_;

  // any thread
  std::atomic<u64> flush_asked_{0}, flush_served_{0};  // how often somebody wanted this vCPU's TLB dropped
  std::atomic<u32> nmis_{0};
  std::atomic<bool> init_{false}, sipi_{false}, unhalted_{false};
  std::atomic<u8> sipi_vector_{0};
  std::atomic<bool> signalled_{false};  // signal_came() since the last KVM_RUN ended
  std::atomic<u32> waiting_{0};
  WakePipe wake_;
};

}  // namespace ring3::engine::abi
