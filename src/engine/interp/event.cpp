#include "engine/interp/segment_load.hpp"

/// Delivery of interrupts and exceptions.
///
/// Spec: Intel SDM vol. 3A ch. 6 (6.12.1 gates and stacks, 6.14 64-bit mode, table 6-5 double faults), ch. 20.3
///       (virtual-8086); vol. 2, INT n.
/// Order: everything that can fault is done before the first register changes. The frame is the last such
///        thing and is written whole or not at all.
namespace ring3::engine {
namespace {

bool is_soft(Event::Type t) { return t == Event::Type::Software || t == Event::Type::SoftwareException; }

/// Fault-class exceptions: the pushed RFLAGS has RF set, so that an instruction breakpoint on the
/// restarted instruction does not fire again.
bool pushes_rf(const Event& e) {
  if (e.type != Event::Type::Exception) return false;
  switch (e.vector) {
    case vec::DB: return e.payload & (1u << 13);  // general detect is a fault
    case vec::BP:
    case vec::OF:
    case vec::DF:
    case vec::MC: return false;
    default: return true;
  }
}

bool deliver_real(Context& c, const Event& e) {
  VcpuState& s = c.s;
  const u32 at = e.vector * 4u;
  if (at + 3 > s.idtr.limit) {
    c.fault(vec::GP, 0);
    return false;
  }
  u16 ip, cs;
  if (!c.mmu.read_system(wrap_linear(c, s.idtr.base + at), &ip)) return false;
  if (!c.mmu.read_system(wrap_linear(c, s.idtr.base + at + 2), &cs)) return false;
  StackFrame frame(s.seg[SS], 2, c.stack_size, s.gpr[RSP], false);
  frame.push(s.rflags & 0xffff);
  frame.push(s.seg[CS].selector);
  frame.push(s.rip & 0xffff);
  if (!frame.check(c, 0) || !frame.write(c)) return false;
  s.gpr[RSP] = frame.final_rsp();
  load_real(c, CS, cs);
  s.rip = ip;
  s.rflags &= ~(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
  return true;
}

bool deliver_task_gate(Context& c, const Event& e, const Descriptor& gate, u32 ext) {
  Descriptor tss;
  if (!read_task_descriptor(c, gate.gate_selector(), false, vec::GP, ext, &tss)) return false;
  return switch_task(c, tss, TaskSwitch::Event, c.s.rip, e.has_error ? &e.error : nullptr, ext);
}

bool deliver_protected(Context& c, const Event& e) {
  VcpuState& s = c.s;
  const bool lma = s.long_mode(), soft = is_soft(e.type), v86 = s.v8086();
  const u32 ext = soft ? 0 : 1;
  const u32 idt_error = e.vector * 8u + 2 + ext;

  // ---- the gate ----
  const u32 size = lma ? 16 : 8, at = e.vector * size;
  if (at + size - 1 > s.idtr.limit) {
    c.fault(vec::GP, idt_error);
    return false;
  }
  Descriptor gate;
  gate.linear = wrap_linear(c, s.idtr.base + at);
  if (!c.mmu.read_system(gate.linear, &gate.low)) return false;
  if (lma && !c.mmu.read_system(gate.linear + 8, &gate.high)) return false;
  const u8 type = gate.type();
  const bool valid = !gate.s() && (type == kIntGate32 || type == kTrapGate32 ||
                                   (!lma && (type == kTaskGate || type == kIntGate16 || type == kTrapGate16)));
  if (!valid || (soft && gate.dpl() < c.cpl)) {
    c.fault(vec::GP, idt_error);
    return false;
  }
  if (!gate.present()) {
    c.fault(vec::NP, idt_error);
    return false;
  }
  if (type == kTaskGate) return deliver_task_gate(c, e, gate, ext);

  // ---- the code segment ----
  const u16 cs_selector = gate.gate_selector();
  const u32 cs_error = (cs_selector & kSelectorMask) | ext;
  if (is_null(cs_selector)) {
    c.fault(vec::GP, ext);
    return false;
  }
  Descriptor code;
  if (!read_descriptor(c, cs_selector, vec::GP, ext, &code)) return false;
  if (!code.code() || code.dpl() > c.cpl || (lma && (!code.l() || code.db()))) {
    c.fault(vec::GP, cs_error);
    return false;
  }
  if (!code.present()) {
    c.fault(vec::NP, cs_error);
    return false;
  }
  const u8 cpl = code.conforming() ? c.cpl : code.dpl();
  const bool inner = cpl < c.cpl;
  if (v86 && (!inner || cpl != 0)) {
    c.fault(vec::GP, cs_error);
    return false;
  }

  // ---- the stack ----
  const unsigned ist = lma ? (gate.low >> 32) & 7 : 0;
  Segment new_ss = s.seg[SS];
  u64 sp = s.gpr[RSP];
  u32 stack_error = 0;
  if (lma) {
    if (ist != 0) {
      const u32 slot = ist * 8 + 28;
      if (slot + 7 > s.tr.limit) {
        c.fault(vec::TS, (s.tr.selector & kSelectorMask) | ext);
        return false;
      }
      if (!c.mmu.read_system(s.tr.base + slot, &sp)) return false;
    } else if (inner && !read_tss_stack(c, cpl, ext, nullptr, &sp)) {
      return false;
    }
    if (inner) new_ss = null_stack_segment(cpl);
    sp &= ~0xfull;
    stack_error = ext;
  } else if (inner) {
    u16 ss;
    if (!read_tss_stack(c, cpl, ext, &ss, &sp)) return false;
    if (!check_stack_segment(c, ss, cpl, false, vec::TS, ext, &new_ss)) return false;
    stack_error = (ss & kSelectorMask) | ext;
  }

  // ---- the frame ----
  const unsigned width = lma ? 8 : type >= kIntGate32 ? 4 : 2;
  const unsigned sp_size = lma ? 8 : new_ss.db ? 4 : 2;
  StackFrame frame(new_ss, width, sp_size, sp, inner);
  u64 flags = s.rflags;
  // An instruction breakpoint, and an interrupt between iterations of a string instruction, push the RF that the
  // run loop left.
  if (pushes_rf(e)) flags |= rflags::RF;
  else if (soft) flags &= ~rflags::RF;
  if (v86)
    for (Seg seg : {GS, FS, DS, ES}) frame.push(s.seg[seg].selector);
  if (inner || lma) {
    frame.push(s.seg[SS].selector);
    frame.push(s.gpr[RSP]);
  }
  frame.push(flags);
  frame.push(s.seg[CS].selector);
  frame.push(s.rip);
  if (e.has_error) frame.push(e.error);

  u64 rip = gate.gate_offset();
  if (width == 2) rip &= 0xffff;
  Segment cs = code.segment();
  if (!frame.check(c, stack_error) || !check_target(c, cs, rip, ext)) return false;
  if (!mark_accessed(c, code) || !frame.write(c)) return false;

  // ---- nothing faults from here on ----
  cs.type |= 1;
  cs.selector = (cs_selector & kSelectorMask) | cpl;
  s.seg[CS] = cs;
  if (inner) s.seg[SS] = new_ss;
  if (v86)
    for (Seg seg : {ES, DS, FS, GS}) load_null(c, seg, 0);
  s.gpr[RSP] = frame.final_rsp();
  s.rip = rip;
  s.rflags &= ~(rflags::TF | rflags::NT | rflags::VM | rflags::RF);
  if (type == kIntGate16 || type == kIntGate32) s.rflags &= ~rflags::IF;
  return true;
}

enum class Class : u8 { Benign, Contributory, PageFault, DoubleFault };
Class classify(const Event& e) {
  if (e.type != Event::Type::Exception) return Class::Benign;
  switch (e.vector) {
    case vec::DE:
    case vec::TS:
    case vec::NP:
    case vec::SS:
    case vec::GP: return Class::Contributory;
    case vec::PF: return Class::PageFault;
    case vec::DF: return Class::DoubleFault;
    default: return Class::Benign;
  }
}

/// Effects of an exception that do not depend on its delivery succeeding. Repeating them is harmless.
void record(Context& c, const Event& e) {
  VcpuState& s = c.s;
  if (e.type != Event::Type::Exception) return;
  if (e.vector == vec::PF) s.cr2 = e.payload;
  if (e.vector == vec::DB) {
    if (e.payload != 0) s.dr6 = (s.dr6 & ~0xfull) | (e.payload & 0xe00f);
    if (s.dr7 & (1u << 13)) {
      s.dr7 &= ~(1ull << 13);
      c.mode_changed();
    }
  }
}

}  // namespace

Delivered deliver_event(Context& c, const Event& event) {
  VcpuState& s = c.s;
  const u64 rip = s.rip;
  Event e = event;
  bool committed = false;  // a task switch took place: the old RIP is not to be restored
  for (;;) {
    record(c, e);
    const bool ok = s.real_mode() ? deliver_real(c, e) : deliver_protected(c, e);
    if (ok) {
      if (event.type == Event::Type::Nmi) s.nmi_blocked = true;
      s.sti_shadow = s.mov_ss_shadow = false;
      c.stop() = Stop{};
      c.mode_changed();
      return Delivered::Ok;
    }
    const Stop stop = c.stop();
    if (stop.kind == Stop::Kind::Trap) committed = true;
    if (stop.kind == Stop::Kind::Exit) {
      if (!committed) s.rip = rip;
      return Delivered::Exit;
    }
    // A fault while delivering a software interrupt is a fault of the INT instruction.
    if (is_soft(e.type) && stop.kind == Stop::Kind::Fault) {
      s.rip = rip - e.payload;
      if (!c.code64) s.rip = static_cast<u32>(s.rip);
      if (!c.protected_mode) s.rip &= 0xffff;
    }
    Event second;
    second.vector = stop.vector;
    second.has_error = stop.has_error && !s.real_mode();
    second.error = stop.error;
    second.payload = stop.payload;
    const Class a = classify(e), b = classify(second);
    const bool serious = b == Class::Contributory || b == Class::PageFault;
    if (a == Class::DoubleFault && serious) return Delivered::TripleFault;
    if ((a == Class::Contributory && b == Class::Contributory) || (a == Class::PageFault && serious)) {
      if (second.vector == vec::PF) s.cr2 = second.payload;
      second = Event{};
      second.vector = vec::DF;
      second.has_error = !s.real_mode();
    }
    e = second;
  }
}

}  // namespace ring3::engine
