#include "engine/interp/families.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

/// Far control transfers: JMP, CALL, RET, IRET, and the instructions that raise software interrupts.
///
/// Spec:   Intel SDM vol. 2 (the instruction pages), vol. 3A 5.8 (gates, stack switches), 7.3, 20.2.
/// Faults: all are found before the first register changes; the frame of a CALL is written whole or not at all.
namespace ring3::engine {
namespace {

u64 mask_to(u64 v, unsigned size) { return size == 2 ? v & 0xffff : size == 4 ? static_cast<u32>(v) : v; }

/// The target of a direct or indirect far transfer.
bool far_target(Context& c, const DecodedInsn& insn, unsigned size, u16* selector, u64* offset) {
  if (insn.operands[0].kind == OperandKind::FarPtr) {
    *selector = static_cast<u16>(insn.disp);
    *offset = mask_to(static_cast<u64>(insn.imm), size);
    return true;
  }
  u64 at;
  if (!mem_linear(c, insn, size + 2, false, &at)) return false;
  u8 bytes[10];
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  if (!c.mmu.read_bytes(at, bytes, size + 2, seg)) return false;
  *offset = 0;
  std::memcpy(offset, bytes, size);
  std::memcpy(selector, bytes + size, 2);
  return true;
}

void set_cs(Context& c, const Descriptor& d, u8 cpl) {
  Segment cs = d.segment();
  cs.type |= 1;
  cs.selector = (d.selector & kSelectorMask) | cpl;
  c.s.seg[CS] = cs;
}

/// A code segment in long mode is either 64-bit or not; both L and D set is reserved.
bool bad_long_bits(const Context& c, const Descriptor& d) { return c.s.long_mode() && d.l() && d.db(); }

Exec real_transfer(Context& c, unsigned size, u16 selector, u64 offset, bool call) {
  VcpuState& s = c.s;
  if (offset > s.seg[CS].limit) return c.gp0();
  if (call) {
    StackFrame frame(s.seg[SS], size, c.stack_size, s.gpr[RSP], false);
    frame.push(s.seg[CS].selector);
    frame.push(s.rip);
    if (!frame.check(c, 0) || !frame.write(c)) return Exec::Stop;
    s.gpr[RSP] = frame.final_rsp();
  }
  if (s.v8086()) load_v86(c, CS, selector);
  else load_real(c, CS, selector);
  s.rip = offset;
  c.mode_changed();
  return Exec::Branch;
}

/// JMP or CALL straight to a code segment: the level stays.
Exec to_code(Context& c, Descriptor& d, unsigned size, u64 offset, bool call) {
  VcpuState& s = c.s;
  const u32 error = d.selector & kSelectorMask;
  if (bad_long_bits(c, d)) return c.fault(vec::GP, error);
  if (d.conforming() ? d.dpl() > c.cpl : (d.selector & 3) > c.cpl || d.dpl() != c.cpl) return c.fault(vec::GP, error);
  if (!d.present()) return c.fault(vec::NP, error);
  StackFrame frame(s.seg[SS], size, c.stack_size, s.gpr[RSP], false);
  if (call) {
    frame.push(s.seg[CS].selector);
    frame.push(s.rip);
    if (!frame.check(c, 0)) return Exec::Stop;
  }
  if (!check_target(c, d.segment(), offset, 0) || !mark_accessed(c, d)) return Exec::Stop;
  if (call) {
    if (!frame.write(c)) return Exec::Stop;
    s.gpr[RSP] = frame.final_rsp();
  }
  set_cs(c, d, c.cpl);
  s.rip = offset;
  c.mode_changed();
  return Exec::Branch;
}

/// CALL through a gate to a more privileged level: a new stack, with parameters copied.
Exec call_inner(Context& c, const Descriptor& gate, Descriptor& code, u64 offset) {
  VcpuState& s = c.s;
  const bool lma = s.long_mode();
  const u8 cpl = code.dpl();
  const unsigned width = lma ? 8 : gate.type() == kCallGate32 ? 4 : 2;
  u16 ss_selector = 0;
  u64 sp;
  if (!read_tss_stack(c, cpl, 0, &ss_selector, &sp)) return Exec::Stop;
  Segment ss = null_stack_segment(cpl);
  u32 stack_error = 0;
  if (!lma) {
    if (!check_stack_segment(c, ss_selector, cpl, false, vec::TS, 0, &ss)) return Exec::Stop;
    stack_error = ss_selector & kSelectorMask;
  }
  StackFrame frame(ss, width, lma ? 8 : ss.db ? 4 : 2, sp, true);
  frame.push(s.seg[SS].selector);
  frame.push(s.gpr[RSP]);
  const unsigned parameters = lma ? 0 : (gate.low >> 32) & 31;
  for (unsigned i = parameters; i-- > 0;) {
    u64 v;
    if (!peek_stack(c, width, i, 0, &v)) return Exec::Stop;
    frame.push(v);
  }
  frame.push(s.seg[CS].selector);
  frame.push(s.rip);
  if (!frame.check(c, stack_error) || !check_target(c, code.segment(), offset, 0)) return Exec::Stop;
  if (!mark_accessed(c, code) || !frame.write(c)) return Exec::Stop;
  s.seg[SS] = ss;
  s.gpr[RSP] = frame.final_rsp();
  set_cs(c, code, cpl);
  s.rip = offset;
  c.mode_changed();
  return Exec::Branch;
}

Exec through_call_gate(Context& c, const Descriptor& gate, bool call) {
  const bool lma = c.s.long_mode();
  const u32 gate_error = gate.selector & kSelectorMask;
  if (gate.dpl() < c.cpl || (gate.selector & 3) > gate.dpl()) return c.fault(vec::GP, gate_error);
  if (lma && ((gate.high >> 40) & 0x1f) != 0) return c.fault(vec::GP, gate_error);
  if (!gate.present()) return c.fault(vec::NP, gate_error);
  const u16 selector = gate.gate_selector();
  const u32 error = selector & kSelectorMask;
  if (is_null(selector)) return c.gp0();
  Descriptor code;
  if (!read_descriptor(c, selector, vec::GP, 0, &code)) return Exec::Stop;
  if (!code.code() || code.dpl() > c.cpl) return c.fault(vec::GP, error);
  if (lma && (!code.l() || code.db())) return c.fault(vec::GP, error);
  if (!call && !code.conforming() && code.dpl() != c.cpl) return c.fault(vec::GP, error);
  if (!code.present()) return c.fault(vec::NP, error);
  u64 offset = gate.gate_offset();
  if (gate.type() == kCallGate16) offset &= 0xffff;
  if (call && !code.conforming() && code.dpl() < c.cpl) return call_inner(c, gate, code, offset);
  const unsigned width = lma ? 8 : gate.type() == kCallGate32 ? 4 : 2;
  // The level stays: as a transfer to the code segment with CPL for its RPL.
  code.selector = (selector & kSelectorMask) | c.cpl;
  const u8 stack_size = c.stack_size;
  if (lma) c.stack_size = 8;  // the push is that of 64-bit mode, also from compatibility mode
  const Exec e = to_code(c, code, width, offset, call);
  if (e == Exec::Stop) c.stack_size = stack_size;
  return e;
}

Exec to_task(Context& c, const Descriptor& tss, bool call) {
  return switch_task(c, tss, call ? TaskSwitch::Call : TaskSwitch::Jmp, c.s.rip, nullptr, 0) ? Exec::Branch : Exec::Stop;
}

template <bool kCall>
Exec jmp_call_far(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  const unsigned size = far_operand_size(c, insn);
  u16 selector;
  u64 offset;
  if (!far_target(c, insn, size, &selector, &offset)) return Exec::Stop;
  if (!c.protected_mode) return real_transfer(c, size, selector, offset, kCall);
  if (is_null(selector)) return c.gp0();
  Descriptor d;
  if (!read_descriptor(c, selector, vec::GP, 0, &d)) return Exec::Stop;
  if (d.code()) return to_code(c, d, size, offset, kCall);
  const u32 error = selector & kSelectorMask;
  if (d.s()) return c.fault(vec::GP, error);
  if (s.long_mode()) return d.type() == kCallGate32 ? through_call_gate(c, d, kCall) : c.fault(vec::GP, error);
  switch (d.type()) {
    case kCallGate16:
    case kCallGate32: return through_call_gate(c, d, kCall);
    case kTaskGate: {
      if (d.dpl() < c.cpl || (selector & 3) > d.dpl()) return c.fault(vec::GP, error);
      if (!d.present()) return c.fault(vec::NP, error);
      Descriptor tss;
      if (!read_task_descriptor(c, d.gate_selector(), false, vec::GP, 0, &tss)) return Exec::Stop;
      return to_task(c, tss, kCall);
    }
    case kTss16:
    case kTss32:
      if (d.dpl() < c.cpl || (selector & 3) > d.dpl() || (selector & 4)) return c.fault(vec::GP, error);
      if (!d.present()) return c.fault(vec::NP, error);
      return to_task(c, d, kCall);
    default: return c.fault(vec::GP, error);
  }
}

/// The code segment of a return: not to a more privileged level.
bool return_code(Context& c, u16 selector, Descriptor* d) {
  if (is_null(selector)) {
    c.gp0();
    return false;
  }
  if (!read_descriptor(c, selector, vec::GP, 0, d)) return false;
  const u32 error = selector & kSelectorMask;
  const u8 rpl = selector & 3;
  if (!d->code() || bad_long_bits(c, *d) || rpl < c.cpl || (d->conforming() ? d->dpl() > rpl : d->dpl() != rpl)) {
    c.fault(vec::GP, error);
    return false;
  }
  if (!d->present()) {
    c.fault(vec::NP, error);
    return false;
  }
  return true;
}

/// RSP after a return that popped `popped`: only SP of a 16-bit stack is loaded.
u64 returned_rsp(const Context& c, const Segment& cs, const Segment& ss, u64 popped, unsigned imm) {
  if (c.s.long_mode() && cs.l) return popped + imm;
  if (ss.db) return static_cast<u32>(popped + imm);
  return (c.s.gpr[RSP] & 0xffff0000) | ((popped + imm) & 0xffff);
}

Exec ret_far(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  const unsigned size = far_operand_size(c, insn);
  const unsigned imm = insn.operands[0].kind == OperandKind::Imm ? static_cast<u16>(insn.imm) : 0;
  u64 rip, cs;
  if (!peek_stack(c, size, 0, 0, &rip) || !peek_stack(c, size, 1, 0, &cs)) return Exec::Stop;
  if (!c.protected_mode) {
    if (rip > s.seg[CS].limit) return c.gp0();
    if (s.v8086()) load_v86(c, CS, static_cast<u16>(cs));
    else load_real(c, CS, static_cast<u16>(cs));
    s.gpr[RSP] = advance_rsp(s.gpr[RSP], c.stack_size, static_cast<i64>(2 * size + imm));
    s.rip = rip;
    c.mode_changed();
    return Exec::Branch;
  }
  Descriptor d;
  if (!return_code(c, static_cast<u16>(cs), &d)) return Exec::Stop;
  const u8 cpl = cs & 3;
  if (cpl == c.cpl) {
    if (!check_target(c, d.segment(), rip, 0) || !mark_accessed(c, d)) return Exec::Stop;
    s.gpr[RSP] = advance_rsp(s.gpr[RSP], c.stack_size, static_cast<i64>(2 * size + imm));
    set_cs(c, d, cpl);
    s.rip = rip;
    c.mode_changed();
    return Exec::Branch;
  }
  u64 sp, ss_selector;
  if (!peek_stack(c, size, 2, imm, &sp) || !peek_stack(c, size, 3, imm, &ss_selector)) return Exec::Stop;
  Segment ss;
  const bool target64 = s.long_mode() && d.l();
  if (!check_stack_segment(c, static_cast<u16>(ss_selector), cpl, target64, vec::GP, 0, &ss)) return Exec::Stop;
  if (!check_target(c, d.segment(), rip, 0) || !mark_accessed(c, d)) return Exec::Stop;
  s.gpr[RSP] = returned_rsp(c, d.segment(), ss, sp, imm);
  s.seg[SS] = ss;
  set_cs(c, d, cpl);
  s.rip = rip;
  drop_inner_segments(c, cpl);
  c.mode_changed();
  return Exec::Branch;
}

// ---- IRET ----

/// NMIs are unblocked by the attempt, also when it faults (SDM vol. 3A 6.7.1); a stop for the VMM is no attempt.
Exec iret_done(Context& c, Exec e) {
  if (e == Exec::Stop && c.stop().kind == Stop::Kind::Exit) return e;
  if (c.s.nmi_blocked) {
    c.s.nmi_blocked = false;
    c.env.nmi_unblocked();
  }
  return e;
}

u64 merge_flags(u64 old, u64 popped, u64 change) {
  return (old & ~change) | (popped & change) | rflags::FIXED1;
}

constexpr u64 kIret16 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;

u64 iret_change_mask(const Context& c, unsigned size) {
  u64 change = kIret16;
  if (size != 2) change |= rflags::RF | rflags::AC | rflags::ID;
  if (c.cpl <= ((c.s.rflags >> 12) & 3)) change |= rflags::IF;
  if (c.cpl == 0) {
    change |= rflags::IOPL;
    if (size != 2) change |= rflags::VIF | rflags::VIP;
  }
  return change;
}

Exec iret_real(Context& c, unsigned size) {
  VcpuState& s = c.s;
  const bool v86 = s.v8086();
  if (v86 && (s.rflags & rflags::IOPL) != rflags::IOPL) return c.gp0();
  u64 rip, cs, flags;
  if (!peek_stack(c, size, 0, 0, &rip) || !peek_stack(c, size, 1, 0, &cs) || !peek_stack(c, size, 2, 0, &flags))
    return Exec::Stop;
  if (rip > s.seg[CS].limit) return c.gp0();
  u64 change = kIret16 | rflags::IF;
  if (!v86) change |= rflags::IOPL;
  if (size == 4) change |= rflags::RF | rflags::AC | rflags::ID;
  s.rflags = merge_flags(s.rflags & ~rflags::RF, flags, change);
  s.gpr[RSP] = advance_rsp(s.gpr[RSP], c.stack_size, static_cast<i64>(3 * size));
  if (v86) load_v86(c, CS, static_cast<u16>(cs));
  else load_real(c, CS, static_cast<u16>(cs));
  s.rip = rip;
  c.mode_changed();
  return Exec::Branch;
}

Exec iret_task(Context& c) {
  VcpuState& s = c.s;
  u16 link;
  if (!c.mmu.read_system(wrap_linear(c, s.tr.base), &link)) return Exec::Stop;
  Descriptor tss;
  if (!read_task_descriptor(c, link, true, vec::TS, 0, &tss)) return Exec::Stop;
  return switch_task(c, tss, TaskSwitch::Iret, s.rip, nullptr, 0) ? Exec::Branch : Exec::Stop;
}

Exec iret_to_v86(Context& c, u64 rip, u64 cs, u64 flags) {
  VcpuState& s = c.s;
  u64 v[6];  // ESP, SS, ES, DS, FS, GS
  for (unsigned i = 0; i < 6; ++i)
    if (!peek_stack(c, 4, 3 + i, 0, &v[i])) return Exec::Stop;
  if (rip > 0xffff) return c.gp0();
  s.rflags = (flags & 0x3f7fd5) | rflags::FIXED1;
  load_v86(c, CS, static_cast<u16>(cs));
  load_v86(c, SS, static_cast<u16>(v[1]));
  load_v86(c, ES, static_cast<u16>(v[2]));
  load_v86(c, DS, static_cast<u16>(v[3]));
  load_v86(c, FS, static_cast<u16>(v[4]));
  load_v86(c, GS, static_cast<u16>(v[5]));
  s.gpr[RSP] = static_cast<u32>(v[0]);
  s.rip = rip;
  c.mode_changed();
  return Exec::Branch;
}

Exec iret_protected(Context& c, unsigned size) {
  VcpuState& s = c.s;
  if (s.rflags & rflags::NT) return s.long_mode() ? c.gp0() : iret_task(c);
  u64 rip, cs, flags;
  if (!peek_stack(c, size, 0, 0, &rip) || !peek_stack(c, size, 1, 0, &cs) || !peek_stack(c, size, 2, 0, &flags))
    return Exec::Stop;
  if (size == 4 && (flags & rflags::VM) && c.cpl == 0 && !s.long_mode()) return iret_to_v86(c, rip, cs, flags);
  Descriptor d;
  if (!return_code(c, static_cast<u16>(cs), &d)) return Exec::Stop;
  const u8 cpl = cs & 3;
  const bool pops_stack = c.code64 || cpl != c.cpl;
  u64 sp = 0, ss_selector = 0;
  Segment ss = s.seg[SS];
  const bool target64 = s.long_mode() && d.l();
  if (pops_stack) {
    if (!peek_stack(c, size, 3, 0, &sp) || !peek_stack(c, size, 4, 0, &ss_selector)) return Exec::Stop;
    if (!check_stack_segment(c, static_cast<u16>(ss_selector), cpl, target64, vec::GP, 0, &ss)) return Exec::Stop;
  }
  if (!check_target(c, d.segment(), rip, 0) || !mark_accessed(c, d)) return Exec::Stop;
  const bool outer = cpl != c.cpl;
  s.rflags = merge_flags(s.rflags & ~rflags::RF, flags, iret_change_mask(c, size));
  if (pops_stack) {
    s.gpr[RSP] = returned_rsp(c, d.segment(), ss, sp, 0);
    s.seg[SS] = ss;
  } else {
    s.gpr[RSP] = advance_rsp(s.gpr[RSP], c.stack_size, static_cast<i64>(3 * size));
  }
  set_cs(c, d, cpl);
  s.rip = rip;
  if (outer) drop_inner_segments(c, cpl);
  c.mode_changed();
  return Exec::Branch;
}

Exec iret(Context& c, const DecodedInsn& insn) {
  return iret_done(c, c.protected_mode ? iret_protected(c, insn.opsize) : iret_real(c, insn.opsize));
}

// ---- software interrupts: traps that the run loop delivers ----

Exec raise(Context& c, const DecodedInsn& insn, u8 vector, bool soft) {
  Stop stop = Stop::fault(vector);
  stop.kind = Stop::Kind::Trap;
  stop.soft = soft;
  stop.payload = soft ? insn.length : 0;
  c.stop() = stop;
  return Exec::Stop;
}

Exec int3(Context& c, const DecodedInsn& insn) { return raise(c, insn, vec::BP, true); }
Exec int1(Context& c, const DecodedInsn& insn) { return raise(c, insn, vec::DB, false); }
Exec into(Context& c, const DecodedInsn& insn) {
  return c.s.rflags & rflags::OF ? raise(c, insn, vec::OF, true) : Exec::Next;
}
Exec int_n(Context& c, const DecodedInsn& insn) {
  if (c.s.v8086() && (c.s.rflags & rflags::IOPL) != rflags::IOPL) return c.gp0();
  return raise(c, insn, static_cast<u8>(insn.imm), true);
}

}  // namespace

Handler select_far(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::JmpFar: return jmp_call_far<false>;
    case Op::CallFar: return jmp_call_far<true>;
    case Op::RetFar: return ret_far;
    case Op::Iret: return iret;
    case Op::Int3: return int3;
    case Op::Int: return int_n;
    case Op::Into: return into;
    case Op::Int1: return int1;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
