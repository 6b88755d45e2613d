#include "generator.hpp"

#include <Zydis/Zydis.h>

#include <cstring>

#include "engine/interp/features.hpp"
#include "engine/interp/xstate.hpp"

namespace ring3::diff {

using namespace engine;  // NOLINT: a test of that room

bool host_has_avx512() {
  static const bool has = [] {
    if (!host_features()[Feature::Avx512f]) return false;
    for (const XstateComponent& x : xstate_components())
      if (x.standard != x.in_area) return false;
    return true;
  }();
  return has;
}

const char* name(Family family) {
  static constexpr const char* kNames[] = {"integer", "shift", "branch", "string", "stack", "bmi",
                                           "x87",     "mmx",   "sse",    "avx",    "privileged", "avx512"};
  return kNames[static_cast<unsigned>(family)];
}

namespace {

/// Instructions that cannot be compared in a Linux process, each for its reason.
bool excluded(const DecodedInsn& i, bool compat32) {
  switch (i.op) {
    case Op::Syscall: case Op::Sysenter: case Op::Int: case Op::Int1:  // enter the kernel under us
    case Op::Rdtsc: case Op::Rdtscp: case Op::Rdpmc: case Op::Rdrand: case Op::Rdseed: case Op::Rdpid:
    case Op::Cpuid: case Op::Xgetbv:                                   // answer differently by design
    case Op::Sgdt: case Op::Sidt: case Op::Sldt: case Op::Str: case Op::Smsw:  // Linux emulates under UMIP
    case Op::Lar: case Op::Lsl: case Op::Verr: case Op::Verw:          // read Linux' own GDT
    case Op::Rdfsbase: case Op::Rdgsbase: case Op::Wrfsbase: case Op::Wrgsbase:  // the process' TLS
    case Op::Lds: case Op::Les: case Op::Lfs: case Op::Lgs: case Op::Lss: case Op::PopSeg:
    case Op::CallFar: case Op::JmpFar: case Op::RetFar: case Op::Iret:  // load Linux' selectors
    case Op::Fxsave: case Op::Fxrstor: case Op::Xsave: case Op::Xsaveopt: case Op::Xsavec: case Op::Xsaves:
    case Op::Xrstor: case Op::Xrstors:                                 // unit tests: images hold host FIP/FDP
    case Op::Vmcall: case Op::Vmmcall: case Op::Monitor: case Op::Mwait:
    case Op::Invalid:
    case Op::Clzero:                                                   // not offered by every host kernel
      return true;
    case Op::MovSeg:
      if (i.operands[0].kind == OperandKind::Seg) return true;
      break;
    case Op::Into: case Op::Int3: return false;
    default: break;
  }
  if (i.has(kHasMem) && (i.mem.seg == FS || (!compat32 && i.mem.seg == GS))) return true;
  if (i.mem.seg == FS && (i.op == Op::Xlat || i.op == Op::Maskmov || (i.op >= Op::Movs && i.op <= Op::Outs)))
    return !compat32;
  if (i.op == Op::HostX87) {
    // State images (FLDENV, FNSTENV, FRSTOR, FNSAVE) hold the host's instruction pointers.
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Mem && (o.size == 14 || o.size == 28 || o.size > 90)) return true;
  }
  // An operand-size prefix on a near branch makes the target 16 bits wide: it leaves our pages.
  if ((i.op == Op::Jmp || i.op == Op::Jcc || i.op == Op::Call || i.op == Op::Ret || i.op == Op::Jcxz ||
       i.op == Op::Loop || i.op == Op::Loope || i.op == Op::Loopne)) {
    for (unsigned n = 0; n + 1 < i.length; ++n)
      if (i.raw[n] == 0x66) return true;
  }
  return false;
}

bool is_privileged(Op op) {
  switch (op) {
    case Op::In: case Op::Out: case Op::Ins: case Op::Outs: case Op::Cli: case Op::Sti: case Op::Hlt: case Op::Clts:
    case Op::Lgdt: case Op::Lidt: case Op::Lldt: case Op::Ltr: case Op::Lmsw: case Op::MovCr: case Op::MovDr:
    case Op::Rdmsr: case Op::Wrmsr: case Op::Invd: case Op::Wbinvd: case Op::Invlpg: case Op::Invpcid:
    case Op::Sysret: case Op::Sysexit: case Op::Swapgs: case Op::Xsetbv: case Op::Clac: case Op::Stac: case Op::Rsm:
    case Op::Int3: case Op::Into: case Op::Ud: case Op::Arpl: case Op::MovSeg: case Op::PushSeg:
      return true;
    default: return false;
  }
}

bool in_family(Family f, const DecodedInsn& i) {
  const Op op = i.op;
  const auto between = [&](Op a, Op b) { return op >= a && op <= b; };
  switch (f) {
    case Family::Bmi:
      return between(Op::Adcx, Op::Shrx) || op == Op::Tzcnt || op == Op::Lzcnt || op == Op::Popcnt || op == Op::Crc32 ||
             op == Op::Movbe || op == Op::Movnti || op == Op::Bswap;
    case Family::Shift: return between(Op::Rol, Op::Bswap);
    case Family::Integer:
      return between(Op::Add, Op::Das) || between(Op::Mov, Op::Salc) || between(Op::Clc, Op::Std) ||
             op == Op::Lfence || op == Op::Mfence || op == Op::Sfence || op == Op::Clflush || op == Op::Clflushopt ||
             op == Op::Clwb;
    case Family::Branch: return between(Op::Jmp, Op::Ret) || op == Op::Bound;
    case Family::String: return between(Op::Movs, Op::Stos);
    case Family::Stack: return between(Op::Push, Op::Leave);
    case Family::X87: return op == Op::HostX87 || op == Op::Fwait || op == Op::Emms;
    case Family::Mmx: return op == Op::HostMmx || (op == Op::Maskmov && !i.has(kVex)) || op == Op::Emms;
    case Family::Sse: return (op == Op::HostVec && !i.has(kVex)) || op == Op::Ldmxcsr || op == Op::Stmxcsr || op == Op::Maskmov;
    case Family::Avx512: return i.has(kEvex | kOpmask);
    case Family::Avx:
      return (op == Op::HostVec && i.has(kVex) && !i.has(kOpmask)) || op == Op::Vmaskmov || op == Op::Vgather || op == Op::Vzeroall ||
             op == Op::Vzeroupper || (op == Op::Maskmov && i.has(kVex));
    case Family::Privileged: return is_privileged(op);
    default: return false;
  }
}

/// Bytes of a plausible instruction of the family; decode decides what it is.
unsigned random_bytes(Family f, bool compat32, Random& rng, u8* b) {
  unsigned n = 0;
  const auto put = [&](u64 v) { b[n++] = static_cast<u8>(v); };
  for (int i = 0; i < 15; ++i) b[i] = static_cast<u8>(rng.next());
  const bool vex = f == Family::Avx || f == Family::Avx512 || (f == Family::Bmi && rng.below(2));
  if (!vex) {
    if (rng.one_in(4)) put(0x66);
    if (rng.one_in(f == Family::String ? 2 : 5)) put(rng.below(2) ? 0xf2 : 0xf3);
    if (f == Family::Sse && rng.one_in(3)) put(rng.below(2) ? 0x66 : rng.below(2) ? 0xf2 : 0xf3);
    if (f == Family::Integer && rng.one_in(8)) put(0xf0);
  }
  if (rng.one_in(16)) put(0x67);
  if (rng.one_in(40)) {
    static constexpr u8 kSegments[] = {0x26, 0x2e, 0x36, 0x3e, 0x65};
    put(kSegments[rng.below(compat32 ? 4 : 5)]);
  }
  if (f == Family::Avx512) {
    const u8 vvvv = rng.below(2) ? static_cast<u8>(rng.below(16)) : 15;
    if (rng.one_in(10)) {  // opmask registers
      put(0xc4);
      put((rng.below(8) << 5) | (rng.one_in(4) ? 3 : 1));
      put((rng.below(2) << 7) | (vvvv | (rng.below(4) ? 8 : 0)) << 3 | (rng.below(2) << 2) | rng.below(4));
      static constexpr u8 kOnMasks[] = {0x41, 0x42, 0x44, 0x45, 0x46, 0x47, 0x4a, 0x4b, 0x90, 0x91, 0x92, 0x93, 0x98, 0x99};
      if ((b[n - 2] & 0x1f) == 1) put(kOnMasks[rng.below(14)]); else put(0x30 + rng.below(4));
      if (compat32) b[n - 3] |= 0xc0;
      return 15;
    }
    static constexpr u8 kMaps[] = {1, 1, 2, 2, 2, 3, 3, 5, 6};
    put(0x62);
    put((rng.below(16) << 4) | kMaps[rng.below(9)]);
    put((rng.below(2) << 7) | vvvv << 3 | 4 | rng.below(4));
    put((rng.one_in(3) ? 0x80 : 0) | (rng.below(3) << 5) | (rng.one_in(4) ? 0x10 : 0) | (rng.below(vvvv == 15 ? 8 : 2) ? 8 : 0) |
        (rng.below(3) ? rng.below(8) : 0));
    if (compat32) b[n - 3] |= 0xc0;
    put(rng.next());
    return 15;
  }
  if (vex) {
    const u8 pp = static_cast<u8>(rng.below(4));
    const u8 vvvv = f == Family::Bmi || rng.below(2) ? static_cast<u8>(rng.below(16)) : 15;
    const u8 l = f == Family::Bmi ? 0 : static_cast<u8>(rng.below(2));
    if (f == Family::Avx && rng.one_in(3)) {
      put(0xc5);
      put((rng.below(2) << 7) | (vvvv << 3) | (l << 2) | pp);
    } else {
      put(0xc4);
      put((rng.below(8) << 5) | (f == Family::Bmi ? 2 + rng.one_in(5) : 1 + rng.below(3)));
      put((rng.below(2) << 7) | (vvvv << 3) | (l << 2) | pp);
    }
    if (compat32) b[n - 1 - (b[n - 2] != 0xc5)] |= 0xc0;  // else it is LDS/LES
    if (f == Family::Bmi) {
      static constexpr u8 kBmi[] = {0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf0};
      put(kBmi[rng.below(6)]);
    } else {
      put(rng.next());
    }
    return 15;
  }
  if (!compat32 && rng.below(5) < 3) put(0x40 | rng.below(16));
  switch (f) {
    case Family::X87: put(rng.one_in(30) ? 0x9b : 0xd8 + rng.below(8)); return 15;
    case Family::String: {
      static constexpr u8 kStrings[] = {0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf};
      put(kStrings[rng.below(10)]);
      return 15;
    }
    case Family::Shift:
      if (rng.below(2)) {
        static constexpr u8 kShifts[] = {0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3};
        put(kShifts[rng.below(6)]);
        return 15;
      }
      put(0x0f);
      static constexpr u8 kBits[] = {0xa3, 0xab, 0xb3, 0xbb, 0xba, 0xa4, 0xa5, 0xac, 0xad, 0xbc, 0xbd, 0xb8, 0xc8};
      put(kBits[rng.below(13)]);
      return 15;
    case Family::Mmx: case Family::Sse: {
      put(0x0f);
      const u64 map = rng.below(8);
      if (map == 0) put(0x38);
      if (map == 1) put(0x3a);
      if (map >= 2) { b[n] = static_cast<u8>(rng.below(4) ? 0x10 + rng.below(0xf0) : rng.next()); ++n; }
      return 15;
    }
    case Family::Bmi: {
      put(0x0f);
      const u64 k = rng.below(6);
      if (k == 0) put(0xb8);
      if (k == 1) put(0xbc);
      if (k == 2) put(0xbd);
      if (k >= 3) { put(0x38); put(0xf0 + rng.below(7)); }
      return 15;
    }
    case Family::Branch: {
      const u64 k = rng.below(8);
      if (k < 3) put(0x70 + rng.below(16));
      else if (k < 5) { put(0x0f); put(0x80 + rng.below(16)); }
      else if (k == 5) put(0xe0 + rng.below(4));
      else if (k == 6) put(0xff);
      else { static constexpr u8 kB[] = {0xe8, 0xe9, 0xeb, 0xc2, 0xc3, 0x62}; put(kB[rng.below(6)]); }
      return 15;
    }
    case Family::Stack: {
      const u64 k = rng.below(10);
      if (k < 2) put(0x50 + rng.below(16));
      else if (k == 2) put(0x68 + 2 * rng.below(2));
      else if (k == 3) put(0x8f);
      else if (k == 4) put(0xff);
      else if (k == 5) put(0xc8 + rng.below(2));
      else if (k == 6) put(0x9c + rng.below(2));
      else if (k == 7) put(0x60 + rng.below(2));
      else put(0x50 + rng.below(16));
      return 15;
    }
    default:
      if (rng.below(3) == 0) put(0x0f);
      put(rng.next());
      return 15;
  }
}

/// Makes the address of an operand without registers, and branch displacements, land in our pages.
void patch_displacement(bool compat32, Random& rng, Case* c) {
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, compat32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
                   compat32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
  ZydisDecodedInstruction z;
  ZydisDecodedOperand zo[ZYDIS_MAX_OPERAND_COUNT];
  if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, c->bytes, 15, &z, zo))) return;
  const u64 rip = kCode + c->code_offset;
  if (c->insn.has(kHasMem) && (c->insn.mem.base == kNoReg || c->insn.mem.base == kRipBase) &&
      c->insn.mem.index == kNoReg && z.raw.disp.size >= 32) {
    u64 disp = kData + 64 + rng.below(kDataSize);
    if (c->insn.mem.base == kRipBase) disp -= rip + c->size;
    std::memcpy(c->bytes + z.raw.disp.offset, &disp, z.raw.disp.size / 8);
  } else if (c->insn.has(kHasMem) && z.raw.disp.size == 32 && rng.below(4)) {
    const i32 disp = static_cast<i32>(rng.below(4096)) - 2048;  // small, so that 32-bit wrap-around is the exception
    std::memcpy(c->bytes + z.raw.disp.offset, &disp, 4);
  }
  for (const auto& imm : z.raw.imm) {
    if (!imm.is_relative || imm.size == 0) continue;
    const i64 rel = static_cast<i64>(kFarPad) - c->size;
    std::memcpy(c->bytes + imm.offset, &rel, imm.size / 8);
  }
}

