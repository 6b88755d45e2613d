#include <type_traits>
#include <utility>

#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

/// Near control flow: JMP Jcc JCXZ LOOP LOOPE LOOPNE CALL RET, and BOUND.
///
/// Width:  the target is truncated to the operand size.
/// Faults: a target outside the code segment's limit, or not canonical, is #GP(0) at the branch, with
///         nothing changed.
namespace ring3::engine {
namespace {

/// T: u16, u32 or u64, the operand size. Checks a target.
template <class T>
RING3_INLINE bool target_ok(Context& c, u64 target) {
  if constexpr (sizeof(T) == 8) {
    if (canonical(target)) [[likely]] return true;
  } else {
    if (c.code64 || target <= c.s.seg[CS].limit) [[likely]] return true;
  }
  c.gp0();
  return false;
}
template <class T>
RING3_INLINE Exec jump(Context& c, u64 target) {
  target = static_cast<T>(target);
  if (!target_ok<T>(c, target)) return Exec::Stop;
  c.s.rip = target;
  return Exec::Branch;
}
template <class T>
RING3_INLINE u64 relative(const Context& c, const DecodedInsn& i) { return c.s.rip + static_cast<u64>(i.imm); }

/// A register or memory operand that holds the target.
template <class T, bool kMem>
RING3_INLINE bool read_target(Context& c, const DecodedInsn& i, T* out) {
  if constexpr (kMem) return read_mem<T>(c, i, out);
  *out = get_reg<T>(c.s, i.operands[0]);
  return true;
}

template <class T>
Exec jmp_rel(Context& c, const DecodedInsn& i) { return jump<T>(c, relative<T>(c, i)); }
template <class T, bool kMem>
Exec jmp_ind(Context& c, const DecodedInsn& i) {
  T target;
  return read_target<T, kMem>(c, i, &target) ? jump<T>(c, target) : Exec::Stop;
}
template <unsigned kCondition, class T>
Exec jcc(Context& c, const DecodedInsn& i) {
  if (!condition<kCondition>(c.s.rflags)) return Exec::Branch;
  return jump<T>(c, relative<T>(c, i));
}
template <std::size_t... kConditions>
Handler choose_jcc(const DecodedInsn& i, std::index_sequence<kConditions...>) {
  static constexpr Handler k16[] = {jcc<kConditions, u16>...};
  static constexpr Handler k32[] = {jcc<kConditions, u32>...};
  static constexpr Handler k64[] = {jcc<kConditions, u64>...};
  return (i.opsize == 8 ? k64 : i.opsize == 4 ? k32 : k16)[i.opcode & 15];
}

/// JCXZ JECXZ JRCXZ: by address size.
template <class T>
Exec jcxz(Context& c, const DecodedInsn& i) {
  if (truncate(c.s.gpr[RCX], i.addrsize) != 0) return Exec::Branch;
  return jump<T>(c, relative<T>(c, i));
}
/// LOOPcc: rCX by address size; ZF of the flags as they are.
template <class T, Op kOp>
Exec loop(Context& c, const DecodedInsn& i) {
  const u64 count = truncate(c.s.gpr[RCX] - 1, i.addrsize);
  const bool zero = c.s.rflags & rflags::ZF;
  const bool taken = count != 0 && (kOp == Op::Loop || (kOp == Op::Loope) == zero);
  if (taken && jump<T>(c, relative<T>(c, i)) == Exec::Stop) return Exec::Stop;
  c.s.gpr[RCX] = i.addrsize == 2 ? (c.s.gpr[RCX] & ~0xffffull) | count : count;
  return Exec::Branch;
}

template <class T>
RING3_INLINE Exec call(Context& c, u64 target) {
  target = static_cast<T>(target);
  if (!target_ok<T>(c, target) || !push_value<T>(c, static_cast<T>(c.s.rip))) return Exec::Stop;
  c.s.rip = target;
  return Exec::Branch;
}
template <class T>
Exec call_rel(Context& c, const DecodedInsn& i) { return call<T>(c, relative<T>(c, i)); }
template <class T, bool kMem>
Exec call_ind(Context& c, const DecodedInsn& i) {
  T target;
  return read_target<T, kMem>(c, i, &target) ? call<T>(c, target) : Exec::Stop;
}
template <class T>
Exec ret(Context& c, const DecodedInsn& i) {
  T target;
  if (!peek_value<T>(c, 0, &target) || !target_ok<T>(c, target)) return Exec::Stop;
  put_rsp(c, c.s.gpr[RSP] + sizeof(T) + static_cast<u16>(i.imm));
  c.s.rip = target;
  return Exec::Branch;
}

/// BOUND r, m        62 /r, not in 64-bit mode: #BR when the signed index is outside [lower, upper].
/// Faults: an index below the lower bound is found before the upper one is read by Intel's processors, not by AMD's.
template <class T>
Exec bound(Context& c, const DecodedInsn& i) {
  using Signed = std::make_signed_t<T>;
  const Seg seg = static_cast<Seg>(i.mem.seg);
  const u64 offset = c.effective_address(i);
  u64 lin;
  T lower, upper;
  if (!c.linear(seg, offset, sizeof(T), false, &lin) || !c.mmu.read(lin, &lower, seg)) return Exec::Stop;
  const Signed index = static_cast<Signed>(get_reg<T>(c.s, i.operands[0]));
  if (!c.features.amd && index < static_cast<Signed>(lower)) return c.fault(vec::BR);
  if (!c.linear(seg, truncate(offset + sizeof(T), i.addrsize), sizeof(T), false, &lin) || !c.mmu.read(lin, &upper, seg))
    return Exec::Stop;
  if (index < static_cast<Signed>(lower) || index > static_cast<Signed>(upper)) return c.fault(vec::BR);
  return Exec::Next;
}

}  // namespace

Handler select_branch(const DecodedInsn& i) {
  const Operand& a = i.operands[0];
  return by_size_not8(i.opsize, [&]<class T>() -> Handler {
    switch (i.op) {
      case Op::Jmp:
        if (is_reg(a)) return jmp_ind<T, false>;
        return is_mem(a) ? jmp_ind<T, true> : jmp_rel<T>;
      case Op::Jcc: return choose_jcc(i, std::make_index_sequence<16>());
      case Op::Jcxz: return jcxz<T>;
      case Op::Loop: return loop<T, Op::Loop>;
      case Op::Loope: return loop<T, Op::Loope>;
      case Op::Loopne: return loop<T, Op::Loopne>;
      case Op::Call:
        if (is_reg(a)) return call_ind<T, false>;
        return is_mem(a) ? call_ind<T, true> : call_rel<T>;
      case Op::Ret: return ret<T>;
      case Op::Bound:
        if constexpr (sizeof(T) < 8) return bound<T>;
        return nullptr;
      default: return nullptr;
    }
  });
}

}  // namespace ring3::engine
