#pragma once
#include <chrono>
#include <memory>

#include "base/result.hpp"
#include "kvm/endpoint.hpp"

namespace ring3::kvm {

/// What a small guest could do on a KVM.
struct ProbeResult {
  double million_insns_per_second = 0;  ///< 64-bit ring-0 integer and memory instructions
  double milliseconds_to_long_mode = 0; ///< from the first KVM_RUN to the loop
  bool x86_64_v2 = false;               ///< guest CPUID offers CX16, LAHF, POPCNT, SSE3 to SSE4.2
};

/// Boots a guest of 64 KiB from real through protected to long mode, lets it count in ring 0 and
/// measures how fast. That /dev/kvm opens says nothing: hosts exist where it opens and ring-0 code
/// runs a thousand times too slowly, or not at all.
///
/// Time:   `limit` for the whole guest, on a host so busy that its thread does not run up to ten times that; returns then, whatever the guest does (a kick ends it; a
///         provider that does not answer kicks is left behind on its thread and reported).
/// Errors: why the guest did not get to its loop: the failing ioctl, or the unexpected exit.
Result<ProbeResult> probe(std::shared_ptr<Endpoint> system,
                          std::chrono::milliseconds limit = std::chrono::milliseconds(300));

}  // namespace ring3::kvm
