#pragma once
#include <atomic>
#include <bitset>
#include <functional>
#include <memory>

#include "engine/decode/insn.hpp"
#include "engine/interp/environment.hpp"
#include "engine/mmu/mmu.hpp"
#include "engine/state/vcpu_state.hpp"

/// What an instruction handler works on. One per vCPU, used on its thread.
namespace ring3::engine {

/// What a handler returns.
enum class Exec : u8 {
  Next,    ///< retired; go on with the next instruction of the block
  Branch,  ///< retired; RIP, mode, privilege or translation may have changed: look the next block up
  Stop,    ///< not retired (Fault, Exit) or retired with a Trap: Context::stop() says what
  Halt,    ///< HLT (or MWAIT) retired
  BlockEnd,  ///< the run loop's own: no instruction here, look the next block up; handlers never return it
};

struct Context;
struct Event;
struct VectorUnit;  ///< interp/vector.hpp
/// On entry s.rip is already the address of the NEXT instruction; on Stop (Fault, Exit) the caller
/// puts it back. Handlers change architectural state only after their last possible stop.
using Handler = Exec (*)(Context&, const DecodedInsn&);

/// Guest CPUID distilled into what instruction semantics ask for.
struct GuestFeatures {
  std::bitset<static_cast<unsigned>(Feature::Count)> has;
  u64 cr4_reserved = ~0ull;   ///< bits that fault when set
  u64 efer_reserved = ~0ull;
  u64 xcr0_supported = 3;
  u32 mxcsr_mask = 0xffff;
  u8 maxphyaddr = 40;         ///< bits
  u8 linear_bits = 48;
  bool amd = false;           ///< vendor AuthenticAMD/HygonGenuine: SYSCALL/SYSENTER/segment-load differences
  bool pcid = false, page1g = true, nx = true;
  bool spec_ctrl = false;     ///< IA32_SPEC_CTRL (CPUID 7.EDX[26], or AMD's 80000008.EBX IBRS/STIBP/SSBD)
  bool ibpb = false;          ///< IA32_PRED_CMD (CPUID 7.EDX[26] or 80000008.EBX[12])
  bool flush_l1d = false;     ///< IA32_FLUSH_CMD
  bool arch_capabilities = false;
  bool osvw = false;          ///< AMD 80000001.ECX[9]
  bool null_clears_base = true;  ///< Intel, or AMD 80000021.EAX[6]: a null selector load zeroes base and limit
  bool operator[](Feature f) const { return has[static_cast<unsigned>(f)]; }
  /// The instruction's feature, and what its encoding needs beside it.
  bool allows(const DecodedInsn& i) const {
    if (!(*this)[i.feature]) return false;
    if (!i.has(kEvex)) return true;
    return (*this)[Feature::Avx512f] && (!i.has(kEvexVl) || (*this)[Feature::Avx512vl]);
  }
};

struct Context {
  Context(VcpuState& state, Mmu& mmu_, Environment& environment) : s(state), mmu(mmu_), env(environment) {}

  VcpuState& s;
  Mmu& mmu;
  Environment& env;
  GuestFeatures features;
  std::shared_ptr<VectorUnit> vector_unit;  ///< host-executed instructions' stubs; attach_vector_unit() makes it

  /// Raised by other threads and by handlers: leave the block loop at the next boundary. Bits are
  /// the owner's (abi/); the interpreter only compares with zero.
  AttentionWord& attention() const { return *attention_; }
  /// Where it is from now on, with what it holds. Not while other threads may raise it.
  void place_attention(AttentionWord* at) {
    at->take();
    if (const u32 bits = attention_->take(); bits != 0) at->raise(bits);
    attention_ = at;
  }
  void place_attention_here() { place_attention(&own_attention_); }

  /// Mode facts derived from s by mode_changed(), read on every access.
  bool code64 = false;        ///< 64-bit sub-mode
  bool long_mode = false;
  bool protected_mode = false;///< CR0.PE and not virtual-8086
  u8 cpl = 0;
  CodeMode code_mode = CodeMode::Bits16;
  u8 stack_size = 2;          ///< bytes used of rSP: 2, 4, 8
  u8 flat_segments = 0;       ///< bit per Seg: legacy mode; base 0, limit 4 GiB, usable, writable data: no check needed
  bool slow_step = false;     ///< TF, code breakpoints, guest-debug: one instruction at a time with checks
  bool fpu_ok = true;         ///< CR0.EM/TS clear
  u32 instruction_bytes = 0;  ///< unused by handlers; statistics
  u64 retired = 0;            ///< instructions retired
  std::atomic_flag* split_lock = nullptr;  ///< SplitLock holds it: whoever cuts an instruction off gives it back
  u32 fetch_key = 0;          ///< mode bits that decoded code and its lookup depend on

