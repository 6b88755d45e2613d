#pragma once
#include <array>
#include <atomic>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/irq/apic_bus.hpp"
#include "engine/timer/timer_queue.hpp"
#include "engine/timer/tsc.hpp"

/// The local APIC of one vCPU: xAPIC registers, x2APIC MSRs, timer.
///
/// Spec:      SDM vol. 3A ch. 11; virt/kvm/api KVM_GET/SET_LAPIC, KVM_CAP_X2APIC_API.
/// Modelled:  everything an integrated APIC of version 0x14 has, with six LVT entries or, for corrected machine checks, seven; the timer's
///            input clock is 1 GHz, as KVM's.
/// Deviation: delivery status is always idle; periodic timers are stretched to at least 200 µs.
/// Threading: "owner" below: the thread that runs the vCPU or holds it for an ioctl. accept(), lint(),
///            has_interrupt() and the matching functions: any thread, lock-free. Only the timer's state has a
///            lock.
/// Trust:     offsets, sizes and values come from the guest, a kvm_lapic_state from the VMM; all may be
/// hostile.
namespace ring3::engine {

/// A second interrupt controller whose vectors go through the LAPIC (Hyper-V's SynIC). On the vCPU's thread, no lock held.
class VectorListener {
 public:
  virtual ~VectorListener() = default;
  /// Whether the vector ends by itself when it is taken: it never stands in ISR.
  virtual bool auto_eoi(u8 vector) const = 0;
  /// The guest has ended the vector.
  virtual void eoi(u8 vector) = 0;
};

class Lapic {
 public:
  static constexpr u64 kDefaultBase = 0xfee00000;
  static constexpr u64 kBaseBsp = 1u << 8, kBaseX2apic = 1u << 10, kBaseEnable = 1u << 11;

  /// What the vCPU's CPUID says.
  struct Features {
    bool x2apic = true;
    bool tsc_deadline = true;
    bool eoi_suppression = false;  ///< version register bit 24; KVM: split irqchip with x2APIC
    u8 physical_bits = 40;
  };

  /// Attaches to the bus; power-on state. vcpu < ApicBus::kMaxVcpus and unused on that bus.
  Lapic(ApicBus& bus, TimerQueue& timers, const Tsc& tsc, unsigned vcpu, bool bsp);
  ~Lapic();
  Lapic(const Lapic&) = delete;
  Lapic& operator=(const Lapic&) = delete;

  unsigned vcpu() const { return vcpu_; }
  /// KVM_SET_CPUID2. Owner.
  void set_features(const Features& features);
  /// KVM_X86_SETUP_MCE with MCG_CMCI_P: the LVT entry of corrected machine checks. Owner.
  void set_cmci(bool on);
  /// RESET leaves the boot processor's LINT0 masked, as hardware does (KVM_X86_QUIRK_LINT0_REENABLED). Before the vCPU runs.
  void mask_lint0_at_reset();

  // --- the vCPU's run loop ---------------------------------------------------------------------

  /// Whether an interrupt of higher priority than PPR is pending: a few ns, any thread. It does not look at
  /// the 8259: see IrqChip.
  bool has_interrupt() const { return irr_pending_.load(std::memory_order_acquire) && pending_vector() >= 0; }
  /// The vector has_interrupt() means, or -1.
  int pending_vector() const;
  /// INTA: moves the highest pending vector from IRR to ISR and returns it; -1 when there is none. Owner.
  int ack_interrupt();
  /// Whether the 8259's output reaches this vCPU: LINT0 in ExtINT mode, or the APIC disabled.
  bool accepts_extint() const;

  /// Whether ending the interrupt in service clears its bit and does nothing else: it is the only one, was an edge, no
  /// other is pending, and nobody waits for its end. Owner.
  bool eoi_is_plain() const;

  /// CR8. Owner.
  u8 cr8() const { return static_cast<u8>(reg(kTpr) >> 4 & 0xf); }
  void set_cr8(u64 value) { set_tpr(static_cast<u32>(value & 0xf) << 4); }

