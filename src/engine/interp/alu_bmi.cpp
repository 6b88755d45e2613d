#include <type_traits>

#include "engine/interp/alu.hpp"

/// BMI1, BMI2, ADX: the host's own instructions, which a guest is offered only where the host has them.
namespace ring3::engine {
namespace {

/// Operand n: memory when kMem, else a register.
template <class T, bool kMem>
RING3_INLINE bool source(Context& c, const DecodedInsn& i, unsigned n, T* out) {
  if constexpr (kMem) return read_mem<T>(c, i, out);
  *out = get_reg<T>(c.s, i.operands[n]);
  return true;
}

enum class Bmi : u8 { Andn, Bextr, Blsi, Blsmsk, Blsr, Bzhi, Pdep, Pext, Sarx, Shlx, Shrx };

/// dest = a OP b, in the order the AT&T form wants: "op b, a, dest". Sets *ax for those that change flags.
template <Bmi kOp, class T>
RING3_INLINE T bmi(T a, T b, u32* ax) {
  T d = 0;
#define RING3_FLAGS3(name) asm(name " %3, %2, %0\n\tlahf\n\tseto %%al" : "=&r"(d), "=&a"(*ax) : "r"(a), "r"(b) : "cc")
#define RING3_FLAGS2(name) asm(name " %2, %0\n\tlahf\n\tseto %%al" : "=&r"(d), "=&a"(*ax) : "r"(a) : "cc")
#define RING3_PLAIN3(name) asm(name " %2, %1, %0" : "=r"(d) : "r"(a), "r"(b))
  if constexpr (kOp == Bmi::Andn) RING3_FLAGS3("andn");
  if constexpr (kOp == Bmi::Bextr) RING3_FLAGS3("bextr");
  if constexpr (kOp == Bmi::Bzhi) RING3_FLAGS3("bzhi");
  if constexpr (kOp == Bmi::Blsi) RING3_FLAGS2("blsi");
  if constexpr (kOp == Bmi::Blsmsk) RING3_FLAGS2("blsmsk");
  if constexpr (kOp == Bmi::Blsr) RING3_FLAGS2("blsr");
  if constexpr (kOp == Bmi::Pdep) RING3_PLAIN3("pdep");
  if constexpr (kOp == Bmi::Pext) RING3_PLAIN3("pext");
#undef RING3_FLAGS3
#undef RING3_FLAGS2
#undef RING3_PLAIN3
  constexpr unsigned kMask = 8 * sizeof(T) - 1;
  if constexpr (kOp == Bmi::Sarx) d = static_cast<T>(static_cast<std::make_signed_t<T>>(a) >> (b & kMask));
  if constexpr (kOp == Bmi::Shlx) d = static_cast<T>(a << (b & kMask));
  if constexpr (kOp == Bmi::Shrx) d = static_cast<T>(a >> (b & kMask));
  return d;
}

/// kFirst, kSecond: which operands are a and b; kMemory: the one that is r/m (0: none is memory).
template <Bmi kOp, class T, unsigned kFirst, unsigned kSecond, unsigned kMemory>
Exec bmi3(Context& c, const DecodedInsn& i) {
  T a, b = 0;
  if (!source<T, kMemory == kFirst>(c, i, kFirst, &a)) return Exec::Stop;
  if constexpr (kSecond != 0)
    if (!source<T, kMemory == kSecond>(c, i, kSecond, &b)) return Exec::Stop;
  u32 ax = 0;
  put_reg<T>(c.s, i.operands[0], bmi<kOp, T>(a, b, &ax));
  if constexpr (kOp <= Bmi::Bzhi) put_status(c.s, ax);
  return Exec::Next;
}

template <Bmi kOp, unsigned kFirst, unsigned kSecond, unsigned kRm>
Handler choose(const DecodedInsn& i) {
  const bool mem = is_mem(i.operands[kRm]);
  const unsigned size = i.operands[0].size;
  if (size == 4) return mem ? bmi3<kOp, u32, kFirst, kSecond, kRm> : bmi3<kOp, u32, kFirst, kSecond, 0>;
  if (size == 8) return mem ? bmi3<kOp, u64, kFirst, kSecond, kRm> : bmi3<kOp, u64, kFirst, kSecond, 0>;
  return nullptr;
}

/// MULX high, low, r/m: rDX * r/m; the high half is written last.
template <class T, bool kMem>
Exec mulx(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 2, &m)) return Exec::Stop;
  const u128 product = static_cast<u128>(static_cast<T>(c.s.gpr[RDX])) * m;
  put_reg<T>(c.s, i.operands[1], static_cast<T>(product));
  put_reg<T>(c.s, i.operands[0], static_cast<T>(product >> (8 * sizeof(T))));
  return Exec::Next;
}

