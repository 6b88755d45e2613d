#include <type_traits>
#include <utility>

#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

/// Data movement: MOV and its extending forms, LEA, XCHG, CMOVcc, SETcc, sign extensions, LAHF/SAHF, XLAT.
///
/// Memory: an aligned access of up to 8 bytes is one host access.
/// Atomic: XCHG with memory always is, LOCK prefix or not.
namespace ring3::engine {
namespace {

template <class T>
Exec mov_rr(Context& c, const DecodedInsn& i) {
  put_reg<T>(c.s, i.operands[0], get_reg<T>(c.s, i.operands[1]));
  return Exec::Next;
}
template <class T>
Exec mov_ri(Context& c, const DecodedInsn& i) {
  put_reg<T>(c.s, i.operands[0], static_cast<T>(i.imm));
  return Exec::Next;
}
template <class T>
Exec mov_rm(Context& c, const DecodedInsn& i) {
  T v;
  if (!read_mem<T>(c, i, &v)) return Exec::Stop;
  put_reg<T>(c.s, i.operands[0], v);
  return Exec::Next;
}
template <class T>
Exec mov_mr(Context& c, const DecodedInsn& i) {
  return write_mem<T>(c, i, get_reg<T>(c.s, i.operands[1])) ? Exec::Next : Exec::Stop;
}
template <class T>
Exec mov_mi(Context& c, const DecodedInsn& i) {
  return write_mem<T>(c, i, static_cast<T>(i.imm)) ? Exec::Next : Exec::Stop;
}
Handler choose_mov(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  return by_size(a.size, [&]<class T>() -> Handler {
    if (is_reg(a)) return is_reg(b) ? mov_rr<T> : is_imm(b) ? mov_ri<T> : is_mem(b) ? mov_rm<T> : nullptr;
    if (is_mem(a)) return is_reg(b) ? mov_mr<T> : is_imm(b) ? mov_mi<T> : nullptr;
    return nullptr;
  });
}

template <class T>
RING3_INLINE T swap_bytes(T v) {
  if constexpr (sizeof(T) == 8) return __builtin_bswap64(v);
  if constexpr (sizeof(T) == 4) return __builtin_bswap32(v);
  return __builtin_bswap16(static_cast<u16>(v));
}
template <class T, bool kLoad>
Exec movbe(Context& c, const DecodedInsn& i) {
  if constexpr (kLoad) {
    T v;
    if (!read_mem<T>(c, i, &v)) return Exec::Stop;
    put_reg<T>(c.s, i.operands[0], swap_bytes(v));
    return Exec::Next;
  } else {
    return write_mem<T>(c, i, swap_bytes(get_reg<T>(c.s, i.operands[1]))) ? Exec::Next : Exec::Stop;
  }
}

/// MOVZX, MOVSX, MOVSXD: From may be signed.
template <class To, class From, bool kMem>
Exec extend(Context& c, const DecodedInsn& i) {
  using Raw = std::make_unsigned_t<From>;
  Raw v;
  if constexpr (kMem) {
    if (!read_mem<Raw>(c, i, &v)) return Exec::Stop;
  } else {
    v = get_reg<Raw>(c.s, i.operands[1]);
  }
  put_reg<To>(c.s, i.operands[0], static_cast<To>(static_cast<From>(v)));
  return Exec::Next;
}
template <bool kSigned>
Handler choose_extend(const DecodedInsn& i) {
  const bool mem = is_mem(i.operands[1]);
  return by_size_not8(i.operands[0].size, [&]<class To>() -> Handler {
    return by_size(i.operands[1].size, [&]<class Raw>() -> Handler {
      using From = std::conditional_t<kSigned, std::make_signed_t<Raw>, Raw>;
      // MOVSXD with a 16-bit destination reads 32 bits of memory and keeps the lower half.
      constexpr bool kNarrowing = kSigned && sizeof(To) == 2 && sizeof(Raw) == 4;
      if constexpr ((sizeof(Raw) <= sizeof(To) && sizeof(Raw) <= 4) || kNarrowing)
        return mem ? extend<To, From, true> : extend<To, From, false>;
      else
        return nullptr;
    });
  });
}

template <class T>
Exec lea(Context& c, const DecodedInsn& i) {
  put_reg<T>(c.s, i.operands[0], static_cast<T>(c.effective_address(i)));
  return Exec::Next;
}

template <class T>
Exec xchg_rr(Context& c, const DecodedInsn& i) {
  const T a = get_reg<T>(c.s, i.operands[0]), b = get_reg<T>(c.s, i.operands[1]);
  put_reg<T>(c.s, i.operands[0], b);
  put_reg<T>(c.s, i.operands[1], a);
  return Exec::Next;
}
/// kReg: which operand is the register.
template <class T, unsigned kReg>
Exec xchg_m(Context& c, const DecodedInsn& i) {
  const T source = get_reg<T>(c.s, i.operands[kReg]);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  u64 lin;
  if (!c.linear(seg, c.effective_address(i), sizeof(T), true, &lin)) return Exec::Stop;
  T old = 0;
  if (!modify_linear<T, true>(c, lin, seg, [&](T& d) {
        old = d;
        d = source;
      }))
    return Exec::Stop;
  put_reg<T>(c.s, i.operands[kReg], old);
  return Exec::Next;
}

/// CMOVcc r, r/m: memory is read and a 32-bit destination's upper half cleared whatever the condition.
template <unsigned kCondition, class T, bool kMem>
Exec cmov(Context& c, const DecodedInsn& i) {
  T v;
  if constexpr (kMem) {
    if (!read_mem<T>(c, i, &v)) return Exec::Stop;
  } else {
    v = get_reg<T>(c.s, i.operands[1]);
  }
  if (!condition<kCondition>(c.s.rflags)) v = get_reg<T>(c.s, i.operands[0]);
  put_reg<T>(c.s, i.operands[0], v);
  return Exec::Next;
}
template <unsigned kCondition, bool kMem>
Exec setcc(Context& c, const DecodedInsn& i) {
  const u8 v = condition<kCondition>(c.s.rflags) ? 1 : 0;
  if constexpr (kMem) return write_mem<u8>(c, i, v) ? Exec::Next : Exec::Stop;
  put_reg<u8>(c.s, i.operands[0], v);
  return Exec::Next;
}
template <std::size_t... kConditions>
Handler choose_cmov(const DecodedInsn& i, std::index_sequence<kConditions...>) {
  const unsigned condition_code = i.opcode & 15;
  Handler h = nullptr;
  const bool mem = is_mem(i.operands[1]);
  const auto pick = [&]<unsigned kCondition>() {
    h = by_size_not8(i.operands[0].size, [&]<class T>() -> Handler {
      return mem ? cmov<kCondition, T, true> : cmov<kCondition, T, false>;
    });
  };
  ((condition_code == kConditions ? pick.template operator()<kConditions>() : void(0)), ...);
  return h;
}
template <std::size_t... kConditions>
Handler choose_setcc(const DecodedInsn& i, std::index_sequence<kConditions...>) {
  static constexpr Handler kReg[] = {setcc<kConditions, false>...};
  static constexpr Handler kMem[] = {setcc<kConditions, true>...};
  return (is_mem(i.operands[0]) ? kMem : kReg)[i.opcode & 15];
}

/// CBW CWDE CDQE
template <class To, class From>
Exec cbw(Context& c, const DecodedInsn&) {
  put_gpr_as<To>(c.s, RAX, static_cast<To>(static_cast<From>(c.s.gpr[RAX])));
  return Exec::Next;
}
/// CWD CDQ CQO
template <class T>
Exec cwd(Context& c, const DecodedInsn&) {
  const bool negative = static_cast<std::make_signed_t<T>>(c.s.gpr[RAX]) < 0;
  put_gpr_as<T>(c.s, RDX, negative ? static_cast<T>(~static_cast<T>(0)) : static_cast<T>(0));
  return Exec::Next;
}

Exec lahf(Context& c, const DecodedInsn&) {
  c.s.gpr[RAX] = (c.s.gpr[RAX] & ~0xff00ull) | (c.s.rflags & 0xff) << 8;
  return Exec::Next;
}
Exec sahf(Context& c, const DecodedInsn&) {
  constexpr u64 kMask = rflags::STATUS & ~rflags::OF;
  c.s.rflags = (c.s.rflags & ~kMask) | (c.s.gpr[RAX] >> 8 & kMask);
  return Exec::Next;
}
/// SALC              D6, undocumented: AL = CF ? FF : 0.
Exec salc(Context& c, const DecodedInsn&) {
  put_gpr_as<u8>(c.s, RAX, c.s.rflags & rflags::CF ? 0xff : 0);
  return Exec::Next;
}
/// XLAT              AL = [rBX + AL]
Exec xlat(Context& c, const DecodedInsn& i) {
  const Seg seg = static_cast<Seg>(i.mem.seg);
  u64 lin;
  u8 v;
  if (!c.linear(seg, truncate(c.s.gpr[RBX] + static_cast<u8>(c.s.gpr[RAX]), i.addrsize), 1, false, &lin)) return Exec::Stop;
  if (!c.mmu.read(lin, &v, seg)) return Exec::Stop;
  put_gpr_as<u8>(c.s, RAX, v);
  return Exec::Next;
}
Exec nop(Context&, const DecodedInsn&) { return Exec::Next; }
Exec pause(Context&, const DecodedInsn&) {
  __builtin_ia32_pause();
  return Exec::Next;
}

}  // namespace

Handler select_move(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  constexpr auto kConditions = std::make_index_sequence<16>();
  switch (i.op) {
    case Op::Mov: return choose_mov(i);
    case Op::Movnti: return choose_mov(i);
    case Op::Movbe:
      return by_size_not8(is_mem(a) ? b.size : a.size,
                          [&]<class T>() -> Handler { return is_mem(b) ? movbe<T, true> : movbe<T, false>; });
    case Op::Movzx: return choose_extend<false>(i);
    case Op::Movsx:
    case Op::Movsxd: return choose_extend<true>(i);
    case Op::Lea: return by_size_not8(a.size, [&]<class T>() -> Handler { return is_mem(b) ? lea<T> : nullptr; });
    case Op::Xchg:
      return by_size(is_reg(a) ? a.size : b.size, [&]<class T>() -> Handler {
        if (is_reg(a) && is_reg(b)) return xchg_rr<T>;
        return is_reg(a) ? xchg_m<T, 0> : is_reg(b) ? xchg_m<T, 1> : nullptr;
      });
    case Op::Cmovcc: return choose_cmov(i, kConditions);
    case Op::Setcc: return choose_setcc(i, kConditions);
    case Op::Cbw: return i.opsize == 2 ? cbw<u16, i8> : i.opsize == 4 ? cbw<u32, i16> : cbw<u64, i32>;
    case Op::Cwd: return i.opsize == 2 ? cwd<u16> : i.opsize == 4 ? cwd<u32> : cwd<u64>;
    case Op::Lahf: return lahf;
    case Op::Sahf: return sahf;
    case Op::Xlat: return xlat;
    case Op::Pause: return pause;
    case Op::Nop:
    case Op::Endbr:
    case Op::Prefetch: return nop;
    case Op::Salc: return salc;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
