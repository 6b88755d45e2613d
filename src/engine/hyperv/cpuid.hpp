#pragma once
#include "base/linux_kvm.hpp"

#include <functional>
#include <vector>

#include "base/types.hpp"

/// Hyper-V's CPUID leaves: what is offered, and what a vCPU was given of them.
///
/// Spec: TLFS "Feature and interface discovery"; virt/kvm/api KVM_GET_SUPPORTED_HV_CPUID.
namespace ring3::engine::hv {

/// KVM_GET_SUPPORTED_HV_CPUID. lapic: LAPICs are the engine's (or may be: the system's own answer).
std::vector<kvm_cpuid_entry2> supported_cpuid(u32 max_vps, bool lapic);

/// A vCPU's own leaves.
struct Cpuid {
  bool present = false;  ///< the interface is Hyper-V's
  u32 features_eax = 0, features_ebx = 0, features_edx = 0;
  u32 recommend_eax = 0, recommend_ebx = 0;
  u32 syndbg_eax = 0;

  /// find: the entry of a leaf, or null.
  static Cpuid from(const std::function<const kvm_cpuid_entry2*(u32 leaf)>& find);
  /// Whether the leaves let a guest use an MSR, or a hypercall.
  bool allows_msr(u32 index) const;
  bool allows_call(u16 code) const;
  bool syndbg() const { return (syndbg_eax & 2) != 0; }
};

}  // namespace ring3::engine::hv
