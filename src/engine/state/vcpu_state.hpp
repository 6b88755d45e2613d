#pragma once
#include <array>

#include "base/types.hpp"

/// The architectural state of one vCPU, and nothing else: no caches, no host pointers. Everything
/// here round-trips through the KVM ABI's getters and setters.
///
/// Spec:      Intel SDM vol. 1 ch. 3, vol. 3A ch. 2; AMD APM vol. 2 ch. 3.
/// Threading: owned by the vCPU's thread while it runs; by the holder of the vCPU's lock otherwise.
namespace ring3::engine {

// GPR numbers as encoded.
enum Gpr : u8 { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
// Segment numbers as encoded.
enum Seg : u8 { ES, CS, SS, DS, FS, GS, kSegCount };

namespace rflags {
inline constexpr u64 CF = 1u << 0, FIXED1 = 1u << 1, PF = 1u << 2, AF = 1u << 4, ZF = 1u << 6, SF = 1u << 7,
                     TF = 1u << 8, IF = 1u << 9, DF = 1u << 10, OF = 1u << 11, IOPL = 3u << 12, NT = 1u << 14,
                     RF = 1u << 16, VM = 1u << 17, AC = 1u << 18, VIF = 1u << 19, VIP = 1u << 20, ID = 1u << 21;
inline constexpr u64 STATUS = CF | PF | AF | ZF | SF | OF;
}  // namespace rflags

namespace cr0 {
inline constexpr u64 PE = 1u << 0, MP = 1u << 1, EM = 1u << 2, TS = 1u << 3, ET = 1u << 4, NE = 1u << 5,
                     WP = 1u << 16, AM = 1u << 18, NW = 1u << 29, CD = 1u << 30, PG = 1u << 31;
}
namespace cr4 {
inline constexpr u64 VME = 1u << 0, PVI = 1u << 1, TSD = 1u << 2, DE = 1u << 3, PSE = 1u << 4, PAE = 1u << 5,
                     MCE = 1u << 6, PGE = 1u << 7, PCE = 1u << 8, OSFXSR = 1u << 9, OSXMMEXCPT = 1u << 10,
                     UMIP = 1u << 11, LA57 = 1u << 12, FSGSBASE = 1u << 16, PCIDE = 1u << 17,
                     OSXSAVE = 1u << 18, SMEP = 1u << 20, SMAP = 1u << 21, PKE = 1u << 22;
}
namespace efer {
inline constexpr u64 SCE = 1u << 0, LME = 1u << 8, LMA = 1u << 10, NX = 1u << 11, SVME = 1u << 12, FFXSR = 1u << 14;
}

/// Exception vectors.
namespace vec {
inline constexpr u8 DE = 0, DB = 1, NMI = 2, BP = 3, OF = 4, BR = 5, UD = 6, NM = 7, DF = 8, TS = 10, NP = 11,
                    SS = 12, GP = 13, PF = 14, MF = 16, AC = 17, MC = 18, XM = 19;
}
/// Page-fault error code bits.
namespace pferr {
inline constexpr u32 P = 1, W = 2, U = 4, RSVD = 8, I = 16, PK = 32;
}

/// A segment register with its hidden part, in kvm_segment's terms. For a null data segment,
/// unusable = 1. limit is in bytes (already expanded by G).
struct Segment {
  u64 base = 0;
  u32 limit = 0xffff;
  u16 selector = 0;
  u8 type = 0;  ///< the 4-bit type field
  u8 s = 1;     ///< 1: code/data, 0: system
  u8 dpl = 0;
  u8 present = 1;
  u8 l = 0;
  u8 db = 0;
  u8 g = 0;
  u8 avl = 0;
  u8 unusable = 0;
};

struct DescriptorTable {
  u64 base = 0;
  u16 limit = 0xffff;
};

/// The XSAVE area in the standard (non-compacted) format: what KVM_GET_XSAVE returns. Live register
/// contents, not a copy: XMM n is at 160+16n, the upper half of YMM n at 576+16n, ST(i) at 32+16i
/// (by stack position, as FXSAVE stores them), the abridged tag word at 4. AVX-512's components stand where Intel's
/// processors have them, whatever the host's layout: k0..k7 at 1088+8n, bits 511:256 of ZMM0..15 at 1152+32n, ZMM16..31 at
/// 1664+64(n-16).
/// header.xstate_bv is not maintained while running; it is computed by whoever saves.
struct alignas(64) XsaveArea {
  static constexpr u32 kXmm = 160, kYmmHigh = 576, kHeader = 512, kSize = 4096;
  static constexpr u32 kOpmask = 1088, kZmmHigh = 1152, kHi16 = 1664, kEnd = 2688;
  u8 bytes[kSize] = {};

