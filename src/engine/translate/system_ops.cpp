#include "engine/translate/builder.hpp"

/// System instructions that a kernel runs between one piece of user code and the next, by a call of
/// SystemOp functions (transitions.cpp): the guest's registers stay where they are, nothing leaves to
/// the run loop. What is rare about them (a mode that changes, a pending interrupt window, a trap flag) is left
/// to the interpreter: the function then returns 0, with nothing changed.
///
/// Spec: as the interpreter's handlers (interp/system.cpp, syscall.cpp, stack.cpp).
namespace ring3::engine {

void BlockBuilder::system_op(SystemOp op, bool may_refuse) {
  clobber_flags();
  e_.mov_imm(kScratch1, static_cast<u64>(op));
  e_.encode({.opcode = 0xff, .reg = 2, .memory = true, .mem = HostMem::frame(frame::kSystemOp)});
  if (!may_refuse) return;
  e_.encode({.w = true, .opcode = 0x85, .reg = kScratch1, .rm = kScratch1});
  e_.jcc(4, interpret_label());
}

bool BlockBuilder::system(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Swapgs:
      return swapgs();
    case Op::Stac:
    case Op::Clac:
      return clac_stac(i.op == Op::Stac);
    case Op::Sti:
      return sti();
    case Op::Popf:
      return popf(i);
    case Op::MovCr:
      return mov_from_cr(i);
    case Op::Rdtsc:
    case Op::Rdtscp:
      return rdtsc(i.op == Op::Rdtscp);
    default:
      return false;
  }
}

bool BlockBuilder::may_follow_sti(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Nop:
    case Op::Endbr:
    case Op::Mov:
    case Op::Lea:
    case Op::Test:
    case Op::Cmp:
    case Op::Add:
    case Op::Sub:
    case Op::And:
    case Op::Or:
    case Op::Xor:
    case Op::Push:
    case Op::Pop:
    case Op::Jmp:
    case Op::Jcc:
    case Op::Call:
    case Op::Ret:
      return true;
    default:
      return false;
  }
}

bool BlockBuilder::swapgs() {
  e_.load(kScratch0, HostMem::frame(frame::kGsBase));
  e_.load(kScratch1, HostMem::frame(frame::kKernelGsBase));
  e_.store(HostMem::frame(frame::kGsBase), kScratch1);
  e_.store(HostMem::frame(frame::kKernelGsBase), kScratch0);
  return true;
}

bool BlockBuilder::clac_stac(bool set) {
  system_op(set ? SystemOp::Stac : SystemOp::Clac, false);
  return true;
}

/// With no interrupt waiting, the shadow matters only when the instruction behind STI is left to the interpreter: its
/// exit makes the shadow then. Else that instruction runs alone, in the interpreter: the run loop sees the shadow.
bool BlockBuilder::sti() {
  if (index_ + 1 < count_ && may_follow_sti(request_->insns[index_ + 1])) {
    system_op(SystemOp::StiOpen, true);
    return true;
  }
  system_op(SystemOp::Sti, false);
  flags_to_host(kScratch0);
  emit_rip(kScratch0, page_offset(next_rip()));
  e_.encode({.opcode = 0xff, .reg = 4, .memory = true, .mem = HostMem::frame(frame::kExitAttention)});
  ended_ = true;
  return true;
}

bool BlockBuilder::popf(const DecodedInsn& i) {
  if (i.opsize != word()) return false;
  Access a;
  if (!access(stack_address(0), word(), Kind::Read, false, &a)) return false;
  load_word(kScratch0, a.mem);
  system_op(SystemOp::Popf, true);  // r14 stays
  move_rsp(word());
  // As LAHF and SETO leave them: SF ZF AF PF CF in bits 15:8, OF in bit 0.
  e_.mov32(kScratch1, kScratch0);
  e_.and32(kScratch0, static_cast<u32>(rflags::STATUS & 0xff));
  e_.encode({.opcode = 0xc1, .reg = 4, .rm = kScratch0, .imm_size = 1, .imm = {8}});   // shl r14d, 8
  e_.encode({.opcode = 0xc1, .reg = 5, .rm = kScratch1, .imm_size = 1, .imm = {11}});  // shr r15d, 11
  e_.and32(kScratch1, 1);
  e_.encode({.opcode = 0x09, .reg = kScratch1, .rm = kScratch0});  // or r14d, r15d
  e_.store32(HostMem::frame(kFlagsSlot), kScratch0);
  flags_ = Flags::Frame;
  return true;
}

bool BlockBuilder::mov_from_cr(const DecodedInsn& i) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (to.kind != OperandKind::Gpr || from.kind != OperandKind::Cr) return false;
  SystemOp op;
  switch (from.reg) {
    case 0:
      op = SystemOp::ReadCr0;
      break;
    case 2:
      op = SystemOp::ReadCr2;
      break;
    case 3:
      op = SystemOp::ReadCr3;
      break;
    case 4:
      op = SystemOp::ReadCr4;
      break;
    default:
      return false;
  }
  system_op(op, false);
  if (special(to.reg)) {
    e_.store(slot(to.reg), kScratch1);
  } else {
    code32() ? e_.mov32(host(to.reg), kScratch1) : e_.mov(host(to.reg), kScratch1);
  }
  return true;
}

bool BlockBuilder::rdtsc(bool aux) {
  system_op(SystemOp::Rdtsc, true);
  e_.mov32(kHostRax, kScratch1);
  e_.mov(kHostRdx, kScratch1);
  e_.shr(kHostRdx, 32);
  if (!aux) return true;
  system_op(SystemOp::TscAux, false);
  e_.mov32(kHostRcx, kScratch1);
  return true;
}

}  // namespace ring3::engine
