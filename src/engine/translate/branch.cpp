#include "engine/translate/builder.hpp"

/// Near control flow: JMP Jcc JRCXZ LOOP CALL RET, and the block's exits.
///
/// Faults: a target that is not canonical is left to the interpreter, with nothing changed.
/// Polls:  a direct exit that goes backward looks at attention, by way of RCX where flags live in the host;
///         exit_indirect polls by itself: while attention is raised it finds nothing in the jump table. Forward
///         branches, calls forward and returns to after their call cannot make a loop by themselves.
namespace ring3::engine {
namespace {

HostMem frame_at(u32 offset) { return HostMem::frame(offset); }
/// jmp [the frame's slot]
Encoding thunk_jump(u32 offset) {
  return {.opcode = 0xff, .reg = 4, .memory = true, .mem = frame_at(offset)};
}

}  // namespace

void BlockBuilder::exit_interpret_now() {
  flags_to_host(kScratch0);
  emit_rip(kScratch0, page_offset(rip()));
  const bool vector = needs_vectors(request_->insns[index_].op);
  ended_ = true;
  if ((request_->mode.lazy && vector) || code32() || request_->edge != 0) {
    e_.encode(thunk_jump(request_->mode.lazy && vector ? frame::kExitVectors : frame::kExitInterpret));
    return;
  }
  e_.bytes({0x41, 0xbf});  // mov r15d, the number it is given
  out_->left = static_cast<u32>(index_);
  out_->left_at.push_back(e_.size());
  e_.imm32(0);
  e_.encode(thunk_jump(exit_of_left(request_->insns[index_])));
}

bool BlockBuilder::reachable(u64 target) const {
  const i64 offset = page_offset(target);
  return static_cast<u64>(static_cast<i64>(target << 16) >> 16) == target &&
         (!pic() || (offset > -0x7fff0000ll && offset < 0x7fff0000ll));
}

void BlockBuilder::restore_page(u64 rip) {
  if (!pic()) return;
  e_.lea(kScratch0, HostMem::at(kScratch0, -static_cast<i32>(page_offset(rip))));
  e_.store(frame_at(frame::kPage), kScratch0);
}

void BlockBuilder::flags_away(u8 scratch) {
  if (flags_ != Flags::Host) return;
  emit_flags_save(scratch);
  flags_ = Flags::Frame;
}

/// Leaves both scratch registers free, the flags where they are.
void BlockBuilder::poll(u64 target) {
  const bool host = flags_ == Flags::Host;
  polls_.push_back({{}, target, host, !host});
  if (!host) {
    e_.cmp32_imm(frame_at(frame::kAttention), 0);
    e_.jcc(5, polls_.back().entry);
    return;
  }
  e_.mov(kScratch0, kHostRcx);
  e_.load32(kHostRcx, frame_at(frame::kAttention));
  const u32 over = e_.jrcxz_short(8);
  e_.jmp(polls_.back().entry);
  e_.bind_short(over);
  e_.mov(kHostRcx, kScratch0);
}

/// Position-independent: the page moves along, and the link holds for one place of the target's page in one
/// address space.
void BlockBuilder::exit_to_other_page(u64 target, bool backward, const i64* r14) {
  const Flags flags = flags_;
  flags_away(kScratch0);  // r14 is kept, or there is nothing to do
  if (backward) poll(target);
  const u64 in_page = target & (kPageSize - 1);
  stubs_.push_back({{}, static_cast<i64>(in_page), true});
  if (r14 == nullptr) e_.load(kScratch0, frame_at(frame::kPage));
  const i64 base = r14 != nullptr ? *r14 : 0;
  e_.lea(kScratch0, HostMem::at(kScratch0, static_cast<i32>(page_offset(target) - static_cast<i64>(in_page) - base)));
  e_.store(frame_at(frame::kPage), kScratch0);
  e_.add(kScratch0, frame_at(frame::kJumpBias));
  e_.bytes({0x49, 0xbf});  // mov r15, the link's
  const u32 guard = e_.size();
  e_.imm64(0);
  e_.encode({.w = true, .opcode = 0x39, .reg = kScratch1, .rm = kScratch0});  // cmp r14, r15
  e_.jcc(5, stubs_.back().entry);
  out_->exits.push_back({e_.size() + 1, 0, 0, static_cast<u64>(page_offset(target)), true, guard, true});
  e_.jmp(stubs_.back().entry);
  flags_ = flags;  // what the branch's other way has
}

void BlockBuilder::exit_to(u64 target, bool backward, const i64* r14) {
  ended_ = true;
  if (pic() && !same_page(target)) {
    exit_to_other_page(target, backward, r14);
    return;
  }
  if (backward) poll(target);
  const bool in_frame = flags_ != Flags::Host;
  stubs_.push_back({{}, page_offset(target), in_frame});
  Label& stub = stubs_.back().entry;
  u32 bias = DirectExit::kSamePage;
  const bool unguarded = !same_page(target) && request_->mode.windowed;
  if (!same_page(target) && !unguarded) {
    if (in_frame) {
      e_.encode({.opcode = 0x81, .reg = 7, .memory = true, .mem = frame_at(frame::kBiasHigh), .imm_size = 4});  // cmp, the link's
      bias = e_.size() - 4;
      e_.jcc(5, stub);
    } else {
      e_.mov(kScratch0, kHostRcx);
      e_.load32(kHostRcx, frame_at(frame::kBiasNegated));
      e_.bytes({0x8d, 0x89});  // lea ecx, [rcx + the link's]
      bias = e_.size();
      e_.imm32(0);
      const u32 over = e_.jrcxz_short(8);
      e_.mov(kHostRcx, kScratch0);
      e_.jmp(stub);
      e_.bind_short(over);
      e_.mov(kHostRcx, kScratch0);
    }
  }
  out_->exits.push_back({e_.size() + 1, 0, 0, pic() ? static_cast<u64>(page_offset(target)) : target, in_frame, bias});
  out_->exits.back().unguarded = unguarded;
  e_.jmp(stub);
}

void BlockBuilder::exit_if(u8 condition, u64 target) {
  stubs_.push_back({{}, page_offset(target), false});
  e_.jcc(condition, stubs_.back().entry);
  out_->exits.push_back({e_.size() - 4, 0, 0, pic() ? static_cast<u64>(page_offset(target)) : target, false});
  out_->exits.back().insns = static_cast<u16>(index_ + 1);
}

/// The jump table's entry for r14; the thunks' hash (jump_index()). checked: the target is canonical; else that is for what the
/// table has not, and nothing of the instruction's may have happened yet.
void BlockBuilder::exit_indirect(bool checked) {
  ended_ = true;
  flags_away(kScratch1);  // the check of a window leaves them in the host
  if (!checked) static_cast<void>(interpret_label());
  e_.encode({.vex = true, .pp = 3, .map = 3, .opcode = 0xf0, .reg = kScratch1, .rm = kScratch0, .imm_size = 1, .imm = {30}});  // rorx r15d, r14d, 30
  e_.encode({.opcode = 0x23, .reg = kScratch1, .memory = true, .mem = frame_at(frame::kJumpMask)});                             // and r15d, [mask]
  e_.add(kScratch1, frame_at(frame::kJumpTable));
  e_.cmp(kScratch0, HostMem::at(kScratch1));
  misses_.push_back({{}, checked, interpret_.size() - 1});
  e_.jcc(5, misses_.back().entry);
  e_.encode({.opcode = 0xff, .reg = 4, .memory = true, .mem = HostMem::at(kScratch1, 8)});
}

void BlockBuilder::shadow_call(u64 back) {
  Label callee;
  flags_away(kScratch1);
  // The shadow stack is full: it begins anew.
  e_.encode({.w = true, .opcode = 0x3b, .reg = kHostRsp, .memory = true, .mem = frame_at(frame::kShadowLimit)});
  const u32 room = e_.jcc_short(7);
  e_.load(kHostRsp, frame_at(frame::kShadowBase));
  e_.bind_short(room);
  e_.bytes({0x41, 0x56});  // push r14
  e_.call(callee);
  restore_page(back);
  const Flags flags = flags_;
  flags_ = Flags::Frame;  // as every RET leaves them
  exit_to(back, false);
  flags_ = flags;
  e_.bind(callee);
}

void BlockBuilder::shadow_return() {
  flags_away(kScratch1);
  e_.cmp(kScratch0, HostMem::at(kHostRsp, 8));
}

void BlockBuilder::check_canonical(u8 reg, u8 temp) {
  if (code32()) {
    e_.mov32(reg, reg);
  } else {
    emit_canonical_test(reg, temp, interpret_label());
  }
}

void BlockBuilder::emit_canonical_test(u8 reg, u8 temp, Label& otherwise) {
  if (request_->mode.user) {  // the interpreter raises what there is to raise in the upper half
    e_.cmp(reg, frame_at(frame::kUserEnd));
    e_.jcc(3, otherwise);
    return;
  }
  e_.mov(temp, reg);
  e_.encode({.w = true, .opcode = 0xc1, .reg = 4, .rm = temp, .imm_size = 1, .imm = {16}});  // shl
  e_.encode({.w = true, .opcode = 0xc1, .reg = 7, .rm = temp, .imm_size = 1, .imm = {16}});  // sar
  e_.encode({.w = true, .opcode = 0x39, .reg = reg, .rm = temp});                            // cmp
  e_.jcc(5, otherwise);
}

bool BlockBuilder::jmp(const DecodedInsn& i) {
  const Operand& o = i.operands[0];
  if (i.opsize != word()) return false;
  if (o.kind == OperandKind::Rel) {
    const u64 target = wrapped(next_rip() + static_cast<u64>(i.imm));
    if (!reachable(target)) return false;
    if (loop_.on && target == request_->rip) {
      ended_ = true;
      if (!in_second_body_) poll(target);
      e_.jmp(in_second_body_ ? loop_.fast : loop_.setup);
      return true;
    }
    exit_to(target);
    return true;
  }
  if (o.kind == OperandKind::Mem) {
    Access a;
    if (!access_of(i, &a)) return false;
    load_word(kScratch0, a.mem);
  } else if (o.kind == OperandKind::Gpr) {
    clobber_flags();
    if (special(o.reg)) {
      e_.load(kScratch0, slot(o.reg));
    } else {
      e_.mov(kScratch0, host(o.reg));
    }
  } else {
    return false;
  }
  if (code32()) e_.mov32(kScratch0, kScratch0);
  exit_indirect(code32());
  return true;
}

bool BlockBuilder::jcc(const DecodedInsn& i) {
  if (i.opsize != word() || i.operands[0].kind != OperandKind::Rel) return false;
  const u64 target = wrapped(next_rip() + static_cast<u64>(i.imm));
  if (!reachable(target)) return false;
  flags_to_host(kScratch0);
  const bool loop = loop_.on && target == request_->rip;
  if (loop && in_second_body_) {
    e_.jcc(i.opcode & 15, loop_.fast);
    exit_to(wrapped(next_rip()));
    return true;
  }
  const bool goes_on = index_ + 1 < request_->insns.size();  // the block, where it is not taken
  if (!loop && same_page(target) && target > rip()) {
    exit_if(i.opcode & 15, target);
    if (!goes_on) exit_to(wrapped(next_rip()));
    return true;
  }
  if (goes_on) {
    far_exits_.push_back({{}, target, index_});
    e_.jcc(i.opcode & 15, far_exits_.back().entry);
    return true;
  }
  if (!loop && same_page(wrapped(next_rip()))) {
    exit_if((i.opcode & 15) ^ 1, wrapped(next_rip()));
    exit_to(target);
    return true;
  }
  Label taken;
  e_.jcc(i.opcode & 15, taken);
  exit_to(wrapped(next_rip()));
  e_.bind(taken);
  if (loop) {
    poll(target);
    e_.jmp(loop_.setup);
  } else {
    exit_to(target);
  }
  return true;
}

/// JRCXZ, LOOP, LOOPE, LOOPNE: the host's own, over the first exit.
bool BlockBuilder::count_branch(const DecodedInsn& i) {
  if (i.opsize != word() || (i.addrsize != 8 && i.addrsize != 4) || i.operands[0].kind != OperandKind::Rel)
    return false;
  const u64 target = wrapped(next_rip() + static_cast<u64>(i.imm));
  if (!reachable(target)) return false;
  // By the operation: with a repeat prefix the opcode may mean another condition (decode knows).
  const u8 opcode = i.op == Op::Loopne ? 0xe0 : i.op == Op::Loope ? 0xe1 : i.op == Op::Loop ? 0xe2 : 0xe3;
  flags_to_host(kScratch0);
  if (i.addrsize == 4) e_.byte(0x67);
  e_.bytes({opcode, 0});
  const u32 over = e_.size() - 1;
  exit_to(wrapped(next_rip()));
  e_.bind_short(over);
  exit_to(target);
  return true;
}

bool BlockBuilder::call(const DecodedInsn& i) {
  const Operand& o = i.operands[0];
  if (i.opsize != word()) return false;
  const u64 back = wrapped(next_rip());
  if (!reachable(back)) return false;
  const auto push_return = [&](const Access& a) {
    if (code32() || (!pic() && static_cast<u64>(static_cast<i64>(static_cast<i32>(back))) == back)) {
      store_word_imm(a.mem, static_cast<i32>(back));
      emit_rip(kScratch0, page_offset(back));
    } else {
      emit_rip(kScratch0, page_offset(back));
      e_.store(a.mem, kScratch0);
    }
  };
  Access a;
  if (o.kind == OperandKind::Rel) {
    const u64 target = wrapped(back + static_cast<u64>(i.imm));
    if (!reachable(target)) return false;
    if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
    push_return(a);
    move_rsp(-word());
    shadow_call(back);
    const i64 at = page_offset(back);  // in r14
    exit_to(target, target <= rip(), flags_ != Flags::Host ? &at : nullptr);
    return true;
  }
  if (o.kind == OperandKind::Mem) {
    if (!access_of(i, &a)) return false;
    load_word(kScratch0, a.mem);
    flags_away(kScratch1);  // the check of a window leaves them in the host
  } else if (o.kind == OperandKind::Gpr) {
    clobber_flags();
    if (special(o.reg)) {
      e_.load(kScratch0, slot(o.reg));
    } else {
      e_.mov(kScratch0, host(o.reg));
    }
  } else {
    return false;
  }
  check_canonical(kScratch0, kScratch1);
  e_.store(frame_at(kValueSlot), kScratch0);
  if (!access(stack_address(-word()), word(), Kind::Write, false, &a)) return false;
  push_return(a);
  move_rsp(-word());
  shadow_call(back);
  e_.load(kScratch0, frame_at(kValueSlot));
  exit_indirect(true);
  return true;
}

bool BlockBuilder::ret(const DecodedInsn& i) {
  if (i.opsize != word()) return false;
  Access a;
  if (!access(stack_address(0), word(), Kind::Read, false, &a)) return false;
  load_word(kScratch0, a.mem);
  const i32 drop = word() + static_cast<i32>(static_cast<u16>(i.imm));
  shadow_return();
  const u32 other = e_.jcc_short(5);
  move_rsp(drop);
  e_.bytes({0xc2, 8, 0});  // ret 8: and away with the guest's
  e_.bind_short(other);
  check_canonical(kScratch0, kScratch1);
  move_rsp(drop);
  e_.encode(thunk_jump(frame::kExitReturn));
  ended_ = true;
  return true;
}

}  // namespace ring3::engine
