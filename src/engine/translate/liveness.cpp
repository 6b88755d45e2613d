#include "engine/translate/liveness.hpp"

#include "engine/interp/vector_stub.hpp"

namespace ring3::engine {
namespace {

using namespace rflags;

constexpr u64 kLogic = STATUS;

FlagUse uses(u64 reads, u64 writes) { return {reads, writes, true}; }

/// Count of a shift by an immediate, masked; 0 for a shift by CL, whose count is not known.
unsigned shift_count(const DecodedInsn& i, unsigned operand) {
  if (i.operands[operand].kind != OperandKind::Imm) return 0;
  return static_cast<unsigned>(i.imm) & (i.operands[0].size == 8 ? 63 : 31);
}

bool vector_writes_flags(const DecodedInsn& i) {
  if (i.has(kOpmask)) return i.opcode == 0x98 || i.opcode == 0x99;  // KORTEST, KTEST
  if (i.has(kEvex)) {
    EvexParts p;
    return parse_evex(i, CodeMode::Bits64, &p) && (p.map == 1 || p.map == 5) && (i.opcode == 0x2e || i.opcode == 0x2f);
  }
  // Told apart by the opcode map, which the bytes before the opcode say.
  unsigned map = 0;
  for (unsigned n = 0; n + 1 < i.length; n++) {
    if (i.has(kVex)) {
      if (i.raw[n] == 0xc5) {
        map = 1;
        break;
      }
      if (i.raw[n] == 0xc4) {
        map = i.raw[n + 1] & 0x1f;
        break;
      }
    } else if (i.raw[n] == 0x0f) {
      map = i.raw[n + 1] == 0x38 ? 2 : i.raw[n + 1] == 0x3a ? 3 : 1;
      break;
    }
  }
  if (map == 1) return i.opcode == 0x2e || i.opcode == 0x2f;
  if (map == 2) return i.opcode == 0x17 || (i.has(kVex) && (i.opcode == 0x0e || i.opcode == 0x0f));
  return map == 3 && i.opcode >= 0x60 && i.opcode <= 0x63;
}

/// FCMOVcc DA, DB C0..DF; FCOMI, FUCOMI, FCOMIP, FUCOMIP DB, DF E8..F7.
FlagUse x87_use(const DecodedInsn& i) {
  if (i.has(kHasMem)) return {};
  const u8 modrm = i.raw[i.length - 1];
  const bool fcmov = (i.opcode == 0xda || i.opcode == 0xdb) && modrm < 0xe0;
  if (fcmov) return uses(CF | ZF | PF, 0);
  const bool fcomi = (i.opcode == 0xdb || i.opcode == 0xdf) && modrm >= 0xe8 && modrm < 0xf8;
  return fcomi ? uses(0, CF | ZF | PF) : FlagUse{};
}

}  // namespace

u64 condition_flags(u8 condition) {
  switch ((condition & 15) >> 1) {
    case 0:
      return OF;
    case 1:
      return CF;
    case 2:
      return ZF;
    case 3:
      return CF | ZF;
    case 4:
      return SF;
    case 5:
      return PF;
    case 6:
      return SF | OF;
    default:
      return SF | OF | ZF;
  }
}

FlagUse flag_use(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Add:
    case Op::Sub:
    case Op::Cmp:
    case Op::Neg:
    case Op::Xadd:
    case Op::Cmpxchg:
    case Op::Popcnt:
      return uses(0, STATUS);
    case Op::And:
    case Op::Or:
    case Op::Xor:
    case Op::Test:
      return uses(0, kLogic);
    case Op::Adc:
    case Op::Sbb:
      return uses(CF, STATUS);
    case Op::Inc:
    case Op::Dec:
      return uses(0, STATUS & ~CF);
    case Op::Cmpxchg8b:
    case Op::Cmpxchg16b:
      return uses(0, ZF);
    case Op::Adcx:
      return uses(CF, CF);
    case Op::Adox:
      return uses(OF, OF);
    case Op::Andn:
    case Op::Blsi:
    case Op::Blsmsk:
    case Op::Blsr:
    case Op::Bzhi:
      return uses(0, CF | ZF | SF | OF);
    case Op::Bextr:
      return uses(0, CF | ZF | OF);
    case Op::Mul:
    case Op::Imul1:
    case Op::Imul2:
    case Op::Imul3:
      return uses(0, CF | OF);
    case Op::Div:
    case Op::Idiv:
      return uses(0, 0);
    case Op::Shl:
    case Op::Shr:
    case Op::Sar: {
      const unsigned count = shift_count(i, 1);
      if (count == 0 || count >= i.operands[0].size * 8u) return uses(0, 0);
      return uses(0, CF | PF | ZF | SF | (count == 1 ? OF : 0));
    }
    case Op::Rol:
    case Op::Ror: {
      const unsigned count = shift_count(i, 1);
      return uses(0, count == 0 ? 0 : CF | (count == 1 ? OF : 0));
    }
    case Op::Rcl:
    case Op::Rcr:
      return uses(CF, 0);
    case Op::Shld:
    case Op::Shrd: {
      const unsigned count = shift_count(i, 2);
      if (count == 0 || i.operands[0].size == 2) return uses(0, 0);
      return uses(0, CF | PF | ZF | SF | (count == 1 ? OF : 0));
    }
    case Op::Bt:
    case Op::Bts:
    case Op::Btr:
    case Op::Btc:
      return uses(0, CF);
    case Op::Bsf:
    case Op::Bsr:
      return uses(0, ZF);
    case Op::Tzcnt:
    case Op::Lzcnt:
      return uses(0, CF | ZF);
    case Op::Cmovcc:
    case Op::Setcc:
    case Op::Jcc:
      return uses(condition_flags(i.opcode), 0);
    case Op::Loope:
    case Op::Loopne:
      return uses(ZF, 0);
    case Op::Scas:
    case Op::Cmps:
      return i.has(kRep | kRepne) ? FlagUse{} : uses(0, STATUS);
    case Op::Popf:
      return uses(0, STATUS);
    case Op::Pushf:
      return uses(STATUS, 0);
    case Op::Lahf:
      return uses(SF | ZF | AF | PF | CF, 0);
    case Op::Sahf:
      return uses(0, SF | ZF | AF | PF | CF);
    case Op::Clc:
    case Op::Stc:
      return uses(0, CF);
    case Op::Cmc:
      return uses(CF, CF);
    case Op::HostX87:
      return x87_use(i);
    case Op::HostVec:
      return vector_writes_flags(i) ? uses(0, STATUS) : FlagUse{};
    default:
      return FlagUse{};
  }
}

