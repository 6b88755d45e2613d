#include <bit>

#include "engine/translate/builder.hpp"

/// MOVS STOS LODS SCAS CMPS, with REP those that store; CLD and STD. Addresses of the mode's width, no segment base.
///
/// Pieces: a repeated instruction runs the host's own on the host addresses, over as many elements as lie
///         inside one page of each side. After each piece rCX, rSI and rDI are exact and attention is polled;
///         what cannot go on (a fault, a device, an element across a page end) is interpreted from there.
///         Host and guest addresses differ by the same amount for every byte of a page, and the pieces keep
///         the order of the elements, so copies that feed on themselves come out alike.
/// DF:     lives in VcpuState; where it is set, the instruction is interpreted.
namespace ring3::engine {
namespace {

// BlockBuilder's kValueSlot and kRaxSlot: no flags are restored while these hold something.
constexpr u32 kTargetSlot = frame::kScratch + 16, kSavedSlot = frame::kScratch + 8;
constexpr u8 kNotEqual = 5, kEqual = 4, kBelow = 2, kAbove = 7;

Encoding with_imm32(Encoding e, u32 value) {
  e.imm_size = 4;
  for (unsigned n = 0; n < 4; n++) e.imm[n] = static_cast<u8>(value >> (8 * n));
  return e;
}
/// reg op= rm, 64 bits.
Encoding alu64(u8 opcode, u8 reg, u8 rm) { return {.w = true, .opcode = opcode, .reg = reg, .rm = rm}; }
constexpr u8 kSubFrom = 0x2b, kAddTo = 0x03, kCompare = 0x3b;

/// An instruction whose opcode's low bit tells bytes from words, for elements of this size.
Encoding sized(u8 opcode, u8 size) {
  Encoding e;
  e.p66 = size == 2;
  e.w = size == 8;
  e.opcode = static_cast<u8>(opcode | (size == 1 ? 0 : 1));
  return e;
}
Encoding sized(u8 opcode, u8 size, u8 reg, const HostMem& mem) {
  Encoding e = sized(opcode, size);
  e.reg = reg;
  e.memory = true;
  e.mem = mem;
  e.rex_forced = true;  // byte registers are never AH..BH
  return e;
}
constexpr u8 kLoad = 0x8a, kStore = 0x88, kCompareWith = 0x3a;

}  // namespace

void BlockBuilder::emit_direction_check() {
  e_.load(kScratch0, HostMem::frame(kRflags));
  e_.encode(with_imm32({.opcode = 0xf7, .reg = 0, .memory = true, .mem = HostMem::at(kScratch0)},
                       static_cast<u32>(rflags::DF)));
  e_.jcc(kNotEqual, interpret_label());
}

bool BlockBuilder::string(const DecodedInsn& i) {
  const u8 size = i.opsize;
  if (i.addrsize != word() || (size != 1 && size != 2 && size != 4 && size != 8)) return false;
  const bool from = i.op == Op::Movs || i.op == Op::Lods || i.op == Op::Cmps;
  if (from && (i.mem.seg == FS || i.mem.seg == GS || (code32() && i.mem.seg == CS)))
    return false;
  if (i.has(kRep | kRepne)) return (i.op == Op::Movs || i.op == Op::Stos) && repeated_string(i);

  Address source, target;
  source.base = RSI;
  target.base = RDI;
  source.narrow = source.linear32 = target.narrow = target.linear32 = code32();
  const i32 step = size;
  clobber_flags();
  emit_direction_check();
  Access a;
  switch (i.op) {
    case Op::Movs:  // the source first: a fault there leaves no trace of the store
      if (!access(source, size, Kind::Read, false, &a)) return false;
      e_.lea(kScratch0, a.mem);
      e_.store(HostMem::frame(kTargetSlot), kScratch0);
      if (!access(target, size, Kind::Write, false, &a)) return false;
      single_register(&a);
      e_.load(kScratch1, HostMem::frame(kTargetSlot));
      e_.encode(sized(kLoad, size, kScratch1, HostMem::at(kScratch1)));
      e_.encode(sized(kStore, size, kScratch1, a.mem));
      advance(kHostRsi, step, word());
      advance(kHostRdi, step, word());
      return true;
    case Op::Stos:
      if (!access(target, size, Kind::Write, false, &a)) return false;
      e_.encode(sized(kStore, size, kHostRax, a.mem));
      advance(kHostRdi, step, word());
      return true;
    case Op::Lods:
      if (!access(source, size, Kind::Read, false, &a)) return false;
      e_.encode(sized(kLoad, size, kHostRax, a.mem));
      advance(kHostRsi, step, word());
      return true;
    case Op::Scas:
      if (!access(target, size, Kind::Read, false, &a)) return false;
      e_.encode(sized(kCompareWith, size, kHostRax, a.mem));
      flags_ = Flags::Host;
      advance(kHostRdi, step, word());
      return true;
    case Op::Cmps:
      if (!access(source, size, Kind::Read, false, &a)) return false;
      e_.encode(sized(kLoad, size, kScratch0, a.mem));
      e_.store(HostMem::frame(kTargetSlot), kScratch0);
      if (!access(target, size, Kind::Read, false, &a)) return false;
      single_register(&a);
      e_.load(kScratch1, HostMem::frame(kTargetSlot));
      e_.encode(sized(kCompareWith, size, kScratch1, a.mem));
      flags_ = Flags::Host;
      advance(kHostRsi, step, word());
      advance(kHostRdi, step, word());
      return true;
    default:
      return false;
  }
}

bool BlockBuilder::repeated_string(const DecodedInsn& i) {
  const bool move = i.op == Op::Movs;
  const u8 size = i.opsize;
  const u8 log2 = static_cast<u8>(std::countr_zero(static_cast<unsigned>(size)));
  clobber_flags();
  emit_direction_check();
  Label again, done;
  e_.bind(again);
  e_.encode({.w = !code32(), .opcode = 0x85, .reg = kHostRcx, .rm = kHostRcx});
  e_.jcc(kEqual, done);
  if (code32()) {
    for (const u8 r : {kHostRcx, kHostRsi, kHostRdi})
      if (move || r != kHostRsi) e_.mov32(r, r);
  }

  Address at;
  at.narrow = at.linear32 = code32();
  // Indexed, not based: each round is checked by itself.
  Access a;
  const auto whole = [&](u8 reg, Kind kind) {
    at.index = reg;
    whole_ = true;
    const bool reached = access(at, size, kind, false, &a);
    whole_ = false;
    if (!reached) return false;
    e_.lea(kScratch0, a.mem);
    e_.encode(alu64(kSubFrom, kScratch0, reg));  // r14: host address - register
    return true;
  };
  if (move) {  // the source first: a fault there leaves no trace of the store
    if (!whole(RSI, Kind::Read)) return false;
    e_.store(HostMem::frame(kTargetSlot), kScratch0);
  }
  if (!whole(RDI, Kind::Write)) return false;
  e_.store(HostMem::frame(kSavedSlot), kHostRdx);
  // r15: elements of this piece, up to the nearer page end; the first one lies inside.
  e_.mov32(kScratch1, kHostRdi);
  e_.and32(kScratch1, static_cast<u32>(kPageSize - 1));
  if (move) {
    e_.mov32(kHostRdx, kHostRsi);
    e_.and32(kHostRdx, static_cast<u32>(kPageSize - 1));
    e_.encode(alu64(kCompare, kScratch1, kHostRdx));
    e_.encode({.w = true, .map = 1, .opcode = 0x40 | kBelow, .reg = kScratch1, .rm = kHostRdx});
  }
  e_.mov_imm(kHostRdx, kPageSize);
  e_.encode(alu64(kSubFrom, kHostRdx, kScratch1));
  if (log2 != 0) e_.shr(kHostRdx, log2);
  e_.encode(alu64(kCompare, kHostRdx, kHostRcx));
  e_.encode({.w = true, .map = 1, .opcode = 0x40 | kAbove, .reg = kHostRdx, .rm = kHostRcx});
  if (move) e_.load(kScratch1, HostMem::frame(kTargetSlot));  // host address - rSI

  e_.encode({.w = true, .opcode = 0x87, .reg = kHostRcx, .rm = kHostRdx});  // xchg: rcx piece, rdx all
  e_.encode(alu64(kSubFrom, kHostRdx, kHostRcx));
  e_.encode(alu64(kAddTo, kHostRdi, kScratch0));
  if (move) e_.encode(alu64(kAddTo, kHostRsi, kScratch1));
  Encoding string = sized(move ? 0xa4 : 0xaa, size);
  e_.byte(0xf3);
  if (string.p66) e_.byte(0x66);
  if (string.w) e_.byte(0x48);
  e_.byte(string.opcode);
  e_.encode(alu64(kSubFrom, kHostRdi, kScratch0));
  if (move) e_.encode(alu64(kSubFrom, kHostRsi, kScratch1));
  if (code32()) {  // past the end of 4 GiB
    e_.mov32(kHostRdi, kHostRdi);
    if (move) e_.mov32(kHostRsi, kHostRsi);
  }
  e_.mov(kHostRcx, kHostRdx);
  e_.load(kHostRdx, HostMem::frame(kSavedSlot));

  e_.encode({.w = true, .opcode = 0x85, .reg = kHostRcx, .rm = kHostRcx});
  e_.jcc(kEqual, done);
  e_.cmp32_imm(HostMem::frame(frame::kAttention), 0);
  e_.jcc(kEqual, again);
  if (flags_ == Flags::Frame) emit_flags_restore(kScratch0);
  emit_rip(kScratch0, page_offset(rip()));
  e_.encode({.opcode = 0xff, .reg = 4, .memory = true, .mem = HostMem::frame(frame::kExitAttention)});
  e_.bind(done);
  return true;
}

/// CLD, STD: DF is in VcpuState.
bool BlockBuilder::direction(bool set) {
  clobber_flags();
  e_.load(kScratch0, HostMem::frame(kRflags));
  Encoding e{.opcode = 0x81, .reg = static_cast<u8>(set ? 1 : 4), .memory = true, .mem = HostMem::at(kScratch0)};
  return e_.encode(with_imm32(e, static_cast<u32>(set ? rflags::DF : ~rflags::DF)));
}

}  // namespace ring3::engine
