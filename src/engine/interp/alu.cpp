#include "engine/interp/alu.hpp"

#include "engine/interp/families.hpp"

/// ADD OR ADC SBB AND SUB XOR CMP TEST INC DEC NEG NOT XADD CMPXCHG CMPXCHG8B CMPXCHG16B.
///
/// Flags:  the host's own, from the same instruction (alu.hpp); undefined AF included.
/// Memory: a read-modify-write needs write permission before it reads.
/// Atomic: with LOCK, one host CMPXCHG loop on the guest's memory.
namespace ring3::engine {
namespace {

template <Alu kOp, class T>
RING3_INLINE void finish(Context& c, u32 ax) {
  if constexpr (kOp != Alu::Not) put_status(c.s, ax);
}

template <Alu kOp, class T>
Exec alu_rr(Context& c, const DecodedInsn& i) {
  T d = get_reg<T>(c.s, i.operands[0]);
  const u32 ax = alu<kOp, T>(d, get_reg<T>(c.s, i.operands[1]), c.s.rflags);
  if constexpr (alu_writes(kOp)) put_reg<T>(c.s, i.operands[0], d);
  finish<kOp, T>(c, ax);
  return Exec::Next;
}
template <Alu kOp, class T>
Exec alu_ri(Context& c, const DecodedInsn& i) {
  T d = get_reg<T>(c.s, i.operands[0]);
  const u32 ax = alu<kOp, T>(d, static_cast<T>(i.imm), c.s.rflags);
  if constexpr (alu_writes(kOp)) put_reg<T>(c.s, i.operands[0], d);
  finish<kOp, T>(c, ax);
  return Exec::Next;
}
template <Alu kOp, class T>
Exec alu_rm(Context& c, const DecodedInsn& i) {
  T source;
  if (!read_mem<T>(c, i, &source)) return Exec::Stop;
  T d = get_reg<T>(c.s, i.operands[0]);
  const u32 ax = alu<kOp, T>(d, source, c.s.rflags);
  if constexpr (alu_writes(kOp)) put_reg<T>(c.s, i.operands[0], d);
  finish<kOp, T>(c, ax);
  return Exec::Next;
}
/// Memory destination; the source is a register, or the immediate (also of unary operations, unused).
template <Alu kOp, class T, bool kImm, bool kLocked>
Exec alu_m(Context& c, const DecodedInsn& i) {
  const T source = kImm ? static_cast<T>(i.imm) : get_reg<T>(c.s, i.operands[1]);
  u32 ax = 0;
  if constexpr (alu_writes(kOp)) {
    const u64 flags = c.s.rflags;
    if (!modify_mem<T, kLocked>(c, i, [&](T& d) { ax = alu<kOp, T>(d, source, flags); })) return Exec::Stop;
  } else {
    T d;
    if (!read_mem<T>(c, i, &d)) return Exec::Stop;
    ax = alu<kOp, T>(d, source, c.s.rflags);
  }
  finish<kOp, T>(c, ax);
  return Exec::Next;
}

template <Alu kOp>
Handler choose(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  const bool locked = i.has(kLock);
  return by_size(a.size, [&]<class T>() -> Handler {
    if constexpr (alu_unary(kOp)) {
      if (is_reg(a)) return alu_ri<kOp, T>;
      if (is_mem(a)) return locked ? alu_m<kOp, T, true, true> : alu_m<kOp, T, true, false>;
      return nullptr;
    } else {
      if (is_reg(a)) return is_reg(b) ? alu_rr<kOp, T> : is_imm(b) ? alu_ri<kOp, T> : is_mem(b) ? alu_rm<kOp, T> : nullptr;
      if (!is_mem(a)) return nullptr;
      if (is_imm(b)) return locked && alu_writes(kOp) ? alu_m<kOp, T, true, alu_writes(kOp)> : alu_m<kOp, T, true, false>;
      if (is_reg(b)) return locked && alu_writes(kOp) ? alu_m<kOp, T, false, alu_writes(kOp)> : alu_m<kOp, T, false, false>;
      return nullptr;
    }
  });
}

// ---- XADD, CMPXCHG ----

/// XADD r/m, r    0F C0/C1. The sum goes to the destination, the old destination to the source.
template <class T>
Exec xadd_r(Context& c, const DecodedInsn& i) {
  const T old = get_reg<T>(c.s, i.operands[0]);
  T d = old;
  const u32 ax = alu<Alu::Add, T>(d, get_reg<T>(c.s, i.operands[1]), 0);
  put_reg<T>(c.s, i.operands[1], old);
  put_reg<T>(c.s, i.operands[0], d);
  put_status(c.s, ax);
  return Exec::Next;
}
template <class T, bool kLocked>
Exec xadd_m(Context& c, const DecodedInsn& i) {
  const T source = get_reg<T>(c.s, i.operands[1]);
  T old = 0;
  u32 ax = 0;
  if (!modify_mem<T, kLocked>(c, i, [&](T& d) {
        old = d;
        ax = alu<Alu::Add, T>(d, source, 0);
      }))
    return Exec::Stop;
  put_reg<T>(c.s, i.operands[1], old);
  put_status(c.s, ax);
  return Exec::Next;
}

/// CMPXCHG r/m, r    0F B0/B1
/// Memory: a write access either way. Width: on a match RAX is untouched, on a mismatch a 32-bit
/// accumulator write clears bits 63:32; the destination stays as it is (both vendors' CPUs, whatever SDM vol. 2 says).
template <class T>
Exec cmpxchg_r(Context& c, const DecodedInsn& i) {
  const T d = get_reg<T>(c.s, i.operands[0]);
  T acc = static_cast<T>(c.s.gpr[RAX]);
  const u32 ax = alu<Alu::Cmp, T>(acc, d, 0);
  if (acc == d) {
    put_reg<T>(c.s, i.operands[0], get_reg<T>(c.s, i.operands[1]));
  } else {
    put_gpr_as<T>(c.s, RAX, d);
  }
  put_status(c.s, ax);
  return Exec::Next;
}
template <class T, bool kLocked>
Exec cmpxchg_m(Context& c, const DecodedInsn& i) {
  const T source = get_reg<T>(c.s, i.operands[1]);
  const T acc = static_cast<T>(c.s.gpr[RAX]);
  T found = 0;
  if (!modify_mem<T, kLocked>(c, i, [&](T& d) {
        found = d;
        if (d == acc) d = source;
      }))
    return Exec::Stop;
  T left = acc;
  const u32 ax = alu<Alu::Cmp, T>(left, found, 0);
  if (found != acc) put_gpr_as<T>(c.s, RAX, found);
  put_status(c.s, ax);
  return Exec::Next;
}

/// CMPXCHG8B m64     0F C7 /1: EDX:EAX with ECX:EBX; only ZF changes.
template <bool kLocked>
Exec cmpxchg8b(Context& c, const DecodedInsn& i) {
  const u64 expected = static_cast<u32>(c.s.gpr[RAX]) | c.s.gpr[RDX] << 32;
  const u64 desired = static_cast<u32>(c.s.gpr[RBX]) | c.s.gpr[RCX] << 32;
  u64 found = 0;
  if (!modify_mem<u64, kLocked>(c, i, [&](u64& d) {
        found = d;
        if (d == expected) d = desired;
      }))
    return Exec::Stop;
  if (found == expected) {
    c.s.rflags |= rflags::ZF;
  } else {
    c.s.rflags &= ~rflags::ZF;
    c.s.gpr[RAX] = static_cast<u32>(found);
    c.s.gpr[RDX] = found >> 32;
  }
  return Exec::Next;
}

/// CMPXCHG16B m128   REX.W 0F C7 /1: RDX:RAX with RCX:RBX; #GP(0) unless 16-byte aligned; only ZF changes.
/// The host's own instruction, locked always: a 16-byte access is not single otherwise.
Exec cmpxchg16b(Context& c, const DecodedInsn& i) {
  const Seg seg = static_cast<Seg>(i.mem.seg);
  u64 lin;
  if (!c.linear(seg, c.effective_address(i), 16, true, &lin)) return Exec::Stop;
  if (lin & 15) return c.gp0();
  Mmu::Rmw rmw;
  if (!c.mmu.rmw_begin(lin, 16, seg, &rmw)) return Exec::Stop;
  u64 low = c.s.gpr[RAX], high = c.s.gpr[RDX];
  bool equal;
  u64 value[2] = {};
  if (rmw.host != nullptr) {
    // SAFETY: 16 writable bytes, aligned as the guest's address is (both are page offsets).
    asm volatile("lock cmpxchg16b (%3)\n\tsete %2"
                 : "+a"(low), "+d"(high), "=q"(equal)
                 : "r"(rmw.host), "b"(c.s.gpr[RBX]), "c"(c.s.gpr[RCX])
                 : "cc", "memory");
    std::memcpy(value, rmw.host, 16);
  } else {
    std::memcpy(value, rmw.buffer, 16);
    equal = value[0] == low && value[1] == high;
    low = value[0];
    high = value[1];
    if (equal) {
      value[0] = c.s.gpr[RBX];
      value[1] = c.s.gpr[RCX];
    }
  }
  if (!c.mmu.rmw_end(rmw, value, 16)) return Exec::Stop;
  if (equal) {
    c.s.rflags |= rflags::ZF;
  } else {
    c.s.rflags &= ~rflags::ZF;
    c.s.gpr[RAX] = low;
    c.s.gpr[RDX] = high;
  }
  return Exec::Next;
}

}  // namespace

Handler select_alu(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  const bool locked = i.has(kLock);
  switch (i.op) {
    case Op::Add: return choose<Alu::Add>(i);
    case Op::Or: return choose<Alu::Or>(i);
    case Op::Adc: return choose<Alu::Adc>(i);
    case Op::Sbb: return choose<Alu::Sbb>(i);
    case Op::And: return choose<Alu::And>(i);
    case Op::Sub: return choose<Alu::Sub>(i);
    case Op::Xor: return choose<Alu::Xor>(i);
    case Op::Cmp: return choose<Alu::Cmp>(i);
    case Op::Test: return choose<Alu::Test>(i);
    case Op::Inc: return choose<Alu::Inc>(i);
    case Op::Dec: return choose<Alu::Dec>(i);
    case Op::Neg: return choose<Alu::Neg>(i);
    case Op::Not: return choose<Alu::Not>(i);
    case Op::Xadd:
      return by_size(a.size, [&]<class T>() -> Handler {
        if (!is_reg(b)) return nullptr;
        if (is_reg(a)) return xadd_r<T>;
        return is_mem(a) ? (locked ? xadd_m<T, true> : xadd_m<T, false>) : nullptr;
      });
    case Op::Cmpxchg:
      return by_size(a.size, [&]<class T>() -> Handler {
        if (!is_reg(b)) return nullptr;
        if (is_reg(a)) return cmpxchg_r<T>;
        return is_mem(a) ? (locked ? cmpxchg_m<T, true> : cmpxchg_m<T, false>) : nullptr;
      });
    case Op::Cmpxchg8b: return is_mem(a) ? (locked ? cmpxchg8b<true> : cmpxchg8b<false>) : nullptr;
    case Op::Cmpxchg16b: return is_mem(a) ? cmpxchg16b : nullptr;
    default: break;
  }
  if (Handler h = select_muldiv(i)) return h;
  return select_bmi(i);
}

}  // namespace ring3::engine