u64 flags_left_undefined(const DecodedInsn& insn) {
  using namespace rflags;
  const bool by_one = insn.imm == 1 && insn.operands[1].kind != OperandKind::Gpr;
  switch (insn.op) {
    case Op::And:
    case Op::Or:
    case Op::Xor:
    case Op::Test:
      return AF;
    case Op::Bsf:
    case Op::Bsr:
      return OF | SF | AF | PF | CF;
    case Op::Tzcnt:
    case Op::Lzcnt:
    case Op::Bt:
    case Op::Bts:
    case Op::Btr:
    case Op::Btc:
      return OF | SF | AF | PF;
    case Op::Mul:
    case Op::Imul1:
    case Op::Imul2:
    case Op::Imul3:
      return SF | ZF | AF | PF;
    case Op::Div:
    case Op::Idiv:
      return STATUS;
    case Op::Shl:
    case Op::Shr:
    case Op::Sar:
      return AF | (by_one ? 0 : OF) | (insn.opsize < 4 ? CF : 0);
    case Op::Rol:
    case Op::Ror:
    case Op::Rcl:
    case Op::Rcr:
      return by_one ? 0 : OF;
    case Op::Shld:
    case Op::Shrd:
      return insn.opsize < 4 ? STATUS : AF | OF;
    case Op::Andn:
    case Op::Blsi:
    case Op::Blsmsk:
    case Op::Blsr:
    case Op::Bzhi:
      return AF | PF;
    case Op::Bextr:
      return AF | SF | PF;
    default:
      return 0;
  }
}

}  // namespace ring3::engine
