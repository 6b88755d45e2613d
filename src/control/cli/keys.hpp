#pragma once
#include <cstddef>
#include <span>

#include "base/types.hpp"

namespace ring3::control {

/// The keys that ring3 takes out of what is typed: Ctrl-A, then
///   x       end the VM (d, where the keys leave a console that goes on)
///   h or ?  list the keys
///   Ctrl-A  send one Ctrl-A to the guest
/// Any other key after Ctrl-A is swallowed with it. A Ctrl-A at the end of one burst waits for the next.
///
/// Threading: one thread at a time.
class EscapeKeys {
 public:
  enum class Leave { kEnd, kDetach };
  explicit EscapeKeys(Leave leave = Leave::kEnd) : leave_(leave == Leave::kEnd ? 'x' : 'd') {}

  struct Found {
    std::size_t bytes = 0;  ///< what is left for the guest, at the start of the buffer
    bool stop = false;      ///< Ctrl-A x or d; what follows it is dropped
    bool help = false;      ///< Ctrl-A h
  };

  /// Filters in place; the result is never longer than the input.
  Found filter(std::span<u8> typed) {
    constexpr u8 kCtrlA = 0x01;
    Found found;
    for (const u8 key : typed) {
      if (!pending_) {
        if (key == kCtrlA) pending_ = true;
        else typed[found.bytes++] = key;
        continue;
      }
      pending_ = false;
      if ((key | 0x20) == leave_) {
        found.stop = true;
        return found;
      }
      switch (key) {
        case kCtrlA: typed[found.bytes++] = kCtrlA; break;
        case 'h': case 'H': case '?': found.help = true; break;
        default: break;
      }
    }
    return found;
  }

 private:
  u8 leave_;
  bool pending_ = false;
};

inline constexpr char kKeysHelp[] =
    "\nring3: Ctrl-A h       this list\n"
    "ring3: Ctrl-A x       end the VM\n"
    "ring3: Ctrl-A Ctrl-A  send Ctrl-A to the guest\n";

}  // namespace ring3::control
