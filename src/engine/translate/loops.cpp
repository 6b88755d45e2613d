#include <algorithm>

#include "engine/translate/builder.hpp"

/// Loops of one block: checks before the loop instead of in it.
///
/// A block that ends with a branch to its own start, and in which some base and index registers are
/// moved by constants only, gets a second body. There, the accesses off those registers (a stream each) have no check.
/// It is entered from the first one's backward branch by way of `setup`, which finds every stream's bytes of the next
/// iteration in the TLB, in one page each, keeps the addends in the frame, and from what is left of the pages how far
/// the fastest stream may go. The second body compares that at its start: one check for all streams. Where the
/// room ends, and where setup misses, the iteration runs in the first body, whose own checks fill the TLB or
/// leave it to the interpreter.
///
/// Exactness:   setup and the comparison stand where no flag is live inside the block (live_[0] is none), and fill
///              nothing: no page-table flag is set for an access that does not happen.
/// Interrupts:  the second body does not poll; the room is less than a page and the fastest stream moves by a byte or
///              more, so it is left after 4096 iterations at most, and the first body's branch polls.
/// Confinement: as for groups (groups.cpp): registers change as written_registers() and moves_by() say, or not at all.
namespace ring3::engine {
namespace {

constexpr i64 kStreamReach = 1024, kStep = 2048;

Encoding with_imm32(Encoding e, u32 value) {
  e.imm_size = 4;
  for (unsigned n = 0; n < 4; n++) e.imm[n] = static_cast<u8>(value >> (8 * n));
  return e;
}

}  // namespace

/// The address of a stream's byte `at` (a displacement off the registers at the block's start).
BlockBuilder::Address BlockBuilder::stream_address(const Stream& s, i64 at) {
  Address a;
  a.base = s.group.base;
  a.index = s.group.index;
  a.scale_log2 = s.group.scale_log2;
  a.disp = static_cast<i32>(at);
  return a;
}

void BlockBuilder::plan_loop(std::size_t count) {
  loop_.on = false;
  loop_.count = 0;
  loop_.fast = loop_.setup = Label{};
  loop_.hoisted.assign(count, false);
  if (!request_->loops || code32() || request_->edge != 0 || count < 2) return;
  const DecodedInsn& last = request_->insns[count - 1];
  u64 size = 0;
  for (std::size_t n = 0; n < count; n++) size += request_->insns[n].length;
  if (last.op != Op::Jcc && last.op != Op::Jmp) return;
  if (last.operands[0].kind != OperandKind::Rel || size + static_cast<u64>(last.imm) != 0) return;
  u64 live = rflags::STATUS;
  for (std::size_t n = count; n-- > 0;) live = live_before(request_->insns[n], use_[n], live);
  if (live != 0) return;

  i64 step[16] = {};
  bool wild[16] = {};
  for (std::size_t n = 0; n + 1 < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    u32 written = 0;
    if (!written_registers(i, &written)) return;
    for (u8 r = 0; r < 16; r++) {
      i64 by = 0;
      if (((written >> r) & 1) == 0) continue;
      if (moves_by(i, r, &by)) step[r] += by;
      else wild[r] = true;
    }
  }

  i64 moved[16] = {};
  insn_ = &request_->insns[0];
  for (std::size_t n = 0; n + 1 < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    const Operand* mem = nullptr;
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Mem && (o.access & kReadWrite) != 0) mem = &o;
    Address a;
    const bool by_bits = i.op >= Op::Bt && i.op <= Op::Btc && i.operands[1].kind == OperandKind::Gpr;
    if (mem != nullptr && mem->size != 0 && mem->size <= 64 && !by_bits && !masked_store(i) && address_of(i, &a) && groupable(a) &&
        !wild[a.base] && (a.index == kNoReg || !wild[a.index])) {
      add_to_stream(n, a, *mem, moved, step);
    }
    u32 written = 0;
    written_registers(i, &written);
    for (u8 r = 0; r < 16; r++) {
      i64 by = 0;
      if (((written >> r) & 1) != 0 && moves_by(i, r, &by)) moved[r] += by;
    }
  }
  for (unsigned k = 0; k < loop_.count; k++) {
    const i64 s = loop_.streams[k].step, r = loop_.streams[loop_.leader].step;
    if (k == 0 || (s < 0 ? -s : s) > (r < 0 ? -r : r)) loop_.leader = k;
  }
  loop_.on = loop_.count != 0 && loop_.streams[loop_.leader].step != 0;
}

bool BlockBuilder::all_hoisted(std::size_t count) const {
  for (std::size_t n = 0; n < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Mem && (o.access & kReadWrite) != 0 && !loop_.hoisted[n]) return false;
    if (i.op == Op::Push || i.op == Op::Pop) return false;
  }
  return true;
}

