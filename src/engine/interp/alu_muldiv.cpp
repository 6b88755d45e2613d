#include <type_traits>

#include "engine/interp/alu.hpp"

/// MUL IMUL DIV IDIV and the decimal adjustments AAA AAD AAM AAS DAA DAS.
///
/// Flags:  the products' from the host's own instruction; the divisions leave them as they were (undefined).
/// Faults: #DE before anything changes.
namespace ring3::engine {
namespace {

/// Reads operand n, a register or memory.
template <class T, bool kMem>
RING3_INLINE bool source(Context& c, const DecodedInsn& i, unsigned n, T* out) {
  if constexpr (kMem) return read_mem<T>(c, i, out);
  *out = get_reg<T>(c.s, i.operands[n]);
  return true;
}

/// rDX:rAX (AX for bytes) = rAX * r/m.
template <class T, bool kSigned, bool kMem>
Exec mul1(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 0, &m)) return Exec::Stop;
  u64 low = c.s.gpr[RAX], high = c.s.gpr[RDX];
  u32 ax;
  // LAHF needs AH, so the product moves away first; MOV leaves flags alone.
  if constexpr (sizeof(T) == 1) {
    if constexpr (kSigned)
      asm("imul %2\n\tmov %0, %3\n\tlahf\n\tseto %%al\n\tmov %%eax, %1\n\tmov %3, %0"
          : "+&a"(low), "=&r"(ax), "+&r"(m), "=&r"(high) : : "cc");
    else
      asm("mul %2\n\tmov %0, %3\n\tlahf\n\tseto %%al\n\tmov %%eax, %1\n\tmov %3, %0"
          : "+&a"(low), "=&r"(ax), "+&r"(m), "=&r"(high) : : "cc");
    put_gpr_as<u16>(c.s, RAX, static_cast<u16>(low));
  } else {
    u64 keep;
    if constexpr (kSigned)
      asm("imul %4\n\tmov %0, %3\n\tlahf\n\tseto %%al\n\tmov %%eax, %2\n\tmov %3, %0"
          : "+&a"(low), "+&d"(high), "=&r"(ax), "=&r"(keep) : "r"(m) : "cc");
    else
      asm("mul %4\n\tmov %0, %3\n\tlahf\n\tseto %%al\n\tmov %%eax, %2\n\tmov %3, %0"
          : "+&a"(low), "+&d"(high), "=&r"(ax), "=&r"(keep) : "r"(m) : "cc");
    put_gpr_as<T>(c.s, RAX, static_cast<T>(low));
    put_gpr_as<T>(c.s, RDX, static_cast<T>(high));
  }
  put_status(c.s, ax);
  return Exec::Next;
}

template <class T>
RING3_INLINE u32 host_imul(T& d, T s) {
  u32 ax;
  asm("imul %2, %0\n\tlahf\n\tseto %%al" : "+r"(d), "=&a"(ax) : "r"(s) : "cc");
  return ax;
}
/// IMUL r, r/m       0F AF
template <class T, bool kMem>
Exec imul2(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 1, &m)) return Exec::Stop;
  T d = get_reg<T>(c.s, i.operands[0]);
  const u32 ax = host_imul(d, m);
  put_reg<T>(c.s, i.operands[0], d);
  put_status(c.s, ax);
  return Exec::Next;
}
/// IMUL r, r/m, imm  69, 6B
template <class T, bool kMem>
Exec imul3(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 1, &m)) return Exec::Stop;
  const u32 ax = host_imul(m, static_cast<T>(i.imm));
  put_reg<T>(c.s, i.operands[0], m);
  put_status(c.s, ax);
  return Exec::Next;
}

/// The dividend: AX, DX:AX, EDX:EAX or RDX:RAX.
template <class T>
RING3_INLINE u128 dividend(const VcpuState& s) {
  if constexpr (sizeof(T) == 1) return static_cast<u16>(s.gpr[RAX]);
  return static_cast<u128>(static_cast<T>(s.gpr[RDX])) << (8 * sizeof(T)) | static_cast<T>(s.gpr[RAX]);
}
template <class T>
RING3_INLINE void put_division(VcpuState& s, T quotient, T remainder) {
  if constexpr (sizeof(T) == 1) {
    put_gpr_as<u16>(s, RAX, static_cast<u16>(quotient | remainder << 8));
  } else {
    put_gpr_as<T>(s, RAX, quotient);
    put_gpr_as<T>(s, RDX, remainder);
  }
}
/// n / d where the quotient fits 64 bits: the host's DIV where the compiler would call a 128-bit routine.
RING3_INLINE void divide(u128 n, u64 d, u64* q, u64* r) {
  if ((n >> 64) == 0) {
    *q = static_cast<u64>(n) / d;
    *r = static_cast<u64>(n) % d;
    return;
  }
  u64 low = static_cast<u64>(n), high = static_cast<u64>(n >> 64);
  asm("div %2" : "+a"(low), "+d"(high) : "r"(d) : "cc");
  *q = low;
  *r = high;
}

template <class T, bool kMem>
Exec div(Context& c, const DecodedInsn& i) {
  T d;
  if (!source<T, kMem>(c, i, 0, &d)) return Exec::Stop;
  const u128 n = dividend<T>(c.s);
  if (static_cast<T>(n >> (8 * sizeof(T))) >= d) return c.fault(vec::DE);  // zero, or the quotient is too wide
  u64 q, r;
  divide(n, d, &q, &r);
  put_division<T>(c.s, static_cast<T>(q), static_cast<T>(r));
  return Exec::Next;
}

