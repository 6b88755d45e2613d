#include "engine/translate/builder.hpp"

/// Instructions that are executed as they are, with registers and memory operand renamed.
///
/// Registers: where the guest's stand is in frame.hpp. One in the frame becomes a memory operand where that means the
///            same, else a scratch register that is loaded before and stored after.
/// High bytes: AH..BH cannot stand beside a REX prefix, which the renamed memory operand needs; the register's
///            two low bytes are swapped around the instruction then.
namespace ring3::engine {
namespace {

/// Writes its destination without reading it (whole 64 bits, or 32 that clear the rest).
bool overwrites(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Mov:
    case Op::Movzx:
    case Op::Movsx:
    case Op::Movsxd:
    case Op::Movbe:
    case Op::Imul3:
    case Op::HostVec:
    case Op::HostMmx:
    case Op::Andn:
    case Op::Bextr:
    case Op::Blsi:
    case Op::Blsmsk:
    case Op::Blsr:
    case Op::Bzhi:
    case Op::Mulx:
    case Op::Pdep:
    case Op::Pext:
    case Op::Rorx:
    case Op::Sarx:
    case Op::Shlx:
    case Op::Shrx:
    case Op::Tzcnt:
    case Op::Lzcnt:
    case Op::Popcnt:
      return true;
    default:
      return false;
  }
}

/// The register operand in ModRM.rm may be memory instead: same width, same meaning.
bool rm_may_be_memory(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Xchg:
    case Op::Xadd:
    case Op::Cmpxchg:
    case Op::Bswap:
    case Op::HostVec:
    case Op::HostMmx:
    case Op::Movbe:
      return false;
    case Op::Bt:
    case Op::Bts:
    case Op::Btr:
    case Op::Btc:
      return i.operands[1].kind == OperandKind::Imm;
    default:
      return true;
  }
}

}  // namespace

bool BlockBuilder::plain_high_byte(const DecodedInsn& i, Reencoding& r) {
  // One memory operand and one high byte register, in ModRM.reg.
  by_tlb_ = true;  // the bytes are swapped when it comes to the access
  if (!r.high_reg || i.op == Op::Cmpxchg) return false;
  Access a;
  if (!access_of(i, &a)) return false;
  single_register(&a);
  need_flags(kScratch1);
  const u8 low = r.e.reg - 4;
  r.e.reg = low;
  r.e.rex_barred = false;
  r.e.mem = a.mem;
  const u8 swap = static_cast<u8>(0xc0 | (low + 4) << 3 | low);
  e_.bytes({0x86, swap});
  e_.encode(r.e);
  e_.bytes({0x86, swap});
  return true;
}

bool BlockBuilder::plain(const DecodedInsn& i) {
  Reencoding r;
  if (!take_apart(i, code32(), &r)) return false;
  Encoding& e = r.e;
  if (i.op == Op::HostVec && i.has(kEvex | kOpmask)) need_zmm();
  if (e.memory && e.rex_barred) return plain_high_byte(i, r);

  Access a;
  if (e.memory) {
    both_free_ = true;
    const bool ok = access_of(i, &a);
    both_free_ = false;
    if (!ok) return false;
  } else {
    a.scratch0_free = a.scratch1_free = true;
  }

  // Which guest registers the fields name.
  struct Field {
    u8* number;
    u8 bit;
    bool high;
  };
  Field fields[] = {{&e.rm, kGprRm, r.high_rm}, {&e.reg, kGprReg, r.high_reg}, {&e.vvvv, kGprVvvv, false}};
  // ModRM.rm from the frame itself.
  bool rm_in_frame = false;
  if ((r.gpr_fields & kGprRm) && !r.high_rm && special(e.rm) && e.has_modrm && rm_may_be_memory(i)) {
    bool written = false;
    u8 size = 0;
    for (const Operand& o : i.operands) {
      if (o.kind != OperandKind::Gpr || o.reg != e.rm) continue;
      if (o.access & kWrite) written = true;
      if (o.size > size) size = o.size;
    }
    // Another field naming the same register may be the one that is written.
    const bool alone =
        !((r.gpr_fields & kGprReg) && e.reg == e.rm) && !((r.gpr_fields & kGprVvvv) && e.vvvv == e.rm);
    // Of bytes and words: the next read of the whole register would wait for such a store.
    rm_in_frame = alone && (!written || size == 8);
  }
  struct Substitute {
    u8 guest = kNoReg, scratch = 0;
    bool written = false;
  };
  Substitute substitutes[2];
  unsigned count = 0;
  for (const Field& f : fields) {
    if (!(r.gpr_fields & f.bit) || f.high) continue;
    const u8 guest = *f.number;
    if (!special(guest)) {
      *f.number = host(guest);
      continue;
    }
    if (f.bit == kGprRm && rm_in_frame && !e_.r14_holds(slot_offset(guest))) continue;
    if (f.bit == kGprRm) rm_in_frame = false;
    unsigned n = 0;
    while (n < count && substitutes[n].guest != guest) n++;
    if (n == count) {
      if (count == 2) return false;
      if (!a.scratch0_free && !a.scratch1_free && a.mem.index == kScratch1 && count == 0) single_register(&a);
      Substitute& s = substitutes[count];
      if (a.scratch0_free) {
        s.scratch = kScratch0;
        a.scratch0_free = false;
      } else if (a.scratch1_free) {
        s.scratch = kScratch1;
        a.scratch1_free = false;
      } else {
        return false;
      }
      s.guest = guest;
      bool read = false;
      for (const Operand& o : i.operands) {
        if (o.kind != OperandKind::Gpr || o.reg != guest) continue;
        if (o.access & kWrite) s.written = true;
        if ((o.access & kRead) || o.size < 4) read = true;
      }
      if (read || !overwrites(i)) e_.load(s.scratch, slot(guest));
      count++;
    }
    *f.number = substitutes[n].scratch;
  }
  if (rm_in_frame) {
    e.memory = true;
    e.mem = slot(e.rm);
  } else if (e.memory) {
    e.mem = a.mem;
  }
  need_flags(a.scratch0_free ? kScratch0 : a.scratch1_free ? kScratch1 : static_cast<u8>(kHostNone));
  if (i.op == Op::Div || i.op == Op::Idiv) out_->faults.push_back({e_.size(), pic() ? static_cast<u64>(page_offset(rip())) : rip(), windowed() && e.memory && !rm_in_frame, flags_ == Flags::Frame});
  if (!e_.encode(e)) return false;
  for (unsigned n = 0; n < count; n++)
    if (substitutes[n].written) e_.store(slot(substitutes[n].guest), substitutes[n].scratch);
  return true;
}

}  // namespace ring3::engine