void BlockBuilder::add_to_stream(std::size_t n, const Address& a, const Operand& mem, const i64* moved,
                                 const i64* step) {
  const DecodedInsn& i = request_->insns[n];
  const auto along = [&](const i64* by) {
    return by[a.base] + (a.index != kNoReg ? by[a.index] * (i64{1} << a.scale_log2) : 0);
  };
  const i64 at = along(moved) + a.disp, by = along(step);
  const bool aligned = i.has(kAligned) || i.op == Op::Cmpxchg16b;
  if (by > kStep || by < -kStep || (aligned && ((mem.size & (mem.size - 1)) != 0 || by % mem.size != 0))) return;
  const bool write =
      (mem.access & kWrite) != 0 || i.op == Op::Cmpxchg || i.op == Op::Cmpxchg8b || i.op == Op::Cmpxchg16b;
  Stream* s = nullptr;
  for (unsigned k = 0; k < loop_.count; k++)
    if (same_registers(loop_.streams[k].group, a)) s = &loop_.streams[k];
  if (s == nullptr) {
    if (loop_.count == loop_.streams.size()) return;
    s = &loop_.streams[loop_.count++];
    *s = Stream{};
    s->group.active = true;
    s->group.base = a.base;
    s->group.index = a.index;
    s->group.scale_log2 = a.scale_log2;
    s->group.low = at;
    s->group.high = at + mem.size;
    s->step = by;
  }
  const i64 low = std::min(s->group.low, at), high = std::max(s->group.high, at + mem.size);
  if (high - low > kStreamReach) return;
  s->group.low = low;
  s->group.high = high;
  s->group.write |= write;
  if (aligned) s->aligned.push_back({at, mem.size});
  loop_.hoisted[n] = true;
}

void BlockBuilder::emit_setup(const Stream& s, u32 slot, bool first) {
  Label start = begin_;
  const i64 low = s.group.low, bytes = s.group.high - low;
  for (const auto& [at, size] : s.aligned) {
    emit_address(kScratch0, stream_address(s, at));
    e_.test8_imm(kScratch0, static_cast<u8>(size - 1));
    e_.jcc(5, start);
  }
  emit_group_check(stream_address(s, low), static_cast<u32>(bytes), s.group.write, start);
  e_.store(HostMem::frame(slot), kScratch1);
  if (s.step == 0 && !first) return;
  // r15 = how far the stream may go in its direction.
  emit_address(kScratch1, stream_address(s, low));
  e_.and32(kScratch1, static_cast<u32>(kPageSize - 1));
  if (s.step >= 0) {
    e_.encode(with_imm32({.opcode = 0x81, .reg = 6, .rm = kScratch1}, static_cast<u32>(kPageSize - 1)));  // xor
    e_.encode(with_imm32({.opcode = 0x81, .reg = 5, .rm = kScratch1}, static_cast<u32>(bytes - 1)));      // sub
  }
  u32 keep = 0;
  if (!first) {
    e_.cmp(kScratch1, HostMem::frame(frame::kLoopRoom));
    keep = e_.jcc_short(3);
  }
  e_.store(HostMem::frame(frame::kLoopRoom), kScratch1);
  if (!first) e_.bind_short(keep);
}

/// setup and the second body, behind everything else. False: it is not the same instructions.
bool BlockBuilder::second_body(std::size_t done) {
  if (!loop_.on) return true;
  const Stream& leader = loop_.streams[loop_.leader];
  Label start = begin_;
  e_.bind(loop_.setup);
  start_groups(true);  // for the accesses off other registers
  for (unsigned k = 0; k < loop_.count; k++) loop_.streams[k].group.slot = groups_[k].slot;
  emit_setup(leader, leader.group.slot, true);
  for (unsigned k = 0; k < loop_.count; k++)
    if (k != loop_.leader) emit_setup(loop_.streams[k], loop_.streams[k].group.slot, false);
  emit_address(kScratch0, stream_address(leader, leader.group.low));
  if (leader.step < 0)
    e_.encode({.w = true, .opcode = 0x2b, .reg = kScratch0, .memory = true, .mem = HostMem::frame(frame::kLoopRoom)});
  e_.store(HostMem::frame(frame::kLoopStart), kScratch0);

  e_.bind(loop_.fast);
  emit_address(kScratch0, stream_address(leader, leader.group.low));
  e_.encode({.w = true, .opcode = 0x2b, .reg = kScratch0, .memory = true, .mem = HostMem::frame(frame::kLoopStart)});
  e_.cmp(kScratch0, HostMem::frame(frame::kLoopRoom));
  e_.jcc(7, start);
  for (unsigned k = 0; k < loop_.count; k++) groups_[k] = loop_.streams[k].group;
  in_second_body_ = true;
  rip_ = request_->rip;
  flags_ = Flags::Dead;
  ended_ = false;
  const bool same = body(0, done) == done && ended_;
  in_second_body_ = false;
  return same;
}

}  // namespace ring3::engine