/// RORX r, r/m, imm
template <class T, bool kMem>
Exec rorx(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 1, &m)) return Exec::Stop;
  constexpr unsigned kBits = 8 * sizeof(T);
  const unsigned n = static_cast<unsigned>(i.imm) & (kBits - 1);
  put_reg<T>(c.s, i.operands[0], static_cast<T>(m >> n | m << ((kBits - n) & (kBits - 1))));
  return Exec::Next;
}

/// ADCX (CF) and ADOX (OF) r, r/m: unsigned add with that one flag as carry in and out.
template <class T, bool kMem, u64 kFlag>
Exec adx(Context& c, const DecodedInsn& i) {
  T m;
  if (!source<T, kMem>(c, i, 1, &m)) return Exec::Stop;
  const u128 sum = static_cast<u128>(get_reg<T>(c.s, i.operands[0])) + m + ((c.s.rflags & kFlag) ? 1 : 0);
  put_reg<T>(c.s, i.operands[0], static_cast<T>(sum));
  const bool carry = (sum >> (8 * sizeof(T))) & 1;
  c.s.rflags = carry ? c.s.rflags | kFlag : c.s.rflags & ~kFlag;
  return Exec::Next;
}

template <u64 kFlag>
Handler choose_adx(const DecodedInsn& i) {
  const bool mem = is_mem(i.operands[1]);
  if (i.operands[0].size == 8) return mem ? adx<u64, true, kFlag> : adx<u64, false, kFlag>;
  return mem ? adx<u32, true, kFlag> : adx<u32, false, kFlag>;
}

}  // namespace

Handler select_bmi(const DecodedInsn& i) {
  const bool wide = i.operands[0].size == 8;
  switch (i.op) {
    case Op::Andn: return choose<Bmi::Andn, 1, 2, 2>(i);
    case Op::Bextr: return choose<Bmi::Bextr, 1, 2, 1>(i);
    case Op::Bzhi: return choose<Bmi::Bzhi, 1, 2, 1>(i);
    case Op::Blsi: return choose<Bmi::Blsi, 1, 0, 1>(i);
    case Op::Blsmsk: return choose<Bmi::Blsmsk, 1, 0, 1>(i);
    case Op::Blsr: return choose<Bmi::Blsr, 1, 0, 1>(i);
    case Op::Pdep: return choose<Bmi::Pdep, 1, 2, 2>(i);
    case Op::Pext: return choose<Bmi::Pext, 1, 2, 2>(i);
    case Op::Sarx: return choose<Bmi::Sarx, 1, 2, 1>(i);
    case Op::Shlx: return choose<Bmi::Shlx, 1, 2, 1>(i);
    case Op::Shrx: return choose<Bmi::Shrx, 1, 2, 1>(i);
    case Op::Mulx:
      if (wide) return is_mem(i.operands[2]) ? mulx<u64, true> : mulx<u64, false>;
      return is_mem(i.operands[2]) ? mulx<u32, true> : mulx<u32, false>;
    case Op::Rorx:
      if (wide) return is_mem(i.operands[1]) ? rorx<u64, true> : rorx<u64, false>;
      return is_mem(i.operands[1]) ? rorx<u32, true> : rorx<u32, false>;
    case Op::Adcx: return choose_adx<rflags::CF>(i);
    case Op::Adox: return choose_adx<rflags::OF>(i);
    default: return nullptr;
  }
}

}  // namespace ring3::engine
