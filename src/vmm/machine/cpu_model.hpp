#pragma once
#include <span>
#include <string>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::vmm {

/// What the guest's CPUID says, before the parts that differ from vCPU to vCPU.
///
/// A specification is a model and changes: "x86-64-v3,-avx2,+sha-ni".
///   default     the features of x86-64-v3 and the common others (AES, SHA, RDRAND, SMEP, PCID, …), as far
///               as this KVM offers them: the same guest on every host that has them
///   host        all this KVM offers
///   x86-64-v2   exactly the levels of the psABI and the common others; refused when the level's own
///   x86-64-v3   features are not all there
/// Names of features are those of /proc/cpuinfo, lower case, with - or _.
/// Family and model are the host's with `host`. With the others, of Intel's: Haswell's where x86-64-v3 is all there, Nehalem's with
/// v2, else Core 2's; of AMD's: from Zen 4 on Zen 3's.
///
/// Nothing is offered that `supported` (KVM_GET_SUPPORTED_CPUID) lacks.
/// Errors: EINVAL: unknown model or feature, one that this KVM does not offer.
Result<std::vector<kvm_cpuid_entry2>> cpu_model(const std::string& specification,
                                                std::vector<kvm_cpuid_entry2> supported);

/// The entries for one vCPU of `count`: APIC ids and topology (one socket, one thread a core), the
/// hypervisor bit, the TSC deadline timer when KVM has it (KVM_CAP_TSC_DEADLINE_TIMER).
std::vector<kvm_cpuid_entry2> cpuid_for_vcpu(std::span<const kvm_cpuid_entry2> model, u32 id, u32 count,
                                             bool tsc_deadline);

}  // namespace ring3::vmm
