#include <algorithm>

#include "engine/translate/builder.hpp"

/// Accesses off the same registers, checked once.
///
/// The first access of a group checks all bytes that later accesses of the block reach off the same, unchanged
/// base and index (a base that moves by constants counts as unchanged), in one page and for writing when one
/// of them writes, and keeps the page's addend in the frame. The others take the addend from there: no check,
/// and the flags stay. A translation that was checked holds to the end of the block: this vCPU serves
/// shootdowns between blocks, and an instruction that could change translations or rights ends all groups.
///
/// A group's check may miss where the first access by itself would not: the bytes lie in two pages, or the page
/// takes no writes yet. It then goes on in another block, made when first needed, in which every access has its own
/// check: no access is refused, and no page is marked dirty, for another's sake.
///
/// Confinement rests on written_registers(): what is not listed there ends all groups.
namespace ring3::engine {
namespace {

constexpr i32 kReach = 240;  ///< bytes of a group at most: few groups lie in two pages

constexpr u32 bit(u8 reg) { return reg < 16 ? 1u << reg : 0; }

}  // namespace

/// General registers that an instruction writes. False: not known here, or more than registers and memory
/// may have changed.
bool BlockBuilder::written_registers(const DecodedInsn& i, u32* out) {
  u32 w = 0;
  bool every = false;  // count every register operand as written
  switch (i.op) {
    case Op::Add:
    case Op::Or:
    case Op::Adc:
    case Op::Sbb:
    case Op::And:
    case Op::Sub:
    case Op::Xor:
    case Op::Inc:
    case Op::Dec:
    case Op::Neg:
    case Op::Not:
    case Op::Adcx:
    case Op::Adox:
    case Op::Andn:
    case Op::Bextr:
    case Op::Blsi:
    case Op::Blsmsk:
    case Op::Blsr:
    case Op::Bzhi:
    case Op::Pdep:
    case Op::Pext:
    case Op::Rorx:
    case Op::Sarx:
    case Op::Shlx:
    case Op::Shrx:
    case Op::Imul2:
    case Op::Imul3:
    case Op::Rol:
    case Op::Ror:
    case Op::Rcl:
    case Op::Rcr:
    case Op::Shl:
    case Op::Shr:
    case Op::Sar:
    case Op::Shld:
    case Op::Shrd:
    case Op::Bts:
    case Op::Btr:
    case Op::Btc:
    case Op::Bsf:
    case Op::Bsr:
    case Op::Tzcnt:
    case Op::Lzcnt:
    case Op::Popcnt:
    case Op::Crc32:
    case Op::Bswap:
    case Op::Mov:
    case Op::Movbe:
    case Op::Movnti:
    case Op::Movzx:
    case Op::Movsx:
    case Op::Movsxd:
    case Op::Lea:
    case Op::Cmovcc:
    case Op::Setcc:
      // The first operand is the only one that may be written.
      if (i.operands[0].kind == OperandKind::Gpr || i.operands[0].kind == OperandKind::GprHigh)
        w |= bit(i.operands[0].reg);
      if (i.operands[0].kind != OperandKind::Gpr && i.operands[0].kind != OperandKind::GprHigh &&
          i.operands[0].kind != OperandKind::Mem)
        return false;
      break;
    case Op::Cmp:
    case Op::Test:
    case Op::Bt:
    case Op::Nop:
    case Op::Prefetch:
    case Op::Endbr:
    case Op::Pause:
    case Op::Lfence:
    case Op::Mfence:
    case Op::Sfence:
    case Op::Clc:
    case Op::Stc:
    case Op::Cmc:
    case Op::Sahf:
    case Op::Jcc:
    case Op::Vgather:
    case Op::Vmaskmov:
      break;
    case Op::Xchg:
    case Op::Xadd:
    case Op::Mulx:
      every = true;
      break;
    case Op::Cmpxchg:
    case Op::Cmpxchg8b:
    case Op::Cmpxchg16b:
      every = true;
      w |= bit(RAX) | bit(RDX);
      break;
    case Op::Mul:
    case Op::Imul1:
    case Op::Div:
    case Op::Idiv:
    case Op::Cbw:
    case Op::Cwd:
      w |= bit(RAX) | bit(RDX);
      break;
    case Op::Lahf:
      w |= bit(RAX);
      break;
    case Op::HostX87:
      if (!i.has(kHasMem)) w |= bit(RAX);  // FNSTSW AX
      break;
    case Op::Fwait:
    case Op::Emms:
      break;
    case Op::HostMmx:
      every = true;
      break;
    case Op::HostVec:
      every = true;
      if (i.opcode >= 0x60 && i.opcode <= 0x63) w |= bit(RCX);  // PCMPESTRI, PCMPISTRI in map 3
      break;
    case Op::Push:
      w |= bit(RSP);
      break;
    case Op::Pop:
      every = true;
      w |= bit(RSP);
      break;
    default:
      return false;
  }
  for (const Operand& o : i.operands) {
    if (o.kind != OperandKind::Gpr && o.kind != OperandKind::GprHigh) continue;
    if (every || (o.access & kWrite) != 0) w |= bit(o.reg);
  }
  *out = w;
  return true;
}

/// The instruction changes reg by a constant, and no other way.
bool BlockBuilder::moves_by(const DecodedInsn& i, u8 reg, i64* by) {
  const Operand& d = i.operands[0];
  const bool whole = d.kind == OperandKind::Gpr && d.reg == reg && d.size == 8;
  switch (i.op) {
    case Op::Add:
    case Op::Sub:
      if (!whole || i.operands[1].kind != OperandKind::Imm || i.imm > 4096 || i.imm < -4096) return false;
      *by = i.op == Op::Add ? i.imm : -i.imm;
      return true;
    case Op::Inc:
    case Op::Dec:
      if (!whole) return false;
      *by = i.op == Op::Inc ? 1 : -1;
      return true;
    case Op::Lea:
      if (!whole || i.addrsize != 8 || i.mem.base != reg || i.mem.index != kNoReg || i.disp > 4096 || i.disp < -4096)
        return false;
      *by = i.disp;
      return true;
    case Op::Push:
      *by = -8;
      return reg == RSP && i.opsize == 8;
    case Op::Pop:
      *by = 8;
      return reg == RSP && i.opsize == 8 && d.kind == OperandKind::Gpr && d.reg != RSP;
    default:
      return false;
  }
}

bool BlockBuilder::groupable(const Address& a) {
  return !a.constant && !a.rip && a.segment == 0 && !a.narrow && a.bit == kNoReg && a.base != kNoReg && a.base < 16 &&
         (a.index == kNoReg || (a.index < 16 && !(special(a.base) && special(a.index)))) && a.disp > -0x10000000 &&
         a.disp < 0x10000000;
}

void BlockBuilder::follow(const DecodedInsn& i, Group* g) {
  if (!g->active) return;
  u32 written = 0;
  if (!written_registers(i, &written)) {
    g->active = false;
    return;
  }
  i64 by = 0;
  if (g->index != kNoReg && (written & bit(g->index)) != 0) {
    if (!moves_by(i, g->index, &by)) g->active = false;
    g->moved += by * (i64{1} << g->scale_log2);
  }
  if ((written & bit(g->base)) != 0) {
    by = 0;
    if (!moves_by(i, g->base, &by)) g->active = false;
    g->moved += by;
  }
  if (g->moved > 0x10000000 || g->moved < -0x10000000) g->active = false;
}

bool BlockBuilder::same_registers(const Group& g, const Address& a) {
  return groupable(a) && g.base == a.base && g.index == a.index &&
         (a.index == kNoReg || g.scale_log2 == a.scale_log2);
}

/// r15, the addend, becomes what the group keeps. near: base + index * scale + disp, or null, is in r14, which is clobbered. The
/// flags stay.
void BlockBuilder::keep(Group* g, const i32* near) {
  g->whole = special(g->base) || g->index != kNoReg;
  if (g->whole) {
    if (near == nullptr) {
      Address registers;
      registers.base = g->base;
      registers.index = g->index;
      registers.scale_log2 = g->scale_log2;
      emit_address(kScratch0, registers);
    }
    e_.lea(kScratch1, HostMem{kScratch0, kScratch1, 0, false, near == nullptr ? 0 : -*near});
  }
  e_.store(HostMem::frame(g->slot), kScratch1);
  e_.holds(g->slot);
}

/// An access by way of what a group keeps.
void BlockBuilder::through(const Group& g, const Address& a, Access* out) {
  if (g.whole) {
    by_sum(g.slot, g.moved + a.disp, out);
  } else {
    e_.load_r15(g.slot);
    operand_of(a, out);
  }
}

/// An operand off a host address that the frame holds.
void BlockBuilder::by_sum(u32 slot, i64 disp, Access* out) {
  const bool other = certain_ && both_free_;  // r15 has a region's constant, most likely
  other ? e_.load_r14(slot) : e_.load_r15(slot);
  *out = {HostMem::at(other ? kScratch0 : kScratch1, static_cast<i32>(disp)), !other, other};
}

const BlockBuilder::Group* BlockBuilder::group_of(const Address& a, u8 size, Kind kind) const {
  for (const Group& g : groups_) {
    if (!g.active || !same_registers(g, a) || (kind == Kind::Write && !g.write)) continue;
    const i64 at = g.moved + a.disp;
    if (at >= g.low && at + size <= g.high) return &g;
  }
  return nullptr;
}

/// Looks ahead for what an access at insn index_ could check for. Null: it stands alone, or no slot is free.
BlockBuilder::Group* BlockBuilder::open_group(const Address& a, u8 size, Kind kind) {
  // What follows STI is left to the interpreter with its shadow, which the way to the other block does not have.
  if (!groupable(a) || interpret_.back().sti_shadow) return nullptr;
  Group* const slot = free_group();
  if (slot == nullptr) return nullptr;
  Group g;
  g.active = true;
  g.base = a.base;
  g.index = a.index;
  g.scale_log2 = a.scale_log2;
  g.low = a.disp;
  g.high = a.disp + size;
  g.write = kind == Kind::Write;
  bool always = true;  // a store that may not come to pass does not ask for a page that takes writes
  const auto add = [&](const Address& other, unsigned bytes, bool write) {
    if (bytes == 0 || bytes > 64 || !same_registers(g, other) || (write && !g.write && !always)) return;
    const i64 at = g.moved + other.disp;
    const i64 low = std::min(g.low, at), high = std::max(g.high, at + bytes);
    if (high - low > kReach) return;
    g.low = low;
    g.high = high;
    g.write |= write;
    g.others++;
  };
  for (std::size_t n = index_; n < count_; n++) {
    const DecodedInsn& i = request_->insns[n];
    always &= i.op != Op::Jcc;
    if (n != index_) {
      for (const Operand& o : i.operands) {
        Address at;
        if (o.kind != OperandKind::Mem || (o.access & kReadWrite) == 0 || i.has(kAligned) || !address_of(i, &at))
          continue;
        if (i.op >= Op::Bt && i.op <= Op::Btc && i.operands[1].kind == OperandKind::Gpr) continue;
        if (masked_store(i)) continue;
        add(at, o.size, (o.access & kWrite) != 0);
      }
      if (i.opsize == 8 && !code32() && (i.op == Op::Push || i.op == Op::Call)) add(stack_address(-8), 8, true);
      if (i.opsize == 8 && !code32() && (i.op == Op::Pop || i.op == Op::Ret)) add(stack_address(0), 8, false);
    }
    follow(i, &g);
    if (!g.active) break;
  }
  bool stacked = g.base == RSP && g.index == kNoReg;
  for (const Group& other : groups_) stacked &= !other.active || other.slot != frame::kStackAddend;
  if (g.others == 0 && !must_group_ && !stacked) return nullptr;
  g.active = true;
  g.moved = 0;
  g.slot = stacked ? frame::kStackAddend : slot->slot;
  *slot = g;
  return slot;
}

/// Relative to RIP, in one page, whose place is known when the block is made.
bool BlockBuilder::in_known_page(const Address& a, unsigned size) {
  return a.rip && a.segment == 0 && a.bit == kNoReg && (a.value & (kPageSize - 1)) + size <= kPageSize;
}

/// A page that was checked: its slot holds its host address.
const BlockBuilder::Group* BlockBuilder::page_group(const Address& a, Kind kind) const {
  for (const Group& g : groups_)
    if (g.active && g.base == kRipBase && g.low == static_cast<i64>(a.value & kPageMask) && (g.write || kind == Kind::Read)) return &g;
  return nullptr;
}

/// Whether an instruction behind index_ reaches the same page of those relative to RIP, before translations may change.
bool BlockBuilder::page_again(const Address& a, Kind kind) const {
  u64 next = rip_;
  u32 written = 0;
  for (std::size_t n = index_; n < count_; n++) {
    const DecodedInsn& i = request_->insns[n];
    next += i.length;
    if (n != index_ && i.mem.base == kRipBase && i.mem.index == kNoReg && i.mem.seg != FS && i.mem.seg != GS) {
      const u64 value = static_cast<u64>(i.disp + page_offset(next));
      for (const Operand& o : i.operands) {
        const bool fits = o.kind == OperandKind::Mem && (value & (kPageSize - 1)) + o.size <= kPageSize;
        const u32 wanted = kind == Kind::Write ? kReadWrite : kRead;
        if (fits && (o.access & kReadWrite & ~wanted) == 0 && (o.access & wanted) != 0 && ((value ^ a.value) & kPageMask) == 0) return true;
      }
    }
    if (!written_registers(i, &written)) return false;
  }
  return false;
}

/// For the page of the access at insn index_. Null: it stands alone, or no slot is free.
const BlockBuilder::Group* BlockBuilder::open_page_group(const Address& a, Kind kind) {
  if (!grouping_ || !page_again(a, kind)) return nullptr;
  Group* const g = free_group();
  if (g == nullptr) return nullptr;
  g->active = true;
  g->write = kind == Kind::Write;
  g->base = kRipBase;
  g->low = static_cast<i64>(a.value & kPageMask);
  return g;
}

BlockBuilder::Group* BlockBuilder::free_group() {
  for (unsigned n = 0; n < kGroups; n++) {
    Group& g = groups_[n];
    if (g.active) continue;
    g = Group{};
    g.slot = frame::kGroups + 8 * n;
    return &g;
  }
  return nullptr;
}

void BlockBuilder::start_groups(bool on) {
  grouping_ = on;
  for (unsigned n = 0; n < kGroups; n++) {
    groups_[n] = Group{};
    groups_[n].slot = frame::kGroups + 8 * n;
  }
}

/// An instruction that is not known here may use the slots itself.
void BlockBuilder::before(const DecodedInsn& i) {
  u32 written = 0;
  if (i.op == Op::Call || i.op == Op::Ret || i.op == Op::Jmp || i.op == Op::Leave || written_registers(i, &written))
    return;
  for (Group& g : groups_) g.active = false;
}

/// The group lies elsewhere than the stack's last accesses: its page takes that place, if it may be written.
void BlockBuilder::stack_miss(GroupMiss& m) {
  e_.bind(m.stack);
  emit_group_check(m.address, m.size, true, m.entry);
  e_.store(HostMem::frame(frame::kStackAddend), kScratch1);
  emit_address(kScratch1, m.address);
  e_.encode({.w = true, .opcode = 0x29, .reg = kScratch0, .rm = kScratch1});  // sub
  e_.store(HostMem::frame(frame::kStackPage), kScratch1);
  e_.store_imm32(HostMem::frame(frame::kStackLimit), static_cast<i32>(kPageSize) - kReach + 1);
  e_.jmp(m.resume);
}

/// The miss of a group's check. In one page, a fill that the first access alone is entitled to: what that does not
/// make good is most often a page fault of the access, and the interpreter's. In two, on without groups.
void BlockBuilder::finish_groups() {
  for (GroupMiss& m : group_misses_) {
    Label ungrouped;
    if (m.stacked) stack_miss(m);
    e_.bind(m.entry);
    Label& interpret = interpret_[m.insn].entry;
    Label& found = m.stacked ? m.stack : m.resume;
    emit_address(kScratch0, m.address);
    one_page_or(ungrouped, m.size);
    e_.mov_imm(kScratch1, m.size);
    emit_fill(m.write && m.fill);
    if (m.fill && (m.write || !m.stacked)) {
      e_.jcc(5, found);
      e_.jmp(interpret);
    } else {  // a read first: does the page take writes as well?
      e_.jcc(4, interpret);
      emit_group_check(m.address, m.size, true, m.write ? interpret : ungrouped);
      e_.jmp(found);
    }
    e_.bind(ungrouped);
    leave_ungrouped(m.insn, m.offset, m.flags == Flags::Frame);
  }
}

/// On at this instruction, of which nothing has happened, in a block without groups.
void BlockBuilder::leave_ungrouped(std::size_t insn, i64 offset, bool in_frame) {
  if (interpret_[insn].fip) emit_fip(interpret_[insn].fip_offset);
  stubs_.push_back({{}, offset, in_frame, true});
  DirectExit x;
  x.field = e_.size() + 1;
  x.target = pic() ? static_cast<u64>(offset) : (request_->rip & kPageMask) + static_cast<u64>(offset);
  x.frame_flags = in_frame;
  x.ungrouped = true;
  out_->exits.push_back(x);
  e_.jmp(stubs_.back().entry);
}

}  // namespace ring3::engine
