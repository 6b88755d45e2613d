#include "engine/translate/builder.hpp"

/// PUSH, POP, LEAVE with 64-bit operands. rSP changes after the last check.
namespace ring3::engine {

bool BlockBuilder::push(const DecodedInsn& i) {
  if (i.opsize != 8) return false;
  const Operand& o = i.operands[0];
  Access a;
  if (o.kind == OperandKind::Mem) {
    if (!access_of(i, &a)) return false;
    e_.load(kScratch0, a.mem);
    e_.store(HostMem::frame(kValueSlot), kScratch0);
    if (!access(stack_address(-8), 8, Kind::Write, false, &a)) return false;
    e_.load(kScratch0, HostMem::frame(kValueSlot));
    e_.store(a.mem, kScratch0);
  } else if (o.kind == OperandKind::Gpr) {
    if (!access(stack_address(-8), 8, Kind::Write, false, &a)) return false;
    e_.store(a.mem, value_of(o.reg, kScratch0));
  } else if (o.kind == OperandKind::Imm) {
    if (i.imm != static_cast<i32>(i.imm)) return false;
    if (!access(stack_address(-8), 8, Kind::Write, false, &a)) return false;
    e_.store_imm32(a.mem, static_cast<i32>(i.imm));
  } else {
    return false;
  }
  e_.lea(kHostR13, HostMem::at(kHostR13, -8));
  return true;
}

bool BlockBuilder::pop(const DecodedInsn& i) {
  const Operand& o = i.operands[0];
  if (i.opsize != 8 || o.kind != OperandKind::Gpr) return false;
  Access a;
  if (!access(stack_address(0), 8, Kind::Read, false, &a)) return false;
  if (o.reg == RSP) {
    e_.load(kHostR13, a.mem);
    return true;
  }
  if (special(o.reg)) {
    e_.load(kScratch0, a.mem);
    e_.store(slot(o.reg), kScratch0);
  } else {
    e_.load(host(o.reg), a.mem);
  }
  e_.lea(kHostR13, HostMem::at(kHostR13, 8));
  return true;
}

bool BlockBuilder::leave(const DecodedInsn& i) {
  if (i.opsize != 8) return false;
  Address at;
  at.base = RBP;
  Access a;
  if (!access(at, 8, Kind::Read, false, &a)) return false;
  e_.lea(kHostR13, HostMem::at(kHostRbp, 8));
  e_.load(kHostRbp, a.mem);
  return true;
}

}  // namespace ring3::engine
