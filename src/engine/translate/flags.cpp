#include "engine/translate/builder.hpp"

/// The guest's status flags between host RFLAGS and the frame.
///
/// Spec: LAHF/SAHF move SF ZF AF PF CF; OF goes through SETO and an addition that overflows.
namespace ring3::engine {

void BlockBuilder::clobber_flags() {
  if (flags_ != Flags::Host) return;
  if (live_[index_] == 0) {
    flags_ = Flags::Dead;
    return;
  }
  emit_flags_save(kScratch0);  // the scratch registers hold nothing before an instruction's first check
  flags_ = Flags::Frame;
}

void BlockBuilder::emit_flags_save(u8 scratch) {
  e_.mov(scratch, kHostRax);
  e_.byte(0x9f);                 // lahf
  e_.bytes({0x0f, 0x90, 0xc0});  // seto al
  e_.store32(HostMem::frame(kFlagsSlot), kHostRax);
  e_.mov(kHostRax, scratch);
}

void BlockBuilder::emit_flags_restore(u8 scratch) {
  const bool in_register = scratch != kHostNone;
  if (in_register) {
    e_.mov(scratch, kHostRax);
  } else {
    e_.store(HostMem::frame(kRaxSlot), kHostRax);
  }
  e_.load32(kHostRax, HostMem::frame(kFlagsSlot));
  e_.bytes({0x04, 0x7f, 0x9e});  // add al, 7Fh (OF); sahf
  if (in_register) {
    e_.mov(kHostRax, scratch);
  } else {
    e_.load(kHostRax, HostMem::frame(kRaxSlot));
  }
}

void BlockBuilder::flags_to_host(u8 scratch) {
  if (flags_ == Flags::Frame) emit_flags_restore(scratch);
  flags_ = Flags::Host;
}

void BlockBuilder::need_flags(u8 scratch) {
  if (!use_[index_].touches) return;
  if (flags_ == Flags::Frame && live_[index_] != 0) emit_flags_restore(scratch);
  flags_ = Flags::Host;
}

}  // namespace ring3::engine
