#pragma once
#include <vector>

#include "block_guest.hpp"
#include "generator.hpp"

/// Random programs: blocks of random instructions with branches forward and back, calls and returns, indirect
/// jumps, repeated strings, stores into their own code, a device, and addresses that now and then fault.
///
/// What the architecture leaves undefined never decides anything: where an instruction leaves flags undefined, one
/// that defines them follows (but for AF, which nothing reads).
namespace ring3::diff {

struct Program {
  std::vector<u8> code;           ///< at kCode
  std::vector<unsigned> entries;  ///< offsets of the blocks' beginnings
};

Program generate_program(BlockMode mode, Random& rng);

/// Registers that point into memory, and so are not written but by the generator.
bool is_pointer(BlockMode mode, u8 reg);
/// A value for a pointer register.
u64 pointer_value(Random& rng);

}  // namespace ring3::diff
