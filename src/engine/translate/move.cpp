#include "engine/translate/builder.hpp"

/// LEA, moves between registers, and instructions without renamed operands.
namespace ring3::engine {

bool BlockBuilder::lea(const DecodedInsn& i) {
  Address a;
  if (!address_of(i, &a)) return false;
  a.segment = 0;
  const u8 size = i.operands[0].size, guest = i.operands[0].reg;
  if (size != 2 && size != 4 && size != 8) return false;
  const bool through = size == 2 || special(guest);
  const u8 to = through ? kScratch0 : host(guest);
  if (a.rip) {
    emit_rip(to, static_cast<i64>(a.value));
    if (size == 4) e_.mov32(to, to);
  } else if (a.constant) {
    e_.mov_imm(to, size == 8 ? a.value : static_cast<u32>(a.value));
  } else {
    // Both registers by name, so that no flag is touched and `to` may be one of them.
    HostMem m;
    m.disp = a.disp;
    m.scale_log2 = a.scale_log2;
    if (a.base != kNoReg) m.base = value_of(a.base, kScratch0);
    if (a.index != kNoReg) m.index = value_of(a.index, kScratch1);
    if (size == 8 && !a.narrow) {
      e_.lea(to, m);
    } else {
      e_.lea32(to, m);
    }
  }
  if (size == 2) {
    if (special(guest)) {  // mov [slot], r14w
      e_.encode({.p66 = true, .opcode = 0x89, .reg = kScratch0, .memory = true, .mem = slot(guest)});
    } else {
      e_.encode({.p66 = true, .opcode = 0x89, .reg = kScratch0, .rm = host(guest)});
    }
  } else if (through) {
    e_.store(slot(guest), kScratch0);
  }
  return true;
}

/// MOV r64, r64 and r32, r32 in the one form that needs no scratch register.
bool BlockBuilder::mov_register(const DecodedInsn& i) {
  const Operand &d = i.operands[0], &s = i.operands[1];
  if (d.kind != OperandKind::Gpr || s.kind != OperandKind::Gpr || d.size != s.size ||
      (d.size != 8 && d.size != 4))
    return false;
  if (special(d.reg) == special(s.reg)) return false;
  if (special(s.reg)) {
    if (d.size == 8) {
      e_.load(host(d.reg), slot(s.reg));
    } else {
      e_.load32(host(d.reg), slot(s.reg));
    }
    return true;
  }
  if (d.size == 4) {
    e_.mov32(kScratch0, host(s.reg));
    e_.store(slot(d.reg), kScratch0);
  } else {
    e_.store(slot(d.reg), host(s.reg));
  }
  return true;
}

bool BlockBuilder::verbatim(const DecodedInsn& i) {
  need_flags(kScratch0);
  switch (i.op) {
    case Op::Cbw:
      if (i.opsize == 2) e_.byte(0x66);
      if (i.opsize == 8) e_.byte(0x48);
      e_.byte(0x98);
      return true;
    case Op::Cwd:
      if (i.opsize == 2) e_.byte(0x66);
      if (i.opsize == 8) e_.byte(0x48);
      e_.byte(0x99);
      return true;
    case Op::Lahf:
      e_.byte(0x9f);
      return true;
    case Op::Sahf:
      e_.byte(0x9e);
      return true;
    case Op::Clc:
      e_.byte(0xf8);
      return true;
    case Op::Stc:
      e_.byte(0xf9);
      return true;
    case Op::Cmc:
      e_.byte(0xf5);
      return true;
    case Op::Nop:
    case Op::Prefetch:
    case Op::Endbr:
      return true;
    case Op::Pause:
      e_.bytes({0xf3, 0x90});
      return true;
    case Op::Lfence:
      e_.bytes({0x0f, 0xae, 0xe8});
      return true;
    case Op::Mfence:
      e_.bytes({0x0f, 0xae, 0xf0});
      return true;
    case Op::Sfence:
      e_.bytes({0x0f, 0xae, 0xf8});
      return true;
    case Op::Vzeroupper:
    case Op::Vzeroall:
      if (code32()) {  // eight registers: VMOVAPS xmm, xmm and VPXOR xmm, xmm, xmm clear what is above
        for (u8 n = 0; n < 8; n++) {
          const u8 modrm = static_cast<u8>(0xc0 | n << 3 | n);
          if (i.op == Op::Vzeroupper) e_.bytes({0xc5, 0xf8, 0x28, modrm});
          else e_.bytes({0xc5, static_cast<u8>(0x81 | (~n & 15) << 3), 0xef, modrm});
        }
        return true;
      }
      if (i.op == Op::Vzeroall) {
        e_.bytes({0xc5, 0xfc, 0x77});
        return true;
      }
      e_.bytes({0xc5, 0xf8, 0x77});
      return true;
    default:
      return false;
  }
}

}  // namespace ring3::engine
