#pragma once
#include "engine/decode/insn.hpp"
#include "engine/translate/emitter.hpp"

/// A guest instruction's bytes taken apart, so that it can be written again with other operands.
///
/// Kept: the prefixes that belong to the operation (66h, F2h, F3h, LOCK), REX.W, VEX.L/W/pp, opcode,
/// immediates. Dropped: segment and address-size prefixes, the memory operand; register numbers are the
/// caller's to map. Trust: the bytes are the guest's; decode() has accepted them for 64-bit mode,
/// or for 32-bit mode when code32.
namespace ring3::engine {

/// Which fields of an instruction hold general registers.
enum GprField : u8 { kGprReg = 1, kGprRm = 2, kGprVvvv = 4 };

struct Reencoding {
  Encoding e;         ///< register fields hold the guest's numbers; memory is set, mem is not
  u8 gpr_fields = 0;  ///< GprField bits
  bool high_rm = false, high_reg = false;  ///< the field names AH..BH (numbers 4..7)
};

/// False when the shape is not one this file knows; the instruction is then interpreted.
/// Of HostVec, only opcodes that interp/vector_stub.hpp lets run on the host are taken.
bool take_apart(const DecodedInsn& insn, bool code32, Reencoding* out);

}  // namespace ring3::engine