  u16& fcw() { return *reinterpret_cast<u16*>(bytes + 0); }
  u16& fsw() { return *reinterpret_cast<u16*>(bytes + 2); }
  u8& ftw_abridged() { return bytes[4]; }
  u32& mxcsr() { return *reinterpret_cast<u32*>(bytes + 24); }
  u8* xmm(unsigned n) { return bytes + kXmm + 16 * n; }
  u8* ymm_high(unsigned n) { return bytes + kYmmHigh + 16 * n; }
  u64& opmask(unsigned n) { return *reinterpret_cast<u64*>(bytes + kOpmask + 8 * n); }
  u8* zmm_high(unsigned n) { return bytes + kZmmHigh + 32 * n; }  ///< n < 16
  u8* hi16(unsigned n) { return bytes + kHi16 + 64 * (n - 16); }  ///< 16 <= n < 32
};

/// Model-specific registers that are plain storage to the vCPU core. MSRs that belong to other
/// rooms (APIC base and x2APIC, TSC deadline, kvmclock) live there, behind Environment.
struct Msrs {
  u64 star = 0, lstar = 0, cstar = 0, sfmask = 0, kernel_gs_base = 0, tsc_aux = 0;
  u64 sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
  u64 pat = 0x0007040600070406;
  u64 misc_enable = 1;
  u64 spec_ctrl = 0;
  u64 xss = 0;
  u64 mtrr_def_type = 0;
  std::array<u64, 11> mtrr_fixed{};     ///< 64K, 16K×2, 4K×8
  std::array<u64, 16> mtrr_variable{};  ///< base/mask pairs
  u64 mcg_status = 0, mcg_ctl = 0, mcg_cap = 0;
  std::array<u64, 128> mc_banks{};      ///< 32 banks × (CTL, STATUS, ADDR, MISC)
  u64 debugctl = 0;
  u64 smbase = 0x30000;
  u64 microcode_rev = 0;
  u64 platform_info = 1u << 31;  ///< CPUID faulting can be enabled
  u64 misc_features = 0;         ///< bit 0: CPUID faults above CPL 0
  u64 arch_capabilities = 0;
  u64 hwcr = 0, de_cfg = 0, osvw_length = 0, osvw_status = 0;  ///< AMD
};

/// An event that was recognised but is not yet delivered (as in kvm_vcpu_events).
struct PendingException {
  bool pending = false;
  bool has_error = false;
  u8 vector = 0;
  u32 error = 0;
  bool has_payload = false;
  u64 payload = 0;  ///< #PF: CR2; #DB: DR6 bits
};

struct VcpuState {
  u64 gpr[16] = {};
  u64 rip = 0xfff0;
  u64 rflags = rflags::FIXED1;  ///< always materialised, bit 1 set, reserved bits clear

  Segment seg[kSegCount];  ///< indexed by Seg
  Segment ldtr, tr;
  DescriptorTable gdtr, idtr;

  u64 cr0 = cr0::ET | cr0::CD | cr0::NW;
  u64 cr2 = 0, cr3 = 0, cr4 = 0;
  u64 efer = 0;
  u64 xcr0 = 1;
  u64 dr[4] = {};
  u64 dr6 = 0xffff0ff0, dr7 = 0x400;
  u64 pdptr[4] = {};  ///< PAE paging outside long mode: loaded by MOV CR3

  XsaveArea xsave;
  Msrs msr;

  PendingException exception;      ///< set by KVM_SET_VCPU_EVENTS and between an exit and delivery
  bool sti_shadow = false;         ///< interrupts are held for one instruction after STI
  bool mov_ss_shadow = false;      ///< interrupts, NMIs and #DB are held after MOV SS / POP SS
  bool nmi_blocked = false;        ///< from NMI delivery to the next IRET
  u8 nmi_pending = 0;              ///< at most 2
  bool injected_interrupt = false; ///< KVM_INTERRUPT without an irqchip
  u8 injected_vector = 0;
  bool injected_soft = false;

  /// Privilege level: SS.DPL, as on hardware (3 in virtual-8086 mode, 0 in real mode).
  u8 cpl() const { return seg[SS].dpl; }
  bool protected_mode() const { return cr0 & cr0::PE; }
  bool v8086() const { return rflags & rflags::VM; }
  bool long_mode() const { return efer & efer::LMA; }                   ///< IA-32e, either sub-mode
  bool code64() const { return long_mode() && seg[CS].l; }              ///< 64-bit sub-mode
  bool real_mode() const { return !(cr0 & cr0::PE); }

  /// RESET / INIT state (SDM vol. 3A table 9-1). INIT keeps the x87/SSE state, MSRs and CR0.CD/NW.
  void reset();
  void init();
};

}  // namespace ring3::engine
