#include "engine/translate/builder.hpp"

/// Guest addresses and the inline check.
///
/// The check, for an operand of n bytes at a:
///     r15 = entry(a);  r14 = a ^ gs:[r15 + tag];  r14 <= 4096 - n ?  r15 = gs:[r15 + addend]
/// A tag is the page its entry stands for, or no page's address that belongs to the entry: the difference is the offset in
/// the page, or more. An access that crosses into the next page misses too. Where alignment is required, a misaligned
/// address misses. The operand is then at a + addend, with the instruction's
/// own base register where it has one.
///
/// On a miss the fill thunk gives the addend itself, also for an access in two pages where that is possible, and the
/// instruction goes on behind its check.
namespace ring3::engine {

bool BlockBuilder::address_of(const DecodedInsn& i, Address* out) const {
  const MemOperand& m = i.mem;
  *out = Address{};
  if (i.addrsize == 2 || !i.has(kHasMem) || i.op == Op::Vgather) return false;
  out->narrow = i.addrsize == 4;
  out->linear32 = code32();
  if (code32() && (m.seg == CS || (m.seg == FS && !request_->mode.fs_flat) || (m.seg == GS && !request_->mode.gs_flat)))
    return false;
  if (m.seg == FS) out->segment = frame::kFsBase;
  if (m.seg == GS) out->segment = frame::kGsBase;
  if (m.base == kRipBase || (m.base == kNoReg && m.index == kNoReg)) {
    if (m.index != kNoReg) return false;
    if (m.base == kRipBase && pic()) {
      const i64 offset = i.disp + page_offset(next_rip());
      if (out->narrow || offset <= -0x7fff0000ll || offset >= 0x7fff0000ll) return false;
      out->rip = true;
      out->value = static_cast<u64>(offset);
      return true;
    }
    const u64 value = static_cast<u64>(i.disp) + (m.base == kRipBase ? next_rip() : 0);
    out->constant = true;
    out->value = out->narrow ? static_cast<u32>(value) : value;
    return true;
  }
  if ((m.base != kNoReg && m.base > 15) || (m.index != kNoReg && (m.index > 15 || m.index == RSP)))
    return false;
  out->base = m.base;
  out->index = m.index;
  out->scale_log2 = m.scale_log2 & 3;
  if (i.disp != static_cast<i32>(i.disp)) return false;
  out->disp = static_cast<i32>(i.disp);
  return true;
}

void BlockBuilder::add_segment(u8 to, const Address& a) {
  if (a.segment == 0) return;
  e_.encode({.w = !a.linear32, .opcode = 0x03, .reg = to, .memory = true, .mem = HostMem::frame(a.segment)});
}

/// The unit that a bit offset selects: address + (offset >> log2(bits)) * bytes, the offset signed.
void BlockBuilder::emit_bit_address(u8 to, const Address& a) {
  const u8 log2 = a.bit_size == 8 ? 3 : a.bit_size == 4 ? 2 : 1;
  if (special(a.bit)) {
    e_.load(to, slot(a.bit));
  } else {
    e_.mov(to, host(a.bit));
  }
  if (a.bit_size == 4) e_.encode({.w = true, .opcode = 0x63, .reg = to, .rm = to});            // movsxd
  if (a.bit_size == 2) e_.encode({.w = true, .map = 1, .opcode = 0xbf, .reg = to, .rm = to});  // movsx
  e_.encode({.w = true,
             .opcode = 0xc1,
             .reg = 7,
             .rm = to,
             .imm_size = 1,
             .imm = {static_cast<u8>(log2 + 3)}});  // sar
  if (a.rip) {
    e_.lea(to, {kHostNone, to, log2, false, static_cast<i32>(a.value)});
    e_.add(to, HostMem::frame(frame::kPage));
    add_segment(to, a);
    return;
  }
  HostMem m;
  m.index = to;
  m.scale_log2 = log2;
  m.disp = a.constant ? static_cast<i32>(a.value) : a.disp;
  if (!a.constant && a.base != kNoReg && !special(a.base)) m.base = host(a.base);
  e_.lea(to, m);
  if (!a.constant && a.index != kNoReg) e_.lea(to, {to, host(a.index), a.scale_log2, false, 0});
  if (!a.constant && a.base != kNoReg && special(a.base)) e_.add(to, slot(a.base));
  add_segment(to, a);
}

void BlockBuilder::emit_address(u8 to, const Address& a) {
  if (a.bit != kNoReg) {
    emit_bit_address(to, a);
    return;
  }
  if (a.constant || a.rip) {
    if (a.constant) e_.mov_imm(to, a.value);
    if (a.rip) emit_rip(to, static_cast<i64>(a.value));
    add_segment(to, a);
    return;
  }
  HostMem m;
  m.disp = a.disp;
  m.scale_log2 = a.scale_log2;
  bool add_base = false;
  if (a.base != kNoReg && !special(a.base)) m.base = host(a.base);
  if (a.index != kNoReg && !special(a.index)) m.index = host(a.index);
  if (a.index != kNoReg && special(a.index)) {
    e_.load(to, slot(a.index));
    m.index = to;
    add_base = a.base != kNoReg && special(a.base);
  } else if (a.base != kNoReg && special(a.base)) {
    e_.load(to, slot(a.base));
    m.base = to;
  }
  if (add_base) {
    e_.lea(to, m);
    e_.add(to, slot(a.base));
    if (a.narrow) e_.mov32(to, to);
  } else if (a.narrow) {
    e_.lea32(to, m);
  } else if (m.index == kHostNone && m.disp == 0) {
    if (m.base != to) e_.mov(to, m.base);
  } else {
    e_.lea(to, m);
  }
  add_segment(to, a);
}

Label& BlockBuilder::interpret_label() {
  Interpret& i = interpret_.back();
  i.used = true;
  i.flags_in_frame = flags_ == Flags::Frame;
  return i.entry;
}

bool BlockBuilder::access(const Address& a, u8 size, Kind kind, bool aligned, Access* out) {
  if (size == 0 || size > 64) return false;
  if (windowed() && by_window(a)) {
    window_access(a, out);
    return true;
  }
  const u32 tag = kind == Kind::Write ? frame::kTlbWriteTag : frame::kTlbReadTag;
  if (in_second_body_ && (!aligned || loop_.hoisted[index_])) {
    if (const Group* g = group_of(a, size, kind)) return through(*g, a, out), true;
  }
  if (grouping_ && in_known_page(a, size) && (!aligned || (a.value & (size - 1u)) == 0)) {
    if (const Group* g = page_group(a, kind)) {
      e_.load_r15(g->slot);
      *out = {HostMem::at(kScratch1, static_cast<i32>(a.value & (kPageSize - 1))), true, false};
      return true;
    }
  }
  if (grouping_ && !aligned) {
    if (const Group* g = group_of(a, size, kind)) return through(*g, a, out), true;
    if (Group* const g = open_group(a, size, kind)) {
      clobber_flags();
      group_misses_.emplace_back();
      GroupMiss& m = group_misses_.back();
      m.address = a;
      m.address.disp = static_cast<i32>(g->low);
      m.size = static_cast<u32>(g->high - g->low);
      m.write = g->write;
      m.fill = g->write == (kind == Kind::Write);
      m.offset = page_offset(rip());
      interpret_label();
      m.insn = interpret_.size() - 1;
      m.flags = flags_;
      if (g->slot == frame::kStackAddend) {
        m.stacked = true;
        emit_address(kScratch0, m.address);
        e_.encode({.w = true, .opcode = 0x2b, .reg = kScratch0, .memory = true, .mem = HostMem::frame(frame::kStackPage)});
        e_.cmp(kScratch0, HostMem::frame(frame::kStackLimit));
        e_.jcc(3, m.stack);
        e_.bind(m.resume);
        return through(*g, a, out), true;
      }
      emit_group_check(m.address, m.size, g->write, m.entry);
      e_.bind(m.resume);
      keep(g, nullptr);
      through(*g, a, out);
      return true;
    }
  }
  if (must_group_) return false;
  clobber_flags();
  interpret_label();
  const auto fits = [](u64 v) { return static_cast<u64>(static_cast<i64>(static_cast<i32>(v))) == v; };

  slow_.emplace_back();
  SlowPath& s = slow_.back();
  s.address = a;
  s.size = size;
  s.aligned = aligned;
  s.whole = whole_;
  s.refused = hits_only_;
  s.write = kind == Kind::Write;
  s.insn = static_cast<u32>(interpret_.size() - 1);

  if (a.constant && a.segment == 0 && a.bit == kNoReg) {
    const u64 v = a.value;
    if ((v & (kPageSize - 1)) + size > kPageSize || (aligned && (v & (size - 1u)) != 0)) return false;
    const u32 entry = static_cast<u32>((v >> frame::kTlbShift) & frame::kTlbMask);
    const u64 page = v & kPageMask;
    const u8 bank = request_->mode.stacked ? u8{kScratch1} : u8{kHostNone};
    if (bank != kHostNone) e_.load(bank, HostMem::frame(frame::kTlb));
    if (fits(page)) {
      e_.cmp_imm(tlb(bank, entry + tag), static_cast<i32>(page));
    } else {
      e_.mov_imm(kScratch0, page);
      e_.cmp(kScratch0, tlb(bank, entry + tag));
    }
    e_.jcc(5, s.entry);
    e_.load(kScratch1, tlb(bank, entry + frame::kTlbAddend));
    e_.bind(s.resume);
    if (fits(v)) {
      *out = {HostMem::at(kScratch1, static_cast<i32>(v)), true, false};
    } else {
      e_.mov_imm(kScratch0, v);
      *out = {HostMem{kScratch0, kScratch1, 0, false, 0}, false, false};
    }
    return true;
  }

  if (a.rip && a.segment == 0 && a.bit == kNoReg) {
    const i32 at = static_cast<i32>(a.value & (kPageSize - 1));
    if (at + static_cast<i32>(size) > static_cast<i32>(kPageSize) || (aligned && (at & (size - 1)) != 0)) return false;
    emit_rip(kScratch0, static_cast<i64>(a.value) - at);
    emit_rorx(kScratch1, kScratch0, frame::kTlbShift);
    emit_tlb_mask();
    e_.cmp(kScratch0, tlb(kScratch1, tag));
    e_.jcc(5, s.entry);
    e_.load(kScratch1, tlb(kScratch1, frame::kTlbAddend));
    e_.bind(s.resume);
    if (const Group* g = open_page_group(a, kind)) {
      e_.encode({.w = true, .opcode = 0x01, .reg = kScratch0, .rm = kScratch1});  // add r15, r14
      e_.store(HostMem::frame(g->slot), kScratch1);
      e_.holds(g->slot);
      *out = {HostMem::at(kScratch1, at), true, false};
      return true;
    }
    *out = {HostMem{kScratch0, kScratch1, 0, false, at}, false, false};
    return true;
  }

  const bool plain = !a.constant && !a.rip && a.segment == 0 && !a.narrow && a.bit == kNoReg;
  const bool in_registers = plain && (a.base == kNoReg || !special(a.base)) &&
                            (a.index == kNoReg || !special(a.index)) && a.disp < 0x7fff0000;
  emit_address(kScratch0, a);
  emit_rorx(kScratch1, in_registers && a.base != kNoReg && a.index == kNoReg && a.disp == 0 ? host(a.base) : kScratch0,
            frame::kTlbShift);
  emit_tlb_mask();
  e_.xor_(kScratch0, tlb(kScratch1, tag));
  if (aligned) {
    e_.test_imm(kScratch0, -static_cast<i32>(kPageSize) | (size - 1));
    e_.jcc(5, s.entry);
  } else {
    emit_start_compare(size);
    e_.jcc(7, s.entry);
  }
  e_.load(kScratch1, tlb(kScratch1, frame::kTlbAddend));
  e_.bind(s.resume);
  operand_of(a, out);
  return true;
}

/// The operand whose addend is in r15. Flags stay where the address has no segment and is no narrow one.
void BlockBuilder::operand_of(const Address& a, Access* out) {
  const bool plain = !a.constant && a.segment == 0 && !a.narrow && a.bit == kNoReg;
  if (plain && a.base != kNoReg && a.index == kNoReg) {
    const bool loaded = special(a.base);
    if (loaded) e_.load(kScratch0, slot(a.base));
    *out = {HostMem{loaded ? kScratch0 : host(a.base), kScratch1, 0, false, a.disp}, !loaded, false};
    return;
  }
  // The instruction adds its bit offset by itself.
  Address operand = a;
  operand.bit = kNoReg;
  emit_address(kScratch0, operand);
  *out = {HostMem{kScratch0, kScratch1, 0, false, 0}, false, false};
}

/// r15 is masked to the offset of a TLB entry. Three bytes less than with an immediate.
void BlockBuilder::emit_tlb_mask() {
  e_.encode({.opcode = 0x23, .reg = kScratch1, .memory = true, .mem = HostMem::frame(RING3_FRAME_TLB_MASK)});  // and
  if (request_->mode.stacked) e_.add(kScratch1, HostMem::frame(frame::kTlb));
}

/// Above: an access of this size that starts at offset r14 does not end in the same page.
void BlockBuilder::emit_start_compare(u32 size) {
  u32 log2 = 0;
  while (log2 < 4 && 1u << log2 < size) log2++;
  if (1u << log2 == size) {
    e_.cmp(kScratch0, HostMem::frame(RING3_FRAME_LAST_START + 8 * log2));
  } else {
    e_.cmp_imm(kScratch0, static_cast<i32>(kPageSize - size));
  }
}

/// r15 = addend, or the jump. r14: the first byte's offset in its page.
void BlockBuilder::emit_group_check(const Address& first, u32 size, bool write, Label& miss) {
  emit_address(kScratch0, first);
  emit_rorx(kScratch1, kScratch0, frame::kTlbShift);
  emit_tlb_mask();
  e_.xor_(kScratch0, tlb(kScratch1, write ? frame::kTlbWriteTag : frame::kTlbReadTag));
  emit_start_compare(size);
  e_.jcc(7, miss);
  e_.load(kScratch1, tlb(kScratch1, frame::kTlbAddend));
}

/// Flags stay.
void BlockBuilder::emit_rorx(u8 to, u8 from, u8 count) {
  e_.encode({.vex = true, .w = true, .pp = 3, .map = 3, .opcode = 0xf0, .reg = to, .rm = from, .imm_size = 1, .imm = {count}});
}

/// The misses of single checks: r14 = address, a fill, and on with the addend, or interpretation.
void BlockBuilder::finish_slow_paths() {
  for (SlowPath& s : slow_) {
    Interpret& interpret = interpret_[s.insn];
    e_.bind(s.entry);
    if (s.refused) {
      e_.jmp(interpret.entry);
      continue;
    }
    emit_address(kScratch0, s.address);
    if (s.aligned) {
      e_.test8_imm(kScratch0, static_cast<u8>(s.size - 1));
      e_.jcc(5, interpret.entry);
    }
    if (s.whole) one_page_or(interpret.entry, s.size);
    e_.mov_imm(kScratch1, s.size);
    emit_fill(s.write);
    e_.jcc(4, interpret.entry);
    if (s.address.rip && s.address.segment == 0 && s.address.bit == kNoReg)  // the check has the page alone
      e_.lea(kScratch0, HostMem::at(kScratch0, -static_cast<i32>(s.address.value & (kPageSize - 1))));
    e_.jmp(s.resume);
  }
}

/// r14 = address. Clobbers r15 and the flags.
void BlockBuilder::one_page_or(Label& otherwise, u32 size) {
  e_.mov32(kScratch1, kScratch0);
  e_.and32(kScratch1, static_cast<u32>(kPageSize - 1));
  Encoding compare{.opcode = 0x81, .reg = 7, .rm = kScratch1, .imm_size = 4};
  const u32 last = static_cast<u32>(kPageSize - size);
  for (unsigned n = 0; n < 4; n++) compare.imm[n] = static_cast<u8>(last >> (8 * n));
  e_.encode(compare);
  e_.jcc(7, otherwise);
}

/// r14 = address, r15 = size; then r15 = addend, or 0 with ZF set.
void BlockBuilder::emit_fill(bool write) {
  e_.encode({.opcode = 0xff,
             .reg = 2,
             .memory = true,
             .mem = HostMem::frame(write ? frame::kFillWrite : frame::kFillRead)});
  e_.encode({.w = true, .opcode = 0x85, .reg = kScratch1, .rm = kScratch1});
}

bool BlockBuilder::access_of(const DecodedInsn& i, Access* out) {
  const Operand* mem = nullptr;
  for (const Operand& o : i.operands)
    if (o.kind == OperandKind::Mem) mem = &o;
  if (mem == nullptr || (mem->access & kReadWrite) == 0) return false;
  Address a;
  if (!address_of(i, &a)) return false;
  const bool write =
      (mem->access & kWrite) || i.op == Op::Cmpxchg || i.op == Op::Cmpxchg8b || i.op == Op::Cmpxchg16b;
  const bool aligned = i.has(kAligned) || i.op == Op::Cmpxchg16b;
  if (aligned && (mem->size & (mem->size - 1)) != 0) return false;
  const bool bits = i.op == Op::Bt || i.op == Op::Bts || i.op == Op::Btr || i.op == Op::Btc;
  if (bits && i.operands[1].kind == OperandKind::Gpr) {
    if (a.narrow ||
        (a.constant && a.value != static_cast<u64>(static_cast<i64>(static_cast<i32>(a.value)))) ||
        (!a.constant && a.index != kNoReg && special(a.index)) || mem->size < 2 || mem->size > 8)
      return false;
    a.bit = i.operands[1].reg;
    a.bit_size = mem->size;
  }
  // A store of which a mask may spare all bytes makes no page dirty for their sake.
  hits_only_ = masked_store(i);
  const bool grouping = grouping_;
  if (hits_only_) grouping_ = false;
  const bool ok = access(a, mem->size, write ? Kind::Write : Kind::Read, aligned, out);
  hits_only_ = false;
  grouping_ = grouping;
  return ok;
}

void BlockBuilder::single_register(Access* a) {
  if (a->scratch1_free) return;
  if (a->mem.base != kScratch0 || a->mem.index != kHostNone || a->mem.disp != 0) e_.lea(kScratch0, a->mem);
  a->mem = HostMem::at(kScratch0);
  a->scratch0_free = false;
  a->scratch1_free = true;
}

u8 BlockBuilder::value_of(u8 guest, u8 scratch) {
  if (!special(guest)) return host(guest);
  e_.load(scratch, slot(guest));
  return scratch;
}

}  // namespace ring3::engine
