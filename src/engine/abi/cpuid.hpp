#pragma once
#include "base/linux_kvm.hpp"

#include <span>
#include <vector>

#include "base/types.hpp"

/// Guest CPUID: what the engine offers, and what a vCPU was given.
///
/// Spec: SDM vol. 2A CPUID; APM vol. 3 app. E; virt/kvm/x86/cpuid; virt/kvm/api KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2.
namespace ring3::engine::abi {

inline constexpr u32 kMaxCpuidEntries = 256;  ///< KVM_SET_CPUID2 takes no more

/// KVM_CPUID leaf 0x40000001 EAX.
namespace pv {
inline constexpr u32 kClockSource = 1u << 0, kNopIoDelay = 1u << 1, kClockSource2 = 1u << 3, kAsyncPf = 1u << 4,
                     kStealTime = 1u << 5, kPvEoi = 1u << 6, kUnhalt = 1u << 7, kAsyncPfVmexit = 1u << 10, kSendIpi = 1u << 11,
                     kPollControl = 1u << 12, kSchedYield = 1u << 13, kAsyncPfInt = 1u << 14, kClockStable = 1u << 24;
inline constexpr u32 kOffered = kClockSource | kNopIoDelay | kClockSource2 | kAsyncPf | kStealTime | kPvEoi | kUnhalt | kAsyncPfVmexit |
                                kSendIpi | kPollControl | kSchedYield | kAsyncPfInt | kClockStable;
}  // namespace pv

/// IA32_ARCH_CAPABILITIES as offered: none of the speculation problems exist in interpreted code, and
/// with IBRS_ALL a kernel needs no retpolines.
u64 arch_capabilities();

/// KVM_GET_SUPPORTED_CPUID: the host's features that the engine emulates, plus those it emulates by itself.
/// Fewer than 80 entries.
std::vector<kvm_cpuid_entry2> supported_cpuid();
/// KVM_GET_EMULATED_CPUID.
std::vector<kvm_cpuid_entry2> emulated_cpuid();

/// A vCPU's CPUID. Owner of the vCPU only.
class Cpuid {
 public:
  /// 0, or -EINVAL for a table no processor could have.
  int set(std::span<const kvm_cpuid_entry2> entries);
  const std::vector<kvm_cpuid_entry2>& entries() const { return entries_; }
  bool empty() const { return entries_.empty(); }

  /// The CPUID instruction, without the bits that follow live state.
  void lookup(u32 leaf, u32 subleaf, u32 out[4]) const;
  const kvm_cpuid_entry2* find(u32 leaf, u32 subleaf) const;

  /// KVM's features: behind the leaf with KVM's signature, which stands at 0x40000100 where Hyper-V's leaves are the first.
  const kvm_cpuid_entry2* pv_features() const;
  /// Takes a bit of pv::kOffered out of a table, as the kernel does where it cannot be served.
  static void drop_pv_feature(std::vector<kvm_cpuid_entry2>* entries, u32 bit);
  bool x2apic() const;
  bool tsc_deadline() const;
  u8 physical_bits() const;
  bool amd() const;  ///< AMD-compatible: out-of-range leaves read as zero

 private:
  std::vector<kvm_cpuid_entry2> entries_;
};

}  // namespace ring3::engine::abi
