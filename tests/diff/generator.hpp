#pragma once
#include <string>

#include "engine/decode/decoder.hpp"
#include "engine/state/vcpu_state.hpp"
#include "native.hpp"

/// Random user-mode instructions with random operands, made so that most of them succeed and the
/// rest fault in interesting ways. A case follows from (family, mode, seed) alone.
namespace ring3::diff {

enum class Family : u8 { Integer, Shift, Branch, String, Stack, Bmi, X87, Mmx, Sse, Avx, Privileged, kCount };
const char* name(Family family);

struct Case {
  u8 bytes[15] = {};
  unsigned size = 0;
  unsigned code_offset = 0;  ///< in the code page
  engine::DecodedInsn insn;
  Registers regs;
};

/// splitmix64
class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() {
    u64 z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  u64 below(u64 n) { return next() % n; }
  bool one_in(u64 n) { return below(n) == 0; }

 private:
  u64 state_;
};

/// Chooses the instruction: bytes, insn and code_offset.
void generate_instruction(Family family, bool compat32, Random& rng, Case* c);
/// Chooses registers and flags for it; memory is the caller's.
void generate_state(Family family, bool compat32, Random& rng, Case* c);
/// A random byte pattern with interesting floating-point and integer values, for memory.
void fill_memory(Random& rng, u8* data, u64 size);

}  // namespace ring3::diff
