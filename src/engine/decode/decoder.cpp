#include "engine/decode/decoder.hpp"

#include <Zydis/Zydis.h>

#include <cstring>

#include "engine/decode/op_table.hpp"

namespace ring3::engine {
namespace {

/// The decoders Zydis needs, one per mode; constant after construction.
struct Decoders {
  ZydisDecoder d[2][4];  // [amd][Bits16, Bits32, Bits64, real mode]

  Decoders() {
    for (int amd = 0; amd < 2; ++amd) {
      setup(&d[amd][0], ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16, amd);
      setup(&d[amd][1], ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32, amd);
      setup(&d[amd][2], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64, amd);
      setup(&d[amd][3], ZYDIS_MACHINE_MODE_REAL_16, ZYDIS_STACK_WIDTH_16, amd);
    }
  }
  static void setup(ZydisDecoder* decoder, ZydisMachineMode mode, ZydisStackWidth stack, bool amd) {
    ZydisDecoderInit(decoder, mode, stack);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_AMD_BRANCHES, amd);
    // Not offered to the guest: their encodings are the hint NOPs they were carved from, or #UD.
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_WBNOINVD, ZYAN_FALSE);
  }
};

const Decoders kDecoders;

u8 clamp_bytes(u32 bits) { return bits / 8 > 255 ? 0 : static_cast<u8>(bits / 8); }

u8 segment_number(ZydisRegister reg) {
  switch (reg) {
    case ZYDIS_REGISTER_ES: return 0;
    case ZYDIS_REGISTER_CS: return 1;
    case ZYDIS_REGISTER_SS: return 2;
    case ZYDIS_REGISTER_FS: return 4;
    case ZYDIS_REGISTER_GS: return 5;
    default: return 3;
  }
}

/// Fills a register operand; false for register files the engine does not have.
bool register_operand(ZydisRegister reg, Operand* out) {
  const auto id = [&] { return static_cast<u8>(ZydisRegisterGetId(reg)); };
  switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8:
      if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH) {
        out->kind = OperandKind::GprHigh;
        out->reg = static_cast<u8>(reg - ZYDIS_REGISTER_AH);
      } else {
        out->kind = OperandKind::Gpr;
        out->reg = reg <= ZYDIS_REGISTER_BL ? static_cast<u8>(reg - ZYDIS_REGISTER_AL)
                                            : static_cast<u8>(reg - ZYDIS_REGISTER_SPL + 4);
      }
      return true;
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
      out->kind = OperandKind::Gpr;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_SEGMENT:
      out->kind = OperandKind::Seg;
      out->reg = segment_number(reg);
      return true;
    case ZYDIS_REGCLASS_CONTROL:
      out->kind = OperandKind::Cr;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_DEBUG:
      out->kind = OperandKind::Dr;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_XMM:
    case ZYDIS_REGCLASS_YMM:
    case ZYDIS_REGCLASS_ZMM:
      out->kind = OperandKind::Vec;
      out->reg = id();
      return out->reg < 32;
    case ZYDIS_REGCLASS_MASK:
      out->kind = OperandKind::Mask;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_MMX:
      out->kind = OperandKind::Mmx;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_X87:
      out->kind = OperandKind::St;
      out->reg = id();
      return true;
    case ZYDIS_REGCLASS_BOUND:
    case ZYDIS_REGCLASS_TMM:
      return false;
    default:
      out->kind = OperandKind::Other;
      return true;
  }
}

