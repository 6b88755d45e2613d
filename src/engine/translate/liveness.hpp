#pragma once
#include <span>

#include "engine/decode/insn.hpp"
#include "engine/state/vcpu_state.hpp"

/// What instructions do with the status flags, as rflags bits.
///
/// A flag counts as written only when its value afterwards never depends on its value before: a shift by
/// CL may leave all of them alone, DEC keeps CF, and flags that the architecture leaves undefined are not
/// relied upon to change (but AF of AND, OR, XOR and TEST, which every processor clears).
/// Pure functions.
namespace ring3::engine {

struct FlagUse {
  u64 reads = 0;
  u64 writes = 0;
  bool touches = false;  ///< the instruction reads flags or may change any
};

FlagUse flag_use(const DecodedInsn& insn);

/// Status flags that matter before the instruction, when `after` do behind it. A Jcc's way out of the block needs all.
inline u64 live_before(const DecodedInsn& insn, const FlagUse& use, u64 after) {
  return insn.op == Op::Jcc ? rflags::STATUS : (after & ~use.writes) | use.reads;
}

/// Flags that the architecture leaves undefined after the instruction, whatever its operands hold.
u64 flags_left_undefined(const DecodedInsn& insn);

/// The flags that condition (the low four bits of the opcode) reads.
u64 condition_flags(u8 condition);

}  // namespace ring3::engine
