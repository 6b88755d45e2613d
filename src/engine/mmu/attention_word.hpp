#pragma once
#include <atomic>

#include "base/types.hpp"

/// What asks a vCPU's thread to leave guest code at the next boundary.
///
/// Threads: raise() any; the others the vCPU's.
namespace ring3::engine {

struct AttentionWord {
  /// Selects the bits of an address that are an index into translated code's jump tables, times an entry's size.
  static constexpr u32 kJumpMask = 0xffff0;

  std::atomic<u32> bits{0};  ///< what is asked for; the meanings are the owner's (abi/)
  /// kJumpMask, or 0 from raise() to arm(): translated code that jumps by its table finds entry 0 then, which holds nothing.
  std::atomic<u32> jump_mask{kJumpMask};

  void raise(u32 what) {
    bits.fetch_or(what, std::memory_order_seq_cst);
    jump_mask.store(0, std::memory_order_seq_cst);
  }
  void clear(u32 what) { bits.fetch_and(~what, std::memory_order_seq_cst); }
  u32 take() { return bits.exchange(0, std::memory_order_seq_cst); }
  bool raised() const { return bits.load(std::memory_order_relaxed) != 0; }
  /// Before translated code is entered. False: something is asked for.
  /// A raise() whose bits are not seen here clears the mask after it was set: none is lost. One whose bits were taken may clear
  /// it late: translated code leaves for nothing, once.
  bool arm() {
    if (jump_mask.load(std::memory_order_relaxed) == 0) jump_mask.store(kJumpMask, std::memory_order_seq_cst);
    return bits.load(std::memory_order_seq_cst) == 0;
  }
};

}  // namespace ring3::engine
