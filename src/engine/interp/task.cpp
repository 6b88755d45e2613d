#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

/// Hardware task switches (legacy protected mode and from virtual-8086 mode).
///
/// Spec: Intel SDM vol. 3A ch. 7, 7.3 for the order, table 7-1 for the exceptions.
/// Faults before the new task's state is loaded leave everything unchanged; those found while its segment
/// registers are loaded belong to the new task.
namespace ring3::engine {
namespace {

constexpr u32 kSize32 = 0x68, kSize16 = 0x2c;

// Offsets of the dynamic fields.
constexpr unsigned kCr3 = 0x1c, kEip32 = 0x20, kEflags32 = 0x24, kGpr32 = 0x28, kSeg32 = 0x48, kLdt32 = 0x60, kTrap32 = 0x64;
constexpr unsigned kIp16 = 0x0e, kFlags16 = 0x10, kGpr16 = 0x12, kSeg16 = 0x22, kLdt16 = 0x2a;

struct Image {
  u8 bytes[kSize32] = {};
  u16 get16(unsigned at) const {
    u16 v;
    std::memcpy(&v, bytes + at, 2);
    return v;
  }
  u32 get32(unsigned at) const {
    u32 v;
    std::memcpy(&v, bytes + at, 4);
    return v;
  }
  void put16(unsigned at, u16 v) { std::memcpy(bytes + at, &v, 2); }
  void put32(unsigned at, u32 v) { std::memcpy(bytes + at, &v, 4); }
};

bool fail(Context& c, u8 vector, u32 error) {
  c.fault(vector, error);
  return false;
}

/// Loads a data segment register of the new task.
bool load_task_data(Context& c, Seg seg, u16 selector, u32 ext) {
  if (is_null(selector)) {
    load_null(c, seg, selector);
    return true;
  }
  Descriptor d;
  if (!read_descriptor(c, selector, vec::TS, ext, &d)) return false;
  const u32 error = (selector & kSelectorMask) | ext;
  const u8 rpl = selector & 3;
  if (!d.readable() || (!d.conforming() && (rpl > d.dpl() || c.cpl > d.dpl()))) return fail(c, vec::TS, error);
  if (!d.present()) return fail(c, vec::NP, error);
  if (!mark_accessed(c, d)) return false;
  c.s.seg[seg] = d.segment();
  return true;
}

bool load_task_segments(Context& c, const u16 (&sel)[6], u16 ldt, u32 ext) {
  VcpuState& s = c.s;
  if (!is_null(ldt)) {
    const u32 error = (ldt & kSelectorMask) | ext;
    Descriptor d;
    if (ldt & 4) return fail(c, vec::TS, error);
    if (!read_descriptor(c, ldt, vec::TS, ext, &d)) return false;
    if (d.s() || d.type() != kLdt || !d.present()) return fail(c, vec::TS, error);
    s.ldtr = d.segment();
  }
  if (s.v8086()) {
    for (Seg seg : {ES, CS, SS, DS, FS, GS}) load_v86(c, seg, sel[seg]);
    c.mode_changed();
    return true;
  }
  // The level of the new task is its CS's RPL from here on.
  const u8 cpl = sel[CS] & 3;
  s.seg[SS].dpl = cpl;
  c.mode_changed();

  const u32 cs_error = (sel[CS] & kSelectorMask) | ext;
  if (is_null(sel[CS])) return fail(c, vec::TS, ext);
  Descriptor code;
  if (!read_descriptor(c, sel[CS], vec::TS, ext, &code)) return false;
  if (!code.code() || (code.conforming() ? code.dpl() > cpl : code.dpl() != cpl)) return fail(c, vec::TS, cs_error);
  if (!code.present()) return fail(c, vec::NP, cs_error);
  Segment ss;
  if (!check_stack_segment(c, sel[SS], cpl, false, vec::TS, ext, &ss)) return false;
  if (!mark_accessed(c, code)) return false;
  s.seg[CS] = code.segment();
  s.seg[SS] = ss;
  c.mode_changed();
  for (Seg seg : {DS, ES, FS, GS})
    if (!load_task_data(c, seg, sel[seg], ext)) return false;
  return true;
}

}  // namespace

bool read_task_descriptor(Context& c, u16 selector, bool busy, u8 vector, u32 ext, Descriptor* out) {
  const u32 error = (selector & kSelectorMask) | ext;
  if (selector & 4) return fail(c, vector, error);
  if (!read_descriptor(c, selector, vector, ext, out)) return false;
  const u8 type = out->type();
  const bool right = busy ? type == kTss16Busy || type == kTss32Busy : type == kTss16 || type == kTss32;
  if (out->s() || !right) return fail(c, vector, error);
  if (!out->present()) return fail(c, vec::NP, error);
  return true;
}

bool switch_task(Context& c, const Descriptor& tss, TaskSwitch reason, u64 return_rip, const u32* error, u32 ext) {
  VcpuState& s = c.s;
  const bool wide = tss.type() & 8, old_wide = s.tr.type & 8;
  const u32 tss_error = (tss.selector & kSelectorMask) | ext;
  const u64 base = tss.base(), old_base = s.tr.base;
  const u32 size = wide ? kSize32 : kSize16, old_size = old_wide ? kSize32 : kSize16;
  if (tss.limit() < size - 1) return fail(c, vec::TS, tss_error);
  if (s.tr.limit < old_size - 1) return fail(c, vec::TS, (s.tr.selector & kSelectorMask) | ext);

  // ---- everything that can fault in the old task's context ----
  Image image, old;
  if (!c.mmu.read_bytes(wrap_linear(c, base), image.bytes, size, DS, Privilege::System)) return false;
  if (!c.mmu.read_bytes(wrap_linear(c, old_base), old.bytes, old_size, DS, Privilege::System)) return false;
  if (!c.mmu.check_write(wrap_linear(c, old_base), old_size, DS, Privilege::System)) return false;
  const bool nests = reason == TaskSwitch::Call || reason == TaskSwitch::Event;
  const bool leaves = reason == TaskSwitch::Jmp || reason == TaskSwitch::Iret;
  if (nests && !c.mmu.check_write(wrap_linear(c, base), 2, DS, Privilege::System)) return false;
  Descriptor old_descriptor;
  if (leaves && read_descriptor(c, s.tr.selector, vec::TS, ext, &old_descriptor)) {
    if (!set_busy(c, old_descriptor, false)) return false;
  } else if (leaves) {
    return false;
  }
  if (reason != TaskSwitch::Iret && !set_busy(c, tss, true)) return false;

  // ---- save the old task ----
  u64 flags = s.rflags;
  if (reason == TaskSwitch::Iret) flags &= ~rflags::NT;
  if (old_wide) {
    old.put32(kEip32, static_cast<u32>(return_rip));
    old.put32(kEflags32, static_cast<u32>(flags));
    for (unsigned i = 0; i < 8; ++i) old.put32(kGpr32 + 4 * i, static_cast<u32>(s.gpr[i]));
    for (unsigned i = 0; i < 6; ++i) old.put16(kSeg32 + 4 * i, s.seg[i].selector);
  } else {
    old.put16(kIp16, static_cast<u16>(return_rip));
    old.put16(kFlags16, static_cast<u16>(flags));
    for (unsigned i = 0; i < 8; ++i) old.put16(kGpr16 + 2 * i, static_cast<u16>(s.gpr[i]));
    for (unsigned i = 0; i < 4; ++i) old.put16(kSeg16 + 2 * i, s.seg[i].selector);
  }
  const u16 back_link = s.tr.selector;
  // Only the dynamic fields are written; the TSS's own stacks, CR3 and LDT are not.
  const unsigned first = old_wide ? kEip32 : kIp16, last = old_wide ? kLdt32 : kLdt16;
  if (!c.mmu.write_bytes(wrap_linear(c, old_base + first), old.bytes + first, last - first, DS, Privilege::System))
    return false;
  if (nests && !c.mmu.write_system(wrap_linear(c, base), back_link)) return false;
  if (nests && base == old_base) image.put16(0, back_link);

  // ---- commit: the new task's registers ----
  s.tr = tss.segment();
  s.tr.type |= 2;
  s.cr0 |= cr0::TS;
  u64 cr3_stop = 0;
  if (wide && (s.cr0 & cr0::PG) && !write_cr3(c, image.get32(kCr3))) cr3_stop = 1;
  u64 new_flags;
  u16 selectors[6] = {};
  if (wide) {
    s.rip = image.get32(kEip32);
    new_flags = image.get32(kEflags32) & 0x3f7fd5;
    for (unsigned i = 0; i < 8; ++i) s.gpr[i] = image.get32(kGpr32 + 4 * i);
    for (unsigned i = 0; i < 6; ++i) selectors[i] = image.get16(kSeg32 + 4 * i);
  } else {
    s.rip = image.get16(kIp16);
    new_flags = image.get16(kFlags16) & 0x7fd5;
    for (unsigned i = 0; i < 8; ++i) s.gpr[i] = image.get16(kGpr16 + 2 * i);
    for (unsigned i = 0; i < 4; ++i) selectors[i] = image.get16(kSeg16 + 2 * i);
  }
  if (nests) new_flags |= rflags::NT;
  s.rflags = new_flags | rflags::FIXED1;
  s.dr7 &= ~0x155ull;  // L0..L3 and LE are the old task's
  for (unsigned i = 0; i < 6; ++i) {
    // Until its descriptor is loaded a segment register holds its selector and is unusable.
    s.seg[i].selector = selectors[i];
    if (i != CS && i != SS) s.seg[i].unusable = 1;
  }
  const u16 ldt = wide ? image.get16(kLdt32) : image.get16(kLdt16);
  s.ldtr = Segment{};
  s.ldtr.selector = ldt;
  s.ldtr.s = 0;
  s.ldtr.type = kLdt;
  s.ldtr.limit = 0;
  s.ldtr.unusable = 1;
  s.ldtr.present = 0;

  c.mode_changed();
  bool ok = false;
  if (cr3_stop) {
    c.fault(vec::TS, tss_error);
  } else {
    ok = load_task_segments(c, selectors, ldt, ext) && check_target(c, s.seg[CS], s.rip, ext);
  }
  if (ok && error != nullptr) {
    StackFrame frame(s.seg[SS], wide ? 4 : 2, s.seg[SS].db ? 4 : 2, s.gpr[RSP], false);
    frame.push(*error);
    ok = frame.check(c, ext) && frame.write(c);
    if (ok) s.gpr[RSP] = frame.final_rsp();
  }
  c.mode_changed();
  if (!ok) {
    if (c.stop().kind == Stop::Kind::Fault) c.stop().kind = Stop::Kind::Trap;
    return false;
  }
  if (wide && (image.bytes[kTrap32] & 1)) {
    Stop trap = Stop::fault(vec::DB);
    trap.kind = Stop::Kind::Trap;
    trap.payload = 1u << 15;  // DR6.BT
    c.stop() = trap;
    return false;
  }
  return true;
}

}  // namespace ring3::engine
