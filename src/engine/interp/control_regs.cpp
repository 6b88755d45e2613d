#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

/// Control, debug and extended control registers, and the translation cache.
///
/// Spec: Intel SDM vol. 3A 2.5, 2.6, 4.1.2, 4.10.4, 9.8.5, 17.2; vol. 2, MOV, INVPCID, XSETBV.
namespace ring3::engine {
namespace {

constexpr u64 kCr0Defined = cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW |
                            cr0::CD | cr0::PG;

bool gp(Context& c) {
  c.gp0();
  return false;
}

bool pae_paging(u64 cr0, u64 cr4, u64 efer) { return (cr0 & cr0::PG) && (cr4 & cr4::PAE) && !(efer & efer::LMA); }

}  // namespace

bool write_cr0(Context& c, u64 value) {
  VcpuState& s = c.s;
  if (value >> 32) return gp(c);
  value = (value & kCr0Defined) | cr0::ET;
  if ((value & cr0::NW) && !(value & cr0::CD)) return gp(c);
  if ((value & cr0::PG) && !(value & cr0::PE)) return gp(c);
  const u64 old = s.cr0;
  u64 efer = s.efer;
  if ((value & cr0::PG) && !(old & cr0::PG)) {
    if (efer & efer::LME) {
      if (!(s.cr4 & cr4::PAE) || s.seg[CS].l) return gp(c);
      const bool tss16 = (s.tr.type & 0xd) == 1 && !s.tr.unusable;
      if (tss16) return gp(c);
      efer |= efer::LMA;
    }
  } else if (!(value & cr0::PG) && (old & cr0::PG)) {
    if (s.code64() || (s.cr4 & cr4::PCIDE)) return gp(c);
    efer &= ~efer::LMA;
  }
  if (pae_paging(value, s.cr4, efer) && ((old ^ value) & (cr0::PG | cr0::CD | cr0::NW)) && !c.mmu.load_pdptrs(s.cr3))
    return gp(c);
  s.cr0 = value;
  s.efer = efer;
  if ((old ^ value) & (cr0::PG | cr0::WP | cr0::PE)) c.mmu.flush_all();
  c.mode_changed();
  return true;
}

bool write_cr3(Context& c, u64 value) {
  VcpuState& s = c.s;
  bool no_flush = false;
  if (s.long_mode()) {
    if (s.cr4 & cr4::PCIDE) {
      no_flush = value >> 63;
      value &= ~(1ull << 63);
    }
    if (value >> c.features.maxphyaddr) return gp(c);
  } else {
    value = static_cast<u32>(value);
    if (pae_paging(s.cr0, s.cr4, s.efer) && !c.mmu.load_pdptrs(value)) return gp(c);
  }
  c.mmu.set_cr3(value, no_flush);
  return true;
}

bool write_cr4(Context& c, u64 value) {
  VcpuState& s = c.s;
  const u64 old = s.cr4, changed = old ^ value;
  if (value & c.features.cr4_reserved) return gp(c);
  if (s.long_mode()) {
    if (!(value & cr4::PAE) || (changed & cr4::LA57)) return gp(c);
  }
  if ((value & cr4::PCIDE) && !(old & cr4::PCIDE) && (!s.long_mode() || (s.cr3 & 0xfff))) return gp(c);
  if (pae_paging(s.cr0, value, s.efer) && (changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP)) &&
      !c.mmu.load_pdptrs(s.cr3))
    return gp(c);
  s.cr4 = value;
  if (changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE)) c.mmu.flush_all();
  c.mode_changed();
  return true;
}