  /// RESET (init false), or INIT (keeps IA32_APIC_BASE and the APIC id). Owner.
  void reset(bool init);

  // --- registers -------------------------------------------------------------------------------

  u64 apic_base() const { return base_.load(std::memory_order_relaxed); }
  /// WRMSR IA32_APIC_BASE. False: #GP (reserved bits, illegal transition); nothing changed.
  /// host_initiated (KVM_SET_MSRS, KVM_SET_SREGS): any transition between legal states is allowed. Owner.
  bool set_apic_base(u64 value, bool host_initiated);
  /// Whether it would be, from `old` on. features: x2apic and physical_bits count.
  static bool allows_base(u64 old, u64 value, bool host_initiated, const Features& features);

  bool enabled() const { return apic_base() & kBaseEnable; }
  bool x2apic() const { return (apic_base() & (kBaseEnable | kBaseX2apic)) == (kBaseEnable | kBaseX2apic); }
  /// Whether a guest-physical address lies in the APIC's page (for any state of the APIC: a disabled
  /// or x2APIC-mode APIC's page reads as ones and ignores writes).
  bool mmio_contains(Gpa a) const { return (a.value ^ apic_base()) >> 12 << 12 == 0; }

  /// Whether its registers are there: enabled, in xAPIC mode.
  bool takes_mmio() const { return enabled() && !x2apic(); }

  /// MMIO on the APIC's page. offset < 4096. Reads of 1, 2, 4 or 8 bytes; what does not fit one
  /// register reads 0. Writes count only as aligned 4-byte accesses. Owner.
  void mmio_read(u32 offset, void* data, u32 size);
  void mmio_write(u32 offset, const void* data, u32 size);

  /// RDMSR/WRMSR 0x800–0x8ff. False: #GP (also when not in x2APIC mode). Owner.
  bool read_x2apic(u32 msr, u64* value);
  bool write_x2apic(u32 msr, u64 value);

  /// Hyper-V's ICR, EOI and TPR MSRs, in either mode of the APIC; the ICR's destination is in the mode's own place. Owner.
  u64 icr() const { return reg(kIcr) | u64{reg(kIcrHigh)} << 32; }
  void write_icr(u64 value);
  void write_eoi() { eoi(); }
  u32 tpr() const { return reg(kTpr); }
  void write_tpr(u32 value) { set_tpr(value); }
  /// Null: nobody listens. Owner.
  void set_vector_listener(VectorListener* listener) { vectors_ = listener; }

  /// IA32_TSC_DEADLINE (0x6e0): 0 unless armed in that mode. Owner.
  u64 tsc_deadline() const;
  void set_tsc_deadline(u64 value);
  /// The guest's TSC was set or its rate changed: a TSC deadline is re-armed. Owner.
  void tsc_changed();

  /// KVM_GET_LAPIC / KVM_SET_LAPIC. Owner. set: 0, or -EINVAL (x2APIC id that is not the vCPU's, under
  /// x2apic_format).
  void get_state(kvm_lapic_state* out) const;
  int set_state(const kvm_lapic_state& in);

  // --- arrival of interrupts: any thread ---------------------------------------------------------

  /// One message that is addressed to this LAPIC. 1: taken; 0: merged with a pending one; -1: refused
  /// (disabled).
  int accept(const InterruptMessage& message);
  /// A pulse on LINT0 or LINT1 (pin 0 or 1), or a local source, through its
  /// LVT entry. False when masked.
  enum class Source { kTimer, kThermal, kPerf, kLint0, kLint1, kError, kCmci };
  bool local_event(Source source);
  /// The PIT pulses LINT0: counts only when that is set to NMI.
  void lint0_nmi();
  /// Whether dest addresses this LAPIC. ipi: sent by a LAPIC, whose mode then says what broadcast is.
  bool matches(u32 dest, bool logical, const Lapic* source) const;
  /// 8-bit id in xAPIC mode, 32-bit in x2APIC mode.
  u32 apic_id() const;
  /// Software enabled (SVR bit 8) and not disabled by IA32_APIC_BASE.
  bool accepts_fixed() const { return enabled() && (reg(kSvr) & 0x100); }
  /// Priority class for lowest-priority arbitration: PPR.
  u8 ppr() const { return static_cast<u8>(reg(kPpr)); }

