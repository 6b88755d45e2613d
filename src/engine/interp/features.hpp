#pragma once
#include <linux/kvm.h>

#include <span>

#include "engine/interp/context.hpp"

/// Where CPUID names the features that instructions ask for.
///
/// Spec:  Intel SDM vol. 2, CPUID; AMD APM vol. 3 appendix E; AMD's bits where only AMD has them.
/// Trust: the entries come from the VMM; nonsense gives fewer features, never more than the host runs.
namespace ring3::engine {

enum class CpuidReg : u8 { Eax, Ebx, Ecx, Edx };

struct FeatureBit {
  Feature feature;
  u32 leaf, subleaf;
  CpuidReg reg;
  u8 bit;
};

/// One row for each feature with a CPUID bit of its own. Base and Unsupported have none.
std::span<const FeatureBit> feature_bits();

/// What instruction semantics need to know of a guest with these CPUID entries (KVM_SET_CPUID2).
/// XCR0: bits 0..2 and 5..7 at most (x87, SSE, AVX; AVX-512's three, all or none).
GuestFeatures make_features(std::span<const kvm_cpuid_entry2> entries);

/// The same of the host CPU: what stubs may contain. Executes CPUID and XGETBV.
GuestFeatures host_features();

}  // namespace ring3::engine
