// Getters and setters of the vCPU's state structs.
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "engine/abi/user_memory.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"
#include "engine/interp/xstate.hpp"

namespace ring3::engine::abi {
namespace {

kvm_segment to_kvm(const Segment& s) {
  kvm_segment k{};
  k.base = s.base;
  k.limit = s.limit;
  k.selector = s.selector;
  k.type = s.type;
  k.present = s.present;
  k.dpl = s.dpl;
  k.db = s.db;
  k.s = s.s;
  k.l = s.l;
  k.g = s.g;
  k.avl = s.avl;
  k.unusable = s.unusable;
  return k;
}

Segment from_kvm(const kvm_segment& k) {
  Segment s;
  s.base = k.base;
  s.limit = k.limit;
  s.selector = k.selector;
  s.type = k.type & 15;
  s.present = k.present != 0;
  s.dpl = k.dpl & 3;
  s.db = k.db != 0;
  s.s = k.s != 0;
  s.l = k.l != 0;
  s.g = k.g != 0;
  s.avl = k.avl != 0;
  s.unusable = k.unusable != 0;
  return s;
}

constexpr u64 kRflagsWritable = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::RF |
                                rflags::VM | rflags::AC | rflags::VIF | rflags::VIP | rflags::ID;
constexpr u64 kCr0Defined =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

template <class T>
long give(u64 arg, const T& value) {
  return copy_out(arg, value) ? 0 : -EFAULT;
}

}  // namespace

void Vcpu::get_regs(kvm_regs* out) const {
  const u64* g = state_.gpr;
  *out = kvm_regs{g[RAX], g[RBX], g[RCX], g[RDX], g[RSI], g[RDI], g[RSP], g[RBP], g[R8], g[R9], g[R10], g[R11],
                  g[R12], g[R13], g[R14], g[R15], state_.rip, state_.rflags};
}

void Vcpu::set_regs(const kvm_regs& in) {
  u64* g = state_.gpr;
  g[RAX] = in.rax;
  g[RBX] = in.rbx;
  g[RCX] = in.rcx;
  g[RDX] = in.rdx;
  g[RSI] = in.rsi;
  g[RDI] = in.rdi;
  g[RSP] = in.rsp;
  g[RBP] = in.rbp;
  g[R8] = in.r8;
  g[R9] = in.r9;
  g[R10] = in.r10;
  g[R11] = in.r11;
  g[R12] = in.r12;
  g[R13] = in.r13;
  g[R14] = in.r14;
  g[R15] = in.r15;
  if (state_.rip != in.rip) env_.drop();
  state_.rip = in.rip;
  state_.rflags = (in.rflags & kRflagsWritable) | rflags::FIXED1;
  if (!exception_injected_) state_.exception.pending = false;
  state_changed();
}

void Vcpu::get_sregs2(kvm_sregs2* out) const {
  std::memset(out, 0, sizeof *out);
  out->cs = to_kvm(state_.seg[CS]);
  out->ds = to_kvm(state_.seg[DS]);
  out->es = to_kvm(state_.seg[ES]);
  out->fs = to_kvm(state_.seg[FS]);
  out->gs = to_kvm(state_.seg[GS]);
  out->ss = to_kvm(state_.seg[SS]);
  out->tr = to_kvm(state_.tr);
  out->ldt = to_kvm(state_.ldtr);
  out->gdt.base = state_.gdtr.base;
  out->gdt.limit = state_.gdtr.limit;
  out->idt.base = state_.idtr.base;
  out->idt.limit = state_.idtr.limit;
  out->cr0 = state_.cr0;
  out->cr2 = state_.cr2;
  out->cr3 = state_.cr3;
  out->cr4 = state_.cr4;
  out->cr8 = cr8();
  out->efer = state_.efer;
  out->apic_base = apic_base();
  if ((state_.cr0 & cr0::PG) && (state_.cr4 & cr4::PAE) && !state_.long_mode()) {
    out->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
    for (unsigned i = 0; i < 4; i++) out->pdptrs[i] = state_.pdptr[i];
  }
}

void Vcpu::get_sregs(kvm_sregs* out) const {
  kvm_sregs2 all;
  get_sregs2(&all);
  std::memset(out, 0, sizeof *out);
  // The two structs are the same up to and including apic_base.
  static_assert(offsetof(kvm_sregs, apic_base) == offsetof(kvm_sregs2, apic_base));
  std::memcpy(out, &all, offsetof(kvm_sregs, interrupt_bitmap));
  if (state_.injected_interrupt && !state_.injected_soft) {
    out->interrupt_bitmap[state_.injected_vector / 64] |= 1ull << (state_.injected_vector % 64);
  }
}

template <class S>
int Vcpu::set_sregs_common(const S& in) {
  const GuestFeatures& features = interp_->context().features;
  if ((in.efer & efer::LME) && (in.cr0 & cr0::PG)) {
    if (!(in.cr4 & cr4::PAE) || !(in.efer & efer::LMA)) return -EINVAL;
    const u64 pa_limit = features.maxphyaddr >= 64 ? ~0ull : 1ull << features.maxphyaddr;
    if (in.cr3 >= pa_limit) return -EINVAL;
  } else if ((in.efer & efer::LMA) || in.cs.l) {
    return -EINVAL;
  }
  // VME and PVI are kept for the VMM and change nothing: the virtual-8086 extensions are not modelled, nor offered.
  if (in.cr4 & features.cr4_reserved & ~u64{3}) return -EINVAL;
  if (in.cr0 >> 32) return -EINVAL;
  if ((in.cr0 & cr0::NW) && !(in.cr0 & cr0::CD)) return -EINVAL;
  if ((in.cr0 & cr0::PG) && !(in.cr0 & cr0::PE)) return -EINVAL;
  if (in.efer & features.efer_reserved) return -EINVAL;
  if (!set_apic_base(in.apic_base, true)) return -EINVAL;

  if (state_.seg[CS].base != in.cs.base || state_.seg[CS].selector != in.cs.selector) env_.drop();
  state_.seg[CS] = from_kvm(in.cs);
  state_.seg[DS] = from_kvm(in.ds);
  state_.seg[ES] = from_kvm(in.es);
  state_.seg[FS] = from_kvm(in.fs);
  state_.seg[GS] = from_kvm(in.gs);
  state_.seg[SS] = from_kvm(in.ss);
  state_.tr = from_kvm(in.tr);
  state_.ldtr = from_kvm(in.ldt);
  state_.gdtr = {in.gdt.base, in.gdt.limit};
  state_.idtr = {in.idt.base, in.idt.limit};
  state_.cr0 = (in.cr0 & kCr0Defined) | cr0::ET;
  state_.cr2 = in.cr2;
  state_.cr3 = in.cr3;
  state_.cr4 = in.cr4;
  state_.efer = in.efer;
  set_cr8(in.cr8 & 15);
  mmu_.flush_all();
  state_changed();

  // VMMs that know of no MP state reset a vCPU by writing the state after RESET.
  if (id_ == vm_.boot_vcpu() && state_.rip == 0xfff0 && in.cs.selector == 0xf000 && in.cs.base == 0xffff0000 &&
      !(in.cr0 & cr0::PE)) {
    mp_state_ = KVM_MP_STATE_RUNNABLE;
  }
  return 0;
}

int Vcpu::set_sregs(const kvm_sregs& in) {
  if (const int error = set_sregs_common(in); error != 0) return error;
  if ((state_.cr0 & cr0::PG) && (state_.cr4 & cr4::PAE) && !state_.long_mode()) {
    mmu_.load_pdptrs(state_.cr3);  // as the kernel: reserved bits in memory do not fail the ioctl
  }
  state_.injected_interrupt = false;
  for (unsigned v = 0; v < KVM_NR_INTERRUPTS; v++) {
    if (!(in.interrupt_bitmap[v / 64] >> (v % 64) & 1)) continue;
    state_.injected_interrupt = true;
    state_.injected_vector = static_cast<u8>(v);
    state_.injected_soft = false;
    break;
  }
  return 0;
}

int Vcpu::set_sregs2(const kvm_sregs2& in) {
  if (in.flags & ~u64{KVM_SREGS2_FLAGS_PDPTRS_VALID}) return -EINVAL;
  const bool pae = (in.cr0 & cr0::PG) && (in.cr4 & cr4::PAE) && !(in.efer & efer::LMA);
  if ((in.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID) && !pae) return -EINVAL;
  if (const int error = set_sregs_common(in); error != 0) return error;
  if (in.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID) {
    for (unsigned i = 0; i < 4; i++) state_.pdptr[i] = in.pdptrs[i];
    mmu_.flush_all();
  } else if (pae) {
    mmu_.load_pdptrs(state_.cr3);
  }
  return 0;
}

// ---- FPU, XSAVE ----
// struct kvm_fpu keeps registers as FXSAVE does, in another order.

void Vcpu::get_fpu(kvm_fpu* out) const {
  std::memset(out, 0, sizeof *out);
  const u8* x = state_.xsave.bytes;
  std::memcpy(out->fpr, x + 32, sizeof out->fpr);
  std::memcpy(&out->fcw, x + 0, 2);
  std::memcpy(&out->fsw, x + 2, 2);
  out->ftwx = x[4];
  std::memcpy(&out->last_opcode, x + 6, 2);
  std::memcpy(&out->last_ip, x + 8, 8);
  std::memcpy(&out->last_dp, x + 16, 8);
  std::memcpy(out->xmm, x + XsaveArea::kXmm, sizeof out->xmm);
  std::memcpy(&out->mxcsr, x + 24, 4);
}

int Vcpu::set_fpu(const kvm_fpu& in) {
  // The kernel leaves MXCSR alone here; what is set shall be read back, so a legal value is taken.
  const u32 mask = interp_->context().features.mxcsr_mask;
  u8* x = state_.xsave.bytes;
  std::memcpy(x + 32, in.fpr, sizeof in.fpr);
  std::memcpy(x + 0, &in.fcw, 2);
  std::memcpy(x + 2, &in.fsw, 2);
  x[4] = in.ftwx;
  std::memcpy(x + 6, &in.last_opcode, 2);
  std::memcpy(x + 8, &in.last_ip, 8);
  std::memcpy(x + 16, &in.last_dp, 8);
  std::memcpy(x + XsaveArea::kXmm, in.xmm, sizeof in.xmm);
  const u32 mxcsr = in.mxcsr & mask;
  std::memcpy(x + 24, &mxcsr, 4);
  return 0;
}

void Vcpu::get_xsave(u8* out) const {
  std::memcpy(out, state_.xsave.bytes, XsaveArea::kSize);
  const GuestFeatures& features = interp_->context().features;
  const u32 mask = features.mxcsr_mask;
  std::memcpy(out + 28, &mask, 4);
  std::memset(out + 464, 0, 48);  // software's bytes of the legacy area
  u64 header[8] = {};
  header[0] = 3;
  std::memset(out + XsaveArea::kHeader + sizeof header, 0, XsaveArea::kSize - XsaveArea::kHeader - sizeof header);
  const u64 in_use = xstate_in_use(state_.xsave);
  for (const XstateComponent& x : xstate_components()) {
    if (!(in_use >> x.number & 1)) continue;
    header[0] |= u64{1} << x.number;
    std::memcpy(out + x.standard, state_.xsave.bytes + x.in_area, x.size);
  }
  std::memcpy(out + XsaveArea::kHeader, header, sizeof header);
}

int Vcpu::set_xsave(const u8* in) {
  const GuestFeatures& features = interp_->context().features;
  u64 header[8];
  std::memcpy(header, in + XsaveArea::kHeader, sizeof header);
  const u64 known = all_features_.xcr0_supported & 0xe7;
  if (header[0] & ~known) return -EINVAL;
  if (header[1] != 0) return -EINVAL;  // compacted format
  for (unsigned i = 2; i < 8; i++) {
    if (header[i] != 0) return -EINVAL;
  }
  u32 mxcsr;
  std::memcpy(&mxcsr, in + 24, 4);
  if ((header[0] & 6) && (mxcsr & ~features.mxcsr_mask)) return -EINVAL;

  u8* x = state_.xsave.bytes;
  XsaveArea fresh;
  fresh.fcw() = 0x37f;
  fresh.mxcsr() = 0x1f80;
  const u8* from = header[0] & 1 ? in : fresh.bytes;
  std::memcpy(x, from, 24);
  std::memcpy(x + 32, from + 32, 128);
  from = header[0] & 2 ? in : fresh.bytes;
  std::memcpy(x + XsaveArea::kXmm, from + XsaveArea::kXmm, 256);
  if (header[0] & 6) {
    std::memcpy(x + 24, &mxcsr, 4);
  } else {
    std::memcpy(x + 24, fresh.bytes + 24, 4);
  }
  for (const XstateComponent& component : xstate_components()) {
    if (header[0] >> component.number & 1) {
      std::memcpy(x + component.in_area, in + component.standard, component.size);
    } else {
      std::memset(x + component.in_area, 0, component.size);
    }
  }
  return 0;
}

int Vcpu::set_xcrs(const kvm_xcrs& in) {
  if (in.nr_xcrs > KVM_MAX_XCRS || in.flags != 0) return -EINVAL;
  for (u32 i = 0; i < in.nr_xcrs; i++) {
    if (in.xcrs[i].xcr != 0) continue;  // as the kernel: only XCR0 is looked for
    const u64 v = in.xcrs[i].value;
    if (!(v & 1) || (v & ~interp_->context().features.xcr0_supported)) return -EINVAL;
    if ((v & 4) && !(v & 2)) return -EINVAL;
    if ((v & 0xe0) != 0 && ((v & 0xe0) != 0xe0 || !(v & 4))) return -EINVAL;
    state_.xcr0 = v;
    state_changed();
    return 0;
  }
  return 0;
}

// ---- debug registers, events, MP state ----

void Vcpu::get_debugregs(kvm_debugregs* out) const {
  std::memset(out, 0, sizeof *out);
  for (unsigned i = 0; i < 4; i++) out->db[i] = state_.dr[i];
  out->dr6 = state_.dr6;
  out->dr7 = state_.dr7;
}

int Vcpu::set_debugregs(const kvm_debugregs& in) {
  if (in.flags != 0) return -EINVAL;
  if (in.dr6 >> 32 || in.dr7 >> 32) return -EINVAL;
  for (unsigned i = 0; i < 4; i++) state_.dr[i] = in.db[i];
  state_.dr6 = in.dr6;  // as it stands, also what no MOV to a debug register could leave there: as the kernel
  state_.dr7 = in.dr7;
  state_changed();
  return 0;
}

void Vcpu::get_events(kvm_vcpu_events* out) {
  std::memset(out, 0, sizeof *out);
  collect_nmis();
  const PendingException& e = state_.exception;
  // Without the payload capability a pending exception reads as an injected one, so its side effects happen now.
  if (e.pending && !exception_injected_ && !vm_.exception_payload()) apply_payload();
  out->exception.injected = e.pending && (exception_injected_ || !vm_.exception_payload());
  out->exception.pending = e.pending && !exception_injected_;
  out->exception.nr = e.vector;
  out->exception.has_error_code = e.has_error;
  out->exception.error_code = e.error;
  out->exception_has_payload = e.has_payload;
  out->exception_payload = e.payload;
  out->interrupt.injected = state_.injected_interrupt && !state_.injected_soft;
  out->interrupt.nr = state_.injected_vector;
  out->interrupt.shadow = static_cast<u8>((state_.sti_shadow ? KVM_X86_SHADOW_INT_STI : 0) |
                                          (state_.mov_ss_shadow ? KVM_X86_SHADOW_INT_MOV_SS : 0));
  out->nmi.injected = nmi_injected_;
  out->nmi.pending = state_.nmi_pending != 0;
  out->nmi.masked = state_.nmi_blocked;
  out->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
  out->smi.latched_init = init_.load();
  if (vm_.exception_payload()) out->flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
  if (vm_.triple_fault_event()) {
    out->flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    out->triple_fault.pending = triple_fault_pending_;
  }
}

int Vcpu::set_events(const kvm_vcpu_events& in) {
  constexpr u32 kKnown = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW |
                         KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
  if (in.flags & ~kKnown) return -EINVAL;
  bool injected = in.exception.injected != 0, pending = false;
  if (in.flags & KVM_VCPUEVENT_VALID_PAYLOAD) {
    if (!vm_.exception_payload()) return -EINVAL;
    pending = in.exception.pending != 0;
    if (pending) injected = false;
  }
  if ((injected || pending) && (in.exception.nr > 31 || in.exception.nr == vec::NMI)) return -EINVAL;
  if ((in.flags & KVM_VCPUEVENT_VALID_SMM) && (in.smi.smm || in.smi.pending || in.smi.smm_inside_nmi)) return -EINVAL;
  if ((in.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !vm_.triple_fault_event()) return -EINVAL;

  collect_nmis();
  PendingException& e = state_.exception;
  e.pending = injected || pending;
  exception_injected_ = injected;
  e.vector = in.exception.nr;
  e.has_error = in.exception.has_error_code != 0;
  e.error = in.exception.error_code;
  e.has_payload = pending && in.exception_has_payload != 0;
  e.payload = e.has_payload ? in.exception_payload : 0;
  state_.injected_interrupt = in.interrupt.injected != 0;
  state_.injected_vector = in.interrupt.nr;
  state_.injected_soft = in.interrupt.soft != 0;
  if (in.flags & KVM_VCPUEVENT_VALID_SHADOW) {
    state_.sti_shadow = in.interrupt.shadow & KVM_X86_SHADOW_INT_STI;
    state_.mov_ss_shadow = in.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS;
  }
  nmi_injected_ = in.nmi.injected != 0;
  if (in.flags & KVM_VCPUEVENT_VALID_NMI_PENDING) state_.nmi_pending = in.nmi.pending ? 1 : 0;
  state_.nmi_blocked = in.nmi.masked != 0;
  if ((in.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR) && lapic_) sipi_vector_.store(static_cast<u8>(in.sipi_vector));
  if ((in.flags & KVM_VCPUEVENT_VALID_SMM) && lapic_) {
    init_.store(in.smi.latched_init != 0);
    if (in.smi.latched_init != 0) raise(kAttendInit);
  }
  if (in.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) triple_fault_pending_ = in.triple_fault.pending != 0;
  return 0;
}

u32 Vcpu::get_mp_state() {
  accept_init_sipi();
  if (mp_state_ == KVM_MP_STATE_HALTED && (unhalted_.load() || vm_.halts_in_guest())) return KVM_MP_STATE_RUNNABLE;
  return mp_state_;
}

int Vcpu::set_mp_state(u32 state) {
  switch (state) {
    case KVM_MP_STATE_RUNNABLE: break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED:
    case KVM_MP_STATE_HALTED:
    case KVM_MP_STATE_SIPI_RECEIVED:
      if (!lapic_) return -EINVAL;
      break;
    default: return -EINVAL;
  }
  if (state == KVM_MP_STATE_SIPI_RECEIVED) {
    mp_state_ = KVM_MP_STATE_INIT_RECEIVED;
    sipi_.store(true);
    raise(kAttendInit);
  } else {
    mp_state_ = state;
  }
  return 0;
}

long Vcpu::registers_ioctl(unsigned long request, u64 arg) {
  switch (request) {
    case KVM_GET_REGS: { kvm_regs r; get_regs(&r); return give(arg, r); }
    case KVM_SET_REGS: {
      kvm_regs r;
      if (!copy_in(arg, &r)) return -EFAULT;
      set_regs(r);
      return 0;
    }
    case KVM_GET_SREGS: { kvm_sregs r; get_sregs(&r); return give(arg, r); }
    case KVM_SET_SREGS: { kvm_sregs r; return copy_in(arg, &r) ? set_sregs(r) : -EFAULT; }
    case KVM_GET_SREGS2: { kvm_sregs2 r; get_sregs2(&r); return give(arg, r); }
    case KVM_SET_SREGS2: { kvm_sregs2 r; return copy_in(arg, &r) ? set_sregs2(r) : -EFAULT; }
    case KVM_GET_FPU: { kvm_fpu r; get_fpu(&r); return give(arg, r); }
    case KVM_SET_FPU: { kvm_fpu r; return copy_in(arg, &r) ? set_fpu(r) : -EFAULT; }
    case KVM_GET_XSAVE:
    case KVM_GET_XSAVE2:
    {
      u8 area[XsaveArea::kSize];
      get_xsave(area);
      return copy_bytes_out(arg, area, sizeof area) ? 0 : -EFAULT;
    }
    case KVM_SET_XSAVE: {
      u8 area[XsaveArea::kSize];
      return copy_bytes_in(arg, area, sizeof area) ? set_xsave(area) : -EFAULT;
    }
    case KVM_GET_XCRS: {
      kvm_xcrs r{};
      r.nr_xcrs = 1;
      r.xcrs[0].value = state_.xcr0;
      return give(arg, r);
    }
    case KVM_SET_XCRS: { kvm_xcrs r; return copy_in(arg, &r) ? set_xcrs(r) : -EFAULT; }
    case KVM_GET_DEBUGREGS: { kvm_debugregs r; get_debugregs(&r); return give(arg, r); }
    case KVM_SET_DEBUGREGS: { kvm_debugregs r; return copy_in(arg, &r) ? set_debugregs(r) : -EFAULT; }
    case KVM_GET_VCPU_EVENTS: { kvm_vcpu_events r; get_events(&r); return give(arg, r); }
    case KVM_SET_VCPU_EVENTS: { kvm_vcpu_events r; return copy_in(arg, &r) ? set_events(r) : -EFAULT; }
    case KVM_GET_MP_STATE: { kvm_mp_state r{get_mp_state()}; return give(arg, r); }
    case KVM_SET_MP_STATE: { kvm_mp_state r; return copy_in(arg, &r) ? set_mp_state(r.mp_state) : -EFAULT; }
    case KVM_GET_LAPIC: {
      if (!lapic_) return -EINVAL;
      kvm_lapic_state r{};
      lapic_->get_state(&r);
      return give(arg, r);
    }
    case KVM_SET_LAPIC: {
      if (!lapic_) return -EINVAL;
      kvm_lapic_state r;
      return copy_in(arg, &r) ? lapic_->set_state(r) : -EFAULT;
    }
    default: return -EINVAL;  // the kernel's answer on vCPUs
  }
}

}  // namespace ring3::engine::abi