u64 random_value(Random& rng) {
  switch (rng.below(8)) {
    case 0: return rng.below(4);
    case 1: return ~rng.below(4);
    case 2: return 1ull << rng.below(64);
    case 3: return (1ull << rng.below(64)) - 1;
    case 4: return static_cast<u64>(static_cast<i64>(static_cast<i8>(rng.next())));
    case 5: return 0x8000000000000000ull >> (8 * rng.below(8));
    default: return rng.next();
  }
}

u64 random_double_bits(Random& rng) {
  static constexpr u64 kSpecial[] = {0, 0x8000000000000000, 0x3ff0000000000000, 0xbff0000000000000, 0x7ff0000000000000,
                                     0xfff0000000000000, 0x7ff8000000000000, 0x7ff0000000000001, 1, 0x000fffffffffffff,
                                     0x0010000000000000, 0x7fefffffffffffff, 0x4330000000000000, 0x41dfffffffc00000};
  if (rng.below(2)) return kSpecial[rng.below(14)];
  return (rng.next() & 0x800fffffffffffff) | ((1023 - 40 + rng.below(80)) << 52);
}

u32 random_float_bits(Random& rng) {
  static constexpr u32 kSpecial[] = {0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000,
                                     0x7f800001, 1, 0x007fffff, 0x00800000, 0x7f7fffff, 0x4b000000};
  if (rng.below(2)) return kSpecial[rng.below(13)];
  return static_cast<u32>((rng.next() & 0x807fffff) | ((127 - 20 + rng.below(40)) << 23));
}