void memory_operand(const ZydisDecodedInstructionRaw& raw, const ZydisDecodedOperand& o, DecodedInsn* insn) {
  MemOperand& m = insn->mem;
  const auto& z = o.mem;
  m.base = kNoReg;
  if (z.base == ZYDIS_REGISTER_RIP || z.base == ZYDIS_REGISTER_EIP) {
    m.base = kRipBase;
  } else if (z.base != ZYDIS_REGISTER_NONE) {
    m.base = static_cast<u8>(ZydisRegisterGetId(z.base));
  }
  // Mod 0 with base 101b has no base register, whatever REX.B or VEX.B say.
  if (insn->addrsize != 2 && raw.modrm.mod == 0 && raw.modrm.rm == 4 && raw.sib.base == 5) m.base = kNoReg;
  m.index = z.index == ZYDIS_REGISTER_NONE ? kNoReg : static_cast<u8>(ZydisRegisterGetId(z.index));
  m.scale_log2 = z.scale == 8 ? 3 : z.scale == 4 ? 2 : z.scale == 2 ? 1 : 0;
  m.seg = segment_number(z.segment);
  // Zydis misses it where it misses the missing base. EVEX's of 8 bits stand for multiples of the operand's size.
  const bool scaled = insn->has(kEvex) && raw.disp.size == 8;
  insn->disp = raw.disp.size != 0 && !scaled ? raw.disp.value : z.disp.value;
  insn->flags |= kHasMem;
}

/// Zydis has them among those whose masked elements do not fault; the SDM has E4NF for them.
bool masks_no_faults(const ZydisDecodedInstruction& z) {
  switch (z.mnemonic) {
    case ZYDIS_MNEMONIC_VDBPSADBW: case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
    case ZYDIS_MNEMONIC_VGF2P8AFFINEQB: case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB:
      return true;
    default: break;
  }
  switch (z.meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_E1NF: case ZYDIS_EXCEPTION_CLASS_E2NF: case ZYDIS_EXCEPTION_CLASS_E3NF:
    case ZYDIS_EXCEPTION_CLASS_E4NF: case ZYDIS_EXCEPTION_CLASS_E5NF: case ZYDIS_EXCEPTION_CLASS_E6NF:
    case ZYDIS_EXCEPTION_CLASS_E9NF: case ZYDIS_EXCEPTION_CLASS_E10NF: case ZYDIS_EXCEPTION_CLASS_E11NF:
      return true;
    default: return false;
  }
}

bool scalar(ZydisISASet set) {
  return set == ZYDIS_ISA_SET_AVX512F_SCALAR || set == ZYDIS_ISA_SET_AVX512DQ_SCALAR || set == ZYDIS_ISA_SET_AVX512_FP16_SCALAR;
}

/// What a write mask means to the memory operand.
void masked_memory(const ZydisDecodedInstruction& z, const ZydisDecodedOperand* zo, DecodedInsn* insn) {
  if (insn->mask == 0) return;
  const ZydisDecodedOperand* memory = nullptr;
  for (unsigned i = 0; i < z.operand_count_visible; ++i)
    if (zo[i].type == ZYDIS_OPERAND_TYPE_MEMORY) memory = &zo[i];
  if (memory == nullptr) return;
  const bool checked = masks_no_faults(z);
  if (checked && !(memory->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)) return;
  insn->mem_element = clamp_bytes(memory->element_size);
  const u16 elements = memory->element_count;
  switch (z.mnemonic) {
    case ZYDIS_MNEMONIC_VPCOMPRESSB: case ZYDIS_MNEMONIC_VPCOMPRESSW: case ZYDIS_MNEMONIC_VPCOMPRESSD:
    case ZYDIS_MNEMONIC_VPCOMPRESSQ: case ZYDIS_MNEMONIC_VCOMPRESSPS: case ZYDIS_MNEMONIC_VCOMPRESSPD:
    case ZYDIS_MNEMONIC_VPEXPANDB: case ZYDIS_MNEMONIC_VPEXPANDW: case ZYDIS_MNEMONIC_VPEXPANDD:
    case ZYDIS_MNEMONIC_VPEXPANDQ: case ZYDIS_MNEMONIC_VEXPANDPS: case ZYDIS_MNEMONIC_VEXPANDPD:
      insn->masked = MaskedMemory::Packed;
      insn->mask_bits = static_cast<u8>(elements);
      return;
    default: break;
  }
  if (scalar(z.meta.isa_set)) {
    insn->masked = MaskedMemory::Scalar;
    insn->mask_bits = 1;
  } else if (z.avx.broadcast.mode != ZYDIS_BROADCAST_MODE_INVALID) {
    insn->masked = MaskedMemory::Modulo;
    insn->mask_bits = static_cast<u8>(z.avx.broadcast.is_static ? zo[0].element_count : 1u << z.avx.broadcast.mode);
  } else {
    insn->masked = checked ? MaskedMemory::Checked : MaskedMemory::Each;
    insn->mask_bits = static_cast<u8>(elements);
  }
}

