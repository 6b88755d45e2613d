#include "engine/interp/operand.hpp"
#include "engine/interp/segment_load.hpp"

namespace ring3::engine {

Segment Descriptor::segment() const {
  Segment g;
  g.base = base();
  g.limit = limit();
  g.selector = selector;
  g.type = type();
  g.s = s();
  g.dpl = dpl();
  g.present = present();
  g.l = l();
  g.db = db();
  g.g = (low >> 55) & 1;
  g.avl = (low >> 52) & 1;
  g.unusable = 0;
  return g;
}

Lookup read_descriptor(Context& c, u16 selector, Descriptor* out) {
  const VcpuState& s = c.s;
  u64 base, limit;
  if (selector & 4) {
    if (s.ldtr.unusable || !s.ldtr.present || is_null(s.ldtr.selector)) return Lookup::Limit;
    base = s.ldtr.base;
    limit = s.ldtr.limit;
  } else {
    base = s.gdtr.base;
    limit = s.gdtr.limit;
  }
  const u32 index = selector & 0xfff8;
  if (index + 7u > limit) return Lookup::Limit;
  out->selector = selector;
  out->high = 0;
  out->linear = wrap_linear(c, base + index);
  if (!c.mmu.read_system(out->linear, &out->low)) return Lookup::Stop;
  if (s.long_mode() && !out->s()) {
    if (index + 15u > limit) return Lookup::Limit;
    if (!c.mmu.read_system(out->linear + 8, &out->high)) return Lookup::Stop;
  }
  return Lookup::Ok;
}

bool read_descriptor(Context& c, u16 selector, u8 vector, u32 ext, Descriptor* out) {
  switch (read_descriptor(c, selector, out)) {
    case Lookup::Ok: return true;
    case Lookup::Stop: return false;
    case Lookup::Limit: break;
  }
  c.fault(vector, (selector & kSelectorMask) | ext);
  return false;
}

namespace {

/// Changes bits of the byte at linear as an atomic read-modify-write where the level allows one; a byte store
/// (which cannot lose a neighbour's change) otherwise.
bool change_byte(Context& c, u64 linear, u8 set, u8 clear) {
  if (c.cpl != 3) {
    Mmu::Rmw rmw;
    if (!c.mmu.rmw_begin(linear, 1, DS, &rmw)) return false;
    u8 value;
    if (rmw.host != nullptr) {
      // SAFETY: rmw_begin returned a writable host byte.
      u8* p = static_cast<u8*>(rmw.host);
      if (set) value = __atomic_or_fetch(p, set, __ATOMIC_SEQ_CST);
      if (clear) value = __atomic_and_fetch(p, static_cast<u8>(~clear), __ATOMIC_SEQ_CST);
    } else {
      value = static_cast<u8>((rmw.buffer[0] | set) & ~clear);
    }
    return c.mmu.rmw_end(rmw, &value, 1);
  }
  u8 value;
  if (!c.mmu.read_system(linear, &value)) return false;
  return c.mmu.write_system(linear, static_cast<u8>((value | set) & ~clear));
}

}  // namespace

bool mark_accessed(Context& c, Descriptor& d) {
  if (d.type() & 1) return true;
  if (!change_byte(c, d.linear + 5, 1, 0)) return false;
  d.low |= 1ull << 40;
  return true;
}

bool set_busy(Context& c, const Descriptor& d, bool busy) {
  return change_byte(c, d.linear + 5, busy ? 2 : 0, busy ? 0 : 2);
}

void load_real(Context& c, Seg seg, u16 selector) {
  // Limit, granularity and D/B stay what they were: "unreal mode" depends on it.
  Segment& g = c.s.seg[seg];
  g.selector = selector;
  g.base = static_cast<u64>(selector) << 4;
  g.type = seg == CS ? 11 : 3;
  g.s = 1;
  g.dpl = 0;
  g.present = 1;
  g.l = 0;
  g.unusable = 0;
}

void load_v86(Context& c, Seg seg, u16 selector) {
  Segment g;
  g.selector = selector;
  g.base = static_cast<u64>(selector) << 4;
  g.limit = 0xffff;
  g.type = 3;
  g.dpl = 3;
  c.s.seg[seg] = g;
}

void load_null(Context& c, Seg seg, u16 selector) {
  Segment& old = c.s.seg[seg];
  Segment g;
  g.selector = selector;
  g.limit = 0;
  g.type = 0;
  g.s = 0;
  g.present = 0;
  g.unusable = 1;
  if (!c.features.null_clears_base) {
    g.base = old.base;
    g.limit = old.limit;
  }
  old = g;
}

bool check_stack_segment(Context& c, u16 selector, u8 cpl, bool target64, u8 vector, u32 ext, Segment* out) {
  if (is_null(selector)) {
    if (target64 && cpl != 3 && (selector & 3) == cpl) {
      *out = null_stack_segment(cpl);
      out->selector = selector;
      return true;
    }
    c.fault(vector, ext);
    return false;
  }
  Descriptor d;
  if (!read_descriptor(c, selector, vector, ext, &d)) return false;
  const u32 error = (selector & kSelectorMask) | ext;
  if ((selector & 3) != cpl || !d.writable_data() || d.dpl() != cpl) {
    c.fault(vector, error);
    return false;
  }
  if (!d.present()) {
    c.fault(vec::SS, error);
    return false;
  }
  if (!mark_accessed(c, d)) return false;
  *out = d.segment();
  return true;
}

bool load_segment(Context& c, Seg seg, u16 selector) {
  VcpuState& s = c.s;
  if (s.real_mode()) {
    load_real(c, seg, selector);
    return true;
  }
  if (s.v8086()) {
    load_v86(c, seg, selector);
    return true;
  }
  if (seg == SS) {
    Segment g;
    if (!check_stack_segment(c, selector, c.cpl, s.code64(), vec::GP, 0, &g)) return false;
    s.seg[SS] = g;
    return true;
  }
  if (is_null(selector)) {
    load_null(c, seg, selector);
    return true;
  }
  Descriptor d;
  if (!read_descriptor(c, selector, vec::GP, 0, &d)) return false;
  const u32 error = selector & kSelectorMask;
  const u8 rpl = selector & 3;
  if (!d.readable() || (!d.conforming() && (rpl > d.dpl() || c.cpl > d.dpl()))) {
    c.fault(vec::GP, error);
    return false;
  }
  if (!d.present()) {
    c.fault(vec::NP, error);
    return false;
  }
  if (!mark_accessed(c, d)) return false;
  s.seg[seg] = d.segment();
  return true;
}

void drop_inner_segments(Context& c, u8 cpl) {
  for (Seg seg : {ES, DS, FS, GS}) {
    Segment& g = c.s.seg[seg];
    const bool conforming_code = (g.type & 0xc) == 0xc;
    if (g.unusable || is_null(g.selector)) {
      // A null selector loses its RPL and nothing else: its base may have been set by WRFSBASE or an MSR.
      if (is_null(g.selector)) g.selector = 0;
      continue;
    }
    if (!conforming_code && g.dpl < cpl) load_null(c, seg, 0);
  }
}

bool within_limit(const Segment& seg, u64 offset, unsigned size) {
  const u64 last = offset + size - 1;
  if ((seg.type & 0xc) == 4 && seg.s) {  // expand-down data
    const u64 top = seg.db ? 0xffffffff : 0xffff;
    return offset > seg.limit && last <= top;
  }
  return last <= seg.limit;
}

u64 advance_rsp(u64 rsp, unsigned address_size, i64 bytes) {
  const u64 next = rsp + static_cast<u64>(bytes);
  if (address_size == 8) return next;
  if (address_size == 4) return static_cast<u32>(next);
  return (rsp & ~0xffffull) | (next & 0xffff);
}

u64 StackFrame::offset(unsigned i) const {
  const u64 v = sp_ - static_cast<u64>(element_) * (i + 1);
  return address_size_ == 8 ? v : address_size_ == 4 ? static_cast<u32>(v) : v & 0xffff;
}

u64 StackFrame::linear(const Context& c, unsigned i) const {
  return address_size_ == 8 ? offset(i) : wrap_linear(c, ss_.base + offset(i));
}

bool StackFrame::check(Context& c, u32 error) const {
  for (unsigned i = 0; i < count_; ++i) {
    const u64 at = offset(i);
    const bool good = address_size_ == 8 ? canonical(c, at) && canonical(c, at + element_ - 1)
                                         : !ss_.unusable && within_limit(ss_, at, element_);
    if (!good) {
      c.fault(vec::SS, error);
      return false;
    }
  }
  return true;
}

bool StackFrame::write(Context& c) const {
  const Privilege privilege = inner_ ? Privilege::System : Privilege::Current;
  // The elements are consecutive unless the stack pointer wraps.
  const u64 lowest = linear(c, count_ - 1);
  const unsigned bytes = count_ * element_;
  if (lowest + bytes == linear(c, 0) + element_) {
    u8 buffer[kMax * 8];
    for (unsigned i = 0; i < count_; ++i)
      std::memcpy(buffer + (count_ - 1 - i) * element_, &values_[i], element_);
    return c.mmu.write_bytes(lowest, buffer, bytes, SS, privilege);
  }
  for (unsigned i = 0; i < count_; ++i)
    if (!c.mmu.check_write(linear(c, i), element_, SS, privilege)) return false;
  for (unsigned i = 0; i < count_; ++i)
    if (!c.mmu.write_bytes(linear(c, i), &values_[i], element_, SS, privilege)) return false;
  return true;
}

u64 StackFrame::final_rsp() const {
  return advance_rsp(sp_, address_size_, -static_cast<i64>(static_cast<u64>(element_) * count_));
}

bool peek_stack(Context& c, unsigned size, unsigned i, unsigned skip, u64* value) {
  const u64 at = advance_rsp(c.s.gpr[RSP], c.stack_size, static_cast<i64>(size) * i + skip);
  const u64 off = c.stack_size == 8 ? at : c.stack_size == 4 ? static_cast<u32>(at) : at & 0xffff;
  u64 lin;
  if (!c.linear(SS, off, size, false, &lin)) return false;
  *value = 0;
  switch (size) {
    case 2: {
      u16 v;
      if (!c.mmu.read(lin, &v, SS)) return false;
      *value = v;
      return true;
    }
    case 4: {
      u32 v;
      if (!c.mmu.read(lin, &v, SS)) return false;
      *value = v;
      return true;
    }
    default: return c.mmu.read(lin, value, SS);
  }
}

bool read_tss_stack(Context& c, u8 cpl, u32 ext, u16* ss, u64* rsp) {
  const Segment& tr = c.s.tr;
  const u32 error = (tr.selector & kSelectorMask) | ext;
  const bool wide = tr.type & 8;
  if (c.s.long_mode()) {
    const u32 at = cpl * 8u + 4;
    if (at + 7 > tr.limit) {
      c.fault(vec::TS, error);
      return false;
    }
    return c.mmu.read_system(tr.base + at, rsp);
  }
  if (wide) {
    const u32 at = cpl * 8u + 4;
    u32 esp;
    if (at + 5 > tr.limit) {
      c.fault(vec::TS, error);
      return false;
    }
    if (!c.mmu.read_system(wrap_linear(c, tr.base + at), &esp)) return false;
    if (!c.mmu.read_system(wrap_linear(c, tr.base + at + 4), ss)) return false;
    *rsp = esp;
    return true;
  }
  const u32 at = cpl * 4u + 2;
  u16 sp;
  if (at + 3 > tr.limit) {
    c.fault(vec::TS, error);
    return false;
  }
  if (!c.mmu.read_system(wrap_linear(c, tr.base + at), &sp)) return false;
  if (!c.mmu.read_system(wrap_linear(c, tr.base + at + 2), ss)) return false;
  *rsp = sp;
  return true;
}

bool check_target(Context& c, const Segment& cs, u64 rip, u32 ext) {
  const bool good = c.s.long_mode() && cs.l ? canonical(c, rip) : rip <= cs.limit;
  if (!good) c.fault(vec::GP, ext);
  return good;
}

}  // namespace ring3::engine
