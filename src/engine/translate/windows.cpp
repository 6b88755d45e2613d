#include <algorithm>

#include "engine/translate/builder.hpp"

/// Guest memory by the host's MMU: pages of the guest's address space stand in host windows (mmu/window.hpp), region by
/// region (4 TiB), at linear + a constant. For 64-bit user code of address spaces that have run long enough.
///
/// The check, for an operand whose address stands off a register:
///     register >> 42 is the region that the translator expects ?  r15 = that region's constant
/// (of region 0, where addresses begin: register < 4 TiB)
/// and the operand is at its own address + r15: nothing that the address depends on waits for the check. A displacement is
/// less than the guard around the region's host addresses, so that one check serves all accesses off a register while it
/// moves by constants alone: a group, whose slot in the frame holds the constant. Alignment, page ends and missing
/// pages are the host's business: what faults goes to the window's thunk, which maps the page and
/// comes back, or leaves the guest instruction to the interpreter. So, unlike with the TLB's check, the access itself may
/// end an instruction: nothing of the guest's state changes before the last one.
///
/// Stacks: in TranslateMode::stacked, rSP is in the stacks' region, and what is off it is reached by the gs base, which is that
/// region's constant: no check, and no constant to load. after() says why rSP stays there. So are others that are certain to be in it, and
/// what is near FS's base where that is (near_fs).
///
/// In some blocks (plan_regions()) a register of another region leaves the block instead of taking that region's constant: what it was
/// checked for is certain from there on, and needs no slot.
///
/// Confinement: a register of the expected region, + a displacement below the guard, + the constant: inside the region's host
///              addresses and their guards, where nothing else is ever mapped. A region without host addresses has a constant
///              that makes addresses which are not canonical (when the first of them faults, it gets host addresses). The check looks at bits 42 to 49 (for region 0 at all); an address with others
///              set above is not canonical, and not so with the constant added either.
namespace ring3::engine {

namespace {

/// Of a region's constant, in the frame.
u32 delta_slot(u64 region) {
  return region == 0 ? frame::kWindowFirst : frame::kWindowDeltas + static_cast<u32>(8 * Window::named_for(region));
}

}  // namespace

constexpr i32 kWindowDisp = 0x10000000;  ///< displacements are below this, and constants that a register moves by

/// Where an operand of the instruction lies, most likely.
u64 BlockBuilder::expected_region(const Address& a) const {
  if (a.narrow && a.segment == 0) return 0;
  if (a.base == RSP && a.segment == 0) return Window::kStacks;
  const u8 region = foresight_.region(index_);
  return region != Foresight::kUnknown ? region : Window::kStacks;
}

void BlockBuilder::window_point() {
  const Interpret& i = interpret_.back();
  out_->faults.push_back({e_.size(), pic() ? static_cast<u64>(page_offset(i.rip)) : i.rip, true, flags_ == Flags::Frame});
}

/// r15 = bits 42 to 49 of reg. Flags stay.
void BlockBuilder::emit_region_number(u8 reg) {
  emit_rorx(kScratch1, reg, frame::kRegionShift);
  e_.encode({.map = 1, .opcode = 0xb6, .reg = kScratch1, .rm = kScratch1, .rex_forced = true});  // movzx r15d, r15b
}

/// To `other` where reg does not point into this region. Clobbers the flags, and temp.
void BlockBuilder::emit_region_compare(u8 reg, u64 region, u8 temp, Label& other) {
  if (region == 0) {
    e_.cmp(reg, HostMem::frame(frame::kWindowSize));
    e_.jcc(3, other);
    return;
  }
  emit_rorx(temp, reg, frame::kRegionShift);
  e_.encode({.opcode = 0x80, .reg = 7, .rm = temp, .rex_forced = true, .imm_size = 1, .imm = {static_cast<u8>(region)}});  // cmp temp's low byte
  e_.jcc(5, other);
}

/// The same by way of RCX: the flags stay. Clobbers both scratch registers.
void BlockBuilder::emit_region_compare_keeping_flags(u8 reg, u64 region, Label& other) {
  emit_region_number(reg);
  e_.mov(kScratch0, kHostRcx);
  e_.lea32(kHostRcx, HostMem::at(kScratch1, -static_cast<i32>(region)));
  const u32 over = e_.jrcxz_short(8);
  e_.mov(kHostRcx, kScratch0);
  e_.jmp(other);
  e_.bind_short(over);
  e_.mov(kHostRcx, kScratch0);
}

/// r15 = what is added to addresses near reg's.
void BlockBuilder::emit_window_check(u8 reg, u64 region, const Address& a, bool page) {
  if (flags_live_in_host()) {
    // Nothing here changes flags; what the address depends on waits for the table.
    emit_region_number(reg);
    e_.load(kScratch1, HostMem{kHostR9, kScratch1, 3, false, static_cast<i32>(frame::kWindowDeltas) - RING3_FRAME_CENTRE});
    return;
  }
  clobber_flags();  // emits nothing: r14 may hold the address
  window_misses_.emplace_back();
  WindowMiss& m = window_misses_.back();
  m.address = a;
  m.page = page;
  interpret_label();
  m.insn = interpret_.size() - 1;
  emit_region_compare(reg, region, kScratch1, m.entry);
  e_.load(kScratch1, HostMem::frame(delta_slot(region)));
  e_.bind(m.resume);
}

/// An access off one register, which may be in any region.
bool BlockBuilder::region_operand(const DecodedInsn& i, const Operand& o, Address* out) const {
  return o.kind == OperandKind::Mem && (o.access & kReadWrite) != 0 && address_of(i, out) && groupable(*out) && out->index == kNoReg &&
         !off_stack(*out);
}

/// Operands in this region have checks that make it certain.
bool BlockBuilder::certain(u64 region) const {
  return region < Window::kRegions && (certain_ || (several_ && by_gs(region)));
}

/// Whether certain regions pay: accesses off different registers, by turns, each of which would load its group's constant. Where the
/// gs base serves them they cost no constant, and pay off two registers already; but a segment's base makes an address later, and
/// one register alone may be a chain of pointers.
void BlockBuilder::plan_regions(std::size_t count) {
  constexpr unsigned kTurns = 2;
  certain_ = several_ = false;
  if (!request_->mode.windowed || request_->ungrouped || loop_.on) return;
  std::array<Group, kGroups> groups{};
  unsigned turns = 0;
  unsigned uses[Window::kRegions] = {};
  const Group* last = nullptr;
  for (std::size_t n = 0; n < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    index_ = n;
    insn_ = &i;
    for (const Operand& o : i.operands) {
      Address a;
      if (!region_operand(i, o, &a)) continue;
      auto g = std::find_if(groups.begin(), groups.end(), [&](const Group& other) { return other.active && same_registers(other, a); });
      if (g == groups.end()) {
        g = std::find_if(groups.begin(), groups.end(), [](const Group& other) { return !other.active; });
        if (g == groups.end()) continue;
        *g = Group{};
        g->active = true;
        g->base = a.base;
        g->region = static_cast<u8>(expected_region(a)) % Window::kRegions;
        several_ |= stacked() && g != groups.begin();
      } else {
        turns += &*g != last;
      }
      if (!by_gs(g->region)) uses[Window::named_for(g->region)]++;
      last = &*g;
    }
    for (Group& g : groups) follow(i, &g);
  }
  certain_ = turns >= kTurns;
  main_region_ = static_cast<u8>(std::max_element(uses, std::end(uses)) - uses);
}

/// What is at base points into this region, or the block is left for one without groups. Clobbers a scratch register, both where
/// flags are live in the host.
void BlockBuilder::emit_certain_check(u8 base, u64 region) {
  const bool keep = flags_live_in_host();
  const u8 reg = special(base) ? u8{kScratch0} : host(base);
  if (!keep) clobber_flags();
  region_misses_.emplace_back();
  RegionMiss& m = region_misses_.back();
  m.offset = page_offset(rip());
  m.insn = interpret_.size() - 1;
  m.in_frame = flags_ == Flags::Frame;
  if (keep) {
    emit_region_compare_keeping_flags(reg, region, m.entry);
    return;
  }
  if (special(base)) e_.load_r14(slot_offset(base));
  const bool r14 = e_.knows_r15() && reg != kScratch0;
  emit_region_compare(reg, region, r14 ? kScratch0 : kScratch1, m.entry);
  if (reg == kScratch0) e_.let_r14_hold(slot_offset(base));  // RORX has read it alone
}

/// From here on, base points into this region until it changes by more than constants. Null: no room.
BlockBuilder::Group* BlockBuilder::open_region(u8 base, u64 region) {
  Group* const g = free_group();
  if (g == nullptr) return nullptr;
  g->active = g->window = g->certain = true;
  g->base = base;
  g->region = static_cast<u8>(region);
  emit_certain_check(base, region);
  return g;
}

/// Registers that are to be certain at an instruction with flags in the host are looked at before these are made.
void BlockBuilder::regions_ahead() {
  if ((!certain_ && !several_) || flags_live_in_host()) return;
  const std::size_t here = index_;
  const auto moves_by_constants = [&](u8 base, std::size_t to) {
    Group g;
    g.active = true;
    g.base = base;
    for (std::size_t n = here; n < to; n++) follow(request_->insns[n], &g);
    return g.active;
  };
  bool flags = flags_ == Flags::Host;
  for (std::size_t n = here; n < count_; n++) {
    const DecodedInsn& i = request_->insns[n];
    if (n != here) {
      if (!flags || live_[n] == 0) break;
      index_ = n;
      insn_ = &i;
      for (const Operand& o : i.operands) {
        Address a;
        if (!region_operand(i, o, &a) || !moves_by_constants(a.base, n)) continue;
        if (std::any_of(groups_.begin(), groups_.end(), [&](const Group& g) { return g.active && same_registers(g, a); })) continue;
        const u64 region = expected_region(a);
        if (!certain(region)) continue;
        index_ = here;
        (void)open_region(a.base, region);
        index_ = n;
      }
    }
    flags |= use_[n].touches;
  }
  index_ = here;
  insn_ = &request_->insns[here];
}

/// Where nothing has been reached off rSP in this block: whether it comes before anything else is, or leaves the block.
bool BlockBuilder::stack_comes() const {
  for (std::size_t n = index_ + 1; n < count_; n++) {
    const DecodedInsn& i = request_->insns[n];
    u32 written = 0;
    if (i.opsize == 8 && (i.op == Op::Push || i.op == Op::Pop || i.op == Op::Call || i.op == Op::Ret) && !i.has(kHasMem)) return true;
    if (i.has(kHasMem) || i.op == Op::Jcc || !written_registers(i, &written) || (written >> RSP & 1) != 0) return false;
  }
  return false;
}

/// rSP may be used without a look at where it points (TranslateMode::stacked): it is in the stacks' region at entry, and a MiB or
/// less from there at every exit. What is reached off it is in the region, for the guard around that is never mapped; so an
/// instruction that moves it by a constant needs a look only where nothing near is reached in this block, and any other needs one.
void BlockBuilder::after(const DecodedInsn& i) {
  if (!request_->mode.stacked) return;
  u32 written = 0;
  if (written_registers(i, &written)) {
    if ((written >> RSP & 1) == 0) return;
    const bool reached = (i.op == Op::Push || i.op == Op::Pop) && windowed();
    i64 by = 0;
    if (moves_by(i, RSP, &by) && (reached || stack_known_ || stack_comes())) return;
  }
  emit_stack_check();
  stack_known_ = true;
}

void BlockBuilder::emit_stack_check() {
  const bool live = live_[index_ + 1] != 0;
  stack_misses_.push_back({{}, next_rip(), flags_ == Flags::Frame});
  Label& miss = stack_misses_.back().entry;
  if (flags_ != Flags::Host || !live) {
    emit_region_compare(kHostR13, Window::kStacks, kScratch1, miss);
    if (flags_ == Flags::Host) flags_ = Flags::Dead;
    return;
  }
  emit_region_compare_keeping_flags(kHostR13, Window::kStacks, miss);
}

/// The run loop goes on in another mode.
void BlockBuilder::finish_stack_checks() {
  for (StackMiss& m : stack_misses_) {
    e_.bind(m.entry);
    emit_rip(kScratch0, page_offset(m.next));
    e_.mov_imm(kScratch1, frame::kNoTag);
    e_.encode({.opcode = 0xff, .reg = 4, .memory = true,
               .mem = HostMem::frame(m.in_frame ? frame::kExitNextFrame : frame::kExitNext)});
  }
}

/// The constants of up to two regions stay in the scratch registers.
void BlockBuilder::through_region(const Group& g, const Address& a, Access* out) {
  const u32 slot = delta_slot(g.region);
  if (by_gs(g.region)) {
    if (special(a.base)) e_.load_r14(slot_offset(a.base));
    *out = {HostMem::off_gs(special(a.base) ? u8{kScratch0} : host(a.base), a.disp), !special(a.base), true};
    return;
  }
  if (special(a.base)) {
    e_.load_r14(slot_offset(a.base));
    e_.load_r15(slot);
    *out = {HostMem{kScratch0, kScratch1, 0, false, a.disp}, false, false};
    return;
  }
  const bool second = both_free_ && slot != delta_slot(main_region_);
  second ? e_.load_r14(slot) : e_.load_r15(slot);
  *out = {HostMem{host(a.base), second ? kScratch0 : kScratch1, 0, false, a.disp}, !second, second};
}

/// The others, rare ones, go through the TLB.
bool BlockBuilder::by_window(const Address& a) const {
  if (interpret_.back().sti_shadow) return false;
  if (a.segment != 0) return true;
  if (a.constant) return a.value >> 31 == 0 && a.bit == kNoReg;
  const i64 offset = static_cast<i64>(a.value);
  return !a.rip || a.bit != kNoReg || (offset < kWindowDisp && offset > -kWindowDisp);
}

void BlockBuilder::window_access(const Address& a, Access* out) {
  if (off_stack(a)) {
    *out = {HostMem::off_gs(kHostR13, a.disp), true, true};
    // A vector instruction's mask may spare all bytes, and nothing is reached.
    if (insn_->op != Op::HostVec && insn_->op != Op::Vmaskmov) stack_known_ = true;
    window_point();
    return;
  }
  if (a.constant && a.segment == frame::kFsBase && request_->mode.near_fs && !a.narrow && a.bit == kNoReg &&
      a.value + kWindowDisp < 2ull * kWindowDisp) {
    e_.load_r14(frame::kFsBase);
    *out = {HostMem::off_gs(kScratch0, static_cast<i32>(a.value)), false, true};
    window_point();
    return;
  }
  if (a.constant && a.segment == 0) {
    e_.load_r15(frame::kWindowFirst);
    *out = {HostMem::at(kScratch1, static_cast<i32>(a.value)), true, false};
    window_point();
    return;
  }
  if (a.rip && a.segment == 0 && a.bit == kNoReg) {
    const i64 offset = static_cast<i64>(a.value);
    for (const Group& g : groups_) {
      if (!g.active || g.base != kRipBase) continue;
      by_sum(g.slot, offset, out);
      window_point();
      return;
    }
    e_.load(kScratch0, HostMem::frame(frame::kPage));
    emit_window_check(kScratch0, request_->rip >> frame::kRegionShift, a, true);
    if (Group* const g = free_group()) {
      g->active = g->window = true;
      g->base = kRipBase;
      e_.lea(kScratch1, HostMem{kScratch0, kScratch1, 0, false, 0});
      e_.store(HostMem::frame(g->slot), kScratch1);
      e_.holds(g->slot);
      *out = {HostMem::at(kScratch1, static_cast<i32>(offset)), true, false};
    } else {
      *out = {HostMem{kScratch0, kScratch1, 0, false, static_cast<i32>(offset)}, false, false};
    }
    window_point();
    return;
  }

  const bool near = groupable(a);  // and small displacements
  if (near) {
    for (const Group& g : groups_) {
      if (!g.active || !g.window || !same_registers(g, a)) continue;
      g.certain ? through_region(g, a, out) : through(g, a, out);
      window_point();
      return;
    }
  }
  const bool off_base = near && a.index == kNoReg;
  const u64 region = expected_region(a);
  if (certain(region) && off_base && !(special(a.base) && flags_live_in_host())) {
    if (const Group* const g = open_region(a.base, region)) {
      through_region(*g, a, out);
      window_point();
      return;
    }
  }
  u8 reg = kScratch0;
  if (off_base && !special(a.base)) {
    reg = host(a.base);
  } else if (off_base) {
    e_.load(kScratch0, slot(a.base));
  } else {
    // With a segment, a bit offset, or two registers in the frame it takes additions.
    if (!near) clobber_flags();
    emit_address(kScratch0, a);
  }
  emit_window_check(reg, region, a, false);
  if (off_base && reg == kScratch0) e_.let_r14_hold(slot_offset(a.base));  // by way of the miss too
  constexpr i32 kNone = 0;
  if (Group* const g = near ? free_group() : nullptr) {
    g->active = g->window = true;
    g->base = a.base;
    g->index = a.index;
    g->scale_log2 = a.scale_log2;
    g->active = used_again(*g);
    if (g->active) {
      keep(g, off_base ? &kNone : &a.disp);
      through(*g, a, out);
      window_point();
      return;
    }
  }
  if (off_base || a.bit != kNoReg) {
    operand_of(a, out);
  } else {  // the address is in r14 still
    *out = {HostMem{kScratch0, kScratch1, 0, false, 0}, false, false};
  }
  window_point();
}

/// Whether an instruction behind index_ would take the group's constant.
bool BlockBuilder::used_again(Group g) const {
  for (std::size_t n = index_; n < count_; n++) {
    const DecodedInsn& i = request_->insns[n];
    if (n != index_) {
      for (const Operand& o : i.operands) {
        Address at;
        if (o.kind == OperandKind::Mem && (o.access & kReadWrite) != 0 && address_of(i, &at) && same_registers(g, at)) return true;
      }
      const bool stack = i.op == Op::Push || i.op == Op::Pop || i.op == Op::Call || i.op == Op::Ret;
      if (stack && g.base == RSP && g.index == kNoReg) return true;
    }
    follow(i, &g);
    if (!g.active) return false;
  }
  return false;
}

void BlockBuilder::finish_window_misses() {
  for (RegionMiss& m : region_misses_) {
    e_.bind(m.entry);
    leave_ungrouped(m.insn, m.offset, m.in_frame);
  }
  for (WindowMiss& m : window_misses_) {
    Label& interpret = interpret_[m.insn].entry;
    e_.bind(m.entry);
    const bool off_base = !m.page && groupable(m.address) && m.address.index == kNoReg;
    if (m.page) {  // in r14
    } else if (off_base) {
      if (special(m.address.base)) {
        e_.load(kScratch0, slot(m.address.base));
      } else {
        e_.mov(kScratch0, host(m.address.base));
      }
    } else {
      emit_address(kScratch0, m.address);
    }
    e_.mov(kScratch1, kScratch0);
    e_.shr(kScratch1, 47);
    e_.jcc(5, interpret);
    emit_rorx(kScratch1, kScratch0, frame::kRegionShift);
    e_.and32(kScratch1, Window::kRegions - 1);
    e_.load(kScratch1, HostMem{kHostR9, kScratch1, 3, false, static_cast<i32>(frame::kWindowDeltas) - RING3_FRAME_CENTRE});
    e_.jmp(m.resume);
  }
}

}  // namespace ring3::engine