/// Takes over the explicit operands and the implicit ones that are no memory.
bool take_operands(const ZydisDecodedInstruction& z, const ZydisDecodedOperand* zo, DecodedInsn* insn) {
  unsigned n = 0, immediates = 0;
  for (unsigned i = 0; i < z.operand_count_visible; ++i) {
    const ZydisDecodedOperand& o = zo[i];
    if (o.visibility == ZYDIS_OPERAND_VISIBILITY_IMPLICIT && o.type == ZYDIS_OPERAND_TYPE_MEMORY) continue;
    if (insn->has(kEvex) && o.encoding == ZYDIS_OPERAND_ENCODING_MASK) {
      insn->mask = static_cast<u8>(ZydisRegisterGetId(o.reg.value));
      continue;
    }
    if (n == 4) return false;
    Operand& out = insn->operands[n++];
    out.size = clamp_bytes(o.size);
    if (o.actions & ZYDIS_OPERAND_ACTION_MASK_READ) out.access |= kRead;
    if (o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) out.access |= kWrite;
    switch (o.type) {
      case ZYDIS_OPERAND_TYPE_REGISTER:
        if (!register_operand(o.reg.value, &out)) return false;
        break;
      case ZYDIS_OPERAND_TYPE_MEMORY:
        out.kind = OperandKind::Mem;
        if (o.mem.type == ZYDIS_MEMOP_TYPE_AGEN || o.mem.type == ZYDIS_MEMOP_TYPE_MIB) {
          out.size = 0;
          out.access = 0;
        }
        memory_operand(z.raw, o, insn);
        break;
      case ZYDIS_OPERAND_TYPE_POINTER:
        out.kind = OperandKind::FarPtr;
        insn->imm = static_cast<i64>(o.ptr.offset);
        insn->disp = o.ptr.segment;
        break;
      case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        out.kind = o.imm.is_relative ? OperandKind::Rel : OperandKind::Imm;
        if (immediates++ == 0) {
          insn->imm = o.imm.value.s;
        } else {
          out.kind = OperandKind::Imm2;
          insn->disp = o.imm.value.s;
        }
        break;
      default:
        return false;
    }
  }
  return true;
}

bool is_string(Op op) { return op >= Op::Movs && op <= Op::Outs; }

bool has_prefix(const ZydisDecodedInstruction& z, u8 prefix) {
  for (unsigned i = 0; i < z.raw.prefix_count; ++i)
    if (z.raw.prefixes[i].value == prefix) return true;
  return false;
}

/// The source segment of an instruction with implicit memory operands (strings, XLAT, MASKMOV).
u8 implicit_segment(const ZydisDecodedInstruction& z, CodeMode mode) {
  u8 seg = 3;
  for (unsigned i = 0; i < z.raw.prefix_count; ++i) {
    const u8 p = z.raw.prefixes[i].value;
    if (p == 0x64) seg = 4;
    if (p == 0x65) seg = 5;
    if (mode == CodeMode::Bits64) continue;
    if (p == 0x26) seg = 0;
    if (p == 0x2e) seg = 1;
    if (p == 0x36) seg = 2;
    if (p == 0x3e) seg = 3;
  }
  return seg;
}

/// The last F2/F3 prefix decides; MOVS, LODS, STOS, INS and OUTS repeat alike under both.
void string_prefixes(const ZydisDecodedInstruction& z, DecodedInsn* insn) {
  for (unsigned i = 0; i < z.raw.prefix_count; ++i) {
    const u8 p = z.raw.prefixes[i].value;
    if (p != 0xf2 && p != 0xf3) continue;
    insn->flags &= ~(kRep | kRepne);
    const bool compares = insn->op == Op::Cmps || insn->op == Op::Scas;
    insn->flags |= p == 0xf2 && compares ? kRepne : kRep;
  }
}