namespace {

// ---- MOV CR ----

Exec mov_to_cr(Context& c, const DecodedInsn& insn) {
  const u8 cr = insn.operands[0].reg;
  if (cr != 0 && cr != 2 && cr != 3 && cr != 4 && cr != 8) return c.ud();
  if (c.cpl != 0) return c.gp0();
  u64 value = c.s.gpr[insn.operands[1].reg & 15];
  if (!c.code64) value = static_cast<u32>(value);
  switch (cr) {
    case 0:
      if (!write_cr0(c, value)) return Exec::Stop;
      break;
    case 2: c.s.cr2 = value; return Exec::Next;
    case 3:
      if (!write_cr3(c, value)) return Exec::Stop;
      break;
    case 4:
      if (!write_cr4(c, value)) return Exec::Stop;
      break;
    default:
      if (value > 15) return c.gp0();
      c.env.set_cr8(value);
      break;
  }
  return Exec::Branch;
}

Exec mov_from_cr(Context& c, const DecodedInsn& insn) {
  const u8 cr = insn.operands[1].reg;
  u64 value;
  switch (cr) {
    case 0: value = c.s.cr0; break;
    case 2: value = c.s.cr2; break;
    case 3: value = c.s.cr3; break;
    case 4: value = c.s.cr4; break;
    case 8: value = 0; break;
    default: return c.ud();
  }
  if (c.cpl != 0) return c.gp0();
  if (cr == 8) value = c.env.get_cr8();
  put_gpr(c.s, insn.operands[0].reg, c.code64 ? 8 : 4, value);
  return Exec::Next;
}

// ---- MOV DR ----

/// Checks shared by both directions; resolves DR4 and DR5.
bool debug_register(Context& c, u8* dr) {
  if (*dr > 7 || ((*dr == 4 || *dr == 5) && (c.s.cr4 & cr4::DE))) {
    c.ud();
    return false;
  }
  if (c.cpl != 0) return gp(c);
  if (*dr == 4 || *dr == 5) *dr += 2;
  // The VMM's debugger may ask for the same: the run loop tells it.
  if ((c.guest_debug_hw_bp ? c.guest_dr7 : c.s.dr7) & (1u << 13)) {
    c.stop() = Stop::fault(vec::DB);
    c.stop().payload = 1u << 13;  // DR6.BD
    return false;
  }
  return true;
}

Exec mov_to_dr(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  u8 dr = insn.operands[0].reg;
  if (!debug_register(c, &dr)) return Exec::Stop;
  u64 value = s.gpr[insn.operands[1].reg & 15];
  if (!c.code64) value = static_cast<u32>(value);
  if (dr < 4) {
    s.dr[dr] = value;
  } else {
    if (value >> 32) return c.gp0();
    if (dr == 6) {
      s.dr6 = dr6_stored(value);
      return Exec::Next;
    }
    s.dr7 = dr7_stored(value);
  }
  c.mmu.flush_all();  // pages that hold a data breakpoint take the slow path
  c.mode_changed();
  return Exec::Branch;
}

Exec mov_from_dr(Context& c, const DecodedInsn& insn) {
  u8 dr = insn.operands[1].reg;
  if (!debug_register(c, &dr)) return Exec::Stop;
  const u64 value = dr < 4 ? c.s.dr[dr] : dr == 6 ? c.s.dr6 : c.s.dr7;
  put_gpr(c.s, insn.operands[0].reg, c.code64 ? 8 : 4, value);
  return Exec::Next;
}

// ---- the machine status word ----

Exec lmsw(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0) return c.gp0();
  u16 value;
  if (!read_rm16(c, insn, insn.operands[0], &value)) return Exec::Stop;
  // PE can be set, not cleared.
  const u64 next = (c.s.cr0 & ~(cr0::MP | cr0::EM | cr0::TS)) | (value & 0xf);
  return write_cr0(c, next) ? Exec::Branch : Exec::Stop;
}

Exec smsw(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0 && (c.s.cr4 & cr4::UMIP)) return c.gp0();
  return write_rm16(c, insn, insn.operands[0], c.s.cr0) ? Exec::Next : Exec::Stop;
}

Exec clts(Context& c, const DecodedInsn&) {
  if (c.cpl != 0) return c.gp0();
  c.s.cr0 &= ~cr0::TS;
  c.mode_changed();
  return Exec::Branch;
}

