#include "engine/translate/thunks.hpp"

#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {
void ring3_jit_enter(const ring3::u8* code, ring3::u64 pointer);
extern const ring3::u8 ring3_jit_exit_next[], ring3_jit_exit_interpret[], ring3_jit_exit_attention[],
    ring3_jit_exit_cross_frame[], ring3_jit_exit_left[], ring3_jit_exit_interpret_frame[], ring3_jit_exit_return[], ring3_jit_exit_dead_frame[], ring3_jit_exit_fault[], ring3_jit_exit_vectors[], ring3_jit_load_zmm[], ring3_jit_exit_next_frame[],
    ring3_jit_exit_indirect_frame[], ring3_jit_exit_attention_frame[], ring3_jit_fill_read[], ring3_jit_fill_write[],
    ring3_jit_exit_transit[], ring3_jit_system_op[], ring3_jit_window_fault[], ring3_jit_window_again[],
    ring3_jit_window_interpret[], ring3_jit_window_interpret_frame[], ring3_jit_window_lost[];
}

namespace ring3::engine {
namespace {

constexpr int kArchSetGs = 0x1001, kArchGetGs = 0x1004;  // asm/prctl.h
constexpr unsigned long kHasFsgsbase = 1u << 1;          // AT_HWCAP2

bool has_fsgsbase() {
  static const bool has = (::getauxval(AT_HWCAP2) & kHasFsgsbase) != 0;
  return has;
}

u64 gs_base() {
  u64 base = 0;
  if (has_fsgsbase()) {
    asm volatile("rdgsbase %0" : "=r"(base));
  } else {
    ::syscall(SYS_arch_prctl, kArchGetGs, &base);
  }
  return base;
}

void set_gs_base(u64 base) {
  if (has_fsgsbase()) {
    asm volatile("wrgsbase %0" : : "r"(base) : "memory");
  } else {
    ::syscall(SYS_arch_prctl, kArchSetGs, base);
  }
}

}  // namespace

void fill_thunks(JitFrame* frame) {
  frame->exit_next = reinterpret_cast<u64>(ring3_jit_exit_next);
  frame->exit_interpret = reinterpret_cast<u64>(ring3_jit_exit_interpret);
  frame->exit_attention = reinterpret_cast<u64>(ring3_jit_exit_attention);
  frame->exit_cross_frame = reinterpret_cast<u64>(ring3_jit_exit_cross_frame);
  frame->exit_left = reinterpret_cast<u64>(ring3_jit_exit_left);
  frame->exit_interpret_frame = reinterpret_cast<u64>(ring3_jit_exit_interpret_frame);
  frame->exit_return = reinterpret_cast<u64>(ring3_jit_exit_return);
  frame->exit_dead_frame = reinterpret_cast<u64>(ring3_jit_exit_dead_frame);
  frame->exit_vectors = reinterpret_cast<u64>(ring3_jit_exit_vectors);
  frame->exit_next_frame = reinterpret_cast<u64>(ring3_jit_exit_next_frame);
  frame->exit_indirect_frame = reinterpret_cast<u64>(ring3_jit_exit_indirect_frame);
  frame->exit_attention_frame = reinterpret_cast<u64>(ring3_jit_exit_attention_frame);
  frame->exit_transit = reinterpret_cast<u64>(ring3_jit_exit_transit);
  frame->system_op = reinterpret_cast<u64>(ring3_jit_system_op);
  frame->fill_read = reinterpret_cast<u64>(ring3_jit_fill_read);
  frame->load_zmm = reinterpret_cast<u64>(ring3_jit_load_zmm);
  frame->fill_write = reinterpret_cast<u64>(ring3_jit_fill_write);
}

const u8* fault_thunk() { return ring3_jit_exit_fault; }
const u8* window_thunk() { return ring3_jit_window_fault; }
WindowTargets window_targets() {
  return {reinterpret_cast<u64>(ring3_jit_window_again), reinterpret_cast<u64>(ring3_jit_window_interpret),
          reinterpret_cast<u64>(ring3_jit_window_interpret_frame), reinterpret_cast<u64>(ring3_jit_window_lost)};
}

void enter_translated(const u8* code, const JitFrame& frame) { ring3_jit_enter(code, frame.pointer); }

bool host_can_translate() { return __builtin_cpu_supports("avx") && __builtin_cpu_supports("bmi2"); }

JitGsBase::JitGsBase() : previous_(gs_base()) {}
void JitGsBase::use(JitFrame* frame, const Mmu::TlbEntry* tlb, u64 base) {
  frame->tlb = reinterpret_cast<u64>(tlb);
  if (base == 0) base = frame->tlb;
  if (frame->host_gs == base) return;
  frame->host_gs = base;
  set_gs_base(base);
}
bool JitGsBase::any() { return has_fsgsbase(); }
void JitGsBase::put_back(u64 previous) { set_gs_base(previous); }
JitGsBase::~JitGsBase() { set_gs_base(previous_); }

}  // namespace ring3::engine
