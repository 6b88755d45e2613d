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

/// Where the numbers of an instruction stand: all that the bytes after the first `fixed` say is disp and imm.
struct InsnForm {
  u8 fixed = 0;      ///< 0: the rest may say more
  u8 disp_size = 0;  ///< bytes, sign-extended to DecodedInsn::disp
  u8 imm_size = 0;   ///< bytes behind them, extended to DecodedInsn::imm
  bool imm_signed = false;
};
/// The same, and the form of what is valid.
DecodeResult decode(const u8* bytes, unsigned size, CodeMode mode, bool real_mode, bool amd, DecodedInsn* insn, InsnForm* form);

/// Another number when the library underneath is another.
u64 decoder_version();

}  // namespace ring3::engine