// ---- translations ----

Exec invlpg(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0) return c.gp0();
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  u64 linear = c.effective_address(insn);
  if (!c.code64 || seg == FS || seg == GS) linear += c.s.seg[seg].base;
  if (!c.code64) linear = static_cast<u32>(linear);
  if (canonical(c, linear)) c.mmu.flush_page(linear);
  return Exec::Branch;
}

Exec invpcid(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0) return c.gp0();
  u64 type = c.s.gpr[insn.operands[0].reg & 15];
  if (!c.code64) type = static_cast<u32>(type);
  if (type > 3) return c.gp0();
  u64 at;
  if (!mem_linear(c, insn, 16, false, &at)) return Exec::Stop;
  u64 descriptor[2];
  if (!c.mmu.read_bytes(at, descriptor, 16, static_cast<Seg>(insn.mem.seg))) return Exec::Stop;
  const u16 pcid = descriptor[0] & 0xfff;
  const u64 linear = descriptor[1];
  if (descriptor[0] >> 12) return c.gp0();
  const bool pcide = c.s.cr4 & cr4::PCIDE;
  if (type <= 1 && !pcide && pcid != 0) return c.gp0();
  switch (type) {
    case 0:
      if (!canonical(c, linear)) return c.gp0();
      if (!pcide || pcid == (c.s.cr3 & 0xfff)) c.mmu.flush_page(linear);
      else c.mmu.flush_pcid(pcid);
      break;
    case 1:
      if (pcide) c.mmu.flush_pcid(pcid);
      else c.mmu.flush_non_global();
      break;
    default: c.mmu.flush_all(); break;  // type 3 may keep global entries; dropping more is always allowed
  }
  return Exec::Branch;
}

// ---- XCR0 ----

Exec xgetbv(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (!(s.cr4 & cr4::OSXSAVE)) return c.ud();
  const u32 index = static_cast<u32>(s.gpr[RCX]);
  // XCR1 is XINUSE: a component may be reported in use though it is in its initial configuration.
  if (index != 0 && !(index == 1 && c.features[Feature::Xsavec])) return c.gp0();
  s.gpr[RAX] = static_cast<u32>(s.xcr0);
  s.gpr[RDX] = s.xcr0 >> 32;
  return Exec::Next;
}

bool valid_xcr0(u64 v, u64 supported) {
  if (!(v & 1) || (v & ~supported)) return false;
  if ((v & 4) && !(v & 2)) return false;
  const u64 mpx = v & 0x18, avx512 = v & 0xe0, amx = v & 0x60000;
  if (mpx != 0 && mpx != 0x18) return false;
  if (avx512 != 0 && (avx512 != 0xe0 || !(v & 4))) return false;
  return amx == 0 || amx == 0x60000;
}

Exec xsetbv(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (!(s.cr4 & cr4::OSXSAVE)) return c.ud();
  if (c.cpl != 0) return c.gp0();
  const u64 value = (s.gpr[RDX] << 32) | static_cast<u32>(s.gpr[RAX]);
  if (static_cast<u32>(s.gpr[RCX]) != 0 || !valid_xcr0(value, c.features.xcr0_supported)) return c.gp0();
  s.xcr0 = value;
  c.mode_changed();
  return Exec::Branch;
}

}  // namespace

Handler select_control(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::MovCr: return insn.operands[0].kind == OperandKind::Cr ? mov_to_cr : mov_from_cr;
    case Op::MovDr: return insn.operands[0].kind == OperandKind::Dr ? mov_to_dr : mov_from_dr;
    case Op::Lmsw: return lmsw;
    case Op::Smsw: return smsw;
    case Op::Clts: return clts;
    case Op::Invlpg: return invlpg;
    case Op::Invpcid: return invpcid;
    case Op::Xgetbv: return xgetbv;
    case Op::Xsetbv: return xsetbv;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