void random_chunk(Random& rng, u8* at, u64 size) {
  u8 value[16];
  for (u64 i = 0; i < size; i += 16) {
    const u64 kind = rng.below(4);
    for (int j = 0; j < 2; ++j) {
      u64 v = 0;
      if (kind == 0) v = random_double_bits(rng);
      if (kind == 1) v = random_float_bits(rng) | static_cast<u64>(random_float_bits(rng)) << 32;
      if (kind == 2) v = random_value(rng);
      if (kind == 3) v = rng.next();
      std::memcpy(value + 8 * j, &v, 8);
    }
    std::memcpy(at + i, value, size - i < 16 ? size - i : 16);
  }
}

/// 80-bit values: finite, denormal, infinite, NaN, and the unsupported encodings.
void random_x87(Random& rng, u8* at) {
  u64 mantissa = rng.next() | (rng.below(8) ? 1ull << 63 : 0);
  u16 exponent;
  switch (rng.below(6)) {
    case 0: exponent = 0; mantissa &= rng.below(2) ? ~(1ull << 63) : 0; break;
    case 1: exponent = 0x7fff; mantissa = rng.below(2) ? 1ull << 63 : mantissa; break;
    case 2: exponent = static_cast<u16>(rng.next()); break;
    default: exponent = static_cast<u16>(0x3fff - 40 + rng.below(80)); break;
  }
  exponent |= static_cast<u16>(rng.below(2) << 15);
  std::memcpy(at, &mantissa, 8);
  std::memcpy(at + 8, &exponent, 2);
  std::memset(at + 10, 0, 6);
}

}  // namespace