template <class T, bool kMem>
Exec idiv(Context& c, const DecodedInsn& i) {
  T d;
  if (!source<T, kMem>(c, i, 0, &d)) return Exec::Stop;
  constexpr unsigned kBits = 8 * sizeof(T);
  // By magnitudes: no signed overflow anywhere.
  u128 n = dividend<T>(c.s);
  const bool n_negative = (n >> (2 * kBits - 1)) & 1;
  if (n_negative) n = (~n + 1) & (kBits == 64 ? ~static_cast<u128>(0) : (static_cast<u128>(1) << (2 * kBits % 128)) - 1);
  const bool d_negative = d >> (kBits - 1);
  const T magnitude = d_negative ? static_cast<T>(0 - d) : d;
  const u128 high = n >> kBits;
  if (magnitude == 0 || high >= magnitude) return c.fault(vec::DE);
  u64 q, r;
  divide(n, magnitude, &q, &r);
  const bool q_negative = n_negative != d_negative;
  const u64 largest = static_cast<u64>(1) << (kBits - 1);
  if (q > largest || (q == largest && !q_negative)) return c.fault(vec::DE);
  put_division<T>(c.s, static_cast<T>(q_negative ? 0 - q : q), static_cast<T>(n_negative ? 0 - r : r));
  return Exec::Next;
}

// ---- decimal: not in 64-bit mode, so the host cannot run them ----

/// SZP flags of a byte result; the others as given.
void put_decimal(VcpuState& s, u8 result, u64 others) {
  u64 f = others;
  if (result == 0) f |= rflags::ZF;
  if (result & 0x80) f |= rflags::SF;
  if (!__builtin_parity(result)) f |= rflags::PF;
  s.rflags = (s.rflags & ~rflags::STATUS) | f;
}

template <bool kSubtract>
Exec aaa(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  u16 a = static_cast<u16>(s.gpr[RAX]);
  u64 f = 0;
  if ((a & 15) > 9 || (s.rflags & rflags::AF)) {
    a = static_cast<u16>(kSubtract ? a - 0x106 : a + 0x106);
    f = rflags::AF | rflags::CF;
  }
  a &= 0xff0f;
  put_gpr_as<u16>(s, RAX, a);
  put_decimal(s, static_cast<u8>(a), f);
  return Exec::Next;
}
Exec aad(Context& c, const DecodedInsn& i) {
  const u16 a = static_cast<u16>(c.s.gpr[RAX]);
  const u8 r = static_cast<u8>((a & 0xff) + (a >> 8) * static_cast<u8>(i.imm));
  put_gpr_as<u16>(c.s, RAX, r);
  put_decimal(c.s, r, 0);
  return Exec::Next;
}
Exec aam(Context& c, const DecodedInsn& i) {
  const u8 base = static_cast<u8>(i.imm);
  if (base == 0) return c.fault(vec::DE);
  const u8 a = static_cast<u8>(c.s.gpr[RAX]);
  put_gpr_as<u16>(c.s, RAX, static_cast<u16>((a / base) << 8 | a % base));
  put_decimal(c.s, a % base, 0);
  return Exec::Next;
}
template <bool kSubtract>
Exec daa(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  const u8 old = static_cast<u8>(s.gpr[RAX]);
  const bool carry = s.rflags & rflags::CF;
  u8 a = old;
  u64 f = 0;
  if ((old & 15) > 9 || (s.rflags & rflags::AF)) {
    f |= rflags::AF;
    if (kSubtract && (carry || old < 6)) f |= rflags::CF;
    a = static_cast<u8>(kSubtract ? a - 6 : a + 6);
  }
  if (old > 0x99 || carry) {
    a = static_cast<u8>(kSubtract ? a - 0x60 : a + 0x60);
    f |= rflags::CF;
  }
  put_gpr_as<u8>(s, RAX, a);
  put_decimal(s, a, f);
  return Exec::Next;
}

}  // namespace

Handler select_muldiv(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  switch (i.op) {
    case Op::Mul:
      return by_size(a.size, [&]<class T>() -> Handler { return is_mem(a) ? mul1<T, false, true> : mul1<T, false, false>; });
    case Op::Imul1:
      return by_size(a.size, [&]<class T>() -> Handler { return is_mem(a) ? mul1<T, true, true> : mul1<T, true, false>; });
    case Op::Imul2:
      return by_size_not8(a.size, [&]<class T>() -> Handler { return is_mem(b) ? imul2<T, true> : imul2<T, false>; });
    case Op::Imul3:
      return by_size_not8(a.size, [&]<class T>() -> Handler { return is_mem(b) ? imul3<T, true> : imul3<T, false>; });
    case Op::Div:
      return by_size(a.size, [&]<class T>() -> Handler { return is_mem(a) ? div<T, true> : div<T, false>; });
    case Op::Idiv:
      return by_size(a.size, [&]<class T>() -> Handler { return is_mem(a) ? idiv<T, true> : idiv<T, false>; });
    case Op::Aaa: return aaa<false>;
    case Op::Aas: return aaa<true>;
    case Op::Aad: return aad;
    case Op::Aam: return aam;
    case Op::Daa: return daa<false>;
    case Op::Das: return daa<true>;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