  /// Tests and tracing: sees every event that an instruction raised before its delivery. true: it is
  /// not delivered, and Interpreter::run() returns Debug with s.rip as the event's return address.
  std::function<bool(const Event&)> event_filter;

  /// Guest debugging by the VMM (KVM_SET_GUEST_DEBUG).
  bool guest_debug_step = false;
  bool guest_debug_sw_bp = false;  ///< INT3 exits to the VMM
  bool guest_debug_hw_bp = false;  ///< guest_dr is used in place of s.dr/s.dr7
  u64 guest_dr[4] = {};
  u64 guest_dr7 = 0x400;
  bool breakpoints_overridden = false;  ///< mode_changed()'s own

  /// Set by the owner while an interrupt waits: run() returns Attention at the first boundary where it
  /// can be taken (IF set, no shadow). Without it, nothing tells that STI, POPF or IRET opened the window.
  bool interrupt_window = false;

  Stop& stop() { return mmu.stop(); }
  Exec fault(u8 vector) { mmu.stop() = Stop::fault(vector); return Exec::Stop; }
  Exec fault(u8 vector, u32 error) { mmu.stop() = Stop::fault(vector, error); return Exec::Stop; }
  Exec gp0() { return fault(vec::GP, 0); }
  Exec ud() { return fault(vec::UD); }
  Exec exit() { mmu.stop() = Stop::exit(); return Exec::Stop; }

  /// Recomputes the fields above from s, and mmu.mode_changed(). After any change of CR0, CR4, EFER,
  /// RFLAGS.VM/TF/AC, segment registers or DR7. (interp/mode.cpp)
  void mode_changed();
  /// The same where nothing but CPL (as seg[CS] and seg[SS] have it) and RFLAGS.AC has changed, from 64-bit code to 64-bit
  /// code. Uses no vector registers.
  [[gnu::always_inline]] void privilege_changed() {
    cpl = s.seg[SS].dpl;
    fetch_key = (fetch_key & ~8u) | (cpl == 3 ? 8u : 0u);
    mmu.privilege_changed();
  }

  // ---- operand access (interp/operand.hpp defines them inline) ----

  /// Effective address of insn.mem before segmentation, truncated to addrsize.
  u64 effective_address(const DecodedInsn& insn) const;
  /// Effective address to linear for size bytes: adds the segment base, checks limit, type and (64-bit)
  /// canonical form. false: stop() is set (#GP(0), or #SS(0) for SS).
  bool linear(Seg seg, u64 offset, unsigned size, bool write, u64* out);
  bool linear_slow(Seg seg, u64 offset, unsigned size, bool write, u64* out);  ///< (interp/mode.cpp)

 private:
  AttentionWord own_attention_;
  AttentionWord* attention_ = &own_attention_;
};

/// Delivery of events; interp/event.cpp.
/// Spec: SDM vol. 3A ch. 6; double-fault rules table 6-5.
struct Event {
  enum class Type : u8 { External, Nmi, Exception, Software /* INT n */, SoftwareException /* INT3, INTO */, PrivilegedSoftware /* INT1 */ };
  Type type = Type::Exception;
  u8 vector = 0;
  bool has_error = false;
  u32 error = 0;
  u64 payload = 0;  ///< #PF: CR2; #DB: DR6 bits; Software*: length of the INT instruction (Stop::payload),
                    ///< so that a fault in its delivery is reported at the instruction itself
};
enum class Delivered : u8 {
  Ok,
  Exit,        ///< an access during delivery needs the VMM; nothing changed, try again
  TripleFault,
};
/// Delivers event to the guest: the IDT (or IVT), stack switch, IST, contributory faults into #DF.
/// s.rip must be the return address (the faulting instruction, or the next one for traps and interrupts).
Delivered deliver_event(Context& c, const Event& event);

}  // namespace ring3::engine
