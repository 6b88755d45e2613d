#pragma once
#include <atomic>

#include "base/types.hpp"
#include "engine/mmu/mmu.hpp"

namespace ring3::engine {

/// What an instruction reaches outside the CPU core and its memory. Implemented by abi/, which
/// connects it to irq/, timer/ and the run page; tests implement it with a few lines.
///
/// Threading: called on the vCPU's thread only.
/// Replay:    Answer::Exit means the VMM must act first. The instruction raises Stop::Exit, changes
///            nothing, and is executed again when KVM_RUN is entered next; the environment then answers
///            the accesses of that instruction in the same order from its log, until retired() says
///            the instruction (or one iteration of a string instruction) is over.
class Environment : public MmioPort {
 public:
  enum class Answer : u8 { Done, Fault /* #GP(0) */, Exit };

  /// size 1, 2 or 4. Permission was already checked.
  virtual Answer port_in(u16 port, unsigned size, u32* value) = 0;
  virtual Answer port_out(u16 port, unsigned size, u32 value) = 0;

  /// What a hypercall instruction of the other vendor does: the same, is replaced by the right one in the guest's code
  /// (KVM_X86_QUIRK_FIX_HYPERCALL_INSN), or #UD.
  enum class OtherHypercall : u8 { Works, IsPatched, Faults };
  OtherHypercall other_hypercall = OtherHypercall::Works;
  /// Code where no memory is ends in an exit at every CPL (KVM_CAP_EXIT_ON_EMULATION_FAILURE), not only at CPL 0.
  bool exits_without_code = false;
  /// MONITOR and MWAIT work without their feature (KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS).
  bool mwait_without_feature = false;
  /// The feature is what MISC_ENABLE says (without KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT), not CPUID's table.
  bool mwait_by_misc_enable = false;

  /// Before port_in() for an element of REP INS: as many of these could follow at once (1: just this one). The environment
  /// may then get several from the VMM with one exit.
  unsigned string_elements = 1;
  /// Elements that came that way and were not asked for yet: nothing may come between them.
  unsigned string_ready = 0;

  /// MSRs that VcpuState does not hold, or that need checks by other rooms; and all unknown ones.
  virtual Answer rdmsr(u32 index, u64* value) = 0;
  virtual Answer wrmsr(u32 index, u64 value) = 0;

  /// The VMM has a say in MSR accesses: msr_before() is asked ahead of each, msr_faulted() when the core would raise #GP.
  bool msr_hooks = false;
  /// Done with *handled unset: go on. With *handled set the access is over, *value its result.
  virtual Answer msr_before(u32 index, bool write, u64* value, bool* handled) {
    static_cast<void>(index), static_cast<void>(write), static_cast<void>(value);
    *handled = false;
    return Answer::Done;
  }
  /// Done: the access is over, *value its result.
  virtual Answer msr_faulted(u32 index, bool write, u64* value) {
    static_cast<void>(index), static_cast<void>(write), static_cast<void>(value);
    return Answer::Fault;
  }

  /// The guest's CPUID as KVM_SET_CPUID2 gave it, with the bits that follow live state (OSXSAVE,
  /// APIC enable, XSAVE sizes) applied by the interpreter.
  virtual void cpuid(u32 leaf, u32 subleaf, u32 out[4]) = 0;

  virtual u64 rdtsc() = 0;       ///< guest TSC
  /// How rdtsc() comes from the host's: host × *ratio (16.48 fixed point) + *offset. They live as long as this.
  struct HostTsc {
    const std::atomic<u64>* ratio = nullptr;  ///< null: only rdtsc() tells
    const std::atomic<u64>* offset = nullptr;
  };
  virtual HostTsc host_tsc() const { return {}; }
  virtual u64 get_cr8() = 0;     ///< TPR bits 7:4
  virtual void set_cr8(u64 value) = 0;  ///< value 0..15

  /// VMCALL/VMMCALL at CPL 0: KVM's hypercall ABI; result for RAX. Done, or Exit: the VMM answers.
  virtual Answer hypercall(u64 nr, const u64 args[4], u64* result) = 0;
  /// Whether VMCALL and VMMCALL are Hyper-V's hypercalls now; then hv_hypercall() is called instead, at CPL 0 in protected mode:
  /// RCX, RDX and R8, or the pairs of registers that stand for them outside 64-bit code. Fault: #UD.
  virtual bool hv_hypercalls() { return false; }
  virtual Answer hv_hypercall(u64 control, u64 input, u64 output, u64* result) {
    static_cast<void>(control), static_cast<void>(input), static_cast<void>(output), static_cast<void>(result);
    return Answer::Fault;
  }
  /// The same for Xen's, which come first, whatever the CPL and the mode. number: RAX; args: Xen's registers of the mode.
  virtual bool xen_hypercalls(u64 number) {
    static_cast<void>(number);
    return false;
  }
  virtual Answer xen_hypercall(u64 number, const u64 args[6], bool long_mode, unsigned cpl, u64* result) {
    static_cast<void>(number), static_cast<void>(args), static_cast<void>(long_mode), static_cast<void>(cpl), static_cast<void>(result);
    return Answer::Fault;
  }
  /// Any hardware event that a HLT waits for is handled by the caller of Interpreter::run().
  /// An IRET retired and NMIs are unblocked.
  virtual void nmi_unblocked() = 0;

  /// The current instruction (or string iteration) retired after an Answer::Exit was given for it.
  virtual void retired() = 0;
  /// Set while the environment holds answers to replay; the interpreter calls retired() only then.
  bool replaying = false;
};

}  // namespace ring3::engine