/// SSE memory operands must be aligned, but for the instructions whose purpose it is not to be.
bool needs_alignment(const ZydisDecodedInstruction& z, const DecodedInsn& insn, bool amd) {
  if (amd && insn.feature == Feature::Sha) return false;
  if (insn.op != Op::HostVec || !insn.has(kHasMem)) return false;
  u8 size = 0;
  for (const Operand& o : insn.operands)
    if (o.kind == OperandKind::Mem) size = o.size;
  if (size < 16) return false;
  switch (z.mnemonic) {
    case ZYDIS_MNEMONIC_VMOVAPS: case ZYDIS_MNEMONIC_VMOVAPD: case ZYDIS_MNEMONIC_VMOVDQA:
    case ZYDIS_MNEMONIC_VMOVNTPS: case ZYDIS_MNEMONIC_VMOVNTPD: case ZYDIS_MNEMONIC_VMOVNTDQ:
    case ZYDIS_MNEMONIC_VMOVNTDQA:
    case ZYDIS_MNEMONIC_VMOVDQA32: case ZYDIS_MNEMONIC_VMOVDQA64:
      return true;
    case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_LDDQU: case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_PCMPESTRM:
    case ZYDIS_MNEMONIC_PCMPISTRI: case ZYDIS_MNEMONIC_PCMPISTRM:
      return false;
    default:
      return z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
  }
}

/// Operations Zydis does not tell apart by mnemonic.
Op refine(Op op, const ZydisDecodedInstruction& z, const DecodedInsn& insn) {
  const OperandKind k0 = insn.operands[0].kind, k1 = insn.operands[1].kind;
  switch (op) {
    case Op::Mov:
      if (k0 == OperandKind::Seg || k1 == OperandKind::Seg) return Op::MovSeg;
      if (k0 == OperandKind::Cr || k1 == OperandKind::Cr) return Op::MovCr;
      if (k0 == OperandKind::Dr || k1 == OperandKind::Dr) return Op::MovDr;
      return op;
    case Op::Push: return k0 == OperandKind::Seg ? Op::PushSeg : op;
    case Op::Pop: return k0 == OperandKind::Seg ? Op::PopSeg : op;
    case Op::Call: return z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? Op::CallFar : op;
    case Op::Jmp: return z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? Op::JmpFar : op;
    case Op::Ret: return z.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? Op::RetFar : op;
    case Op::Imul1:
      if (insn.operands[2].kind != OperandKind::None) return Op::Imul3;
      if (z.opcode == 0xaf) return Op::Imul2;
      return op;
    case Op::Movs: return z.meta.category == ZYDIS_CATEGORY_STRINGOP ? op : Op::HostVec;
    case Op::Cmps: return z.meta.category == ZYDIS_CATEGORY_STRINGOP ? op : Op::HostVec;
    default: return op;
  }
}

/// What is not in the table: the host's own units, told apart by the registers they use.
Op classify_host(const ZydisDecodedInstruction& z, const DecodedInsn& insn) {
  if (z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
      z.opcode >= 0xd8 && z.opcode <= 0xdf)
    return Op::HostX87;
  bool vec = false;
  for (const Operand& o : insn.operands) {
    if (o.kind == OperandKind::Mmx) return Op::HostMmx;
    if (o.kind == OperandKind::Cr || o.kind == OperandKind::Dr || o.kind == OperandKind::Seg) return Op::Invalid;
    vec |= o.kind == OperandKind::Vec || o.kind == OperandKind::Mask;
  }
  // CVT(T)SS2SI and CVT(T)SD2SI from memory name no vector register.
  vec |= z.opcode_map == ZYDIS_OPCODE_MAP_0F && (z.opcode == 0x2c || z.opcode == 0x2d);
  vec |= insn.has(kEvex);
  return vec ? Op::HostVec : Op::Invalid;
}

