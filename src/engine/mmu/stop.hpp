#pragma once
#include "base/types.hpp"

namespace ring3::engine {

/// Why an instruction could not retire. Nothing architectural has changed when one is raised, but
/// for the progress of repeated string instructions, which is committed iteration by iteration.
struct Stop {
  enum class Kind : u8 {
    None,
    Fault,  ///< deliver vector/error to the guest; RIP at the instruction
    Trap,   ///< the instruction retired; deliver vector with RIP after it (INT n, INT3, INTO, #DB traps)
    Exit,   ///< the environment needs the VMM (PIO, MMIO, MSR…): re-execute afterwards
  };
  Kind kind = Kind::None;
  u8 vector = 0;
  bool has_error = false;
  bool soft = false;  ///< INT n / INT3 / INTO / INT1: gate DPL is checked, no EXT bit
  u32 error = 0;
  u64 payload =
      0;  ///< #PF: faulting linear address; #DB: DR6 bits to set; soft: bytes of the INT instruction

  static Stop fault(u8 vector) { return {Kind::Fault, vector, false, false, 0, 0}; }
  static Stop fault(u8 vector, u32 error) { return {Kind::Fault, vector, true, false, error, 0}; }
  static Stop page_fault(u64 linear, u32 error) { return {Kind::Fault, 14, true, false, error, linear}; }
  static Stop exit() { return {Kind::Exit, 0, false, false, 0, 0}; }
};

}  // namespace ring3::engine
