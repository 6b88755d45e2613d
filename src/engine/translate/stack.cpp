#include "engine/translate/builder.hpp"

/// PUSH, POP, LEAVE, PUSHF with operands of the stack's width; rSP changes after the last check. CLI at CPL 0.
namespace ring3::engine {

void BlockBuilder::store_word_imm(const HostMem& m, i32 value) {
  if (!code32()) {
    e_.store_imm32(m, value);
    return;
  }
  Encoding e{.opcode = 0xc7, .memory = true, .mem = m};
  e.imm_size = 4;
  for (unsigned n = 0; n < 4; n++) e.imm[n] = static_cast<u8>(static_cast<u32>(value) >> (8 * n));
  e_.encode(e);
}

unsigned BlockBuilder::stack_run(Op op) const {
  constexpr unsigned kMost = 8;
  unsigned n = 0;
  while (n < kMost && index_ + n < count_) {
    const DecodedInsn& i = request_->insns[index_ + n];
    if (i.op != op || i.opsize != word() || i.operands[0].kind != OperandKind::Gpr || i.operands[0].reg == RSP) break;
    n++;
  }
  return n;
}

/// One check for all. In 64-bit code as a group, whose miss goes on one by one: a run may lie in two pages. In 32-bit
/// code the first one alone is interpreted then.
bool BlockBuilder::run_access(const Address& at, u8 bytes, Kind kind, Access* out) {
  if (code32()) return access(at, bytes, kind, false, out);
  if (windowed()) return false;  // the last of the accesses may fault when the first ones are done
  if (!grouping_) return false;
  must_group_ = true;
  const bool done = access(at, bytes, kind, false, out);
  must_group_ = false;
  return done;
}

bool BlockBuilder::push(const DecodedInsn& i) {
  Access all;
  const unsigned run = stack_run(Op::Push);
  const i32 w = word(), bytes = static_cast<i32>(run) * w;
  if (run > 1 && run_access(stack_address(-bytes), static_cast<u8>(bytes), Kind::Write, &all)) {
    for (unsigned n = 0; n < run; n++) {
      HostMem at = all.mem;
      at.disp += bytes - w * static_cast<i32>(n + 1);
      store_word(at, value_of(request_->insns[index_ + n].operands[0].reg, kScratch0));
    }
    move_rsp(-bytes);
    consumed_ = run;
    return true;
  }
  if (i.opsize != word()) return false;
  const Operand& o = i.operands[0];
  Access a;
  if (o.kind == OperandKind::Mem) {
    if (!access_of(i, &a)) return false;
    load_word(kScratch0, a.mem);
    e_.store(HostMem::frame(kValueSlot), kScratch0);
    if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
    single_register(&a);
    e_.load(kScratch1, HostMem::frame(kValueSlot));
    store_word(a.mem, kScratch1);
  } else if (o.kind == OperandKind::Gpr) {
    if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
    store_word(a.mem, value_of(o.reg, kScratch0));
  } else if (o.kind == OperandKind::Imm) {
    if (!code32() && i.imm != static_cast<i32>(i.imm)) return false;
    if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
    store_word_imm(a.mem, static_cast<i32>(i.imm));
  } else {
    return false;
  }
  move_rsp(-word());
  return true;
}

bool BlockBuilder::pop(const DecodedInsn& i) {
  Access all;
  const unsigned run = stack_run(Op::Pop);
  const i32 w = word(), bytes = static_cast<i32>(run) * w;
  if (run > 1 && run_access(stack_address(0), static_cast<u8>(bytes), Kind::Read, &all)) {
    for (unsigned n = 0; n < run; n++) {
      const u8 reg = request_->insns[index_ + n].operands[0].reg;
      HostMem at = all.mem;
      at.disp += w * static_cast<i32>(n);
      load_word(special(reg) ? kScratch0 : host(reg), at);
      if (special(reg)) e_.store(slot(reg), kScratch0);
    }
    move_rsp(bytes);
    consumed_ = run;
    return true;
  }
  const Operand& o = i.operands[0];
  if (i.opsize == word() && o.kind == OperandKind::Mem) return pop_memory(i);
  if (i.opsize != word() || o.kind != OperandKind::Gpr) return false;
  Access a;
  if (!access(stack_address(0), word(), Kind::Read, false, &a)) return false;
  if (o.reg == RSP) {
    load_word(kHostR13, a.mem);
    return true;
  }
  if (special(o.reg)) {
    e_.load(kScratch0, a.mem);
    e_.store(slot(o.reg), kScratch0);
  } else {
    load_word(host(o.reg), a.mem);
  }
  move_rsp(word());
  return true;
}

/// An address off rSP uses its value after the pop.
bool BlockBuilder::pop_memory(const DecodedInsn& i) {
  Address to;
  if (!address_of(i, &to)) return false;
  if (!to.constant && to.base == RSP) {
    if (to.disp > 0x7fff0000) return false;
    to.disp += word();
  }
  Access a;
  if (!access(stack_address(0), word(), Kind::Read, false, &a)) return false;
  load_word(kScratch0, a.mem);
  e_.store(HostMem::frame(kValueSlot), kScratch0);
  if (!access(to, word(), Kind::Write, false, &a)) return false;
  single_register(&a);
  e_.load(kScratch1, HostMem::frame(kValueSlot));
  store_word(a.mem, kScratch1);
  move_rsp(word());
  return true;
}

bool BlockBuilder::leave(const DecodedInsn& i) {
  if (i.opsize != word()) return false;
  Address at;
  at.base = RBP;
  at.narrow = at.linear32 = code32();
  Access a;
  if (!access(at, word(), Kind::Read, false, &a)) return false;
  load_word(kScratch0, a.mem);
  if (code32()) {
    e_.lea32(kHostR13, HostMem::at(kHostRbp, 4));
    e_.mov32(kHostRbp, kScratch0);
  } else {
    e_.lea(kHostR13, HostMem::at(kHostRbp, 8));
    e_.mov(kHostRbp, kScratch0);
  }
  return true;
}

/// The image: what VcpuState holds, with the status flags from the frame, without VM and RF.
bool BlockBuilder::pushf(const DecodedInsn& i) {
  if (i.opsize != word()) return false;
  clobber_flags();
  if (flags_ != Flags::Frame) return false;
  const auto byte_to_scratch1 = [&](u32 offset) {
    e_.encode({.map = 1,
               .opcode = 0xb6,
               .reg = kScratch1,
               .memory = true,
               .mem = HostMem::frame(offset)});  // movzx
  };
  const auto merge = [&] {
    e_.encode({.opcode = 0x09, .reg = kScratch1, .rm = kScratch0});
  };  // or r14d, r15d
  e_.load(kScratch0, HostMem::frame(kRflags));
  e_.load(kScratch0, HostMem::at(kScratch0));
  e_.and32(kScratch0, static_cast<u32>(~(rflags::STATUS | rflags::VM | rflags::RF)));
  byte_to_scratch1(kFlagsSlot + 1);
  merge();
  byte_to_scratch1(kFlagsSlot);
  e_.encode({.opcode = 0xc1, .reg = 4, .rm = kScratch1, .imm_size = 1, .imm = {11}});  // shl: OF
  merge();
  e_.store(HostMem::frame(kValueSlot), kScratch0);
  Access a;
  if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
  single_register(&a);
  e_.load(kScratch1, HostMem::frame(kValueSlot));
  store_word(a.mem, kScratch1);
  move_rsp(-word());
  return true;
}

bool BlockBuilder::cli() {
  clobber_flags();
  e_.load(kScratch0, HostMem::frame(kRflags));
  Encoding e{
      .opcode = 0x81, .reg = 4, .memory = true, .mem = HostMem::at(kScratch0)};  // and dword [r14], ~IF
  e.imm_size = 4;
  for (unsigned n = 0; n < 4; n++) e.imm[n] = static_cast<u8>(static_cast<u32>(~rflags::IF) >> (8 * n));
  return e_.encode(e);
}

}  // namespace ring3::engine