/// What Zydis sees otherwise than the CPUs do, as the host oracle found.
void correct(const ZydisDecodedInstruction& z, bool long_mode64, bool amd, DecodedInsn* d) {
  const bool f2 = has_prefix(z, 0xf2);
  const bool f3 = has_prefix(z, 0xf3);
  if (!amd) {
    // AMD's read 32 bits for a destination of 16 (APM vol. 3), Intel's 16 (SDM vol. 2).
    if (d->op == Op::Movsxd && d->opsize == 2) d->operands[1].size = 2;
    return;
  }
  if (d->op == Op::Pause && (z.attributes & ZYDIS_ATTRIB_HAS_REX) && z.raw.rex.B) {
    d->op = Op::Xchg;  // F3 REX.B 90 is no PAUSE, as it is for Intel's
    const u8 size = z.raw.rex.W ? 8 : has_prefix(z, 0x66) ? 2 : 4;
    d->opsize = size;
    d->operands[0] = {OperandKind::Gpr, 8, size, kReadWrite};
    d->operands[1] = {OperandKind::Gpr, 0, size, kReadWrite};
  }
  if (d->op == Op::Loope && f2) d->op = Op::Loopne;  // the prefix decides on ZF
  else if (d->op == Op::Loopne && f3) d->op = Op::Loope;
  if (z.opcode_map == ZYDIS_OPCODE_MAP_0F && z.opcode == 0x0d && z.raw.modrm.mod == 3) d->op = Op::Invalid;
  const bool wide_element = z.opcode_map == ZYDIS_OPCODE_MAP_0F3A && (z.opcode == 0x16 || z.opcode == 0x22);
  if (d->has(kVex) && wide_element && !long_mode64 && z.raw.vex.W) d->op = Op::Invalid;
}

bool ends_block(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Jmp: case Op::Jcc: case Op::Jcxz: case Op::Loop: case Op::Loope: case Op::Loopne: case Op::Call:
    case Op::Ret: case Op::CallFar: case Op::JmpFar: case Op::RetFar: case Op::Iret: case Op::Int3: case Op::Int:
    case Op::Into: case Op::Int1: case Op::Ud: case Op::Invalid: case Op::Sti: case Op::Popf: case Op::Clac:
    case Op::Stac: case Op::Lss: case Op::Lmsw: case Op::MovCr: case Op::MovDr: case Op::Wrmsr: case Op::Hlt:
    case Op::Invd: case Op::Wbinvd: case Op::Invlpg: case Op::Invpcid: case Op::Syscall: case Op::Sysret:
    case Op::Sysenter: case Op::Sysexit: case Op::Xsetbv: case Op::Monitor: case Op::Mwait: case Op::Vmcall:
    case Op::Vmmcall: case Op::Rsm: case Op::Ins: case Op::Outs: case Op::In: case Op::Out: case Op::Serialize:
      return true;
    case Op::MovSeg:
      return insn.operands[0].kind == OperandKind::Seg && insn.operands[0].reg == 2;
    case Op::PopSeg:
      return insn.operands[0].reg == 2;
    default:
      return (insn.flags & (kRep | kRepne)) != 0;  // a repeated string instruction may stop between iterations
  }
}

InsnForm form_of(const ZydisDecodedInstruction& z, const ZydisDecodedOperand* zo, const DecodedInsn& d) {
  InsnForm form;
  const auto& disp = z.raw.disp;
  const auto& imm = z.raw.imm[0];
  if (z.raw.imm[1].size != 0 || z.opcode_map == ZYDIS_OPCODE_MAP_0F0F) return form;
  unsigned immediates = 0;
  for (unsigned i = 0; i < z.operand_count; ++i)
    if (zo[i].encoding == ZYDIS_OPERAND_ENCODING_IS4) return form;
  for (const Operand& o : d.operands) {
    if (o.kind == OperandKind::Imm2 || o.kind == OperandKind::FarPtr) return form;
    immediates += o.kind == OperandKind::Imm || o.kind == OperandKind::Rel;
  }
  if ((imm.size != 0 && immediates != 1) || (disp.size != 0 && !d.has(kHasMem))) return form;
  form.disp_size = disp.size / 8;
  form.imm_size = imm.size / 8;
  form.imm_signed = imm.is_signed;
  const unsigned numbers = form.disp_size + form.imm_size;
  if (numbers < z.length) form.fixed = static_cast<u8>(z.length - numbers);
  if (disp.size != 0 && disp.offset != form.fixed) form.fixed = 0;
  if (imm.size != 0 && imm.offset != form.fixed + form.disp_size) form.fixed = 0;
  return form;
}

}  // namespace

u64 decoder_version() { return ZydisGetVersion(); }

