#include "engine/translate/reencode.hpp"

#include "engine/interp/vector_stub.hpp"

namespace ring3::engine {
namespace {

bool has_modrm_byte(u8 map, u8 op) {
  if (map >= 2) return true;
  if (map == 0) {
    if (op < 0x40) return (op & 7) < 4;
    return op == 0x62 || op == 0x63 || op == 0x69 || op == 0x6b || (op >= 0x80 && op <= 0x8f) || op == 0xc0 ||
           op == 0xc1 || op == 0xc6 || op == 0xc7 || (op >= 0xd0 && op <= 0xd3) ||
           (op >= 0xd8 && op <= 0xdf) || op == 0xf6 || op == 0xf7 || op >= 0xfe;
  }
  if (op >= 0x80 && op <= 0x8f) return false;
  if (op >= 0xc8 && op <= 0xcf) return false;
  if (op >= 0x30 && op <= 0x37) return false;
  return !(op >= 0x05 && op <= 0x09) && op != 0x0b && op != 0x0e && op != 0x77 && op != 0xa0 && op != 0xa1 &&
         op != 0xa2 && op != 0xa8 && op != 0xa9 && op != 0xaa;
}

/// EVEX: everything but the memory operand, as it is.
bool take_evex(const DecodedInsn& insn, bool code32, Reencoding* out) {
  EvexParts p;
  if (!parse_evex(insn, code32 ? CodeMode::Bits32 : CodeMode::Bits64, &p) || !evex_runs_on_host(p.map, p.opcode)) return false;
  if (p.memory != insn.has(kHasMem)) return false;
  Encoding& e = out->e;
  e.evex = true;
  e.map = p.map;
  e.pp = p.pp;
  e.w = p.w;
  e.p2 = p.p2;
  e.vvvv = p.vvvv;
  e.opcode = p.opcode;
  e.reg = p.reg;
  e.memory = p.memory;
  if (!p.memory) e.rm = p.rm;
  e.imm_size = p.imm_size;
  for (unsigned n = 0; n < p.imm_size; n++) e.imm[n] = p.imm[n];
  const u8 field = evex_gpr_field(p.map, p.pp, p.opcode);
  if (code32 && field != 0) e.w = false;
  bool gpr = false;
  for (const Operand& o : insn.operands) gpr |= o.kind == OperandKind::Gpr;
  if (gpr) {
    if (field == 0 || (field == 2 && p.memory)) return false;
    out->gpr_fields = field == 1 ? kGprReg : kGprRm;
    (field == 1 ? e.reg : e.rm) &= 15;
  }
  e.vectors = !gpr;
  return true;
}

/// General registers in ModRM of integer instructions.
u8 integer_fields(const Encoding& e) {
  const u8 op = e.opcode;
  constexpr u8 kBoth = kGprReg | kGprRm;
  if (e.vex) {
    if (e.map == 2 && (op == 0xf2 || op == 0xf5 || op == 0xf6 || op == 0xf7)) return kBoth | kGprVvvv;
    if (e.map == 2 && op == 0xf3) return kGprRm | kGprVvvv;
    if (e.map == 3 && op == 0xf0) return kBoth;
    return 0;
  }
  switch (e.map) {
    case 0:
      if (op < 0x40 || op == 0x63 || op == 0x69 || op == 0x6b || (op >= 0x84 && op <= 0x8b)) return kBoth;
      return kGprRm;
    case 1:
      if (op == 0xc7) return 0;
      if ((op >= 0x90 && op <= 0x9f) || op == 0xba) return kGprRm;
      return kBoth;
    case 2:
      return kBoth;
    default:
      return 0;
  }
}

/// VEX instructions between vectors and general registers or memory of their size: W is ignored in 32-bit code.
bool moves_general(const Encoding& e) {
  const u8 op = e.opcode;
  if (e.map == 1) return op == 0x2a || op == 0x2c || op == 0x2d || op == 0x6e || (op == 0x7e && e.pp == 1);
  // PCMPESTRx take lengths from registers.
  return e.map == 3 && ((op >= 0x14 && op <= 0x17) || op == 0x20 || op == 0x22 || (op >= 0x60 && op <= 0x63));
}

u8 vector_fields(const Encoding& e, const DecodedInsn& insn) {
  bool gpr = false;
  for (const Operand& o : insn.operands) gpr |= o.kind == OperandKind::Gpr;
  if (!gpr) return 0;
  const u8 op = e.opcode;
  if (e.map == 1 && (op == 0x2c || op == 0x2d || op == 0x50 || op == 0xc5 || op == 0xd7)) return kGprReg;
  if (e.map == 1 && (op == 0x2a || op == 0x6e || op == 0x7e || op == 0xc4)) return kGprRm;
  if (e.map == 3 && ((op >= 0x14 && op <= 0x17) || op == 0x20 || op == 0x22)) return kGprRm;
  return 0;
}

}  // namespace

bool take_apart(const DecodedInsn& insn, bool code32, Reencoding* out) {
  *out = Reencoding{};
  if (insn.has(kEvex)) return insn.op == Op::HostVec && take_evex(insn, code32, out);
  Encoding& e = out->e;
  const unsigned n = insn.length <= 15 ? insn.length : 15;
  unsigned i = 0;
  u8 rex = 0;
  bool p66 = false;
  u8 rep = 0;
  for (; i < n; i++) {
    const u8 c = insn.raw[i];
    if (c == 0x66) {
      p66 = true;
    } else if (c == 0xf2 || c == 0xf3) {
      rep = c;
    } else if (c == 0xf0 || c == 0x26 || c == 0x2e || c == 0x36 || c == 0x3e || c == 0x64 || c == 0x65 ||
               c == 0x67) {
    } else if ((c & 0xf0) == 0x40 && !code32) {
      rex = c;
      continue;
    } else {
      break;
    }
    rex = 0;  // a REX prefix counts only right before the opcode
  }
  const auto next = [&](u8* to) {
    if (i >= n) return false;
    *to = insn.raw[i++];
    return true;
  };
  u8 c = 0;
  if (!next(&c)) return false;
  bool r = false, b = false;
  if (insn.has(kVex)) {
    e.vex = true;
    u8 v1 = 0, v2 = 0;
    if (c == 0xc4) {
      if (!next(&v1) || !next(&v2)) return false;
      e.map = v1 & 0x1f;
      r = !(v1 & 0x80);
      b = !(v1 & 0x20);
      e.w = v2 & 0x80;
    } else if (c == 0xc5) {
      if (!next(&v2)) return false;
      e.map = 1;
      r = !(v2 & 0x80);
    } else {
      return false;
    }
    e.vvvv = ~(v2 >> 3) & 15;
    e.l = v2 & 4;
    e.pp = v2 & 3;
    if (code32) {  // eight registers; VEX.W counts only where it selects an operation
      e.vvvv &= 7;
      r = b = false;
    }
    if (e.map < 1 || e.map > 3 || !next(&e.opcode)) return false;
  } else {
    e.p66 = p66;
    e.rep = rep;
    e.lock = insn.has(kLock);
    e.w = rex & 8;
    r = rex & 4;
    b = rex & 1;
    e.rex_forced = rex != 0;
    if (c == 0x0f) {
      e.map = 1;
      if (!next(&c)) return false;
      if (c == 0x38 || c == 0x3a) {
        e.map = c == 0x38 ? 2 : 3;
        if (!next(&c)) return false;
      }
    }
    e.opcode = c;
    if (e.map == 0 && code32 && c >= 0x40 && c <= 0x4f) {  // INC, DEC: FF /0, /1
      e.opcode = 0xff;
      e.reg = c >> 3 & 1;
      e.rm = c & 7;
      out->gpr_fields = kGprRm;
      return i == n;
    }
    if (e.map == 0 && c == 0x82) e.opcode = 0x80;
    if (e.map == 0 && c >= 0xa0 && c <= 0xa3) {  // MOV with an offset: 8A 8B 88 89
      e.opcode = static_cast<u8>(0x88 | (c & 1) | (c < 0xa2 ? 2 : 0));
      e.memory = true;
      out->gpr_fields = kGprReg;
      return insn.has(kHasMem);
    }
  }
  e.has_modrm = has_modrm_byte(e.map, e.opcode);
  if (e.has_modrm) {
    u8 modrm = 0;
    if (!next(&modrm)) return false;
    e.reg = static_cast<u8>((modrm >> 3 & 7) | (r ? 8 : 0));
    const u8 mod = modrm >> 6, rm = modrm & 7;
    e.memory = mod != 3;
    if (e.memory != insn.has(kHasMem)) return false;
    if (e.memory) {
      u8 base = rm;
      if (rm == 4) {
        if (!next(&base)) return false;
        base &= 7;
      }
      i += mod == 1 ? 1 : mod == 2 || base == 5 ? 4 : 0;
    } else {
      e.rm = static_cast<u8>(rm | (b ? 8 : 0));
    }
  } else if (insn.has(kHasMem)) {
    return false;
  }
  if (insn.op == Op::HostVec || insn.op == Op::HostMmx) {
    if (!e.has_modrm) return false;
    if (insn.has(kOpmask)) {
      bool gpr = false;
      for (const Operand& o : insn.operands) gpr |= o.kind == OperandKind::Gpr;
      if (gpr && (e.map != 1 || (e.opcode != 0x92 && e.opcode != 0x93))) return false;
      if (gpr) out->gpr_fields = e.opcode == 0x92 ? kGprRm : kGprReg;
      if (gpr && code32) e.w = false;
    } else if (runs_on_host(e.vex, e.map, e.opcode)) {
      out->gpr_fields = vector_fields(e, insn);
    } else {
      return false;
    }
    e.vectors = out->gpr_fields == 0;
  } else if (insn.op == Op::Vmaskmov) {
    e.vectors = true;
  } else if (e.has_modrm) {
    out->gpr_fields = integer_fields(e);
  } else {
    const bool in_opcode =
        (e.map == 0 && ((e.opcode >= 0x90 && e.opcode <= 0x97) || (e.opcode >= 0xb0 && e.opcode <= 0xbf))) ||
        (e.map == 1 && e.opcode >= 0xc8 && e.opcode <= 0xcf);
    if (in_opcode) {
      e.rm = static_cast<u8>((e.opcode & 7) | (b ? 8 : 0));
      e.opcode &= 0xf8;
      out->gpr_fields = kGprRm;
    }
  }
  if (e.memory) out->gpr_fields &= static_cast<u8>(~kGprRm);
  if (code32 && e.vex && !insn.has(kOpmask) && insn.op != Op::Vmaskmov && (insn.op != Op::HostVec || moves_general(e))) e.w = false;
  for (const Operand& o : insn.operands) {
    if (o.kind != OperandKind::GprHigh) continue;
    e.rex_barred = true;
    // Only the byte operand of MOVZX, MOVSX and CRC32 stands beside a wider register.
    const bool reg_is_byte = insn.op != Op::Movzx && insn.op != Op::Movsx && insn.op != Op::Crc32;
    if ((out->gpr_fields & kGprRm) && e.rm >= 4 && e.rm < 8) out->high_rm = true;
    if ((out->gpr_fields & kGprReg) && reg_is_byte && e.reg >= 4 && e.reg < 8) out->high_reg = true;
  }
  if (i > n || n - i > sizeof e.imm) return false;
  while (i < n) e.imm[e.imm_size++] = insn.raw[i++];
  if (code32 && e.vex && e.map == 3 && e.imm_size == 1 && e.opcode >= 0x4a && e.opcode <= 0x4c) e.imm[0] &= 0x7f;
  return true;
}

}  // namespace ring3::engine
