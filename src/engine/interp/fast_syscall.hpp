#pragma once
#include "engine/interp/segment_load.hpp"

/// SYSCALL and SYSRET in long mode, when nothing about them faults: shared by the interpreter and by what translated
/// code calls, which is made without vectors (so: inlined always) and has RCX and R11 elsewhere.
///
/// Spec: as interp/syscall.cpp. The caller has checked EFER.SCE and CPL, and calls mode_changed() or privilege_changed().
namespace ring3::engine {

/// s.rip is the next instruction's, rflags whole. entry: LSTAR, or CSTAR from compatibility mode.
[[gnu::always_inline]] inline void enter_by_syscall(VcpuState& s, u64 entry, u64& rcx, u64& r11) {
  rcx = s.rip;
  r11 = s.rflags & ~rflags::RF;
  s.rip = entry;
  s.rflags = (s.rflags & ~(s.msr.sfmask | rflags::RF)) | rflags::FIXED1;
  const u16 cs = (s.msr.star >> 32) & kSelectorMask;
  s.seg[CS] = flat_code(cs, 0, true);
  s.seg[SS] = flat_data(static_cast<u16>(cs + 8), 0);
}

inline constexpr u64 kSysretFlags = 0x3c7fd7;  ///< what R11 has a say in

/// to64: with REX.W.
[[gnu::always_inline]] inline void return_by_sysret(VcpuState& s, u64 rcx, u64 r11, bool to64, bool amd) {
  const u16 base = s.msr.star >> 48;
  s.rip = to64 ? rcx : static_cast<u32>(rcx);
  if (s.long_mode()) s.rflags = (r11 & kSysretFlags) | rflags::FIXED1;
  else s.rflags |= rflags::IF;
  s.seg[CS] = flat_code(static_cast<u16>((to64 ? base + 16 : base) | 3), 3, to64);
  const u16 ss = static_cast<u16>((base + 8) | 3);
  if (amd) {
    s.seg[SS].selector = ss;
    s.seg[SS].dpl = 3;
  } else {
    s.seg[SS] = flat_data(ss, 3);
  }
}

}  // namespace ring3::engine
