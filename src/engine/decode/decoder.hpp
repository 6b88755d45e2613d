#pragma once
#include "engine/decode/insn.hpp"

namespace ring3::engine {

enum class DecodeResult : u8 {
  Ok,        ///< insn is valid (op may be Invalid: #UD)
  Short,     ///< more bytes are needed than were given: fetch across the page, or deliver the fetch fault
  TooLong,   ///< more than 15 bytes: #GP(0)
};

/// Decodes one instruction. Pure: no allocation, no state; any thread.
/// real_mode: LOCK/VEX rules of real and virtual-8086 mode (VEX is #UD there).
/// amd: AMD's rules where vendors differ (66h on near branches in 64-bit mode).
DecodeResult decode(const u8* bytes, unsigned size, CodeMode mode, bool real_mode, bool amd, DecodedInsn* insn);

}  // namespace ring3::engine
