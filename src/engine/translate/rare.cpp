#include "engine/translate/builder.hpp"

/// Instructions of no family: MXCSR, the segment registers' selectors and bases, and the check of an
/// instruction whose bytes lie in two pages.
namespace ring3::engine {
namespace {

constexpr u8 kNotEqual = 5;

Encoding imm32_to(u8 opcode_reg, u8 rm, u32 value) {
  Encoding e{.opcode = 0x81, .reg = opcode_reg, .rm = rm};
  e.imm_size = 4;
  for (unsigned n = 0; n < 4; n++) e.imm[n] = static_cast<u8>(value >> (8 * n));
  return e;
}

}  // namespace

bool BlockBuilder::rare(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Ldmxcsr:
      return ldmxcsr(i);
    case Op::Stmxcsr: {
      Access a;
      if (!access_of(i, &a)) return false;
      return e_.encode({.map = 1, .opcode = 0xae, .reg = 3, .memory = true, .mem = a.mem});
    }
    case Op::MovSeg:
      return selector(i);
    case Op::Rdfsbase:
    case Op::Rdgsbase:
    case Op::Wrfsbase:
    case Op::Wrgsbase:
      return segment_base(i);
    default:
      return false;
  }
}

/// A value that faults, or unmasks an exception, is left to the interpreter.
bool BlockBuilder::ldmxcsr(const DecodedInsn& i) {
  constexpr u32 kMasks = 0x1f80, kKnown = 0xffff;
  clobber_flags();
  Access a;
  if (!access_of(i, &a)) return false;
  clobber_flags();
  e_.load32(kScratch0, a.mem);
  e_.mov32(kScratch1, kScratch0);
  e_.encode(imm32_to(4, kScratch1, ~kKnown | kMasks));
  e_.encode(imm32_to(7, kScratch1, kMasks));
  e_.jcc(kNotEqual, interpret_label());
  e_.store32(HostMem::frame(kValueSlot), kScratch0);
  return e_.encode({.map = 1, .opcode = 0xae, .reg = 2, .memory = true, .mem = HostMem::frame(kValueSlot)});
}

/// MOV from a segment register.
bool BlockBuilder::selector(const DecodedInsn& i) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (from.kind != OperandKind::Seg || from.reg > GS) return false;
  clobber_flags();
  e_.mov_imm(kScratch0, from.reg);
  system_op(SystemOp::ReadSelector, false);
  if (to.kind == OperandKind::Gpr) {
    if (to.size == 2) {
      e_.encode(special(to.reg)
                    ? Encoding{.p66 = true, .opcode = 0x89, .reg = kScratch1, .memory = true, .mem = slot(to.reg)}
                    : Encoding{.p66 = true, .opcode = 0x89, .reg = kScratch1, .rm = host(to.reg)});
    } else if (special(to.reg)) {
      e_.store(slot(to.reg), kScratch1);
    } else {
      e_.mov32(host(to.reg), kScratch1);
    }
    return true;
  }
  if (to.kind != OperandKind::Mem) return false;
  e_.store(HostMem::frame(kValueSlot), kScratch1);
  Access a;
  if (!access_of(i, &a)) return false;
  single_register(&a);
  e_.load(kScratch1, HostMem::frame(kValueSlot));
  return e_.encode({.p66 = true, .opcode = 0x89, .reg = kScratch1, .memory = true, .mem = a.mem});
}

/// RDFSBASE RDGSBASE WRFSBASE WRGSBASE: the frame has the bases.
bool BlockBuilder::segment_base(const DecodedInsn& i) {
  const Operand& o = i.operands[0];
  if (code32() || o.kind != OperandKind::Gpr || (o.size != 4 && o.size != 8)) return false;
  const bool fs = i.op == Op::Rdfsbase || i.op == Op::Wrfsbase;
  if (i.op == Op::Rdfsbase || i.op == Op::Rdgsbase) {
    clobber_flags();
    system_op(SystemOp::BasesAllowed, true);
    const HostMem base = HostMem::frame(fs ? frame::kFsBase : frame::kGsBase);
    const u8 to = special(o.reg) ? kScratch0 : host(o.reg);
    o.size == 4 ? e_.load32(to, base) : e_.load(to, base);
    if (special(o.reg)) e_.store(slot(o.reg), to);
    return true;
  }
  if (fs && request_->mode.near_fs) return false;  // the mode changes with it
  clobber_flags();
  const u8 from = value_of(o.reg, kScratch0);
  if (o.size == 4) {
    e_.mov32(kScratch0, from);
  } else if (from != kScratch0) {
    e_.mov(kScratch0, from);
  }
  system_op(fs ? SystemOp::WriteFsBase : SystemOp::WriteGsBase, true);
  return true;
}

/// The bytes on the next page: fetched now, by the execute tag of the TLB, are they what was translated? No other
/// mapping and no store to that page need be tracked then. Others: the block is left as one that is dead.
void BlockBuilder::check_edge() {
  const DecodedInsn& i = request_->insns[0];
  const unsigned here = i.length - request_->edge;
  clobber_flags();
  interpret_label();
  emit_rip(kScratch0, static_cast<i64>(kPageSize));
  if (code32()) e_.mov32(kScratch0, kScratch0);
  e_.mov(kScratch1, kScratch0);
  e_.shr(kScratch1, frame::kTlbShift);
  emit_tlb_mask();
  e_.cmp(kScratch0, tlb(kScratch1, frame::kTlbExecTag));
  e_.jcc(kNotEqual, interpret_label());
  e_.add(kScratch0, tlb(kScratch1, frame::kTlbAddend));
  for (unsigned n = 0; n < request_->edge;) {
    const unsigned left = request_->edge - n;
    const u8 size = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    Encoding e{.p66 = size == 2, .opcode = static_cast<u8>(size == 1 ? 0x80 : 0x81), .reg = 7, .memory = true};
    e.mem = HostMem::at(kScratch0, static_cast<i32>(n));
    e.imm_size = size;
    for (unsigned k = 0; k < size; k++) e.imm[k] = i.raw[here + n + k];
    e_.encode(e);
    e_.jcc(kNotEqual, dead_);
    n += size;
  }
}

}  // namespace ring3::engine
