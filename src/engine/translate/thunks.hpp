#pragma once
#include "engine/translate/frame.hpp"

/// The assembly around translated code (thunks.S).
namespace ring3::engine {

/// Writes the thunks' addresses into the frame.
void fill_thunks(JitFrame* frame);
/// Where a host fault in translated code goes on, r14 = address of the instruction.
const u8* fault_thunk();
/// Where a page fault in translated code goes on, with the faulting instruction's address on the stack and all registers as
/// they were (JitFrame::window_function).
const u8* window_thunk();
/// JitFrame::window_function's answers: the access again; the instruction at JitFrame::exit_rip is interpreted, with the
/// status flags in RFLAGS or in the frame; it is no access through a window.
struct WindowTargets {
  u64 again, interpret, interpret_frame, lost;
};
WindowTargets window_targets();
/// Runs translated code until an exit. Precondition: JitGsBase::use() with this frame on this thread.
void enter_translated(const u8* code, const JitFrame& frame);
/// f(argument), from code that must leave vector registers alone. pointer: JitFrame::pointer.
extern "C" u64 ring3_jit_call_out(u64 (*f)(void*), void* argument, u64 pointer);
/// Whether this host can run translated code at all (AVX, BMI2).
bool host_can_translate();

/// Lends the thread's gs base to translated code, which finds the TLB there; 64-bit Linux programs have no use of their
/// own for it.
class JitGsBase {
 public:
  JitGsBase();
  ~JitGsBase();
  u64 previous() const { return previous_; }
  /// Translated code's accesses go by tlb from now on, and by this base; 0: tlb is it. frame->host_gs says what it is.
  static void use(JitFrame* frame, const Mmu::TlbEntry* tlb, u64 base = 0);
  /// Whether it can be any canonical address: those of the upper half need the host's FSGSBASE.
  static bool any();
  /// What the destructor does, where it was jumped over.
  static void put_back(u64 previous);
  JitGsBase(const JitGsBase&) = delete;
  JitGsBase& operator=(const JitGsBase&) = delete;

 private:
  u64 previous_;
};

}  // namespace ring3::engine
