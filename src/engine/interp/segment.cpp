#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

/// Segment registers and descriptor tables.
///
/// Spec: Intel SDM vol. 2 (MOV, POP, PUSH, LDS…, LGDT, LLDT, LTR, LAR, LSL, VERR, ARPL); vol. 3A ch. 3, 5.
namespace ring3::engine {
namespace {

// ---- MOV, PUSH, POP, LDS and friends ----

Exec mov_to_seg(Context& c, const DecodedInsn& insn) {
  const Seg seg = static_cast<Seg>(insn.operands[0].reg);
  if (seg == CS || seg >= kSegCount) return c.ud();
  u16 selector;
  if (!read_rm16(c, insn, insn.operands[1], &selector)) return Exec::Stop;
  if (!load_segment(c, seg, selector)) return Exec::Stop;
  if (seg == SS) c.s.mov_ss_shadow = true;
  c.mode_changed();
  return Exec::Branch;
}

Exec mov_from_seg(Context& c, const DecodedInsn& insn) {
  if (insn.operands[1].reg >= kSegCount) return c.ud();
  return write_rm16(c, insn, insn.operands[0], c.s.seg[insn.operands[1].reg].selector) ? Exec::Next : Exec::Stop;
}

/// PUSH and POP of a segment register default to 64 bits in 64-bit mode.
unsigned stack_operand_size(const Context& c, const DecodedInsn& insn) {
  const unsigned size = far_operand_size(c, insn);
  return c.code64 && size != 2 ? 8 : size;
}

Exec push_seg(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  const unsigned size = stack_operand_size(c, insn);
  const u64 value = s.seg[insn.operands[0].reg % kSegCount].selector;
  const u64 rsp = advance_rsp(s.gpr[RSP], c.stack_size, -static_cast<i64>(size));
  u64 at;
  if (!c.linear(SS, c.stack_size == 2 ? rsp & 0xffff : rsp, size, true, &at)) return Exec::Stop;
  // A 32-bit push leaves the upper half of the slot alone on Intel.
  const unsigned written = size == 4 && !c.features.amd ? 2 : size;
  if (!c.mmu.write_bytes(at, &value, written, SS)) return Exec::Stop;
  s.gpr[RSP] = rsp;
  return Exec::Next;
}

Exec pop_seg(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  const unsigned size = stack_operand_size(c, insn);
  const Seg seg = static_cast<Seg>(insn.operands[0].reg);
  if (seg == CS || seg >= kSegCount) return c.ud();
  u64 value;
  if (!peek_stack(c, size, 0, 0, &value)) return Exec::Stop;
  const u64 rsp = advance_rsp(s.gpr[RSP], c.stack_size, size);
  if (!load_segment(c, seg, static_cast<u16>(value))) return Exec::Stop;
  s.gpr[RSP] = rsp;
  if (seg == SS) s.mov_ss_shadow = true;
  c.mode_changed();
  return Exec::Branch;
}

template <Seg kSeg>
Exec load_far_pointer(Context& c, const DecodedInsn& insn) {
  const unsigned size = far_operand_size(c, insn);
  u64 at;
  if (!mem_linear(c, insn, size + 2, false, &at)) return Exec::Stop;
  u8 bytes[10];
  if (!c.mmu.read_bytes(at, bytes, size + 2, static_cast<Seg>(insn.mem.seg))) return Exec::Stop;
  u64 offset = 0;
  u16 selector;
  std::memcpy(&offset, bytes, size);
  std::memcpy(&selector, bytes + size, 2);
  if (!load_segment(c, kSeg, selector)) return Exec::Stop;
  put_gpr(c.s, insn.operands[0].reg, size, offset);
  c.mode_changed();
  return Exec::Branch;
}

// ---- GDTR, IDTR ----

bool umip_blocks(Context& c) {
  if (c.cpl == 0 || !(c.s.cr4 & cr4::UMIP)) return false;
  c.gp0();
  return true;
}

template <bool kGdt>
Exec load_table(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0) return c.gp0();
  const unsigned base_size = c.code64 ? 8 : 4;
  u64 at;
  if (!mem_linear(c, insn, 2 + base_size, false, &at)) return Exec::Stop;
  u8 bytes[10];
  if (!c.mmu.read_bytes(at, bytes, 2 + base_size, static_cast<Seg>(insn.mem.seg))) return Exec::Stop;
  DescriptorTable t;
  t.base = 0;
  std::memcpy(&t.limit, bytes, 2);
  std::memcpy(&t.base, bytes + 2, base_size);
  if (c.code64 && !canonical(c, t.base)) return c.gp0();
  if (!c.code64 && far_operand_size(c, insn) == 2) t.base &= 0xffffff;
  (kGdt ? c.s.gdtr : c.s.idtr) = t;
  return Exec::Next;
}

template <bool kGdt>
Exec store_table(Context& c, const DecodedInsn& insn) {
  if (umip_blocks(c)) return Exec::Stop;
  const unsigned base_size = c.code64 ? 8 : 4;
  const DescriptorTable& t = kGdt ? c.s.gdtr : c.s.idtr;
  u8 bytes[10];
  std::memcpy(bytes, &t.limit, 2);
  std::memcpy(bytes + 2, &t.base, base_size);
  u64 at;
  if (!mem_linear(c, insn, 2 + base_size, true, &at)) return Exec::Stop;
  if (!c.mmu.write_bytes(at, bytes, 2 + base_size, static_cast<Seg>(insn.mem.seg))) return Exec::Stop;
  return Exec::Next;
}

// ---- LDTR, TR ----

template <bool kLdtr>
Exec store_selector(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  if (umip_blocks(c)) return Exec::Stop;
  const u16 selector = kLdtr ? c.s.ldtr.selector : c.s.tr.selector;
  return write_rm16(c, insn, insn.operands[0], selector) ? Exec::Next : Exec::Stop;
}

/// Checks common to LLDT and LTR for a system descriptor in the GDT.
bool system_descriptor(Context& c, u16 selector, Descriptor* d) {
  const u32 error = selector & kSelectorMask;
  if (selector & 4) {
    c.fault(vec::GP, error);
    return false;
  }
  if (!read_descriptor(c, selector, vec::GP, 0, d)) return false;
  const bool upper_type = c.s.long_mode() && ((d->high >> 40) & 0x1f) != 0;
  if (d->s() || upper_type) {
    c.fault(vec::GP, error);
    return false;
  }
  return true;
}

Exec lldt(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  if (c.cpl != 0) return c.gp0();
  u16 selector;
  if (!read_rm16(c, insn, insn.operands[0], &selector)) return Exec::Stop;
  VcpuState& s = c.s;
  if (is_null(selector)) {
    s.ldtr = Segment{};
    s.ldtr.selector = selector;
    s.ldtr.limit = 0;
    s.ldtr.s = 0;
    s.ldtr.type = kLdt;
    s.ldtr.present = 0;
    s.ldtr.unusable = 1;
    return Exec::Next;
  }
  Descriptor d;
  if (!system_descriptor(c, selector, &d)) return Exec::Stop;
  const u32 error = selector & kSelectorMask;
  if (d.type() != kLdt) return c.fault(vec::GP, error);
  if (!d.present()) return c.fault(vec::NP, error);
  if (s.long_mode() && !canonical(c, d.base())) return c.fault(vec::GP, error);
  s.ldtr = d.segment();
  return Exec::Next;
}

Exec ltr(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  if (c.cpl != 0) return c.gp0();
  u16 selector;
  if (!read_rm16(c, insn, insn.operands[0], &selector)) return Exec::Stop;
  if (is_null(selector)) return c.gp0();
  Descriptor d;
  if (!system_descriptor(c, selector, &d)) return Exec::Stop;
  const u32 error = selector & kSelectorMask;
  if (d.type() != kTss32 && (c.s.long_mode() || d.type() != kTss16)) return c.fault(vec::GP, error);
  if (!d.present()) return c.fault(vec::NP, error);
  if (c.s.long_mode() && !canonical(c, d.base())) return c.fault(vec::GP, error);
  if (!set_busy(c, d, true)) return Exec::Stop;
  c.s.tr = d.segment();
  c.s.tr.type |= 2;
  return Exec::Next;
}

// ---- LAR, LSL, VERR, VERW, ARPL ----

/// What LAR, LSL, VERR and VERW do with a selector they may not see: ZF cleared, no fault.
enum class Visible : u8 { Yes, No, Stop };

bool set_zf(Context& c, bool zf) {
  c.s.rflags = zf ? c.s.rflags | rflags::ZF : c.s.rflags & ~rflags::ZF;
  return zf;
}

Visible visible_descriptor(Context& c, u16 selector, Descriptor* d) {
  if (is_null(selector)) return Visible::No;
  switch (read_descriptor(c, selector, d)) {
    case Lookup::Stop: return Visible::Stop;
    case Lookup::Limit: return Visible::No;
    case Lookup::Ok: break;
  }
  if (!d->conforming() && (c.cpl > d->dpl() || (selector & 3) > d->dpl())) return Visible::No;
  return Visible::Yes;
}

bool lar_type(u8 type, bool lma) {
  if (lma) return type == kLdt || type == kTss32 || type == kTss32Busy || type == kCallGate32;
  return type == kTss16 || type == kLdt || type == kTss16Busy || type == kCallGate16 || type == kTaskGate ||
         type == kTss32 || type == kTss32Busy || type == kCallGate32;
}
bool lsl_type(u8 type, bool lma) {
  if (lma) return type == kLdt || type == kTss32 || type == kTss32Busy;
  return type == kTss16 || type == kLdt || type == kTss16Busy || type == kTss32 || type == kTss32Busy;
}

template <bool kLimit>
Exec lar_lsl(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  u16 selector;
  if (!read_rm16(c, insn, insn.operands[1], &selector)) return Exec::Stop;
  Descriptor d;
  const Visible v = visible_descriptor(c, selector, &d);
  if (v == Visible::Stop) return Exec::Stop;
  const bool lma = c.s.long_mode();
  const bool ok = v == Visible::Yes && (d.s() || (kLimit ? lsl_type(d.type(), lma) : lar_type(d.type(), lma)));
  if (set_zf(c, ok)) {
    const u64 value = kLimit ? d.limit() : (d.low >> 32) & 0xffff00;
    put_gpr(c.s, insn.operands[0].reg, insn.operands[0].size, value);
  }
  return Exec::Next;
}

template <bool kWriteCheck>
Exec verify(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  u16 selector;
  if (!read_rm16(c, insn, insn.operands[0], &selector)) return Exec::Stop;
  Descriptor d;
  const Visible v = visible_descriptor(c, selector, &d);
  if (v == Visible::Stop) return Exec::Stop;
  set_zf(c, v == Visible::Yes && (kWriteCheck ? d.writable_data() : d.readable()));
  return Exec::Next;
}

Exec arpl(Context& c, const DecodedInsn& insn) {
  if (!c.protected_mode) return c.ud();
  const Operand& dst = insn.operands[0];
  const u16 src = static_cast<u16>(c.s.gpr[insn.operands[1].reg & 15]);
  if (dst.kind != OperandKind::Mem) {
    u64& r = c.s.gpr[dst.reg & 15];
    if (set_zf(c, (r & 3) < (src & 3u))) r = (r & ~3ull) | (src & 3);
    return Exec::Next;
  }
  u64 at;
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  // Writes, and needs to be allowed to, only when the RPL changes (Zen 3, Sapphire Rapids).
  u16 selector;
  if (!mem_linear(c, insn, 2, false, &at) || !c.mmu.read(at, &selector, seg)) return Exec::Stop;
  if ((selector & 3) >= (src & 3)) {
    set_zf(c, false);
    return Exec::Next;
  }
  if (!mem_linear(c, insn, 2, true, &at)) return Exec::Stop;
  Mmu::Rmw rmw;
  if (!c.mmu.rmw_begin(at, 2, seg, &rmw)) return Exec::Stop;
  u16 value;
  std::memcpy(&value, rmw.host != nullptr ? rmw.host : rmw.buffer, 2);
  const bool less = (value & 3) < (src & 3);
  if (less) value = static_cast<u16>((value & ~3) | (src & 3));
  // SAFETY: rmw_begin gave two writable bytes.
  if (rmw.host != nullptr && less) std::memcpy(rmw.host, &value, 2);
  if (!c.mmu.rmw_end(rmw, &value, 2)) return Exec::Stop;
  set_zf(c, less);
  return Exec::Next;
}

}  // namespace

Handler select_segment(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::MovSeg: return insn.operands[0].kind == OperandKind::Seg ? mov_to_seg : mov_from_seg;
    case Op::PushSeg: return push_seg;
    case Op::PopSeg: return pop_seg;
    case Op::Lds: return load_far_pointer<DS>;
    case Op::Les: return load_far_pointer<ES>;
    case Op::Lfs: return load_far_pointer<FS>;
    case Op::Lgs: return load_far_pointer<GS>;
    case Op::Lss: return load_far_pointer<SS>;
    case Op::Lgdt: return load_table<true>;
    case Op::Lidt: return load_table<false>;
    case Op::Sgdt: return store_table<true>;
    case Op::Sidt: return store_table<false>;
    case Op::Lldt: return lldt;
    case Op::Ltr: return ltr;
    case Op::Sldt: return store_selector<true>;
    case Op::Str: return store_selector<false>;
    case Op::Lar: return lar_lsl<false>;
    case Op::Lsl: return lar_lsl<true>;
    case Op::Verr: return verify<false>;
    case Op::Verw: return verify<true>;
    case Op::Arpl: return arpl;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
