#include <type_traits>

#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

/// Shifts, rotates, bit tests and scans, counts, CRC32, BSWAP.
///
/// Flags:  the host's own. SAHF brings the guest's in first, because a rotate keeps most of them and a
///         masked count of zero keeps all.
/// Width:  a 32-bit register destination is written, and its upper half cleared, even by a count of zero.
namespace ring3::engine {
namespace {

enum class Shift : u8 { Rol, Ror, Rcl, Rcr, Shl, Shr, Sar };

/// ax: AH = status flags before; after: AH = status flags, AL = OF. count is not zero.
template <Shift kOp, class T>
RING3_INLINE void shift(T& d, u8 count, u32& ax) {
#define RING3_SHIFT(name) asm("sahf\n\t" name " %%cl, %0\n\tlahf\n\tseto %%al" : "+&r"(d), "+&a"(ax) : "c"(count) : "cc")
  if constexpr (kOp == Shift::Rol) RING3_SHIFT("rol");
  if constexpr (kOp == Shift::Ror) RING3_SHIFT("ror");
  if constexpr (kOp == Shift::Rcl) RING3_SHIFT("rcl");
  if constexpr (kOp == Shift::Rcr) RING3_SHIFT("rcr");
  if constexpr (kOp == Shift::Shl) RING3_SHIFT("shl");
  if constexpr (kOp == Shift::Shr) RING3_SHIFT("shr");
  if constexpr (kOp == Shift::Sar) RING3_SHIFT("sar");
#undef RING3_SHIFT
}

template <class T>
constexpr u8 kCountMask = sizeof(T) == 8 ? 63 : 31;

/// kCl: the count is CL, else the immediate (1 included).
template <bool kCl, class T>
RING3_INLINE u8 count_of(const VcpuState& s, const DecodedInsn& i) {
  return static_cast<u8>(kCl ? s.gpr[RCX] : static_cast<u64>(i.imm)) & kCountMask<T>;
}

template <Shift kOp, class T, bool kCl>
Exec shift_r(Context& c, const DecodedInsn& i) {
  const u8 count = count_of<kCl, T>(c.s, i);
  T d = get_reg<T>(c.s, i.operands[0]);
  if (count == 0) {
    put_reg<T>(c.s, i.operands[0], d);
    return Exec::Next;
  }
  u32 ax = status_ah(c.s.rflags);
  shift<kOp, T>(d, count, ax);
  put_reg<T>(c.s, i.operands[0], d);
  put_status(c.s, ax);
  return Exec::Next;
}
template <Shift kOp, class T, bool kCl>
Exec shift_m(Context& c, const DecodedInsn& i) {
  const u8 count = count_of<kCl, T>(c.s, i);
  u32 ax = 0;
  if (!modify_mem<T, false>(c, i, [&](T& d) {
        ax = status_ah(c.s.rflags);
        if (count != 0) shift<kOp, T>(d, count, ax);
      }))
    return Exec::Stop;
  if (count != 0) put_status(c.s, ax);
  return Exec::Next;
}
template <Shift kOp>
Handler choose(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  const bool cl = is_reg(b);
  return by_size(a.size, [&]<class T>() -> Handler {
    if (is_reg(a)) return cl ? shift_r<kOp, T, true> : shift_r<kOp, T, false>;
    if (is_mem(a)) return cl ? shift_m<kOp, T, true> : shift_m<kOp, T, false>;
    return nullptr;
  });
}

// ---- SHLD, SHRD ----

template <bool kLeft, class T>
RING3_INLINE void double_shift(T& d, T s, u8 count, u32& ax) {
  if constexpr (kLeft)
    asm("sahf\n\tshld %%cl, %3, %0\n\tlahf\n\tseto %%al" : "+&r"(d), "+&a"(ax) : "c"(count), "r"(s) : "cc");
  else
    asm("sahf\n\tshrd %%cl, %3, %0\n\tlahf\n\tseto %%al" : "+&r"(d), "+&a"(ax) : "c"(count), "r"(s) : "cc");
}
template <bool kLeft, class T, bool kCl, bool kMem>
Exec shift_double(Context& c, const DecodedInsn& i) {
  const u8 count = count_of<kCl, T>(c.s, i);
  const T source = get_reg<T>(c.s, i.operands[1]);
  u32 ax = 0;
  const auto operate = [&](T& d) {
    ax = status_ah(c.s.rflags);
    if (count != 0) double_shift<kLeft, T>(d, source, count, ax);
  };
  if constexpr (kMem) {
    if (!modify_mem<T, false>(c, i, operate)) return Exec::Stop;
  } else {
    T d = get_reg<T>(c.s, i.operands[0]);
    operate(d);
    put_reg<T>(c.s, i.operands[0], d);
  }
  if (count != 0) put_status(c.s, ax);
  return Exec::Next;
}
template <bool kLeft>
Handler choose_double(const DecodedInsn& i) {
  const bool cl = is_reg(i.operands[2]), mem = is_mem(i.operands[0]);
  return by_size_not8(i.operands[0].size, [&]<class T>() -> Handler {
    if (mem) return cl ? shift_double<kLeft, T, true, true> : shift_double<kLeft, T, false, true>;
    return cl ? shift_double<kLeft, T, true, false> : shift_double<kLeft, T, false, false>;
  });
}

// ---- bit tests: CF is the bit, the others stay as on the host ----

enum class Bit : u8 { Test, Set, Reset, Complement };

template <Bit kOp, class T>
RING3_INLINE bool bit_op(T& d, unsigned n) {
  const T mask = static_cast<T>(static_cast<T>(1) << n);
  const bool was = d & mask;
  if constexpr (kOp == Bit::Set) d = static_cast<T>(d | mask);
  if constexpr (kOp == Bit::Reset) d = static_cast<T>(d & ~mask);
  if constexpr (kOp == Bit::Complement) d = static_cast<T>(d ^ mask);
  return was;
}
RING3_INLINE void put_carry(VcpuState& s, bool carry) { s.rflags = (s.rflags & ~rflags::CF) | (carry ? rflags::CF : 0); }

template <Bit kOp, class T, bool kImm>
Exec bit_r(Context& c, const DecodedInsn& i) {
  T d = get_reg<T>(c.s, i.operands[0]);
  const u64 n = kImm ? static_cast<u64>(i.imm) : get_reg<T>(c.s, i.operands[1]);
  put_carry(c.s, bit_op<kOp, T>(d, n & (8 * sizeof(T) - 1)));
  if constexpr (kOp != Bit::Test) put_reg<T>(c.s, i.operands[0], d);
  return Exec::Next;
}
/// A register bit offset reaches beyond the operand: signed, in units of the operand size.
template <Bit kOp, class T, bool kImm, bool kLocked>
Exec bit_m(Context& c, const DecodedInsn& i) {
  constexpr unsigned kBits = 8 * sizeof(T);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  u64 offset = c.effective_address(i), n;
  if constexpr (kImm) {
    n = static_cast<u64>(i.imm);
  } else {
    const i64 distance = static_cast<std::make_signed_t<T>>(get_reg<T>(c.s, i.operands[1]));
    n = static_cast<u64>(distance);
    offset = truncate(offset + static_cast<u64>(distance >> std::countr_zero(kBits)) * sizeof(T), i.addrsize);
  }
  n &= kBits - 1;
  u64 lin;
  if (!c.linear(seg, offset, sizeof(T), kOp != Bit::Test, &lin)) return Exec::Stop;
  bool was = false;
  if constexpr (kOp == Bit::Test) {
    T d;
    if (!c.mmu.read(lin, &d, seg)) return Exec::Stop;
    was = bit_op<kOp, T>(d, static_cast<unsigned>(n));
  } else {
    if (!modify_linear<T, kLocked>(c, lin, seg, [&](T& d) { was = bit_op<kOp, T>(d, static_cast<unsigned>(n)); }))
      return Exec::Stop;
  }
  put_carry(c.s, was);
  return Exec::Next;
}
template <Bit kOp>
Handler choose_bit(const DecodedInsn& i) {
  const Operand &a = i.operands[0], &b = i.operands[1];
  const bool imm = is_imm(b), locked = i.has(kLock) && kOp != Bit::Test;
  return by_size_not8(a.size, [&]<class T>() -> Handler {
    if (is_reg(a)) return imm ? bit_r<kOp, T, true> : bit_r<kOp, T, false>;
    if (!is_mem(a)) return nullptr;
    if (imm) return locked ? bit_m<kOp, T, true, true> : bit_m<kOp, T, true, false>;
    return locked ? bit_m<kOp, T, false, true> : bit_m<kOp, T, false, false>;
  });
}

// ---- scans and counts ----

enum class Scan : u8 { Bsf, Bsr, Tzcnt, Lzcnt, Popcnt };

template <Scan kOp, class T, bool kMem>
Exec scan(Context& c, const DecodedInsn& i) {
  T m;
  if constexpr (kMem) {
    if (!read_mem<T>(c, i, &m)) return Exec::Stop;
  } else {
    m = get_reg<T>(c.s, i.operands[1]);
  }
  // BSF and BSR leave the register alone for a zero source: the host works on the whole of it.
  u64 whole = c.s.gpr[i.operands[0].reg & 15];
  u32 ax = status_ah(c.s.rflags);
#define RING3_SCAN(name)                                                                                       \
  do {                                                                                                         \
    if constexpr (sizeof(T) == 2)                                                                              \
      asm("sahf\n\t" name " %2, %w0\n\tlahf\n\tseto %%al" : "+&r"(whole), "+&a"(ax) : "r"(m) : "cc");          \
    else if constexpr (sizeof(T) == 4)                                                                         \
      asm("sahf\n\t" name " %2, %k0\n\tlahf\n\tseto %%al" : "+&r"(whole), "+&a"(ax) : "r"(m) : "cc");          \
    else                                                                                                       \
      asm("sahf\n\t" name " %2, %q0\n\tlahf\n\tseto %%al" : "+&r"(whole), "+&a"(ax) : "r"(m) : "cc");          \
  } while (0)
  if constexpr (kOp == Scan::Bsf) RING3_SCAN("bsf");
  if constexpr (kOp == Scan::Bsr) RING3_SCAN("bsr");
  if constexpr (kOp == Scan::Tzcnt) RING3_SCAN("tzcnt");
  if constexpr (kOp == Scan::Lzcnt) RING3_SCAN("lzcnt");
  if constexpr (kOp == Scan::Popcnt) RING3_SCAN("popcnt");
#undef RING3_SCAN
  c.s.gpr[i.operands[0].reg & 15] = whole;
  put_status(c.s, ax);
  return Exec::Next;
}
template <Scan kOp>
Handler choose_scan(const DecodedInsn& i) {
  const bool mem = is_mem(i.operands[1]);
  return by_size_not8(i.operands[0].size,
                      [&]<class T>() -> Handler { return mem ? scan<kOp, T, true> : scan<kOp, T, false>; });
}

/// CRC32 r, r/m      F2 0F 38 F0/F1: no flags.
template <class T, bool kMem>
Exec crc32(Context& c, const DecodedInsn& i) {
  T m;
  if constexpr (kMem) {
    if (!read_mem<T>(c, i, &m)) return Exec::Stop;
  } else {
    m = get_reg<T>(c.s, i.operands[1]);
  }
  u64 sum = static_cast<u32>(c.s.gpr[i.operands[0].reg & 15]);
  if constexpr (sizeof(T) == 8)
    asm("crc32 %1, %0" : "+r"(sum) : "r"(m));
  else
    asm("crc32 %1, %k0" : "+r"(sum) : "r"(m));
  c.s.gpr[i.operands[0].reg & 15] = sum;
  return Exec::Next;
}

/// BSWAP r           0F C8+r. 16 bits: undefined, so whatever the host does.
template <class T>
Exec bswap(Context& c, const DecodedInsn& i) {
  T d = get_reg<T>(c.s, i.operands[0]);
  if constexpr (sizeof(T) == 8) d = __builtin_bswap64(d);
  if constexpr (sizeof(T) == 4) d = __builtin_bswap32(d);
  if constexpr (sizeof(T) == 2) {
    u64 a = d;
    asm(".byte 0x66, 0x0f, 0xc8" : "+a"(a));
    d = static_cast<T>(a);
  }
  put_reg<T>(c.s, i.operands[0], d);
  return Exec::Next;
}

}  // namespace

Handler select_shift(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Rol: return choose<Shift::Rol>(i);
    case Op::Ror: return choose<Shift::Ror>(i);
    case Op::Rcl: return choose<Shift::Rcl>(i);
    case Op::Rcr: return choose<Shift::Rcr>(i);
    case Op::Shl: return choose<Shift::Shl>(i);
    case Op::Shr: return choose<Shift::Shr>(i);
    case Op::Sar: return choose<Shift::Sar>(i);
    case Op::Shld: return choose_double<true>(i);
    case Op::Shrd: return choose_double<false>(i);
    case Op::Bt: return choose_bit<Bit::Test>(i);
    case Op::Bts: return choose_bit<Bit::Set>(i);
    case Op::Btr: return choose_bit<Bit::Reset>(i);
    case Op::Btc: return choose_bit<Bit::Complement>(i);
    case Op::Bsf: return choose_scan<Scan::Bsf>(i);
    case Op::Bsr: return choose_scan<Scan::Bsr>(i);
    case Op::Tzcnt: return choose_scan<Scan::Tzcnt>(i);
    case Op::Lzcnt: return choose_scan<Scan::Lzcnt>(i);
    case Op::Popcnt: return choose_scan<Scan::Popcnt>(i);
    case Op::Crc32:
      return by_size(i.operands[1].size, [&]<class T>() -> Handler {
        return is_mem(i.operands[1]) ? crc32<T, true> : crc32<T, false>;
      });
    case Op::Bswap:
      return by_size_not8(i.operands[0].size, [&]<class T>() -> Handler { return bswap<T>; });
    default: return nullptr;
  }
}

}  // namespace ring3::engine