DecodeResult decode(const u8* bytes, unsigned size, CodeMode mode, bool real_mode, bool amd, DecodedInsn* insn) {
  InsnForm form;
  return decode(bytes, size, mode, real_mode, amd, insn, &form);
}

DecodeResult decode(const u8* bytes, unsigned size, CodeMode mode, bool real_mode, bool amd, DecodedInsn* insn, InsnForm* form) {
  *insn = DecodedInsn{};
  *form = InsnForm{};
  const unsigned column = mode == CodeMode::Bits64   ? 2
                          : mode == CodeMode::Bits32 ? 1
                          : real_mode                ? 3
                                                     : 0;
  ZydisDecodedInstruction z;
  ZydisDecodedOperand zo[ZYDIS_MAX_OPERAND_COUNT];
  const ZyanStatus status = ZydisDecoderDecodeFull(&kDecoders.d[amd][column], bytes, size, &z, zo);
  if (status == ZYDIS_STATUS_NO_MORE_DATA) {
    if (size < 15) return DecodeResult::Short;
    return DecodeResult::TooLong;
  }
  if (status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG) return DecodeResult::TooLong;
  insn->length = 1;  // of an undefined instruction nothing but its address is ever used
  insn->raw[0] = size > 0 ? bytes[0] : 0;
  insn->flags = kEndsBlock;
  if (!ZYAN_SUCCESS(status)) return DecodeResult::Ok;

  insn->length = z.length;
  std::memcpy(insn->raw, bytes, z.length);
  const bool vex = z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX, evex = z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  if (z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY && !vex && !evex) return DecodeResult::Ok;
  if ((vex || evex) && real_mode) return DecodeResult::Ok;
  const Feature feature = feature_of(z.meta.isa_set);

  DecodedInsn d = *insn;
  d.flags = vex ? kVex : evex ? kEvex : 0;
  if (needs_vl(z.meta.isa_set)) d.flags |= kEvexVl;
  d.opcode = z.opcode;
  d.feature = feature;
  d.opsize = z.operand_width ? z.operand_width / 8 : 1;
  d.addrsize = z.address_width / 8;
  if (!take_operands(z, zo, &d)) return DecodeResult::Ok;
  if (evex) masked_memory(z, zo, &d);
  for (const Operand& o : d.operands)
    if (vex && o.kind == OperandKind::Mask) d.flags |= kOpmask;

  OpRow row = op_row(z.mnemonic);
  d.op = row.op == Op::Invalid ? classify_host(z, d) : refine(row.op, z, d);
  correct(z, mode == CodeMode::Bits64, amd, &d);
  if (d.op == Op::Invalid) return DecodeResult::Ok;
  if (evex && d.op != Op::HostVec && d.op != Op::Vgather && d.op != Op::Vscatter) return DecodeResult::Ok;
  if (row.opsize) d.opsize = row.opsize;
  if (row.op != Op::Invalid && row.any_feature) d.feature = Feature::Base;
  if (d.feature == Feature::Unsupported) return DecodeResult::Ok;
  if (d.feature == Feature::LahfLm && mode != CodeMode::Bits64) d.feature = Feature::Base;
  if (d.op == Op::Sysret || d.op == Op::Sysexit)
    d.opsize = (z.attributes & ZYDIS_ATTRIB_HAS_REX) && z.raw.rex.W ? 8 : 4;

  if (z.attributes & ZYDIS_ATTRIB_HAS_LOCK) d.flags |= kLock;
  if (is_string(d.op)) {
    string_prefixes(z, &d);
    for (Operand& o : d.operands) o = Operand{};
    d.flags &= ~kHasMem;
    if (d.has(kRep | kRepne)) d.flags |= kMayFaultAfterPartial;
  }
  if (is_string(d.op) || d.op == Op::Xlat || d.op == Op::Maskmov) d.mem.seg = implicit_segment(z, mode);
  if (needs_alignment(z, d, amd)) d.flags |= kAligned;
  if (ends_block(d)) d.flags |= kEndsBlock;
  *form = form_of(z, zo, d);
  *insn = d;
  return DecodeResult::Ok;
}

}  // namespace ring3::engine
