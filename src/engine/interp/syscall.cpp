#include "engine/interp/families.hpp"
#include "engine/interp/fast_syscall.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

/// Fast system calls, SWAPGS, and the FS/GS base instructions.
///
/// Spec:    Intel SDM vol. 2; AMD APM vol. 3. Where they differ, GuestFeatures::amd decides: SYSCALL and SYSRET
///          outside 64-bit mode, SS attributes after SYSRET, SYSENTER and SYSEXIT in long mode, where a
///          non-canonical SYSRET target faults.
namespace ring3::engine {
namespace {

Exec syscall(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (!(s.efer & efer::SCE) || !c.protected_mode || (!c.features.amd && !c.code64)) return c.ud();
  if (s.long_mode()) {
    enter_by_syscall(s, c.code64 ? s.msr.lstar : s.msr.cstar, s.gpr[RCX], s.gpr[R11]);
  } else {
    const u16 cs = (s.msr.star >> 32) & kSelectorMask;
    s.gpr[RCX] = static_cast<u32>(s.rip);
    s.rip = static_cast<u32>(s.msr.star);
    s.rflags &= ~(rflags::IF | rflags::VM | rflags::RF);
    s.seg[CS] = flat_code(cs, 0, false);
    s.seg[SS] = flat_data(static_cast<u16>(cs + 8), 0);
  }
  c.mode_changed();
  return Exec::Branch;
}

Exec sysret(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  if (!(s.efer & efer::SCE) || !c.protected_mode || (!c.features.amd && !c.code64)) return c.ud();
  if (c.cpl != 0) return c.gp0();
  const bool to64 = c.code64 && insn.opsize == 8;
  // Intel checks the target at CPL 0; on AMD the fetch faults at CPL 3.
  if (to64 && !c.features.amd && !canonical(c, s.gpr[RCX])) return c.gp0();
  return_by_sysret(s, s.gpr[RCX], s.gpr[R11], to64, c.features.amd);
  c.mode_changed();
  // Unlike POPF's and IRET's, a TF that SYSRET sets traps at once, as if the SYSCALL before it had just ended.
  if ((s.rflags & rflags::TF) && !c.guest_debug_step) {
    c.stop() = Stop::fault(vec::DB);
    c.stop().kind = Stop::Kind::Trap;
    return Exec::Stop;
  }
  return Exec::Branch;
}

Exec sysenter(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (c.features.amd && s.long_mode()) return c.ud();
  const u16 cs = static_cast<u16>(s.msr.sysenter_cs & kSelectorMask);
  if (s.real_mode() || cs == 0) return c.gp0();
  const bool lma = s.long_mode();
  s.rflags &= ~(rflags::VM | rflags::IF | rflags::RF);
  s.seg[CS] = flat_code(cs, 0, lma);
  s.seg[SS] = flat_data(static_cast<u16>(cs + 8), 0);
  s.rip = lma ? s.msr.sysenter_eip : static_cast<u32>(s.msr.sysenter_eip);
  s.gpr[RSP] = lma ? s.msr.sysenter_esp : static_cast<u32>(s.msr.sysenter_esp);
  c.mode_changed();
  return Exec::Branch;
}

Exec sysexit(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  if (c.features.amd && s.long_mode()) return c.cpl != 0 ? c.gp0() : c.ud();
  const u16 base = static_cast<u16>(s.msr.sysenter_cs & kSelectorMask);
  if (s.real_mode() || base == 0 || c.cpl != 0) return c.gp0();
  const bool to64 = c.code64 && insn.opsize == 8;
  if (to64 && (!canonical(c, s.gpr[RCX]) || !canonical(c, s.gpr[RDX]))) return c.gp0();
  s.rip = to64 ? s.gpr[RDX] : static_cast<u32>(s.gpr[RDX]);
  s.gpr[RSP] = to64 ? s.gpr[RCX] : static_cast<u32>(s.gpr[RCX]);
  s.seg[CS] = flat_code(static_cast<u16>((base + (to64 ? 32 : 16)) | 3), 3, to64);
  s.seg[SS] = flat_data(static_cast<u16>((base + (to64 ? 40 : 24)) | 3), 3);
  c.mode_changed();
  return Exec::Branch;
}

// FS and GS bases in 64-bit mode are added on every access: no cached fact about the mode depends on them.

Exec swapgs(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (!c.code64) return c.ud();
  if (c.cpl != 0) return c.gp0();
  std::swap(s.seg[GS].base, s.msr.kernel_gs_base);
  return Exec::Next;
}

template <Seg kSeg>
Exec read_base(Context& c, const DecodedInsn& insn) {
  if (!c.code64 || !(c.s.cr4 & cr4::FSGSBASE)) return c.ud();
  put_gpr(c.s, insn.operands[0].reg, insn.operands[0].size, c.s.seg[kSeg].base);
  return Exec::Next;
}

template <Seg kSeg>
Exec write_base(Context& c, const DecodedInsn& insn) {
  if (!c.code64 || !(c.s.cr4 & cr4::FSGSBASE)) return c.ud();
  u64 value = c.s.gpr[insn.operands[0].reg & 15];
  if (insn.operands[0].size == 4) value = static_cast<u32>(value);
  if (!canonical(c, value)) return c.gp0();
  c.s.seg[kSeg].base = value;
  return Exec::Next;
}

}  // namespace

Handler select_syscall(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Syscall: return syscall;
    case Op::Sysret: return sysret;
    case Op::Sysenter: return sysenter;
    case Op::Sysexit: return sysexit;
    case Op::Swapgs: return swapgs;
    case Op::Rdfsbase: return read_base<FS>;
    case Op::Rdgsbase: return read_base<GS>;
    case Op::Wrfsbase: return write_base<FS>;
    case Op::Wrgsbase: return write_base<GS>;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