 private:
  // Register numbers: offset / 16.
  enum Reg : unsigned {
    kId = 0x02,
    kVersion = 0x03,
    kTpr = 0x08,
    kApr = 0x09,
    kPpr = 0x0a,
    kEoi = 0x0b,
    kRrd = 0x0c,
    kLdr = 0x0d,
    kDfr = 0x0e,
    kSvr = 0x0f,
    kIsr = 0x10,
    kTmr = 0x18,
    kIrr = 0x20,
    kEsr = 0x28,
    kIcr = 0x30,
    kIcrHigh = 0x31,
    kLvtCmci = 0x2f,
    kLvtTimer = 0x32,
    kLvtThermal = 0x33,
    kLvtPerf = 0x34,
    kLvtLint0 = 0x35,
    kLvtLint1 = 0x36,
    kLvtError = 0x37,
    kInitialCount = 0x38,
    kCurrentCount = 0x39,
    kDivide = 0x3e,
    kSelfIpi = 0x3f,
  };
  enum class TimerMode { kOneShot, kPeriodic, kTscDeadline };

  u32 reg(unsigned n) const { return regs_[n].load(std::memory_order_relaxed); }
  void put(unsigned n, u32 v) { regs_[n].store(v, std::memory_order_relaxed); }
  bool test(unsigned bank, u8 vector) const { return reg(bank + (vector >> 5)) >> (vector & 31) & 1; }
  void set_bit(unsigned bank, u8 vector) { regs_[bank + (vector >> 5)].fetch_or(1u << (vector & 31)); }
  void clear_bit(unsigned bank, u8 vector) { regs_[bank + (vector >> 5)].fetch_and(~(1u << (vector & 31))); }
  int highest(unsigned bank) const;

  bool has_lvt(unsigned n) const;
  template <class F>
  void each_lvt(F f) const;
  u32 version() const;
  bool readable(unsigned n) const;
  u32 read_register(unsigned n);
  bool write_register(unsigned n, u32 value);  // false: no such register, or read-only
  void set_tpr(u32 value);
  void set_lvt(unsigned n, u32 value);
  void set_svr(u32 value);
  void eoi();
  void send_ipi(u32 low, u32 dest);
  void update_ppr();
  void attention_if_pending();
  int accept_fixed(u8 vector, bool level);
  void report_error(u32 bits);
  void note_lint0(u32 old_value, u32 new_value);
  void set_xapic_id(u8 id);
  void set_x2apic_id();

  TimerMode timer_mode() const;
  u32 timer_divisor() const;
  u64 timer_remaining_ns_locked() const;
  void timer_start_locked(u64 remaining_ticks);
  void timer_stop_locked();
  void timer_arm_deadline_locked();
  void on_timer();

  ApicBus& bus_;
  const Tsc& tsc_;
  const Clock& clock_;
  const unsigned vcpu_;
  const bool bsp_;
  std::atomic<u64> base_;
  Features features_;
  bool cmci_ = false, lint0_masked_ = false;
  VectorListener* vectors_ = nullptr;
  std::array<std::atomic<u32>, 64> regs_{};
  std::atomic<bool> irr_pending_{false};  // false: IRR is empty
  std::atomic<u32> errors_{0};            // collected since ESR was last written

  mutable std::mutex timer_mutex_;
  u64 timer_target_ns_ = 0;  // next expiry of a counting timer; 0: stopped
  u64 timer_period_ns_ = 0;  // periodic mode
  u64 deadline_tsc_ = 0;     // IA32_TSC_DEADLINE; 0: disarmed
  TimerQueue::Timer timer_;
};

}  // namespace ring3::engine
