#pragma once
#include "engine/interp/context.hpp"

/// The table of handlers: one function per instruction family chooses the handler (a template
/// instance for operand kinds and widths) for a decoded instruction, or null when the family does
/// not have it. Chosen once, when a block is decoded.
namespace ring3::engine {

struct VectorUnit;  ///< host-executed instructions' stubs, per vCPU (interp/vector.hpp)

Handler select_alu(const DecodedInsn& insn);       // alu.cpp: Add..Das, Mul..Idiv (alu_muldiv.cpp), BMI
Handler select_shift(const DecodedInsn& insn);     // shift.cpp: shifts, bit tests and scans
Handler select_move(const DecodedInsn& insn);      // move.cpp: Mov..Salc
Handler select_stack(const DecodedInsn& insn);     // stack.cpp
Handler select_branch(const DecodedInsn& insn);    // branch.cpp: near control flow, Loop, Bound
Handler select_string(const DecodedInsn& insn);    // string.cpp
Handler select_flags(const DecodedInsn& insn);     // flags.cpp: Clc..Std (CLI/STI/CLAC/STAC are system)
// system families
Handler select_far(const DecodedInsn& insn);       // far.cpp: CallFar, JmpFar, RetFar, Iret, INT n, task switches
Handler select_segment(const DecodedInsn& insn);   // segment.cpp: MovSeg..Arpl
Handler select_system(const DecodedInsn& insn);    // system.cpp: Cli, Sti, Clac, Stac, CRs, DRs, MSRs, TSC, CPUID, HLT, SYSCALL, I/O ports, cache control, RDRAND
// FPU and vector
Handler select_vector(const DecodedInsn& insn);    // vector.cpp: Host*, Maskmov, Vmaskmov, Vgather, Vzero*, Emms, Fwait
Handler select_xstate(const DecodedInsn& insn);    // xstate.cpp: Fxsave..Stmxcsr

/// All of the above in order; never null (Op::Invalid and absent features give a #UD handler).
Handler select_handler(const GuestFeatures& features, const DecodedInsn& insn);

}  // namespace ring3::engine