void fill_memory(Random& rng, u8* data, u64 size) { random_chunk(rng, data, size); }

void generate_instruction(Family family, bool compat32, Random& rng, Case* c) {
  const CodeMode mode = compat32 ? CodeMode::Bits32 : CodeMode::Bits64;
  static const bool amd = host_features().amd;  // the host's lengths
  for (;;) {
    random_bytes(family, compat32, rng, c->bytes);
    if (decode(c->bytes, 15, mode, false, amd, &c->insn) != DecodeResult::Ok) continue;
    if (!in_family(family, c->insn) || excluded(c->insn, compat32)) continue;
    c->size = c->insn.length;
    // Now and then behind an odd address; always room for both pads before the trampolines.
    c->code_offset = static_cast<unsigned>(16 * rng.below(64) + (rng.one_in(4) ? rng.below(16) : 0));
    patch_displacement(compat32, rng, c);
    DecodedInsn patched;
    if (decode(c->bytes, 15, mode, false, amd, &patched) != DecodeResult::Ok || patched.length != c->size) continue;
    c->insn = patched;
    return;
  }
}

void generate_state(Family family, bool compat32, Random& rng, Case* c) {
  const DecodedInsn& i = c->insn;
  Registers& r = c->regs;
  std::memset(&r, 0, sizeof(r));
  const u64 mask = compat32 ? 0xffffffffull : ~0ull;
  for (u64& g : r.gpr) g = random_value(rng) & mask;
  if (compat32)
    for (int n = 8; n < 16; ++n) r.gpr[n] = rng.next();
  r.rip = kCode + c->code_offset;
  r.rflags = 0x202 | (rng.next() & rflags::STATUS) | (rng.below(2) ? rflags::DF : 0);
  // Masked stores: whether #AC or #PF comes first differs from case to case on the oracle.
  const bool masked = i.op == Op::Maskmov || i.op == Op::Vmaskmov || i.op == Op::Vgather || i.op == Op::Vscatter || i.mask != 0;
  if (rng.one_in(50) && !masked) r.rflags |= rflags::AC;
  if (rng.one_in(50)) r.rflags |= rflags::ID;

  // An address inside the data pages, sometimes at their edges.
  const auto address = [&]() -> u64 {
    if (family == Family::Avx512) {
      switch (rng.below(12)) {
        case 0: return kReadOnly + rng.below(0x1000);
        case 1: return kAbsent - 64 + rng.below(96);
        case 2: return kData + kDataSize - 64 + rng.below(64);
        case 3: return kData + 64 + rng.below(kDataSize - 192);
        case 4: return kData - 64 + rng.below(96);
        default: return (kData + 64 + rng.below(kDataSize - 192)) & ~63ull;
      }
    }
    switch (rng.below(12)) {
      case 0: return kReadOnly + rng.below(0x1000);
      case 1: return kAbsent - 16 + rng.below(32);
      case 2: return kData + 0x1000 * (1 + rng.below(3)) - 16 + rng.below(32);
      case 3: return (kData + 64 + rng.below(kDataSize - 128));
      default: return (kData + 64 + rng.below(kDataSize - 192)) & ~31ull;
    }
  };
  // The stack: room on both sides.
  r.gpr[RSP] = (kData + 0x800 + rng.below(0x1800)) & ~7ull;
  if (rng.one_in(20)) r.gpr[RSP] = address();
  r.gpr[RBP] = rng.below(4) ? (kData + 0x400 + rng.below(0x2000)) & ~7ull : r.gpr[RBP];

  const u64 addr_mask = i.addrsize == 4 ? 0xffffffffull : i.addrsize == 2 ? 0xffffull : ~0ull;
  if (i.op >= Op::Movs && i.op <= Op::Outs) {
    r.gpr[RSI] = address();
    r.gpr[RDI] = rng.one_in(4) ? r.gpr[RSI] + rng.below(64) - 32 : address();
    r.gpr[RCX] = rng.below(24);
    if (rng.one_in(40)) r.gpr[RCX] = 200 + rng.below(600);
  }
  if (i.op == Op::Xlat) r.gpr[RBX] = address();
  if (i.op == Op::Maskmov) r.gpr[RDI] = address();
  if (i.op == Op::Loop || i.op == Op::Loope || i.op == Op::Loopne || i.op == Op::Jcxz) r.gpr[RCX] = rng.below(3);

  for (int n = 0; n < 8; ++n) random_x87(rng, r.xsave + 32 + 16 * n);
  random_chunk(rng, r.xsave + 160, 256);
  random_chunk(rng, r.xsave + 576, 256);
  if (host_has_avx512() && (family == Family::Sse || family == Family::Avx || family == Family::Avx512)) {
    random_chunk(rng, r.xsave + 1152, 1536);
    if (rng.one_in(3)) std::memset(r.xsave + 1152, 0, 512);  // as between instructions of 256 bits
    for (unsigned n = 0; n < 8; ++n) {
      u64 k = rng.below(4) ? rng.next() : random_value(rng);
      if (rng.one_in(4)) k &= rng.next() & rng.next();
      if (rng.one_in(6)) k = ~0ull;
      std::memcpy(r.xsave + 1088 + 8 * n, &k, 8);
    }
  }
  const bool x87 = family == Family::X87;
  // x87: control word with any rounding and precision; mostly masked. TOP and tags at random.
  u16 fcw = static_cast<u16>(0x37f & ~0xc00);
  if (x87) fcw = static_cast<u16>((rng.next() & 0xf00) | 0x40 | (rng.below(8) ? 0x3f : rng.below(64)));
  u16 fsw = 0;
  if (x87) fsw = static_cast<u16>((rng.below(8) << 11) | (rng.next() & 0x4700));
  if (x87 && rng.one_in(8)) fsw |= rng.below(64) & fcw;  // exceptions seen earlier, masked
  std::memcpy(r.xsave, &fcw, 2);
  std::memcpy(r.xsave + 2, &fsw, 2);
  if (x87 && rng.below(4)) {
    const u64 fip = rng.next() >> 17, fdp = rng.next() >> 17;
    const u16 fop = static_cast<u16>(rng.below(0x800));
    std::memcpy(r.xsave + 6, &fop, 2);
    std::memcpy(r.xsave + 8, &fip, 8);
    std::memcpy(r.xsave + 16, &fdp, 8);
  }
  r.xsave[4] = x87 || family == Family::Mmx ? static_cast<u8>(rng.below(4) ? 0xff : rng.next()) : static_cast<u8>(rng.next());
  u32 mxcsr = 0x1f80;
  if (family == Family::Sse || family == Family::Avx || family == Family::Avx512) {
    mxcsr |= static_cast<u32>((rng.below(4) << 13) | (rng.one_in(4) ? 1u << 15 : 0) | (rng.one_in(4) ? 1u << 6 : 0) |
                              (rng.one_in(4) ? rng.below(64) : 0));
    if (rng.one_in(10)) mxcsr &= ~static_cast<u32>(rng.below(64) << 7);
  }
  std::memcpy(r.xsave + 24, &mxcsr, 4);

  if (i.has(kEvex) && (i.op == Op::Vgather || i.op == Op::Vscatter)) {
    const unsigned index = i.mem.index & 31;
    u8 values[64];
    const bool wide = i.opcode & 1;
    for (unsigned n = 0; n < (wide ? 8u : 16u); ++n) {
      const i64 v = static_cast<i64>(rng.below(300)) - 80;
      std::memcpy(values + (wide ? 8 : 4) * n, &v, wide ? 8 : 4);
    }
    if (index >= 16) {
      std::memcpy(r.xsave + 1664 + 64 * (index - 16), values, 64);
    } else {
      std::memcpy(r.xsave + 160 + 16 * index, values, 16);
      std::memcpy(r.xsave + 576 + 16 * index, values + 16, 16);
      std::memcpy(r.xsave + 1152 + 32 * index, values + 32, 32);
    }
  } else if (i.op == Op::Vgather && i.mem.index != kNoReg) {
    for (unsigned n = 0; n < 8; ++n) {
      const i32 v = static_cast<i32>(rng.below(200)) - 60;
      std::memcpy((n < 4 ? r.xsave + 160 : r.xsave + 576 - 16) + 16 * i.mem.index + 4 * n, &v, 4);
    }
    const bool qword_index = (i.opcode & 1) != 0;
    for (unsigned n = 0; qword_index && n < 4; ++n) {
      const i64 v = static_cast<i64>(rng.below(200)) - 60;
      std::memcpy((n < 2 ? r.xsave + 160 : r.xsave + 576 - 16) + 16 * i.mem.index + 8 * n, &v, 8);
    }
  }
  if (i.has(kHasMem) && i.mem.base != kRipBase) {
    const bool vsib = i.op == Op::Vgather || i.op == Op::Vscatter;
    const u64 target = address();
    const u64 disp = static_cast<u64>(i.disp);
    if (!vsib && i.mem.index != kNoReg && i.mem.index == i.mem.base) {
      r.gpr[i.mem.base] = ((target - disp) & addr_mask) / (1 + (1ull << i.mem.scale_log2));
    } else {
      u64 index = 0;
      if (!vsib && i.mem.index != kNoReg) {
        if (i.mem.base == kNoReg) {
          r.gpr[i.mem.index] = ((target - disp) & addr_mask) >> i.mem.scale_log2;
        } else if (rng.below(3)) {
          r.gpr[i.mem.index] = rng.below(256);
        }
        index = r.gpr[i.mem.index] << i.mem.scale_log2;
      }
      if (i.mem.base != kNoReg) r.gpr[i.mem.base] = (target - disp - index) & addr_mask & mask;
    }
  }
  // A bit offset reaches memory beyond the operand: keep it near.
  if ((i.op == Op::Bt || i.op == Op::Bts || i.op == Op::Btr || i.op == Op::Btc) && i.has(kHasMem) &&
      i.operands[1].kind == OperandKind::Gpr) {
    const u8 reg = i.operands[1].reg;
    const bool address_register = reg == i.mem.base || reg == i.mem.index;
    if (!address_register) r.gpr[reg] = static_cast<u64>(static_cast<i64>(rng.below(8192)) - 4096) & mask;
  }
  // Indirect branches and returns go to pad B; the memory they read holds its address (see the caller).
  if ((i.op == Op::Jmp || i.op == Op::Call) && i.operands[0].kind == OperandKind::Gpr && rng.below(8))
    r.gpr[i.operands[0].reg] = r.rip + kFarPad;
}

}  // namespace ring3::diff
