#include "engine/state/vcpu_state.hpp"

namespace ring3::engine {
namespace {

void reset_common(VcpuState& s) {
  for (u64& g : s.gpr) g = 0;
  s.gpr[RDX] = 0x600;  // family/model/stepping signature of a P6-class part, as KVM leaves it
  s.rip = 0xfff0;
  s.rflags = rflags::FIXED1;
  for (Segment& seg : s.seg) {
    seg = Segment{};
    seg.type = 3;
  }
  s.seg[CS].selector = 0xf000;
  s.seg[CS].base = 0xffff0000;
  s.seg[CS].type = 11;
  s.ldtr = Segment{};
  s.ldtr.s = 0;
  s.ldtr.type = 2;
  s.tr = Segment{};
  s.tr.s = 0;
  s.tr.type = 11;
  s.gdtr = s.idtr = DescriptorTable{};
  s.cr2 = s.cr3 = s.cr4 = 0;
  s.efer = 0;
  for (u64& d : s.dr) d = 0;
  s.dr6 = 0xffff0ff0;
  s.dr7 = 0x400;
  for (u64& p : s.pdptr) p = 0;
  s.exception = PendingException{};
  s.sti_shadow = s.mov_ss_shadow = s.nmi_blocked = false;
  s.nmi_pending = 0;
  s.injected_interrupt = false;
}

}  // namespace

void VcpuState::reset() {
  *this = VcpuState{};
  reset_common(*this);
  cr0 = cr0::ET | cr0::CD | cr0::NW;
  xcr0 = 1;
  xsave.fcw() = 0x40;
  xsave.ftw_abridged() = 0xff;  // all tags valid-zero after RESET (FTW 5555h)
  xsave.mxcsr() = 0x1f80;
}

void VcpuState::init() {
  const u64 keep = cr0 & (cr0::CD | cr0::NW);
  reset_common(*this);
  cr0 = cr0::ET | keep;
}

}  // namespace ring3::engine
