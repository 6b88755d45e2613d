#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/hyperv/cpuid.hpp"
#include "engine/hyperv/partition.hpp"
#include "engine/hyperv/synic.hpp"
#include "engine/irq/lapic.hpp"
#include "engine/timer/timer_queue.hpp"

/// What Hyper-V calls a virtual processor: a vCPU's synthetic MSRs and its hypercalls.
///
/// Spec:      TLFS; virt/kvm/api KVM_CAP_HYPERV*, KVM_EXIT_HYPERV.
/// Threading: the vCPU's owner, but for what stands under "any thread".
/// Trust:     MSR values, registers and guest memory are the guest's.
/// Not here:  VTLs, nested enlightenments, "no EOI required" in the assist page (a guest then always writes its EOI).
namespace ring3::engine::hv {

/// What a virtual processor needs of its vCPU.
class Processor : public GuestPages {
 public:
  /// Look at the SynIC's timers before the next instruction. Any thread.
  virtual void attend_timers() = 0;
  /// Leave guest code after this instruction, for take_exit().
  virtual void attend_exit() = 0;
  /// Write the TSC page, when it is due, before the next instruction.
  virtual void attend_clock() = 0;
  /// These vCPUs, by id, have dropped their TLBs before this one's next instruction.
  virtual void flush_tlbs(const std::vector<unsigned>& vcpus) = 0;
};

/// What the VMM is to be told once the instruction has retired.
struct Exit {
  enum class Kind { kHyperv, kReset, kCrash } kind;
  kvm_hyperv_exit hyperv;  ///< kHyperv
};

struct Hypercall {
  u64 control, input, output;  ///< RCX, RDX, R8, or their pairs of 32-bit registers
  const u8* xmm;               ///< XMM0 to XMM5
};
struct HypercallResult {
  enum class Kind { kDone, kUndefined /* #UD */, kToVmm } kind;
  u64 status = 0;  ///< kDone
};

class Vp {
 public:
  /// lapic may be null. index: the VP index that the guest sees until the VMM sets another. id: KVM's.
  Vp(Partition& partition, Host& host, Processor& processor, TimerQueue& timers, const Tsc& tsc, Lapic* lapic, unsigned id, u32 index);
  ~Vp();
  Vp(const Vp&) = delete;
  Vp& operator=(const Vp&) = delete;

  static bool is_msr(u32 index) { return index >= msr::kBegin && index < msr::kEnd; }
  /// False: #GP.
  bool read_msr(u32 index, bool host, u64* value);
  bool write_msr(u32 index, bool host, u64 value);

  /// KVM_SET_CPUID2. amd: the guest's hypercall instruction is VMMCALL.
  void set_cpuid(const Cpuid& cpuid, bool amd);
  void set_enforce_cpuid(bool on) { enforce_ = on; }
  /// KVM_CAP_HYPERV_SYNIC(2); zero_pages: SIMP's and SIEFP's pages are cleared when the guest sets them. Needs a LAPIC.
  void activate_synic(bool zero_pages);

  /// Whether VMCALL and VMMCALL are Hyper-V's.
  bool hypercalls() const { return cpuid_.present && partition_.has_guest_os(); }
  HypercallResult hypercall(const Hypercall& input);

  bool exit_pending() const { return exits_ != 0; }
  Exit take_exit();
  /// KVM_RUN again, after a KVM_EXIT_HYPERV: the VMM's answer.
  void complete(const kvm_hyperv_exit& answer);

  bool timers_pending() const { return synic_.timers_pending(); }
  void process_timers() { synic_.process_timers(); }
  void update_tsc_page() { partition_.update_tsc_page(tsc_, processor_); }

  // --- any thread ---
  u32 index() const { return index_.load(std::memory_order_relaxed); }
  unsigned id() const { return id_; }
  Lapic* lapic() const { return lapic_; }
  Synic& synic() { return synic_; }

 private:
  bool write_assist_page(u64 value);
  void note_synic_exit(u32 index);
  void note_syndbg_exit(u32 index);
  HypercallResult signal_event(const Hypercall& in, bool fast);
  u64 flush_tlb(const Hypercall& in, u16 code);
  u64 send_ipi(const Hypercall& in, u16 code);
  /// The VPs that a sparse set names, or false: it cannot be read. used: halves of XMM registers that hold other parameters.
  bool sparse_set(const Hypercall& in, u64 valid_banks, unsigned used, u64 offset, std::vector<Vp*>* out);

  enum ExitBit : u8 { kExitHyperv = 1, kExitReset = 2, kExitCrash = 4 };
  Partition& partition_;
  Host& host_;
  Processor& processor_;
  const Tsc& tsc_;
  Lapic* const lapic_;
  const unsigned id_;
  std::atomic<u32> index_;
  Synic synic_;
  Cpuid cpuid_;
  bool amd_ = false, enforce_ = false, syndbg_waits_ = false;
  u64 assist_page_ = 0, runtime_offset_ = 0;
  u8 exits_ = 0;
  kvm_hyperv_exit exit_{};
};

}  // namespace ring3::engine::hv
