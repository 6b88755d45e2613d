#pragma once
#include <algorithm>

#include "base/types.hpp"

namespace ring3::engine::abi {

/// For how long a vCPU that executed HLT looks for what wakes it before its thread sleeps: what comes soon is then served without
/// a context switch at either end. The time grows while sleeps turn out short, and is 0 for a guest that sleeps long.
///
/// Spec:      Documentation/virt/kvm/halt-polling.rst, with the kernel's defaults (10 us to begin with, doubled).
/// Units:     nanoseconds.
/// Threading: the vCPU's thread.
class HaltPoll {
 public:
  static constexpr u64 kDefaultLimit = 200'000;
  static constexpr u64 kFirst = 10'000;

  /// How long to look this time; limit: of the VM, 0 for none.
  u64 time(u64 limit) const { return std::min(now_, limit); }
  /// A halt is over that took `blocked` altogether.
  void ended(u64 blocked, u64 limit) {
    if (blocked <= time(limit)) return;  // looking was enough
    if (blocked >= limit) {
      now_ = 0;
    } else {
      now_ = now_ == 0 ? kFirst : std::min(2 * now_, limit);
    }
  }

 private:
  u64 now_ = 0;
};

}  // namespace ring3::engine::abi
