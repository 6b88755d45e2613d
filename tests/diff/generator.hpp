#pragma once
#include <string>

#include "base/split_mix.hpp"
#include "engine/decode/decoder.hpp"
#include "engine/state/vcpu_state.hpp"
#include "native.hpp"

/// Random user-mode instructions with random operands, made so that most of them succeed and the
/// rest fault in interesting ways. A case follows from (family, mode, seed) alone.
namespace ring3::diff {

enum class Family : u8 { Integer, Shift, Branch, String, Stack, Bmi, X87, Mmx, Sse, Avx, Privileged, Avx512, kCount };
const char* name(Family family);

struct Case {
  u8 bytes[15] = {};
  unsigned size = 0;
  unsigned code_offset = 0;  ///< in the code page
  engine::DecodedInsn insn;
  Registers regs;
};

using Random = SplitMix64;

/// Chooses the instruction: bytes, insn and code_offset.
void generate_instruction(Family family, bool compat32, Random& rng, Case* c);
/// Chooses registers and flags for it; memory is the caller's.
void generate_state(Family family, bool compat32, Random& rng, Case* c);
/// A random byte pattern with interesting floating-point and integer values, for memory.
void fill_memory(Random& rng, u8* data, u64 size);

}  // namespace ring3::diff
