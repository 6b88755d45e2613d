#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

/// PUSH POP PUSHA POPA PUSHF POPF ENTER LEAVE.
///
/// Width:  the operand size says how much is moved, the stack segment's size (Context::stack_size) how much
///         of rSP is used.
/// Faults: rSP changes last. Virtual-8086 mode without IOPL 3 makes PUSHF and POPF #GP(0): CR4.VME is not offered.
namespace ring3::engine {
namespace {

template <class T>
Exec push_r(Context& c, const DecodedInsn& i) {
  return push_value<T>(c, get_reg<T>(c.s, i.operands[0])) ? Exec::Next : Exec::Stop;
}
template <class T>
Exec push_i(Context& c, const DecodedInsn& i) {
  return push_value<T>(c, static_cast<T>(i.imm)) ? Exec::Next : Exec::Stop;
}
template <class T>
Exec push_m(Context& c, const DecodedInsn& i) {
  T v;
  return read_mem<T>(c, i, &v) && push_value<T>(c, v) ? Exec::Next : Exec::Stop;
}
template <class T>
Exec pop_r(Context& c, const DecodedInsn& i) {
  T v;
  if (!peek_value<T>(c, 0, &v)) return Exec::Stop;
  put_rsp(c, c.s.gpr[RSP] + sizeof(T));
  put_reg<T>(c.s, i.operands[0], v);  // POP rSP ends with the value popped
  return Exec::Next;
}
/// An address relative to rSP uses its value after the pop.
template <class T>
Exec pop_m(Context& c, const DecodedInsn& i) {
  T v;
  if (!peek_value<T>(c, 0, &v)) return Exec::Stop;
  const u64 rsp = c.s.gpr[RSP];
  put_rsp(c, rsp + sizeof(T));
  if (write_mem<T>(c, i, v)) return Exec::Next;
  c.s.gpr[RSP] = rsp;
  return Exec::Stop;
}

/// PUSHA: rAX rCX rDX rBX, rSP as it was, rBP rSI rDI, downwards. Checked whole before the first write.
template <class T>
Exec pusha(Context& c, const DecodedInsn&) {
  const u64 mask = stack_mask(c);
  u64 lin[8];
  for (unsigned n = 0; n < 8; n++) {
    const u64 sp = (c.s.gpr[RSP] - (n + 1) * sizeof(T)) & mask;
    if (!c.linear(SS, sp, sizeof(T), true, &lin[n]) || !c.mmu.check_write(lin[n], sizeof(T), SS)) return Exec::Stop;
  }
  for (unsigned n = 0; n < 8; n++)
    if (!c.mmu.write(lin[n], static_cast<T>(c.s.gpr[n]), SS)) return Exec::Stop;
  put_rsp(c, c.s.gpr[RSP] - 8 * sizeof(T));
  return Exec::Next;
}
template <class T>
Exec popa(Context& c, const DecodedInsn&) {
  T v[8];
  for (unsigned n = 0; n < 8; n++)
    if (!peek_value<T>(c, n * sizeof(T), &v[7 - n])) return Exec::Stop;
  put_rsp(c, c.s.gpr[RSP] + 8 * sizeof(T));
  for (unsigned n = 0; n < 8; n++)
    if (n != RSP) put_gpr_as<T>(c.s, n, v[n]);
  return Exec::Next;
}

/// PUSHF: VM and RF are clear in the image.
template <class T>
Exec pushf(Context& c, const DecodedInsn&) {
  if (c.s.v8086() && (c.s.rflags & rflags::IOPL) != rflags::IOPL) return c.gp0();
  return push_value<T>(c, static_cast<T>(c.s.rflags & ~(rflags::VM | rflags::RF))) ? Exec::Next : Exec::Stop;
}
/// POPF: VM, VIF, VIP stay; RF is cleared; IOPL changes at CPL 0 only, IF when CPL <= IOPL, both silently kept
/// otherwise (SDM vol. 2, table of POPF's effects).
template <class T>
Exec popf(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  const u64 iopl = (s.rflags & rflags::IOPL) >> 12;
  if (s.v8086() && iopl != 3) return c.gp0();
  T v;
  if (!peek_value<T>(c, 0, &v)) return Exec::Stop;
  u64 change = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
  if (sizeof(T) > 2) change |= rflags::AC | rflags::ID;
  if (c.cpl == 0) change |= rflags::IOPL;
  if (c.cpl <= iopl) change |= rflags::IF;
  put_rsp(c, s.gpr[RSP] + sizeof(T));
  s.rflags = (s.rflags & ~(change | rflags::RF)) | (v & change) | rflags::FIXED1;
  c.mode_changed();
  return Exec::Branch;
}

/// ENTER imm16, imm8. T: what is pushed. The frame pointers of outer levels are copied through rBP in
/// the stack's width.
template <class T>
Exec enter(Context& c, const DecodedInsn& i) {
  VcpuState& s = c.s;
  const u64 mask = stack_mask(c);
  const u64 size = static_cast<u16>(i.imm);
  const unsigned level = static_cast<unsigned>(i.disp) & 31;
  u64 sp = s.gpr[RSP], bp = s.gpr[RBP];
  const auto push = [&](T v) {
    const u64 to = (sp - sizeof(T)) & mask;
    u64 lin;
    if (!c.linear(SS, to, sizeof(T), true, &lin) || !c.mmu.write(lin, v, SS)) return false;
    sp = to;
    return true;
  };
  if (!push(static_cast<T>(bp))) return Exec::Stop;
  const u64 frame = sp;
  if (level > 0) {
    for (unsigned n = 1; n < level; n++) {
      bp = (bp - sizeof(T)) & mask;
      u64 lin;
      T v;
      if (!c.linear(SS, bp, sizeof(T), false, &lin) || !c.mmu.read(lin, &v, SS) || !push(v)) return Exec::Stop;
    }
    if (!push(static_cast<T>(frame))) return Exec::Stop;
  }
  sp = (sp - size) & mask;
  // A write at the final stack pointer must be possible.
  u64 lin;
  if (!c.linear(SS, sp, sizeof(T), true, &lin) || !c.mmu.check_write(lin, sizeof(T), SS)) return Exec::Stop;
  put_gpr_as<T>(s, RBP, static_cast<T>(frame));
  put_rsp(c, sp);
  return Exec::Next;
}
/// LEAVE: rSP = rBP in the stack's width, then pop rBP.
template <class T>
Exec leave(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  const u64 sp = s.gpr[RBP] & stack_mask(c);
  u64 lin;
  T v;
  if (!c.linear(SS, sp, sizeof(T), false, &lin) || !c.mmu.read(lin, &v, SS)) return Exec::Stop;
  put_rsp(c, sp + sizeof(T));
  put_gpr_as<T>(s, RBP, v);
  return Exec::Next;
}

}  // namespace

Handler select_stack(const DecodedInsn& i) {
  const Operand& a = i.operands[0];
  return by_size_not8(i.opsize, [&]<class T>() -> Handler {
    switch (i.op) {
      case Op::Push: return is_reg(a) ? push_r<T> : is_imm(a) ? push_i<T> : is_mem(a) ? push_m<T> : nullptr;
      case Op::Pop: return is_reg(a) ? pop_r<T> : is_mem(a) ? pop_m<T> : nullptr;
      case Op::Pusha: return pusha<T>;
      case Op::Popa: return popa<T>;
      case Op::Pushf: return pushf<T>;
      case Op::Popf: return popf<T>;
      case Op::Enter: return enter<T>;
      case Op::Leave: return leave<T>;
      default: return nullptr;
    }
  });
}

}  // namespace ring3::engine
