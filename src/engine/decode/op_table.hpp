#pragma once
#include <Zydis/Zydis.h>

#include "engine/decode/op.hpp"

/// The correspondence between Zydis' names and the engine's. Private to decode/.
namespace ring3::engine {

struct OpRow {
  Op op = Op::Invalid;       ///< Invalid: not in the table (a host-executed instruction, or undefined)
  u8 opsize = 0;             ///< bytes; 0: the encoding's effective operand size
  bool any_feature = false;  ///< no CPUID bit guards it (hints that are NOPs where unsupported)
};

OpRow op_row(ZydisMnemonic mnemonic);
Feature feature_of(ZydisISASet isa_set);
bool needs_vl(ZydisISASet isa_set);  ///< EVEX: vectors of 16 or 32 bytes

}  // namespace ring3::engine
