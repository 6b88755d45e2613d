#include "engine/interp/fast_syscall.hpp"
#include "engine/interp/operand.hpp"
#include "engine/translate/thunks.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// What translated code calls with the guest's vectors in the host's registers: system instructions, and the ways between
/// user and kernel.
///
/// This file is made without vector registers (src/CMakeLists.txt). It calls nothing that is not: inlined or trivial
/// members, Mmu::privilege_changed(), and ring3_jit_call_out(); and what uses vectors when the guest's are not there.
///
/// What is rare (a mode that changes, an open interrupt window, a trap flag, anything that faults) is refused with
/// nothing changed: the interpreter does it.
/// Spec: as the interpreter's handlers (interp/system.cpp, syscall.cpp, stack.cpp, far.cpp).
namespace ring3::engine {
namespace {

/// Status flags as LAHF and SETO leave them, and as RFLAGS has them.
u64 status_of(u64 frame_flags) { return (frame_flags >> 8 & rflags::STATUS & 0xff) | (frame_flags & 1) << 11; }
u64 frame_flags_of(u64 flags) { return (flags & rflags::STATUS & 0xff) << 8 | (flags >> 11 & 1); }

}  // namespace

u64 TranslatorVcpu::system_function(void* self, u64 operand, u64 op) {
  return static_cast<TranslatorVcpu*>(self)->system_op(static_cast<SystemOp>(op), operand);
}

u64 TranslatorVcpu::system_op(SystemOp op, u64 operand) {
  frame_.stack_limit = 0;
  switch (op) {
    case SystemOp::Stac:
    case SystemOp::Clac:
      s_.rflags = op == SystemOp::Stac ? s_.rflags | rflags::AC : s_.rflags & ~rflags::AC;
      c_.privilege_changed();
      JitGsBase::use(&frame_, mmu_.tlb());
      return 1;
    case SystemOp::StiOpen:
      if (c_.interrupt_window || c_.attention().raised()) return 0;
      s_.rflags |= rflags::IF;
      return 1;
    case SystemOp::Sti:
      if (!(s_.rflags & rflags::IF)) s_.sti_shadow = true;
      s_.rflags |= rflags::IF;
      return 1;
    case SystemOp::Popf: {
      const u64 change = rflags::DF | (c_.cpl == 0 ? rflags::IF : 0);
      const u64 all = rflags::TF | rflags::NT | rflags::AC | rflags::ID | (c_.cpl == 0 ? rflags::IOPL : 0);
      if ((s_.rflags ^ operand) & all) return 0;
      if (c_.cpl != 0 && (s_.rflags & rflags::IOPL)) return 0;  // IF may be writable
      if (c_.interrupt_window && (operand & rflags::IF)) return 0;
      s_.rflags = (s_.rflags & ~change) | (operand & change);
      return 1;
    }
    case SystemOp::ReadCr0:
      return s_.cr0;
    case SystemOp::ReadCr2:
      return s_.cr2;
    case SystemOp::ReadCr3:
      return s_.cr3;
    case SystemOp::ReadCr4:
      return s_.cr4;
    case SystemOp::Rdtsc:
      if (c_.cpl != 0 && (s_.cr4 & cr4::TSD)) return 0;
      if (host_tsc_.ratio != nullptr) {
        u32 low, high;
        asm volatile("rdtsc" : "=a"(low), "=d"(high));
        const u64 host = static_cast<u64>(high) << 32 | low;
        const u64 scaled = static_cast<u64>(static_cast<u128>(host) * host_tsc_.ratio->load(std::memory_order_relaxed) >> 48);
        return scaled + host_tsc_.offset->load(std::memory_order_relaxed);
      }
      return ring3_jit_call_out([](void* env) { return static_cast<Environment*>(env)->rdtsc(); }, &c_.env, frame_.pointer);
    case SystemOp::TscAux:
      return s_.msr.tsc_aux;
    case SystemOp::ReadSelector:
      return s_.seg[operand % kSegCount].selector;
    case SystemOp::BasesAllowed:
      return c_.code64 && (s_.cr4 & cr4::FSGSBASE) ? 1 : 0;
    case SystemOp::WriteFsBase:
    case SystemOp::WriteGsBase: {
      if (!c_.code64 || !(s_.cr4 & cr4::FSGSBASE) || !canonical(operand)) return 0;
      const bool fs = op == SystemOp::WriteFsBase;
      s_.seg[fs ? FS : GS].base = operand;
      (fs ? frame_.fs_base : frame_.gs_base) = operand;
      return 1;
    }
    case SystemOp::LoadX87:
      return load_x87() ? 1 : 0;
  }
  return 0;
}

/// From VcpuState to the host's registers. With all exceptions masked none is pending.
bool TranslatorVcpu::load_x87() {
  constexpr u16 kMasks = 0x3f;
  if (!c_.fpu_ok || (s_.xsave.fcw() & kMasks) != kMasks) return false;
  u8* const at = s_.xsave.bytes;
  // volatile: no memset() with vector registers is made of it
  volatile u64* const header = reinterpret_cast<u64*>(at + XsaveArea::kHeader);
  header[0] = 1;  // XSTATE_BV: the component is in the image
  for (unsigned n = 1; n < 8; n++) header[n] = 0;
  std::memcpy(&frame_.x87_fip, at + 8, 8);
  frame_.x87_selector = c_.long_mode ? 0 : s_.seg[CS].selector;
  asm volatile("fnstcw %0" : "=m"(frame_.x87_host_fcw));
  asm volatile("xrstor64 (%0)" : : "r"(at), "a"(1), "d"(0) : "memory");
  frame_.x87 = 1;
  return true;
}

u64 TranslatorVcpu::transit_function(void* self, u64 rip, u64 number) {
  TranslatorVcpu& v = *static_cast<TranslatorVcpu*>(self);
  return v.transit(rip, v.left_[number].insn);
}

/// Between flat 64-bit segments, from CPL 0 to there or to CPL 3.
bool TranslatorVcpu::transit_iret() {
  constexpr u64 kFlatCode = 0x00af'9b00'0000'ffff, kFlatData = 0x00cf'9300'0000'ffff;  // accessed; DPL 0
  constexpr u64 kChanged = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::RF |
                           rflags::AC | rflags::VIF | rflags::VIP | rflags::ID;
  // With AC set, reads of the descriptor table would not be those of the system.
  if (c_.cpl != 0 || s_.nmi_blocked || (s_.rflags & (rflags::NT | rflags::AC))) return false;
  ReturnFrame f{*this, frame_.kept[8]};
  const bool whole = frame_.vectors == RING3_VECTORS_AWAY ? read_return(&f) : ring3_jit_call_out(&read_return, &f, frame_.pointer);
  if (!whole || !f.read) return false;
  const u64 cpl = f.cs & 3;
  if ((cpl != 0 && cpl != 3) || (f.ss & 3) != cpl) return false;
  const bool null_stack = cpl == 0 && is_null(static_cast<u16>(f.ss));
  if (f.code != (kFlatCode | cpl << 45) || (!null_stack && f.stack != (kFlatData | cpl << 45))) return false;
  if (!canonical(c_, f.rip) || (f.rflags & rflags::TF)) return false;
  if (cpl == 3) {
    for (Seg seg : {ES, DS, FS, GS})
      if (!s_.seg[seg].unusable && !is_null(s_.seg[seg].selector) && s_.seg[seg].dpl != 3) return false;
    for (Seg seg : {ES, DS, FS, GS})  // as drop_inner_segments()
      if (is_null(s_.seg[seg].selector)) s_.seg[seg].selector = 0;
  }
  s_.rflags = (s_.rflags & ~kChanged) | (f.rflags & kChanged) | rflags::FIXED1;
  s_.rip = f.rip;
  s_.seg[CS] = flat_code(static_cast<u16>(f.cs), static_cast<u8>(cpl), true);
  s_.seg[SS] = null_stack ? null_stack_segment(0) : flat_data(static_cast<u16>(f.ss), static_cast<u8>(cpl));
  frame_.kept[8] = f.rsp;
  return true;
}

/// Refuses, or is done and answers where translated code goes on: its address, or RING3_TRANSIT_DONE when the run loop
/// is to find it.
u64 TranslatorVcpu::transit(u64 rip, const DecodedInsn& insn) {
  // As the run loop would have it.
  if (lockstep_ != nullptr || options_.interpreted_ops != nullptr) return RING3_TRANSIT_REFUSED;
  if (c_.slow_step || s_.sti_shadow || s_.mov_ss_shadow || c_.retired + 1 >= limit_) return RING3_TRANSIT_REFUSED;
  if (c_.interrupt_window || c_.attention().raised()) return RING3_TRANSIT_REFUSED;
  if (c_.guest_debug_hw_bp || c_.breakpoints_overridden) return RING3_TRANSIT_REFUSED;
  u64& rcx = frame_.kept[1];
  switch (insn.op) {
    case Op::Syscall:
      if (!(s_.efer & efer::SCE)) return RING3_TRANSIT_REFUSED;
      // Supervisor code wants vectors, and they are not there.
      if (vectors_held_ != 0 && frame_.vectors == RING3_VECTORS_AWAY) return RING3_TRANSIT_REFUSED;
      s_.rip = rip + insn.length;
      s_.rflags = (s_.rflags & ~rflags::STATUS) | status_of(frame_.flags);
      enter_by_syscall(s_, s_.msr.lstar, rcx, frame_.r11);
      break;
    case Op::Sysret:
      // A target outside the lower half faults, here or when it is fetched.
      if (c_.cpl != 0 || !(s_.efer & efer::SCE) || rcx >> 47 != 0 || (frame_.r11 & rflags::TF)) return RING3_TRANSIT_REFUSED;
      return_by_sysret(s_, rcx, frame_.r11, true, c_.features.amd);
      break;
    case Op::Iret:
      if (!transit_iret()) return RING3_TRANSIT_REFUSED;
      break;
    default:
      return RING3_TRANSIT_REFUSED;
  }
  c_.privilege_changed();
  c_.retired++;
  stats_.transitions++;
  return go_on();
}

/// The block that another address space ran on the same memory.
const u8* TranslatorVcpu::recall_common(TranslateMode mode) {
  Gpa gpa;
  if (!mmu_.fetched(s_.rip, &gpa)) return nullptr;
  const u8* code = cache_->recall_common(gpa, position_independent(s_.rip, mode) ? 0 : s_.rip, mode.bits());
  if (code != nullptr) cache_->remember(code, s_.rip);
  return code;
}

/// At s_.rip, the vectors where they are. What the run loop does before it enters translated code.
u64 TranslatorVcpu::go_on() {
  frame_.stack_limit = 0;
  frame_.flags = frame_flags_of(s_.rflags);
  frame_.exit_rip = s_.rip;
  s_.rflags &= ~rflags::RF;

  TranslateMode m;
  m.user = c_.cpl == 3;
  u32 vectors = frame_.vectors;
  if (!m.user && vectors_held_ == 0) {
    m.lazy = true;
    if (vectors == RING3_VECTORS_IN) vectors = RING3_VECTORS_KEPT;
  } else if (vectors != RING3_VECTORS_AWAY) {
    m.sse = true;
    m.avx = loaded_avx_;
    vectors = RING3_VECTORS_IN;
  } else {
    vectors_from_state(&m);
    if (m.sse) vectors = RING3_VECTORS_WANTED;
  }
  if (m.user && window_.open != 0 && c_.code64) {
    const Mmu::WindowState window = mmu_.window();
    if (window == Mmu::WindowState::Stale || window_.fault != 0) return RING3_TRANSIT_DONE;
    m.windowed = window == Mmu::WindowState::Ready;
    look_at_stack(frame_.kept[8], &m);
  }
  const u64 bias = cache_->known_bias(m.bits(), mmu_.fetch_generation());
  if (m.windowed && !cache_->holds(bias)) return RING3_TRANSIT_DONE;
  const u8* code = bias == 0 ? nullptr : cache_->recall(s_.rip);
  if (code == nullptr && bias != 0 && m.user && c_.code64) code = recall_common(m);
  if (code == nullptr) return RING3_TRANSIT_DONE;
  c_.retired++;
  if (!m.user && vectors_held_ != 0) vectors_held_--;
  if (vectors == RING3_VECTORS_WANTED) loaded_avx_ = m.avx;
  frame_.vectors = vectors;
  set_jumps(bias, m);
  JitGsBase::use(&frame_, mmu_.tlb(), gs_constant_);
  return reinterpret_cast<u64>(code);
}

}  // namespace ring3::engine
